//! The queries of users: deployments, their events, and the state of a service.

use std::sync::Arc;

use capsule_bus::Call;
use capsule_contracts::deploy::{
    Deployment, DeploymentEvent, DiskUsage, GetDeployment, GetServiceState, Instance, ListDeploymentEvents, ListDeployments,
    ServiceState, Status,
};
use capsule_contracts::list::PageQuery;
use capsule_contracts::{Page, Problem, Timestamp, Uuid};
use capsule_runtime::ShimState;
use capsule_store::{FromRow, Scope, page, scoped};

use crate::deployments::{self, Row};
use crate::phases::building::version_warning;
use crate::service_environments::ServiceEnvironment;
use crate::{DeployService, instances, service_environments, texts};

pub async fn list_deployments(service: Arc<DeployService>, call: Call<ListDeployments>) -> Result<Page<Deployment>, Problem> {
    let message = call.message;
    let query = PageQuery::of(&message)?;
    let rows = page!(
        query,
        scoped &call.grant,
        "SELECT d.* FROM deployments d JOIN placements p ON p.service_id = d.service_id AND p.environment_id = d.environment_id \
         WHERE d.organization_id = :tenant AND d.service_id = :service_id AND (:environment = '' OR p.environment_name = :environment) \
         AND (:status = '' OR d.status = :status)",
        "d.id" uuid,
        ["created_at" => "d.created_at" integer],
        service_id = message.service_id,
        environment = message.environment.unwrap_or_default(),
        status = message.status.map_or("", Status::name)
    );
    let rows = service.store.read().all::<Row>(rows?).await?;
    let page = query.page(rows, |row| (row.created_at.into(), row.id));
    let service_environments = service_environments::of_service(&service, &call.grant, message.service_id).await?;
    let items = page.items.iter().filter_map(|row| {
        let service_environment =
            service_environments.iter().find(|service_environment| service_environment.environment_id == row.environment_id)?;
        Some(row.view(&service, service_environment))
    });
    Ok(Page { items: items.collect::<Result<_, _>>()?, next_cursor: page.next_cursor })
}

pub async fn get_deployment(service: Arc<DeployService>, call: Call<GetDeployment>) -> Result<Deployment, Problem> {
    view(&service, &call.grant, call.message.id).await
}

async fn view(service: &DeployService, scope: &impl Scope, id: Uuid) -> Result<Deployment, Problem> {
    let row = deployments::get(service, scope, id).await?;
    let service_environment = service_environments::get(service, scope, row.service_id, row.environment_id).await?;
    row.view(service, &service_environment)
}

#[derive(FromRow)]
struct EventRow {
    at: i64,
    status: String,
    phase: String,
    message: String,
}

pub async fn list_deployment_events(
    service: Arc<DeployService>,
    call: Call<ListDeploymentEvents>,
) -> Result<Page<DeploymentEvent>, Problem> {
    let query = PageQuery::of(&call.message)?;
    // Events have no id: a status and a phase occur once at a time.
    let rows = page!(
        query,
        scoped &call.grant,
        "SELECT at, status, phase, message FROM deployment_events WHERE organization_id = :tenant AND deployment_id = :id",
        "status || ' ' || phase" text,
        ["at" => "at" integer],
        id = call.message.id
    );
    let rows = service.store.read().all::<EventRow>(rows?).await?;
    let page = query.page(rows, |row| (row.at.into(), format!("{} {}", row.status, row.phase)));
    page.try_map(|row| {
        Ok(DeploymentEvent {
            at: Timestamp(row.at),
            status: row.status.parse()?,
            phase: row.phase.parse()?,
            message: row.message,
        })
    })
}

pub async fn get_service_state(service: Arc<DeployService>, call: Call<GetServiceState>) -> Result<ServiceState, Problem> {
    state(&service, &call.grant, call.message.id, &call.message.environment).await
}

