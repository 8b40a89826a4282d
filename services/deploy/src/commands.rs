//! The commands of users. A command only writes the desired state and wakes the controller, so it replies at once.

use std::sync::Arc;

use capsule_buildplan::Kind;
use capsule_bus::{Call, Context, Tenant};
use capsule_contracts::deploy::{CancelDeployment, Deploy, Deployment, Redeploy, Restart, Rollback, ServiceState, Start, Stop};
use capsule_contracts::project::{Configuration, GetConfiguration};
use capsule_contracts::quotas::Quotas;
use capsule_contracts::{Problem, Uuid};
use capsule_store::{Scope, Transaction, scoped};

use crate::deployments::{self, Environment, EnvironmentSnapshot, NewDeployment, Row};
use crate::quotas::Load;
use crate::service_environments::{self, ServiceEnvironment};
use crate::{DeployService, queries, quotas, routes, uploads};

async fn configuration(
    service: &DeployService,
    context: &Context,
    service_id: Uuid,
    environment: &str,
) -> Result<Configuration, Problem> {
    let message = GetConfiguration { service_id, environment: environment.into() };
    let configuration = service.bus.request(&context.as_service("deploy"), &message).await?;
    if configuration.archived {
        return Err(Problem::conflict("The project is archived.").hint("Restore it first."));
    }
    Ok(configuration)
}

async fn insert_build(
    service: &DeployService,
    context: &Context,
    tenant: &Tenant,
    configuration: Configuration,
    trigger: &'static str,
    upload: Option<Uuid>,
    upload_digest: String,
) -> Result<Deployment, Problem> {
    let limits = quotas::limits_of(service, configuration.organization_id).await?;
    let tx = service.store.begin().await?;
    quotas::count_deployment(&tx, tenant, &limits, true).await?;
    let service_environment = service_environments::ensure(service, &tx, tenant, &configuration).await?;
    if let Some(upload) = upload {
        // The upload may have been deleted in the meantime.
        uploads::check_complete(&tx, tenant, upload).await?;
    }
    let new = NewDeployment {
        trigger,
        upload_digest,
        release: None,
        environment: Environment::Current(EnvironmentSnapshot {
            variables: configuration.environment,
            secrets: configuration.secrets,
        }),
        created_by: tenant.user(),
    };
    let row = deployments::insert(service, &tx, context, tenant, &service_environment, new).await?;
    routes::bump_revision(&tx).await?;
    tx.commit().await?;
    service.controller.wake();
    row.view(service, &service_environment)
}

pub async fn deploy(service: Arc<DeployService>, call: Call<Deploy>) -> Result<Deployment, Problem> {
    let Call { message, grant, context } = call;
    let digest = uploads::digest_of(&service, &grant, message.upload_id, message.id).await?;
    let configuration = configuration(&service, &context, message.id, &message.environment).await?;
    insert_build(&service, &context, &grant, configuration, "upload", Some(message.upload_id), digest).await
}

pub async fn redeploy(service: Arc<DeployService>, call: Call<Redeploy>) -> Result<Deployment, Problem> {
    let Call { message, grant, context } = call;
    let earlier = deployments::get(&service, &grant, message.id).await?;
    service
        .blobs
        .path(&earlier.upload_digest)
        .map_err(|_| Problem::conflict("The source of this deployment is no longer available."))?;
    let service_environment = service_environments::get(&service, &grant, earlier.service_id, earlier.environment_id).await?;
    let configuration = configuration(&service, &context, earlier.service_id, &service_environment.environment_name).await?;
    insert_build(&service, &context, &grant, configuration, "redeploy", None, earlier.upload_digest).await
}

/// The context, user and quotas of a command; the quotas are read before the transaction begins.
struct Caller<'a> {
    context: &'a Context,
    tenant: &'a Tenant,
    limits: Quotas,
}

async fn caller<'a>(service: &DeployService, context: &'a Context, tenant: &'a Tenant) -> Result<Caller<'a>, Problem> {
    Ok(Caller { context, tenant, limits: quotas::limits_of(service, tenant.organization()).await? })
}

