//! What users ask for. A command writes what ought to be and wakes the controller; it does nothing
//! itself, so it answers at once.

use std::sync::Arc;

use capsule_buildplan::Kind;
use capsule_bus::{Call, Context, Tenant};
use capsule_contracts::deploy::{CancelDeployment, Deploy, Deployment, Redeploy, Restart, Rollback, ServiceState, Start, Stop};
use capsule_contracts::project::{Configuration, GetConfiguration};
use capsule_contracts::{Problem, Uuid};
use capsule_store::scoped;

use crate::deployments::{self, Environment, New, Row, Sealed};
use crate::placements::{self, Placement};
use crate::quotas::Load;
use crate::{Deploys, instances, queries, quotas, routes, uploads};

async fn configuration(
    deploys: &Deploys,
    context: &Context,
    service_id: Uuid,
    environment: &str,
) -> Result<Configuration, Problem> {
    let ask = GetConfiguration { service_id, environment: environment.into() };
    let configuration = deploys.bus.request(&context.on_behalf("deploy"), &ask).await?;
    if configuration.archived {
        return Err(Problem::conflict("The project is archived.").hint("Restore it first."));
    }
    Ok(configuration)
}

async fn build(
    deploys: &Deploys,
    context: &Context,
    tenant: &Tenant,
    configuration: Configuration,
    trigger: &'static str,
    upload_digest: String,
) -> Result<Deployment, Problem> {
    let limits = quotas::of(deploys, configuration.organization_id).await?;
    let tx = deploys.store.begin().await?;
    quotas::another_deployment(&tx, tenant, &limits, true).await?;
    let placement = placements::ensure(deploys, &tx, tenant, &configuration).await?;
    let new = New {
        trigger,
        upload_digest,
        release: None,
        environment: Environment::Plain(Sealed { variables: configuration.environment, secrets: configuration.secrets }),
        created_by: tenant.user(),
    };
    let row = deployments::insert(deploys, &tx, context, tenant, &placement, new).await?;
    routes::raise(&tx).await?;
    tx.commit().await?;
    deploys.controller.wake();
    row.view(deploys, &placement)
}

pub async fn deploy(deploys: Arc<Deploys>, call: Call<Deploy>) -> Result<Deployment, Problem> {
    let Call { message, proof, context } = call;
    let digest = uploads::digest_of(&deploys, &proof, message.upload_id, message.id).await?;
    let configuration = configuration(&deploys, &context, message.id, &message.environment).await?;
    build(&deploys, &context, &proof, configuration, "upload", digest).await
}

pub async fn redeploy(deploys: Arc<Deploys>, call: Call<Redeploy>) -> Result<Deployment, Problem> {
    let Call { message, proof, context } = call;
    let earlier = deployments::get(&deploys, &proof, message.id).await?;
    deploys
        .blobs
        .path(&earlier.upload_digest)
        .map_err(|_| Problem::conflict("The source of this deployment is not kept any more."))?;
    let placement = placements::get(&deploys, &proof, earlier.service_id, earlier.environment_id).await?;
    let configuration = configuration(&deploys, &context, earlier.service_id, &placement.environment_name).await?;
    build(&deploys, &context, &proof, configuration, "redeploy", earlier.upload_digest).await
}

/// Runs a release that is there already, with the configuration it was made with.
async fn reuse(
    deploys: &Deploys,
    context: &Context,
    tenant: &Tenant,
    placement: &Placement,
    earlier: Row,
    trigger: &'static str,
) -> Result<Deployment, Problem> {
    if !deploys.release_directory(earlier.release_id).exists() {
        return Err(Problem::conflict(format!("The release of deployment {} is not kept any more.", earlier.number))
            .hint("Redeploy it: it will be built again."));
    }
    let limits = quotas::of(deploys, placement.organization_id).await?;
    let plan = earlier.plan()?;
    let tx = deploys.store.begin().await?;
    quotas::another_deployment(&tx, tenant, &limits, false).await?;
    if plan.kind != Kind::Static {
        // Its instances count once they are made; what cannot succeed is refused at once.
        let place = (placement.service_id, placement.environment_id);
        quotas::more_instances(&tx, tenant, &limits, place, Load::of(&plan)).await?;
    }
    let new = New {
        trigger,
        upload_digest: earlier.upload_digest.clone(),
        release: Some((earlier.release_id, earlier.plan.clone())),
        environment: Environment::Of(Box::new(earlier)),
        created_by: tenant.user(),
    };
    let row = deployments::insert(deploys, &tx, context, tenant, placement, new).await?;
    routes::raise(&tx).await?;
    tx.commit().await?;
    deploys.controller.wake();
    row.view(deploys, placement)
}