/// The state of a service in an environment, with that of its instances as their shims report it.
pub async fn state(
    service: &DeployService,
    scope: &impl Scope,
    service_id: Uuid,
    environment: &str,
) -> Result<ServiceState, Problem> {
    let Some(service_environment) = service_environments::by_name(service, scope, service_id, environment).await? else {
        return Ok(ServiceState {
            service_id,
            environment_name: environment.into(),
            url: String::new(),
            state: "not_deployed".into(),
            active: None,
            instances: Vec::new(),
            warnings: Vec::new(),
        });
    };
    let mut shown = Vec::new();
    for row in instances::of(service, &service_environment).await?.into_iter().filter(|row| row.role != "gone") {
        let status = service.runtime.status(&row.id).await;
        let state = match (row.role.as_str(), status.as_ref().map(|status| status.state)) {
            ("retiring", _) | (_, Some(ShimState::Stopping)) => "stopping",
            (_, None | Some(ShimState::Backoff)) => "crashed",
            ("candidate", _) => "starting",
            _ => "running",
        };
        shown.push(Instance {
            id: row.id,
            deployment_id: row.deployment_id,
            process: row.process,
            state: state.into(),
            pid: status.as_ref().and_then(|status| status.pid),
            restarts: status.as_ref().map_or(0, |status| status.restarts),
            started_at: status.as_ref().map(|status| Timestamp(status.started_at)),
            memory_bytes: status.as_ref().and_then(|status| status.memory),
            last_exit: status
                .as_ref()
                .and_then(|status| status.last_exit.as_deref())
                .map(|text| texts::without_paths(service, text)),
            disk: status.as_ref().and_then(|status| status.disk.as_ref()).map(|disk| DiskUsage {
                bytes: disk.usage.bytes,
                limit_bytes: disk.limit.bytes,
                inodes: disk.usage.inodes,
                limit_inodes: disk.limit.inodes,
                enforcement: disk.enforcement.name().into(),
            }),
            warnings: status.map_or_else(Vec::new, |status| {
                status.warnings.iter().map(|warning| texts::without_paths(service, warning)).collect()
            }),
        });
    }
    let active = match service_environment.active_deployment_id {
        Some(id) => Some(view(service, scope, id).await?),
        None => None,
    };
    let serving: Vec<_> = shown.iter().filter(|instance| matches!(instance.state.as_str(), "running" | "crashed")).collect();
    let state = if service_environment.desired_state == "stopped" {
        "stopped"
    } else if active.is_none() {
        if shown.is_empty() { "not_deployed" } else { "starting" }
    } else if serving.iter().any(|instance| instance.state == "crashed") {
        "crashed"
    } else {
        "running"
    };
    let warnings = warnings(service, scope, &service_environment).await?;
    Ok(ServiceState {
        service_id,
        environment_name: service_environment.environment_name,
        url: service.url(&service_environment.host),
        state: state.into(),
        active,
        instances: shown,
        warnings,
    })
}

/// Warnings about versions in the plan of the active deployment, or of the newest if none is active.
async fn warnings(
    service: &DeployService,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
) -> Result<Vec<String>, Problem> {
    let plan = match service_environment.active_deployment_id {
        Some(id) => scoped!(scope, "SELECT plan FROM deployments WHERE organization_id = :tenant AND id = :id", id),
        None => scoped!(
            scope,
            "SELECT plan FROM deployments WHERE organization_id = :tenant AND service_id = :service_id \
             AND environment_id = :environment_id \
             ORDER BY number DESC LIMIT 1",
            service_id = service_environment.service_id,
            environment_id = service_environment.environment_id
        ),
    };
    let plan = service.store.read().value::<Option<String>>(plan).await?.flatten();
    // A plan that this version cannot parse gives no warnings.
    let mismatches = plan.and_then(|text| deployments::read_plan(Some(&text)).ok()).map(|plan| plan.mismatches);
    Ok(mismatches.unwrap_or_default().iter().map(version_warning).collect())
}
