//! The switch: one transaction turns candidates into what serves and what served into what retires;
//! once the ingress has the new table in force, no request goes to the old ones any more, and only
//! then is the deployment said to run.

use capsule_bus::Context;
use capsule_contracts::Problem;
use capsule_contracts::deploy::Status;
use capsule_store::scoped;

use super::{Failure, point_next};
use crate::deployments::{self, Row};
use crate::placements::Placement;
use crate::{Deploys, instances, reconcile, routes};

pub async fn run(deploys: &Deploys, placement: &Placement, row: &Row) -> Result<(), Failure> {
    switch(deploys, placement, row).await?;
    routes::publish(deploys).await?;
    settle(deploys, placement, row).await?;
    deploys.controller.reconcile();
    point_at(deploys, placement, row).await;
    tracing::info!(deployment = %row.id, number = row.number, host = placement.host, "deployment is running");
    reconcile::prune(deploys, placement).await?;
    Ok(())
}

async fn switch(deploys: &Deploys, placement: &Placement, row: &Row) -> Result<(), Problem> {
    let all = instances::of(deploys, placement).await?;
    let of = |role: &str, own: bool| -> Vec<&str> {
        let found = all.iter().filter(|instance| instance.role == role && (instance.deployment_id == row.id) == own);
        found.map(|instance| instance.id.as_str()).collect()
    };
    let tx = deploys.store.begin().await?;
    tx.run(scoped!(
        &row.grant(),
        "UPDATE placements SET active_deployment_id = $1, wanted = 'running' \
         WHERE organization_id = :tenant AND service_id = $2 AND environment_id = $3 AND wanted <> 'removed'",
        row.id,
        row.service_id,
        row.environment_id
    ))
    .await?;
    instances::set_role(&tx, &of("serving", false), "retiring").await?;
    instances::set_role(&tx, &of("candidate", true), "serving").await?;
    tx.commit().await
}

/// This deployment runs; those that ran before it gave way.
async fn settle(deploys: &Deploys, placement: &Placement, row: &Row) -> Result<(), Problem> {
    let context = Context::background("deploy");
    let tx = deploys.store.begin().await?;
    let before = scoped!(
        &row.grant(),
        "SELECT * FROM deployments WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 \
         AND status = 'running' AND id <> $3",
        row.service_id,
        row.environment_id,
        row.id
    );
    for before in tx.read().all::<Row>(before).await? {
        deployments::finish(deploys, &tx, &context, placement, &before, Status::Superseded, None).await?;
    }
    deployments::finish(deploys, &tx, &context, placement, row, Status::Running, None).await?;
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