async fn placed(deploys: &Deploys, tenant: &Tenant, service: Uuid, environment: &str) -> Result<Placement, Problem> {
    placements::by_name(deploys, tenant, service, environment)
        .await?
        .ok_or_else(|| Problem::conflict(format!("The service was never deployed to {environment}.")).hint("Deploy it first."))
}

async fn active(deploys: &Deploys, tenant: &Tenant, placement: &Placement) -> Result<Row, Problem> {
    let active = placement
        .active_deployment_id
        .ok_or_else(|| Problem::conflict("No deployment of the service has succeeded yet.").hint("Deploy it first."))?;
    deployments::get(deploys, tenant, active).await
}

pub async fn rollback(deploys: Arc<Deploys>, call: Call<Rollback>) -> Result<Deployment, Problem> {
    let Call { message, proof, context } = call;
    let placement = placed(&deploys, &proof, message.id, &message.environment).await?;
    let active = active(&deploys, &proof, &placement).await?;
    let earlier = match message.number {
        Some(number) => scoped!(
            &proof,
            "SELECT * FROM deployments WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 \
             AND number = $3 AND status IN ('running', 'superseded') AND plan IS NOT NULL",
            placement.service_id,
            placement.environment_id,
            number
        ),
        // The newest that once ran another release than the present one.
        None => scoped!(
            &proof,
            "SELECT * FROM deployments WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 \
             AND number < $3 AND phase = 'active' AND release_id <> $4 ORDER BY number DESC LIMIT 1",
            placement.service_id,
            placement.environment_id,
            active.number,
            active.release_id
        ),
    };
    let earlier = deploys.store.read().first::<Row>(earlier).await?.ok_or_else(|| {
        let which = message.number.map_or("earlier deployment".into(), |number| format!("deployment {number}"));
        Problem::conflict(format!("There is no {which} that once ran, to return to."))
            .hint("`capsule status` lists the deployments.")
    })?;
    reuse(&deploys, &context, &proof, &placement, earlier, "rollback").await
}

pub async fn restart(deploys: Arc<Deploys>, call: Call<Restart>) -> Result<ServiceState, Problem> {
    let Call { message, proof, context } = call;
    let placement = placed(&deploys, &proof, message.id, &message.environment).await?;
    let active = active(&deploys, &proof, &placement).await?;
    reuse(&deploys, &context, &proof, &placement, active, "restart").await?;
    queries::state(&deploys, &proof, message.id, &message.environment).await
}

pub async fn start(deploys: Arc<Deploys>, call: Call<Start>) -> Result<ServiceState, Problem> {
    let Call { message, proof, context } = call;
    let placement = placed(&deploys, &proof, message.id, &message.environment).await?;
    if placement.wanted == "stopped" {
        let active = active(&deploys, &proof, &placement).await?;
        reuse(&deploys, &context, &proof, &placement, active, "start").await?;
    }
    queries::state(&deploys, &proof, message.id, &message.environment).await
}

pub async fn stop(deploys: Arc<Deploys>, call: Call<Stop>) -> Result<ServiceState, Problem> {
    let Call { message, proof, .. } = call;
    let placement = placed(&deploys, &proof, message.id, &message.environment).await?;
    let serving: Vec<_> = instances::of(&deploys, &placement).await?.into_iter().filter(|row| row.role == "serving").collect();
    let serving: Vec<&str> = serving.iter().map(|row| row.id.as_str()).collect();
    let tx = deploys.store.begin().await?;
    tx.run(scoped!(
        &proof,
        "UPDATE placements SET wanted = 'stopped' WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2",
        placement.service_id,
        placement.environment_id
    ))
    .await?;
    instances::set_role(&tx, &serving, "retiring").await?;
    tx.commit().await?;
    deploys.controller.reconcile();
    // Visitors are told at once; if that fails, the reconciler goes on trying.
    if let Err(problem) = routes::publish(&deploys).await {
        tracing::warn!(%problem, "the routing table could not be published");
    }
    queries::state(&deploys, &proof, message.id, &message.environment).await
}

pub async fn cancel_deployment(deploys: Arc<Deploys>, call: Call<CancelDeployment>) -> Result<Deployment, Problem> {
    let row = deployments::get(&deploys, &call.proof, call.message.id).await?;
    if row.status()?.is_settled() {
        return Err(Problem::conflict(format!("Deployment {} is {} already.", row.number, row.status)));
    }
    let placement = placements::get(&deploys, &call.proof, row.service_id, row.environment_id).await?;
    let tx = deploys.store.begin().await?;
    tx.run(scoped!(&call.proof, "UPDATE deployments SET cancelling = TRUE WHERE organization_id = :tenant AND id = $1", row.id))
        .await?;
    tx.commit().await?;
    deploys.controller.cancel(row.id);
    row.view(&deploys, &placement)
}
