//! Services in environments, in the table `placements`: host, user id, desired state and active deployment.

use capsule_bus::Delivery;
use capsule_contracts::project::{Configuration, ServiceRenamed};
use capsule_contracts::{Problem, Uuid};
use capsule_store::{FromRow, Scope, Transaction, scoped, unscoped};

use crate::{DeployService, closing, hosts, user_ids};

#[derive(Clone, Debug, FromRow)]
pub struct ServiceEnvironment {
    pub service_id: Uuid,
    pub environment_id: Uuid,
    pub organization_id: Uuid,
    pub project_id: Uuid,
    pub service_name: String,
    pub environment_name: String,
    pub host: String,
    /// The host before the removal.
    pub former_host: Option<String>,
    pub uid: i32,
    /// `running`, `stopped` or `removed`.
    #[column("wanted")]
    pub desired_state: String,
    pub active_deployment_id: Option<Uuid>,
}

#[derive(FromRow)]
pub struct Name {
    pub service_id: Uuid,
    pub environment_name: String,
}

/// Finds a service in the environment of this name. `None` if it was never deployed there.
pub async fn by_name(
    service: &DeployService,
    scope: &impl Scope,
    service_id: Uuid,
    environment: &str,
) -> Result<Option<ServiceEnvironment>, Problem> {
    let row = scoped!(
        scope,
        "SELECT :columns FROM placements WHERE organization_id = :tenant AND service_id = :service_id \
         AND environment_name = :environment AND wanted <> 'removed'",
        service_id,
        environment
    );
    service.store.read().first(row).await
}

/// Reads a service in an environment by their ids.
pub async fn get(
    service: &DeployService,
    scope: &impl Scope,
    service_id: Uuid,
    environment_id: Uuid,
) -> Result<ServiceEnvironment, Problem> {
    let row = scoped!(
        scope,
        "SELECT :columns FROM placements WHERE organization_id = :tenant AND service_id = :service_id \
         AND environment_id = :environment_id",
        service_id,
        environment_id
    );
    service.store.read().first(row).await?.ok_or_else(|| Problem::not_found("service in that environment"))
}

/// Reads a service in an environment by their ids, within a transaction.
pub async fn read(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    service_id: Uuid,
    environment_id: Uuid,
) -> Result<ServiceEnvironment, Problem> {
    let row = scoped!(
        scope,
        "SELECT :columns FROM placements WHERE organization_id = :tenant AND service_id = :service_id \
         AND environment_id = :environment_id",
        service_id,
        environment_id
    );
    tx.read().first(row).await?.ok_or_else(|| Problem::not_found("service in that environment"))
}

/// Reads a service in the environment of this name, within a transaction.
pub async fn read_by_name(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    service_id: Uuid,
    environment: &str,
) -> Result<ServiceEnvironment, Problem> {
    let row = scoped!(
        scope,
        "SELECT :columns FROM placements WHERE organization_id = :tenant AND service_id = :service_id \
         AND environment_name = :environment AND wanted <> 'removed'",
        service_id,
        environment
    );
    tx.read()
        .first(row)
        .await?
        .ok_or_else(|| Problem::conflict(format!("The service was never deployed to {environment}.")).hint("Deploy it first."))
}

/// Reads a service in all its environments.
pub async fn of_service(
    service: &DeployService,
    scope: &impl Scope,
    service_id: Uuid,
) -> Result<Vec<ServiceEnvironment>, Problem> {
    let rows = scoped!(
        scope,
        "SELECT :columns FROM placements WHERE organization_id = :tenant AND service_id = :service_id",
        service_id
    );
    service.store.read().all(rows).await
}

/// Records a service's new name. Its hosts and its running instances keep the old one.
pub async fn rename_service(tx: &Transaction<'_>, delivery: Delivery<ServiceRenamed>) -> Result<(), Problem> {
    let Delivery { event, system, .. } = delivery;
    let grant = system.organization(event.organization_id, "a service was renamed");
    tx.run(scoped!(
        &grant,
        "UPDATE placements SET service_name = :name WHERE organization_id = :tenant AND service_id = :service_id",
        name = event.name,
        service_id = event.service_id
    ))
    .await?;
    Ok(())
}

