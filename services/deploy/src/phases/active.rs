//! The switch: one transaction turns candidates into what serves and what served into what retires;
//! once the ingress has the new table in force, no request goes to the old ones any more.

use capsule_bus::Context;
use capsule_contracts::deploy::Status;
use capsule_store::scoped;

use super::{Failure, files, host};
use crate::deployments::{self, Row};
use crate::placements::Placement;
use crate::{Deploys, instances, reconcile, routes};

pub async fn run(deploys: &Deploys, placement: &Placement, row: &Row) -> Result<(), Failure> {
    let all = instances::of(deploys, placement).await?;
    let of_role =
        |role: &str| all.iter().filter(|instance| instance.role == role).map(|instance| instance.id.as_str()).collect::<Vec<_>>();
    let candidates: Vec<&str> =
        all.iter().filter(|i| i.role == "candidate" && i.deployment_id == row.id).map(|i| i.id.as_str()).collect();
    let (serving, context) = (of_role("serving"), Context::background("deploy"));

    let tx = deploys.store.begin().await?;
    if let Some(before) = placement.active_deployment_id.filter(|before| *before != row.id) {
        let before = deployments::get(deploys, &row.grant(), before).await?;
        deployments::finish(deploys, &tx, &context, placement, &before, Status::Superseded, None).await?;
    }
    deployments::finish(deploys, &tx, &context, placement, row, Status::Running, None).await?;
    tx.run(scoped!(
        &row.grant(),
        "UPDATE placements SET active_deployment_id = $1, wanted = 'running' \
         WHERE organization_id = :tenant AND service_id = $2 AND environment_id = $3 AND wanted <> 'removed'",
        row.id,
        row.service_id,
        row.environment_id
    ))
    .await?;
    instances::set_role(&tx, &serving, "retiring").await?;
    instances::set_role(&tx, &candidates, "serving").await?;
    tx.commit().await?;
    // From here on the reconciler would finish what this does not.
    routes::publish(deploys).await?;
    deploys.controller.reconcile();

    let folder = deploys.options.data.join("apps").join(&placement.host);
    let release = deploys.release_directory(row.release_id);
    files(move || {
        std::fs::create_dir_all(&folder).map_err(host)?;
        let (next, current) = (folder.join("next"), folder.join("current"));
        let _ = std::fs::remove_file(&next);
        std::os::unix::fs::symlink(release, &next).map_err(host)?;
        std::fs::rename(next, current).map_err(host)
    })
    .await?;
    tracing::info!(deployment = %row.id, number = row.number, host = placement.host, "deployment is running");
    reconcile::prune(deploys, placement).await?;
    Ok(())
}