/// Inserts a deployment of an existing release with the configuration of the deployment `earlier`. Everything it depends
/// on is read in the transaction.
async fn insert_reuse(
    service: &DeployService,
    tx: &Transaction<'_>,
    caller: &Caller<'_>,
    service_environment: &ServiceEnvironment,
    earlier: Row,
    trigger: &'static str,
) -> Result<Row, Problem> {
    let Caller { context, tenant, limits } = caller;
    if !service.release_directory(earlier.release_id).exists() {
        return Err(Problem::conflict(format!("The release of deployment {} is no longer available.", earlier.number))
            .hint("Redeploy it to build it again."));
    }
    let plan = earlier.plan()?;
    quotas::count_deployment(tx, *tenant, limits, false).await?;
    if plan.kind != Kind::Static {
        // The instances count when they are created; this check fails early.
        let place = (service_environment.service_id, service_environment.environment_id);
        quotas::admit_instances(tx, *tenant, limits, place, Load::of(&plan)).await?;
    }
    let new = NewDeployment {
        trigger,
        upload_digest: earlier.upload_digest.clone(),
        release: Some((earlier.release_id, earlier.plan.clone())),
        environment: Environment::CopyOf(Box::new(earlier)),
        created_by: tenant.user(),
    };
    let row = deployments::insert(service, tx, context, *tenant, service_environment, new).await?;
    routes::bump_revision(tx).await?;
    Ok(row)
}

async fn active(tx: &Transaction<'_>, scope: &impl Scope, service_environment: &ServiceEnvironment) -> Result<Row, Problem> {
    let active = service_environment
        .active_deployment_id
        .ok_or_else(|| Problem::conflict("No deployment of the service has succeeded yet.").hint("Deploy it first."))?;
    deployments::read(tx, scope, active).await
}

pub async fn rollback(service: Arc<DeployService>, call: Call<Rollback>) -> Result<Deployment, Problem> {
    let Call { message, grant, context } = call;
    let caller = caller(&service, &context, &grant).await?;
    let tx = service.store.begin().await?;
    let service_environment = service_environments::read_by_name(&tx, &grant, message.id, &message.environment).await?;
    let active = active(&tx, &grant, &service_environment).await?;
    let earlier = match message.number {
        Some(number) => scoped!(
            &grant,
            "SELECT :columns FROM deployments WHERE organization_id = :tenant AND service_id = :service_id \
             AND environment_id = :environment_id \
             AND number = :number AND status IN ('running', 'superseded') AND plan IS NOT NULL",
            service_id = service_environment.service_id,
            environment_id = service_environment.environment_id,
            number
        ),
        // The newest deployment that was active with another release.
        None => scoped!(
            &grant,
            "SELECT :columns FROM deployments WHERE organization_id = :tenant AND service_id = :service_id \
             AND environment_id = :environment_id \
             AND number < :number AND phase = 'active' AND release_id <> :release_id ORDER BY number DESC LIMIT 1",
            service_id = service_environment.service_id,
            environment_id = service_environment.environment_id,
            number = active.number,
            release_id = active.release_id
        ),
    };
    let earlier = tx.read().first::<Row>(earlier).await?.ok_or_else(|| {
        Problem::conflict(match message.number {
            Some(number) => format!("Cannot roll back: deployment {number} does not exist or never ran."),
            None => "Cannot roll back: no earlier deployment with another release ever ran.".into(),
        })
        .hint("`capsule status` lists the deployments.")
    })?;
    let row = insert_reuse(&service, &tx, &caller, &service_environment, earlier, "rollback").await?;
    tx.commit().await?;
    service.controller.wake();
    row.view(&service, &service_environment)
}

pub async fn restart(service: Arc<DeployService>, call: Call<Restart>) -> Result<ServiceState, Problem> {
    let Call { message, grant, context } = call;
    let caller = caller(&service, &context, &grant).await?;
    let tx = service.store.begin().await?;
    let service_environment = service_environments::read_by_name(&tx, &grant, message.id, &message.environment).await?;
    let active = active(&tx, &grant, &service_environment).await?;
    insert_reuse(&service, &tx, &caller, &service_environment, active, "restart").await?;
    tx.commit().await?;
    service.controller.wake();
    queries::state(&service, &grant, message.id, &message.environment).await
}

