//! What ceased to be: a service, an environment, a project, an organization. Its placements are
//! marked; the reconciler stops what runs of them and removes their files.

use std::sync::Arc;

use capsule_bus::{Call, SystemGrant};
use capsule_contracts::deploy::{CountPlacements, RemoveFromEnvironment, ServiceState};
use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::project::ServicesRemoved;
use capsule_contracts::{Count, Problem, Timestamp, Uuid};
use capsule_store::{Transaction, scoped, unscoped};
use sea_orm::FromQueryResult;

use crate::{Deploys, placements, queries, routes};

/// How long removals are remembered, in seconds; no request is under way for so long.
const REMOVALS_SECONDS: i64 = 7 * 24 * 3600;

pub async fn services(deploys: &Deploys, tx: &Transaction<'_>, event: ServicesRemoved) -> Result<(), Problem> {
    let grant = SystemGrant::new(event.organization_id, "services were removed");
    let removed = event.service_id.or(event.environment_id).unwrap_or(event.project_id);
    placements::remove(deploys, tx, &grant, |placement| match (event.service_id, event.environment_id) {
        (Some(service), _) => placement.service_id == service,
        (None, Some(environment)) => placement.environment_id == environment,
        (None, None) => placement.project_id == event.project_id,
    })
    .await?;
    follow(deploys, tx, &grant, removed).await
}

pub async fn remove_from_environment(deploys: Arc<Deploys>, call: Call<RemoveFromEnvironment>) -> Result<ServiceState, Problem> {
    let Call { message, proof, .. } = call;
    let placement = placements::by_name(&deploys, &proof, message.id, &message.environment).await?;
    let placement = placement.ok_or_else(|| {
        Problem::conflict(format!("The service is not deployed to {}.", message.environment))
            .hint("`capsule status -e NAME` shows it in another environment.")
    })?;
    let tx = deploys.store.begin().await?;
    placements::remove(&deploys, &tx, &proof, |row| {
        (row.service_id, row.environment_id) == (placement.service_id, placement.environment_id)
    })
    .await?;
    let unsettled = scoped!(
        &proof,
        "SELECT id FROM deployments WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 AND finished_at IS NULL",
        placement.service_id,
        placement.environment_id
    );
    let unsettled: Vec<Id> = tx.read().all(unsettled).await?;
    tx.run(scoped!(
        &proof,
        "UPDATE deployments SET cancelling = TRUE \
         WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 AND finished_at IS NULL",
        placement.service_id,
        placement.environment_id
    ))
    .await?;
    routes::raise(&tx).await?;
    tx.commit().await?;
    unsettled.iter().for_each(|row| deploys.controller.cancel(row.id));
    deploys.controller.reconcile();
    queries::state(&deploys, &proof, message.id, &message.environment).await
}

#[derive(FromQueryResult)]
struct Id {
    id: Uuid,
}

pub async fn organization(deploys: &Deploys, tx: &Transaction<'_>, event: OrganizationDeleted) -> Result<(), Problem> {
    let grant = SystemGrant::new(event.organization_id, "the organization was deleted");
    placements::remove(deploys, tx, &grant, |_| true).await?;
    follow(deploys, tx, &grant, event.organization_id).await
}

/// What follows from a removal, in its transaction: deployments to what was removed are cancelled, and no later one
/// brings it back.
async fn follow(deploys: &Deploys, tx: &Transaction<'_>, grant: &SystemGrant, removed: Uuid) -> Result<(), Problem> {
    tx.run(scoped!(
        grant,
        "INSERT INTO removals (id, organization_id, removed_at) VALUES ($1, :tenant, $2) ON CONFLICT (id) DO NOTHING",
        removed,
        Timestamp::now().0
    ))
    .await?;
    tx.run(scoped!(
        grant,
        "UPDATE deployments SET cancelling = TRUE WHERE organization_id = :tenant AND finished_at IS NULL AND EXISTS \
         (SELECT 1 FROM placements p WHERE p.service_id = deployments.service_id \
         AND p.environment_id = deployments.environment_id AND p.wanted = 'removed')"
    ))
    .await?;
    routes::raise(tx).await?;
    deploys.controller.wake();
    deploys.controller.reconcile();
    Ok(())
}

/// Deletes the records of removals long before `now`: whatever was asked for before them was accepted or refused.
pub async fn purge(deploys: &Deploys, now: Timestamp) -> Result<(), Problem> {
    let tx = deploys.store.begin().await?;
    let old = now.plus_seconds(-REMOVALS_SECONDS).0;
    tx.run(unscoped!("the platform's own work", "DELETE FROM removals WHERE removed_at < $1", old)).await?;
    tx.commit().await
}

pub async fn count_placements(deploys: Arc<Deploys>, call: Call<CountPlacements>) -> Result<Count, Problem> {
    let grant = SystemGrant::new(call.message.organization_id, "the organization is being deleted");
    let count = scoped!(&grant, "SELECT COUNT(*) FROM placements WHERE organization_id = :tenant");
    Ok(Count { count: deploys.store.read().value::<i64>(count).await?.unwrap_or_default() })
}