/// Reads all services in all environments, of all tenants.
pub async fn all(service: &DeployService) -> Result<Vec<ServiceEnvironment>, Problem> {
    service
        .store
        .read()
        .all(unscoped!("reconciliation and routing are about all tenants", "SELECT :columns FROM placements"))
        .await
}

/// Returns the service in its environment, which the first deployment creates. Fails if the service, environment,
/// project or organization was removed after `configuration` was read.
pub async fn ensure(
    service: &DeployService,
    tx: &Transaction<'_>,
    scope: &impl Scope,
    configuration: &Configuration,
) -> Result<ServiceEnvironment, Problem> {
    closing::check_open(tx, scope, configuration.service_id).await?;
    let removed = unscoped!(
        "ids of all kinds are unique",
        "SELECT 1 FROM removals WHERE id IN (:service_id, :environment_id, :project_id, :organization_id)",
        service_id = configuration.service_id,
        environment_id = configuration.environment_id,
        project_id = configuration.project_id,
        organization_id = configuration.organization_id
    );
    if tx.read().exists(removed).await? {
        return Err(Problem::not_found("service in that environment"));
    }
    let existing = scoped!(
        scope,
        "SELECT :columns FROM placements WHERE organization_id = :tenant AND service_id = :service_id \
         AND environment_id = :environment_id",
        service_id = configuration.service_id,
        environment_id = configuration.environment_id
    );
    if let Some(service_environment) = tx.read().first::<ServiceEnvironment>(existing).await? {
        // The removal of its files and instances, which have the same host and user id, is still in progress.
        if service_environment.desired_state == "removed" {
            return Err(Problem::conflict(format!("The service is being deleted from {}.", configuration.environment_name))
                .hint("Try again in a few seconds."));
        }
        return Ok(service_environment);
    }
    let service_environment = ServiceEnvironment {
        service_id: configuration.service_id,
        environment_id: configuration.environment_id,
        organization_id: configuration.organization_id,
        project_id: configuration.project_id,
        service_name: configuration.service_name.clone(),
        environment_name: configuration.environment_name.clone(),
        host: hosts::take(tx, scope, &service.options.base_domain, configuration).await?,
        former_host: None,
        uid: user_ids::next(tx).await?,
        desired_state: "running".into(),
        active_deployment_id: None,
    };
    tx.run(scoped!(
        scope,
        "INSERT INTO placements (service_id, environment_id, organization_id, project_id, service_name, environment_name, \
         host, uid, wanted) \
         VALUES (:service_id, :environment_id, :tenant, :project_id, :service_name, :environment_name, :host, :uid, 'running')",
        service_id = service_environment.service_id,
        environment_id = service_environment.environment_id,
        project_id = service_environment.project_id,
        service_name = service_environment.service_name.as_str(),
        environment_name = service_environment.environment_name.as_str(),
        host = service_environment.host.as_str(),
        uid = service_environment.uid
    ))
    .await?;
    Ok(service_environment)
}

/// Marks services in environments as removed. Their hosts are quarantined: only their organization can take them
/// again. The reconciler then stops the instances and deletes the files.
pub async fn remove(
    service: &DeployService,
    tx: &Transaction<'_>,
    scope: &impl Scope,
    is_removed: impl Fn(&ServiceEnvironment) -> bool,
) -> Result<(), Problem> {
    let all = scoped!(scope, "SELECT :columns FROM placements WHERE organization_id = :tenant AND wanted <> 'removed'");
    for service_environment in tx.read().all::<ServiceEnvironment>(all).await?.into_iter().filter(is_removed) {
        hosts::quarantine(tx, scope, &service_environment.host, service.options.host_quarantine_days).await?;
        tx.run(scoped!(
            scope,
            "UPDATE placements SET wanted = 'removed', former_host = host, host = :host \
             WHERE organization_id = :tenant AND service_id = :service_id AND environment_id = :environment_id \
             AND wanted <> 'removed'",
            host = hosts::placeholder(service_environment.service_id, service_environment.environment_id),
            service_id = service_environment.service_id,
            environment_id = service_environment.environment_id
        ))
        .await?;
    }
    Ok(())
}

/// Whether a service in an environment has this host.
pub async fn has_host(service: &DeployService, host: &str) -> Result<bool, Problem> {
    service
        .store
        .read()
        .exists(unscoped!("hosts are unique over all tenants", "SELECT 1 FROM placements WHERE host = :host", host))
        .await
}