pub async fn start(service: Arc<DeployService>, call: Call<Start>) -> Result<ServiceState, Problem> {
    let Call { message, grant, context } = call;
    let caller = caller(&service, &context, &grant).await?;
    let tx = service.store.begin().await?;
    let service_environment = service_environments::read_by_name(&tx, &grant, message.id, &message.environment).await?;
    if needs_start(&tx, &grant, &service_environment).await? {
        let active = active(&tx, &grant, &service_environment).await?;
        insert_reuse(&service, &tx, &caller, &service_environment, active, "start").await?;
        tx.commit().await?;
        service.controller.wake();
    } else {
        drop(tx);
    }
    queries::state(&service, &grant, message.id, &message.environment).await
}

/// Whether a service is stopped and no deployment in progress starts it.
pub async fn needs_start(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
) -> Result<bool, Problem> {
    let in_progress = deployments::unsettled_of(tx, scope, service_environment).await?;
    Ok(service_environment.desired_state == "stopped" && in_progress.iter().all(|row| row.cancelling))
}

pub async fn stop(service: Arc<DeployService>, call: Call<Stop>) -> Result<ServiceState, Problem> {
    let Call { message, grant, context } = call;
    stop_service(&service, &context, &grant, message.id, &message.environment).await?;
    service.controller.reconcile();
    // Published at once for visitors; if that fails, the reconciler repeats it.
    if let Err(problem) = routes::publish(&service).await {
        tracing::warn!(%problem, "cannot publish the routing table; trying again");
    }
    queries::state(&service, &grant, message.id, &message.environment).await
}

/// Stops a service in one transaction: its instances retire, and deployments that would start it again are cancelled. A
/// later deployment starts it.
pub async fn stop_service(
    service: &DeployService,
    context: &Context,
    scope: &impl Scope,
    service_id: Uuid,
    environment: &str,
) -> Result<(), Problem> {
    let tx = service.store.begin().await?;
    let service_environment = service_environments::read_by_name(&tx, scope, service_id, environment).await?;
    let stopped = tx
        .run(scoped!(
            scope,
            "UPDATE placements SET wanted = 'stopped' \
             WHERE organization_id = :tenant AND service_id = :service_id AND environment_id = :environment_id \
             AND wanted <> 'removed'",
            service_id = service_environment.service_id,
            environment_id = service_environment.environment_id
        ))
        .await?;
    if stopped != 1 {
        return Err(Problem::not_found("service in that environment"));
    }
    let in_progress = deployments::unsettled_of(&tx, scope, &service_environment).await?;
    for row in &in_progress {
        // A deployment that is active already only has to be settled.
        if service_environment.active_deployment_id != Some(row.id) {
            deployments::cancel(service, &tx, context, scope, &service_environment, row).await?;
        }
    }
    tx.run(scoped!(
        scope,
        "UPDATE instances SET role = 'retiring' \
         WHERE organization_id = :tenant AND service_id = :service_id AND environment_id = :environment_id AND role = 'serving'",
        service_id = service_environment.service_id,
        environment_id = service_environment.environment_id
    ))
    .await?;
    routes::bump_revision(&tx).await?;
    tx.commit().await?;
    for row in in_progress.iter().filter(|row| service_environment.active_deployment_id != Some(row.id)) {
        service.controller.cancel(row.id);
    }
    Ok(())
}

pub async fn cancel_deployment(service: Arc<DeployService>, call: Call<CancelDeployment>) -> Result<Deployment, Problem> {
    let tx = service.store.begin().await?;
    let row = deployments::read(&tx, &call.grant, call.message.id).await?;
    let service_environment = service_environments::read(&tx, &call.grant, row.service_id, row.environment_id).await?;
    if row.status()?.is_settled() {
        return Err(Problem::conflict(format!("Deployment {} is already {}.", row.number, row.status)));
    }
    if service_environment.active_deployment_id == Some(row.id) {
        return Err(Problem::conflict(format!("Deployment {} is live already.", row.number))
            .hint("Roll back to an earlier one, or stop the service."));
    }
    deployments::cancel(&service, &tx, &call.context, &call.grant, &service_environment, &row).await?;
    let row = deployments::read(&tx, &call.grant, row.id).await?;
    tx.commit().await?;
    service.controller.cancel(row.id);
    row.view(&service, &service_environment)
}
