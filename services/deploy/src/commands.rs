//! What users ask for. A command writes what ought to be and wakes the controller; it does nothing
//! itself, so it answers at once.

use std::sync::Arc;

use capsule_buildplan::Kind;
use capsule_bus::{Call, Context, Tenant};
use capsule_contracts::deploy::{CancelDeployment, Deploy, Deployment, Redeploy, Restart, Rollback, ServiceState, Start, Stop};
use capsule_contracts::project::{Configuration, GetConfiguration};
use capsule_contracts::quotas::Quotas;
use capsule_contracts::{Problem, Uuid};
use capsule_store::{Scope, Transaction, scoped};

use crate::deployments::{self, Environment, New, Row, Sealed};
use crate::placements::{self, Placement};
use crate::quotas::Load;
use crate::{Deploys, queries, quotas, routes, uploads};

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
    upload: Option<Uuid>,
    upload_digest: String,
) -> Result<Deployment, Problem> {
    let limits = quotas::of(deploys, configuration.organization_id).await?;
    let tx = deploys.store.begin().await?;
    quotas::another_deployment(&tx, tenant, &limits, true).await?;
    let placement = placements::ensure(deploys, &tx, tenant, &configuration).await?;
    if let Some(upload) = upload {
        // It may have been forgotten meanwhile.
        uploads::check(&tx, tenant, upload).await?;
    }
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
    build(&deploys, &context, &proof, configuration, "upload", Some(message.upload_id), digest).await
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
    build(&deploys, &context, &proof, configuration, "redeploy", None, earlier.upload_digest).await
}

/// Who asks for a deployment, and within which limits. They are asked for before the transaction begins.
struct Asked<'a> {
    context: &'a Context,
    tenant: &'a Tenant,
    limits: Quotas,
}

async fn asked<'a>(deploys: &Deploys, context: &'a Context, tenant: &'a Tenant) -> Result<Asked<'a>, Problem> {
    Ok(Asked { context, tenant, limits: quotas::of(deploys, tenant.organization()).await? })
}

/// Runs a release that is there already, with the configuration it was made with. Whatever it is decided by is read
/// in the transaction.
async fn reuse(
    deploys: &Deploys,
    tx: &Transaction<'_>,
    by: &Asked<'_>,
    placement: &Placement,
    earlier: Row,
    trigger: &'static str,
) -> Result<Row, Problem> {
    let Asked { context, tenant, limits } = by;
    if !deploys.release_directory(earlier.release_id).exists() {
        return Err(Problem::conflict(format!("The release of deployment {} is not kept any more.", earlier.number))
            .hint("Redeploy it: it will be built again."));
    }
    let plan = earlier.plan()?;
    quotas::another_deployment(tx, *tenant, limits, false).await?;
    if plan.kind != Kind::Static {
        // Its instances count once they are made; what cannot succeed is refused at once.
        let place = (placement.service_id, placement.environment_id);
        quotas::more_instances(tx, *tenant, limits, place, Load::of(&plan)).await?;
    }
    let new = New {
        trigger,
        upload_digest: earlier.upload_digest.clone(),
        release: Some((earlier.release_id, earlier.plan.clone())),
        environment: Environment::Of(Box::new(earlier)),
        created_by: tenant.user(),
    };
    let row = deployments::insert(deploys, tx, context, *tenant, placement, new).await?;
    routes::raise(tx).await?;
    Ok(row)
}

async fn active(tx: &Transaction<'_>, scope: &impl Scope, placement: &Placement) -> Result<Row, Problem> {
    let active = placement
        .active_deployment_id
        .ok_or_else(|| Problem::conflict("No deployment of the service has succeeded yet.").hint("Deploy it first."))?;
    deployments::read(tx, scope, active).await
}

pub async fn rollback(deploys: Arc<Deploys>, call: Call<Rollback>) -> Result<Deployment, Problem> {
    let Call { message, proof, context } = call;
    let by = asked(&deploys, &context, &proof).await?;
    let tx = deploys.store.begin().await?;
    let placement = placements::read_by_name(&tx, &proof, message.id, &message.environment).await?;
    let active = active(&tx, &proof, &placement).await?;
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
    let earlier = tx.read().first::<Row>(earlier).await?.ok_or_else(|| {
        let which = message.number.map_or("earlier deployment".into(), |number| format!("deployment {number}"));
        Problem::conflict(format!("There is no {which} that once ran, to return to."))
            .hint("`capsule status` lists the deployments.")
    })?;
    let row = reuse(&deploys, &tx, &by, &placement, earlier, "rollback").await?;
    tx.commit().await?;
    deploys.controller.wake();
    row.view(&deploys, &placement)
}

