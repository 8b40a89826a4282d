//! The switch: one transaction turns candidates into what serves and what served into what retires;
//! once the ingress has the new table in force, no request goes to the old ones any more, and only
//! then is the deployment said to run.

use capsule_bus::Context;
use capsule_contracts::Problem;
use capsule_contracts::deploy::Status;
use capsule_store::scoped;

use super::{Failure, point_next};
use crate::deployments::{self, Row};
use crate::placements::{self, Placement};
use crate::{Deploys, reconcile, routes};

pub async fn run(deploys: &Deploys, placement: &Placement, row: &Row) -> Result<(), Failure> {
    switch(deploys, row).await?;
    routes::publish(deploys).await?;
    settle(deploys, row).await?;
    deploys.controller.reconcile();
    point_at(deploys, placement, row).await;
    tracing::info!(deployment = %row.id, number = row.number, host = placement.host, "deployment is running");
    reconcile::prune(deploys, placement).await?;
    Ok(())
}

/// Nothing is switched that was cancelled, stopped or removed before: whatever came first is in the database.
pub async fn switch(deploys: &Deploys, row: &Row) -> Result<(), Failure> {
    let grant = row.grant();
    let tx = deploys.store.begin().await?;
    let placement = placements::read(&tx, &grant, row.service_id, row.environment_id).await?;
    if placement.active_deployment_id == Some(row.id) {
        // A run before this one came so far. What was asked for since then stands.
        return Ok(());
    }
    let switch = scoped!(
        &grant,
        "UPDATE placements SET active_deployment_id = $1, wanted = 'running' \
         WHERE organization_id = :tenant AND service_id = $2 AND environment_id = $3 AND wanted <> 'removed'",
        row.id,
        row.service_id,
        row.environment_id
    );
    if !deployments::goes_on(&tx, row).await? || tx.run(switch).await? != 1 {
        return Err(Failure::Cancelled);
    }
    tx.run(scoped!(
        &grant,
        "UPDATE instances SET role = 'retiring' WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 \
         AND deployment_id <> $3 AND role = 'serving'",
        row.service_id,
        row.environment_id,
        row.id
    ))
    .await?;
    tx.run(scoped!(
        &grant,
        "UPDATE instances SET role = 'serving' WHERE organization_id = :tenant AND deployment_id = $1 AND role = 'candidate'",
        row.id
    ))
    .await?;
    routes::raise(&tx).await?;
    tx.commit().await?;
    Ok(())
}

/// This deployment runs; those that ran before it gave way.
pub async fn settle(deploys: &Deploys, row: &Row) -> Result<(), Problem> {
    let (context, grant) = (Context::background("deploy"), row.grant());
    let tx = deploys.store.begin().await?;
    let placement = placements::read(&tx, &grant, row.service_id, row.environment_id).await?;
    let row = deployments::read(&tx, &grant, row.id).await?;
    if row.finished_at.is_some() {
        return Ok(());
    }
    let before = scoped!(
        &grant,
        "SELECT * FROM deployments WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 \
         AND status = 'running' AND id <> $3",
        row.service_id,
        row.environment_id,
        row.id
    );
    for before in tx.read().all::<Row>(before).await? {
        deployments::finish(deploys, &tx, &context, &placement, &before, Status::Superseded, None).await?;
    }
    deployments::finish(deploys, &tx, &context, &placement, &row, Status::Running, None).await?;
    tx.commit().await
}

/// Points `apps/<host>/current` at the release, for people who look.
async fn point_at(deploys: &Deploys, placement: &Placement, row: &Row) {
    let folder = deploys.options.data.join("apps").join(&placement.host);
    let release = deploys.release_directory(row.release_id);
    let pointed = tokio::task::spawn_blocking(move || {
        point_next(&folder, &release)?;
        std::fs::rename(folder.join("next"), folder.join("current"))
    });
    if let Ok(Err(error)) = pointed.await {
        tracing::warn!(host = placement.host, %error, "the link to the release that runs could not be set");
    }
}
