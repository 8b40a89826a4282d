//! A service in an environment: its host, its user id, and what ought to run there.

use capsule_contracts::project::Configuration;
use capsule_contracts::{Problem, Uuid};
use capsule_store::{Scope, Transaction, scoped, unscoped};
use sea_orm::FromQueryResult;

use crate::{Deploys, closing, hosts, user_ids};

#[derive(Clone, Debug, FromQueryResult)]
pub struct Placement {
    pub service_id: Uuid,
    pub environment_id: Uuid,
    pub organization_id: Uuid,
    pub project_id: Uuid,
    pub service_name: String,
    pub environment_name: String,
    pub host: String,
    /// The host that a removed one had.
    pub former_host: Option<String>,
    pub uid: i32,
    pub wanted: String,
    pub active_deployment_id: Option<Uuid>,
}

#[derive(FromQueryResult)]
pub struct Name {
    pub service_id: Uuid,
    pub environment_name: String,
}

/// The placement of a service in the environment of this name, if it was ever deployed there.
pub async fn by_name(
    deploys: &Deploys,
    scope: &impl Scope,
    service: Uuid,
    environment: &str,
) -> Result<Option<Placement>, Problem> {
    let row = scoped!(
        scope,
        "SELECT * FROM placements WHERE organization_id = :tenant AND service_id = $1 AND environment_name = $2 AND wanted <> 'removed'",
        service,
        environment
    );
    deploys.store.read().first(row).await
}

/// The placement with these ids.
pub async fn get(deploys: &Deploys, scope: &impl Scope, service: Uuid, environment: Uuid) -> Result<Placement, Problem> {
    let row = scoped!(
        scope,
        "SELECT * FROM placements WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2",
        service,
        environment
    );
    deploys.store.read().first(row).await?.ok_or_else(|| Problem::not_found("service in that environment"))
}

/// The same, in the transaction that goes by it.
pub async fn read(tx: &Transaction<'_>, scope: &impl Scope, service: Uuid, environment: Uuid) -> Result<Placement, Problem> {
    let row = scoped!(
        scope,
        "SELECT * FROM placements WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2",
        service,
        environment
    );
    tx.read().first(row).await?.ok_or_else(|| Problem::not_found("service in that environment"))
}

/// The placement of a service in the environment of this name, in the transaction that goes by it.
pub async fn read_by_name(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    service: Uuid,
    environment: &str,
) -> Result<Placement, Problem> {
    let row = scoped!(
        scope,
        "SELECT * FROM placements WHERE organization_id = :tenant AND service_id = $1 AND environment_name = $2 AND wanted <> 'removed'",
        service,
        environment
    );
    tx.read()
        .first(row)
        .await?
        .ok_or_else(|| Problem::conflict(format!("The service was never deployed to {environment}.")).hint("Deploy it first."))
}

/// The placements of a service, in whatever environment.
pub async fn of_service(deploys: &Deploys, scope: &impl Scope, service: Uuid) -> Result<Vec<Placement>, Problem> {
    let rows = scoped!(scope, "SELECT * FROM placements WHERE organization_id = :tenant AND service_id = $1", service);
    deploys.store.read().all(rows).await
}

/// All placements, for the loops that serve every tenant.
pub async fn all(deploys: &Deploys) -> Result<Vec<Placement>, Problem> {
    deploys.store.read().all(unscoped!("reconciliation and routing are about all tenants", "SELECT * FROM placements")).await
}

/// The placement that a configuration is for; made at the first deployment. Not once it was removed, or anything
/// that it belongs to: the configuration was read before this transaction.
pub async fn ensure(
    deploys: &Deploys,
    tx: &Transaction<'_>,
    scope: &impl Scope,
    configuration: &Configuration,
) -> Result<Placement, Problem> {
    closing::check(tx, scope, configuration.service_id).await?;
    let removed = unscoped!(
        "ids of all kinds are unique",
        "SELECT 1 FROM removals WHERE id IN ($1, $2, $3, $4)",
        configuration.service_id,
        configuration.environment_id,
        configuration.project_id,
        configuration.organization_id
    );
    if tx.read().exists(removed).await? {
        return Err(Problem::not_found("service in that environment"));
    }
    let known = scoped!(
        scope,
        "SELECT * FROM placements WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2",
        configuration.service_id,
        configuration.environment_id
    );
    if let Some(placement) = tx.read().first::<Placement>(known).await? {
        // Its files and instances are still being removed, under the same host and user id.
        if placement.wanted == "removed" {
            return Err(Problem::conflict(format!("The service is being deleted from {}.", configuration.environment_name))
                .hint("Try again in a few seconds."));
        }
        return Ok(placement);
    }
    let placement = Placement {
        service_id: configuration.service_id,
        environment_id: configuration.environment_id,
        organization_id: configuration.organization_id,
        project_id: configuration.project_id,
        service_name: configuration.service_name.clone(),
        environment_name: configuration.environment_name.clone(),
        host: hosts::take(tx, scope, &deploys.options.base_domain, configuration).await?,
        former_host: None,
        uid: user_ids::next(tx).await?,
        wanted: "running".into(),
        active_deployment_id: None,
    };
    tx.run(scoped!(
        scope,
        "INSERT INTO placements (service_id, environment_id, organization_id, project_id, service_name, environment_name, host, uid, wanted) \
         VALUES ($1, $2, :tenant, $3, $4, $5, $6, $7, 'running')",
        placement.service_id,
        placement.environment_id,
        placement.project_id,
        placement.service_name.as_str(),
        placement.environment_name.as_str(),
        placement.host.as_str(),
        placement.uid
    ))
    .await?;
    Ok(placement)
}

/// Marks placements as removed, in the transaction that learns of it. Their hosts go into quarantine, where their
/// own organization may take them again at once; the reconciler stops what runs and removes the files.
pub async fn remove(
    deploys: &Deploys,
    tx: &Transaction<'_>,
    scope: &impl Scope,
    which: impl Fn(&Placement) -> bool,
) -> Result<(), Problem> {
    let all = scoped!(scope, "SELECT * FROM placements WHERE organization_id = :tenant AND wanted <> 'removed'");
    for placement in tx.read().all::<Placement>(all).await?.into_iter().filter(which) {
        hosts::quarantine(tx, scope, &placement.host, deploys.options.host_quarantine_days).await?;
        tx.run(scoped!(
            scope,
            "UPDATE placements SET wanted = 'removed', former_host = host, host = $1 \
             WHERE organization_id = :tenant AND service_id = $2 AND environment_id = $3 AND wanted <> 'removed'",
            hosts::placeholder(placement.service_id, placement.environment_id),
            placement.service_id,
            placement.environment_id
        ))
        .await?;
    }
    Ok(())
}

/// Whether something that is not removed has this host.
pub async fn has_host(deploys: &Deploys, host: &str) -> Result<bool, Problem> {
    deploys
        .store
        .read()
        .exists(unscoped!("hosts are unique over all tenants", "SELECT 1 FROM placements WHERE host = $1", host))
        .await
}