pub async fn restart(deploys: Arc<Deploys>, call: Call<Restart>) -> Result<ServiceState, Problem> {
    let Call { message, proof, context } = call;
    let by = asked(&deploys, &context, &proof).await?;
    let tx = deploys.store.begin().await?;
    let placement = placements::read_by_name(&tx, &proof, message.id, &message.environment).await?;
    let active = active(&tx, &proof, &placement).await?;
    reuse(&deploys, &tx, &by, &placement, active, "restart").await?;
    tx.commit().await?;
    deploys.controller.wake();
    queries::state(&deploys, &proof, message.id, &message.environment).await
}

pub async fn start(deploys: Arc<Deploys>, call: Call<Start>) -> Result<ServiceState, Problem> {
    let Call { message, proof, context } = call;
    let by = asked(&deploys, &context, &proof).await?;
    let tx = deploys.store.begin().await?;
    let placement = placements::read_by_name(&tx, &proof, message.id, &message.environment).await?;
    if is_to_be_started(&tx, &proof, &placement).await? {
        let active = active(&tx, &proof, &placement).await?;
        reuse(&deploys, &tx, &by, &placement, active, "start").await?;
        tx.commit().await?;
        deploys.controller.wake();
    } else {
        drop(tx);
    }
    queries::state(&deploys, &proof, message.id, &message.environment).await
}

/// Whether a service is stopped and nothing is under way that starts it.
pub async fn is_to_be_started(tx: &Transaction<'_>, scope: &impl Scope, placement: &Placement) -> Result<bool, Problem> {
    let under_way = deployments::unsettled_of(tx, scope, placement).await?;
    Ok(placement.wanted == "stopped" && under_way.iter().all(|row| row.cancelling))
}

pub async fn stop(deploys: Arc<Deploys>, call: Call<Stop>) -> Result<ServiceState, Problem> {
    let Call { message, proof, context } = call;
    halt(&deploys, &context, &proof, message.id, &message.environment).await?;
    deploys.controller.reconcile();
    // Visitors are told at once; if that fails, the reconciler goes on trying.
    if let Err(problem) = routes::publish(&deploys).await {
        tracing::warn!(%problem, "the routing table could not be published");
    }
    queries::state(&deploys, &proof, message.id, &message.environment).await
}

/// Stops a service: in one transaction, nothing of it serves any more and every deployment that would have started it
/// again is cancelled. One that is asked for later starts it.
pub async fn halt(
    deploys: &Deploys,
    context: &Context,
    scope: &impl Scope,
    service: Uuid,
    environment: &str,
) -> Result<(), Problem> {
    let tx = deploys.store.begin().await?;
    let placement = placements::read_by_name(&tx, scope, service, environment).await?;
    let stopped = tx
        .run(scoped!(
            scope,
            "UPDATE placements SET wanted = 'stopped' \
             WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 AND wanted <> 'removed'",
            placement.service_id,
            placement.environment_id
        ))
        .await?;
    if stopped != 1 {
        return Err(Problem::not_found("service in that environment"));
    }
    let under_way = deployments::unsettled_of(&tx, scope, &placement).await?;
    for row in &under_way {
        // The one that serves already is only to be settled.
        if placement.active_deployment_id != Some(row.id) {
            deployments::cancel(deploys, &tx, context, &placement, row).await?;
        }
    }
    tx.run(scoped!(
        scope,
        "UPDATE instances SET role = 'retiring' \
         WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 AND role = 'serving'",
        placement.service_id,
        placement.environment_id
    ))
    .await?;
    routes::raise(&tx).await?;
    tx.commit().await?;
    for row in under_way.iter().filter(|row| placement.active_deployment_id != Some(row.id)) {
        deploys.controller.cancel(row.id);
    }
    Ok(())
}

pub async fn cancel_deployment(deploys: Arc<Deploys>, call: Call<CancelDeployment>) -> Result<Deployment, Problem> {
    let tx = deploys.store.begin().await?;
    let row = deployments::read(&tx, &call.proof, call.message.id).await?;
    let placement = placements::read(&tx, &call.proof, row.service_id, row.environment_id).await?;
    if row.status()?.is_settled() {
        return Err(Problem::conflict(format!("Deployment {} is {} already.", row.number, row.status)));
    }
    if placement.active_deployment_id == Some(row.id) {
        return Err(Problem::conflict(format!("Deployment {} serves already.", row.number))
            .hint("Roll back to an earlier one, or stop the service."));
    }
    deployments::cancel(&deploys, &tx, &call.context, &placement, &row).await?;
    let row = deployments::read(&tx, &call.proof, row.id).await?;
    tx.commit().await?;
    deploys.controller.cancel(row.id);
    row.view(&deploys, &placement)
}
