//! Removals of services, environments, projects and organizations. The rows of the services are marked as removed;
//! the reconciler stops their instances and deletes their files.

use std::sync::Arc;

use capsule_bus::{Call, Delivery};
use capsule_contracts::deploy::{CountServiceEnvironments, RemoveFromEnvironment, ServiceState};
use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::project::ServicesRemoved;
use capsule_contracts::{Count, Problem, Timestamp, Uuid};
use capsule_store::{FromRow, Scope, Transaction, scoped, unscoped};

use crate::{DeployService, queries, routes, service_environments};

/// Retention of removals, in seconds: longer than any request takes.
const REMOVAL_RETENTION_SECONDS: i64 = 7 * 24 * 3600;

pub async fn on_services_removed(
    service: &DeployService,
    tx: &Transaction<'_>,
    delivery: Delivery<ServicesRemoved>,
) -> Result<(), Problem> {
    let grant = delivery.system.organization(delivery.event.organization_id, "services were removed");
    remove_services(service, tx, &grant, &delivery.event).await
}

/// Marks the services of an event as removed.
pub async fn remove_services(
    service: &DeployService,
    tx: &Transaction<'_>,
    scope: &impl Scope,
    event: &ServicesRemoved,
) -> Result<(), Problem> {
    let removed = event.service_id.or(event.environment_id).unwrap_or(event.project_id);
    service_environments::remove(service, tx, scope, |service_environment| match (event.service_id, event.environment_id) {
        (Some(service_id), _) => service_environment.service_id == service_id,
        (None, Some(environment_id)) => service_environment.environment_id == environment_id,
        (None, None) => service_environment.project_id == event.project_id,
    })
    .await?;
    record_removal(service, tx, scope, removed).await
}

pub async fn remove_from_environment(
    service: Arc<DeployService>,
    call: Call<RemoveFromEnvironment>,
) -> Result<ServiceState, Problem> {
    let Call { message, grant, .. } = call;
    let service_environment = service_environments::by_name(&service, &grant, message.id, &message.environment).await?;
    let service_environment = service_environment.ok_or_else(|| {
        Problem::conflict(format!("The service is not deployed to {}.", message.environment))
            .hint("`capsule status -e NAME` shows it in another environment.")
    })?;
    let tx = service.store.begin().await?;
    service_environments::remove(&service, &tx, &grant, |row| {
        (row.service_id, row.environment_id) == (service_environment.service_id, service_environment.environment_id)
    })
    .await?;
    let unsettled = scoped!(
        &grant,
        "SELECT id FROM deployments WHERE organization_id = :tenant AND service_id = :service_id \
         AND environment_id = :environment_id AND finished_at IS NULL",
        service_id = service_environment.service_id,
        environment_id = service_environment.environment_id
    );
    let unsettled: Vec<Id> = tx.read().all(unsettled).await?;
    tx.run(scoped!(
        &grant,
        "UPDATE deployments SET cancelling = TRUE \
         WHERE organization_id = :tenant AND service_id = :service_id AND environment_id = :environment_id \
         AND finished_at IS NULL",
        service_id = service_environment.service_id,
        environment_id = service_environment.environment_id
    ))
    .await?;
    routes::bump_revision(&tx).await?;
    tx.commit().await?;
    unsettled.iter().for_each(|row| service.controller.cancel(row.id));
    service.controller.reconcile();
    queries::state(&service, &grant, message.id, &message.environment).await
}

#[derive(FromRow)]
struct Id {
    id: Uuid,
}

pub async fn on_organization_deleted(
    service: &DeployService,
    tx: &Transaction<'_>,
    delivery: Delivery<OrganizationDeleted>,
) -> Result<(), Problem> {
    let organization = delivery.event.organization_id;
    let grant = delivery.system.organization(organization, "the organization was deleted");
    service_environments::remove(service, tx, &grant, |_| true).await?;
    record_removal(service, tx, &grant, organization).await
}

/// Records a removal in its transaction, so that no later deployment reverts it, and cancels the deployments in progress.
async fn record_removal(service: &DeployService, tx: &Transaction<'_>, scope: &impl Scope, removed: Uuid) -> Result<(), Problem> {
    tx.run(scoped!(
        scope,
        "INSERT INTO removals (id, organization_id, removed_at) VALUES (:removed, :tenant, :removed_at) \
         ON CONFLICT (id) DO NOTHING",
        removed,
        removed_at = Timestamp::now().0
    ))
    .await?;
    tx.run(scoped!(
        scope,
        "UPDATE deployments SET cancelling = TRUE WHERE organization_id = :tenant AND finished_at IS NULL AND EXISTS \
         (SELECT 1 FROM placements p WHERE p.service_id = deployments.service_id \
         AND p.environment_id = deployments.environment_id AND p.wanted = 'removed')"
    ))
    .await?;
    routes::bump_revision(tx).await?;
    service.controller.wake();
    service.controller.reconcile();
    Ok(())
}

/// Deletes the removals whose retention is over at `now`.
pub async fn purge(service: &DeployService, now: Timestamp) -> Result<(), Problem> {
    let tx = service.store.begin().await?;
    let old = now.plus_seconds(-REMOVAL_RETENTION_SECONDS).0;
    tx.run(unscoped!("the platform's own work", "DELETE FROM removals WHERE removed_at < :old", old)).await?;
    tx.commit().await
}

pub async fn count_placements(service: Arc<DeployService>, call: Call<CountServiceEnvironments>) -> Result<Count, Problem> {
    let grant = call.grant.organization(call.message.organization_id, "the organization is being deleted");
    let count = scoped!(&grant, "SELECT COUNT(*) FROM placements WHERE organization_id = :tenant");
    Ok(Count { count: service.store.read().value::<i64>(count).await?.unwrap_or_default() })
}
