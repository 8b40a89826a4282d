//! Promotes the candidates: in one transaction they become serving, and the previous instances retiring. The deployment is
//! running once the routing table without the previous instances is in force.

use capsule_bus::Context;
use capsule_contracts::Problem;
use capsule_contracts::deploy::Status;
use capsule_store::{Scope, scoped};

use super::{Failure, update_next_link};
use crate::deployments::{self, Row};
use crate::service_environments::{self, ServiceEnvironment};
use crate::{DeployService, reconcile, routes};

pub async fn run(
    service: &DeployService,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    row: &Row,
) -> Result<(), Failure> {
    promote(service, scope, row).await?;
    routes::publish(service).await?;
    settle(service, scope, row).await?;
    service.controller.reconcile();
    update_current_link(service, service_environment, row).await;
    tracing::info!(deployment = %row.id, number = row.number, host = service_environment.host, "a deployment is running");
    reconcile::prune(service, service_environment).await?;
    Ok(())
}

/// Makes a deployment active. Fails with [`Failure::Cancelled`] if it was cancelled, or its service stopped or removed,
/// before.
pub async fn promote(service: &DeployService, scope: &impl Scope, row: &Row) -> Result<(), Failure> {
    let tx = service.store.begin().await?;
    let service_environment = service_environments::read(&tx, scope, row.service_id, row.environment_id).await?;
    if service_environment.active_deployment_id == Some(row.id) {
        // An earlier attempt did this. Later commands, such as a stop, stay in force.
        return Ok(());
    }
    let activate = scoped!(
        scope,
        "UPDATE placements SET active_deployment_id = :active_deployment_id, wanted = 'running' \
         WHERE organization_id = :tenant AND service_id = :service_id AND environment_id = :environment_id \
         AND wanted <> 'removed'",
        active_deployment_id = row.id,
        service_id = row.service_id,
        environment_id = row.environment_id
    );
    if !deployments::is_in_progress(&tx, scope, row).await? || tx.run(activate).await? != 1 {
        return Err(Failure::Cancelled);
    }
    tx.run(scoped!(
        scope,
        "UPDATE instances SET role = 'retiring' WHERE organization_id = :tenant AND service_id = :service_id \
         AND environment_id = :environment_id \
         AND deployment_id <> :deployment_id AND role = 'serving'",
        service_id = row.service_id,
        environment_id = row.environment_id,
        deployment_id = row.id
    ))
    .await?;
    tx.run(scoped!(
        scope,
        "UPDATE instances SET role = 'serving' WHERE organization_id = :tenant AND deployment_id = :deployment_id \
         AND role = 'candidate'",
        deployment_id = row.id
    ))
    .await?;
    routes::bump_revision(&tx).await?;
    tx.commit().await?;
    Ok(())
}

/// Settles a deployment as running, and the one that ran before as superseded.
pub async fn settle(service: &DeployService, scope: &impl Scope, row: &Row) -> Result<(), Problem> {
    let context = Context::background("deploy");
    let tx = service.store.begin().await?;
    let service_environment = service_environments::read(&tx, scope, row.service_id, row.environment_id).await?;
    let row = deployments::read(&tx, scope, row.id).await?;
    if row.finished_at.is_some() {
        return Ok(());
    }
    let previous = scoped!(
        scope,
        "SELECT :columns FROM deployments WHERE organization_id = :tenant AND service_id = :service_id \
         AND environment_id = :environment_id \
         AND status = 'running' AND id <> :id",
        service_id = row.service_id,
        environment_id = row.environment_id,
        id = row.id
    );
    for earlier in tx.read().all::<Row>(previous).await? {
        deployments::finish(service, &tx, &context, scope, &service_environment, &earlier, Status::Superseded).await?;
    }
    deployments::finish(service, &tx, &context, scope, &service_environment, &row, Status::Running).await?;
    tx.commit().await
}

/// Points `apps/<host>/current` at the release, for administrators.
async fn update_current_link(service: &DeployService, service_environment: &ServiceEnvironment, row: &Row) {
    let directory = service.options.data.join("apps").join(&service_environment.host);
    let release = service.release_directory(row.release_id);
    let updated = tokio::task::spawn_blocking(move || {
        update_next_link(&directory, &release)?;
        std::fs::rename(directory.join("next"), directory.join("current"))
    });
    if let Ok(Err(error)) = updated.await {
        tracing::warn!(host = service_environment.host, %error, "cannot set the link to the active release");
    }
}
