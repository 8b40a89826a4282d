//! The first step in the deletion of a service: in one transaction, check that the user may deploy to every environment in
//! which the service runs, and close the service to new deployments.

use std::sync::Arc;

use capsule_bus::Call;
use capsule_contracts::deploy::{CloseService, ListServiceEnvironments, ServiceEnvironments};
use capsule_contracts::{Empty, Problem, Timestamp, Uuid};
use capsule_store::{FromRow, Scope, Transaction, scoped, unscoped};

use crate::DeployService;

#[derive(FromRow)]
struct Row {
    environment_id: Uuid,
    environment_name: String,
}

pub async fn list_service_environments(
    service: Arc<DeployService>,
    call: Call<ListServiceEnvironments>,
) -> Result<ServiceEnvironments, Problem> {
    let rows = unscoped!(
        "the project service decides by it who may delete the service",
        "SELECT environment_id, environment_name FROM placements WHERE service_id = :service_id AND wanted <> 'removed'",
        service_id = call.message.service_id
    );
    let rows = service.store.read().all::<Row>(rows).await?;
    Ok(ServiceEnvironments { environment_ids: rows.into_iter().map(|row| row.environment_id).collect() })
}

pub async fn close_service(service: Arc<DeployService>, call: Call<CloseService>) -> Result<Empty, Problem> {
    let grant = call.grant.organization(call.message.organization_id, "the service is being deleted");
    let tx = service.store.begin().await?;
    close(&tx, &grant, call.message.service_id, &call.message.environment_ids).await?;
    tx.commit().await?;
    Ok(Empty {})
}

/// Closes a service. Fails if it runs in an environment that is not in `environments`.
async fn close(tx: &Transaction<'_>, scope: &impl Scope, service_id: Uuid, environments: &[Uuid]) -> Result<(), Problem> {
    let rows = scoped!(
        scope,
        "SELECT environment_id, environment_name FROM placements \
         WHERE organization_id = :tenant AND service_id = :service_id AND wanted <> 'removed'",
        service_id
    );
    if let Some(row) = tx.read().all::<Row>(rows).await?.iter().find(|row| !environments.contains(&row.environment_id)) {
        return Err(Problem::forbidden(format!("The service runs in {}, where you may not deploy.", row.environment_name))
            .hint("Ask an owner or admin of the organization."));
    }
    tx.run(scoped!(
        scope,
        "INSERT INTO closed_services (service_id, organization_id, closed_at) VALUES (:service_id, :tenant, :closed_at) \
         ON CONFLICT (service_id) DO NOTHING",
        service_id,
        closed_at = Timestamp::now().0
    ))
    .await?;
    Ok(())
}

/// Fails if the service is being deleted.
pub async fn check_open(tx: &Transaction<'_>, scope: &impl Scope, service_id: Uuid) -> Result<(), Problem> {
    let closed =
        scoped!(scope, "SELECT 1 FROM closed_services WHERE organization_id = :tenant AND service_id = :service_id", service_id);
    match tx.read().exists(closed).await? {
        true => Err(Problem::conflict("The service is being deleted.")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use capsule_contracts::Uuid;
    use capsule_store::{Databases, Keyring, Store, unscoped};

    use crate::tests::TestScope;

    #[tokio::test]
    async fn a_service_is_closed_only_with_access_to_all_its_environments() {
        let folder = tempfile::tempdir().expect("a folder");
        let keyring = Keyring::open(&folder.path().join("key")).expect("a key");
        let databases = Databases::Embedded(folder.path().into());
        let store = Store::open(&databases, crate::NAME, keyring, crate::MIGRATIONS).await.expect("opens");
        let [organization, service, staging, production] = [1, 2, 3, 4].map(Uuid::from_u128);
        let grant = TestScope(organization);
        let tx = store.begin().await.expect("begins");
        for (number, environment) in [(1, staging), (2, production)] {
            tx.run(unscoped!(
                "test",
                "INSERT INTO placements (service_id, environment_id, organization_id, project_id, service_name, \
                 environment_name, host, uid, wanted) VALUES (:service, :environment, :organization, :project_id, 'web', \
                 :environment_name, :host, :number, 'running')",
                service,
                environment,
                organization,
                project_id = Uuid::from_u128(9),
                environment_name = format!("environment-{number}"),
                host = format!("host-{number}"),
                number
            ))
            .await
            .expect("made");
        }
        let refused = super::close(&tx, &grant, service, &[staging]).await.expect_err("it runs in production");
        assert!(refused.code == "forbidden" && refused.detail.contains("environment-2"), "{refused}");
        super::check_open(&tx, &grant, service).await.expect("nothing was closed");
        super::close(&tx, &grant, service, &[staging, production]).await.expect("closes");
        assert_eq!(super::check_open(&tx, &grant, service).await.expect_err("closed").code, "conflict");
    }
}
