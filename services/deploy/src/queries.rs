//! What users look at: deployments, their steps, and what a service is doing.

use std::sync::Arc;

use capsule_bus::Call;
use capsule_contracts::deploy::{
    Deployment, DeploymentEvent, DiskUsage, GetDeployment, GetServiceState, Instance, ListDeploymentEvents, ListDeployments,
    ServiceState,
};
use capsule_contracts::{Page, Problem, Timestamp, Uuid};
use capsule_runtime::ShimState;
use capsule_store::{Scope, scoped};
use sea_orm::FromQueryResult;

use crate::deployments::{self, Row};
use crate::phases::building::version_warning;
use crate::placements::Placement;
use crate::{Deploys, instances, placements, texts};

pub async fn list_deployments(deploys: Arc<Deploys>, call: Call<ListDeployments>) -> Result<Page<Deployment>, Problem> {
    let message = call.message;
    let limit = i64::from(message.limit.unwrap_or(20));
    let before = match &message.cursor {
        Some(cursor) => cursor.parse::<i64>().map_err(|_| Problem::invalid_field("cursor", "is not one that a page gave"))?,
        None => i64::MAX,
    };
    // Ids sort by the time they were made; a cursor is the time of the last one shown.
    let rows = scoped!(
        &call.proof,
        "SELECT d.* FROM deployments d JOIN placements p ON p.service_id = d.service_id AND p.environment_id = d.environment_id \
         WHERE d.organization_id = :tenant AND d.service_id = $1 AND ($2 = '' OR p.environment_name = $2) AND d.created_at < $3 \
         ORDER BY d.created_at DESC LIMIT $4",
        message.service_id,
        message.environment.unwrap_or_default(),
        before,
        limit + 1
    );
    let mut rows = deploys.store.read().all::<Row>(rows).await?;
    let more = rows.len() as i64 > limit;
    rows.truncate(usize::try_from(limit).unwrap_or(20));
    let next_cursor = rows.last().filter(|_| more).map(|row| row.created_at.to_string());
    let placements = placements::of_service(&deploys, &call.proof, message.service_id).await?;
    let items = rows.iter().filter_map(|row| {
        let placement = placements.iter().find(|placement| placement.environment_id == row.environment_id)?;
        Some(row.view(&deploys, placement))
    });
    Ok(Page { items: items.collect::<Result<_, _>>()?, next_cursor })
}

pub async fn get_deployment(deploys: Arc<Deploys>, call: Call<GetDeployment>) -> Result<Deployment, Problem> {
    view(&deploys, &call.proof, call.message.id).await
}

async fn view(deploys: &Deploys, scope: &impl Scope, id: Uuid) -> Result<Deployment, Problem> {
    let row = deployments::get(deploys, scope, id).await?;
    let placement = placements::get(deploys, scope, row.service_id, row.environment_id).await?;
    row.view(deploys, &placement)
}

#[derive(FromQueryResult)]
struct EventRow {
    at: i64,
    status: String,
    phase: String,
    message: String,
}

pub async fn list_deployment_events(
    deploys: Arc<Deploys>,
    call: Call<ListDeploymentEvents>,
) -> Result<Page<DeploymentEvent>, Problem> {
    let rows = scoped!(
        &call.proof,
        "SELECT at, status, phase, message FROM deployment_events WHERE organization_id = :tenant AND deployment_id = $1 ORDER BY at",
        call.message.id
    );
    let rows = deploys.store.read().all::<EventRow>(rows).await?;
    let events = rows.into_iter().map(|row| {
        Ok(DeploymentEvent {
            at: Timestamp(row.at),
            status: row.status.parse()?,
            phase: row.phase.parse()?,
            message: row.message,
        })
    });
    Ok(Page::whole(events.collect::<Result<_, Problem>>()?))
}

pub async fn get_service_state(deploys: Arc<Deploys>, call: Call<GetServiceState>) -> Result<ServiceState, Problem> {
    state(&deploys, &call.proof, call.message.id, &call.message.environment).await
}

/// What a service is doing in an environment, as its shims say.
pub async fn state(deploys: &Deploys, scope: &impl Scope, service_id: Uuid, environment: &str) -> Result<ServiceState, Problem> {
    let Some(placement) = placements::by_name(deploys, scope, service_id, environment).await? else {
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
    for row in instances::of(deploys, &placement).await?.into_iter().filter(|row| row.role != "gone") {
        let status = deploys.runtime.status(&row.id).await;
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
                .map(|text| texts::without_paths(deploys, text)),
            disk: status.as_ref().and_then(|status| status.disk.as_ref()).map(|disk| DiskUsage {
                bytes: disk.usage.bytes,
                limit_bytes: disk.limit.bytes,
                inodes: disk.usage.inodes,
                limit_inodes: disk.limit.inodes,
                enforcement: disk.enforcement.name().into(),
            }),
            warnings: status.map_or_else(Vec::new, |status| {
                status.warnings.iter().map(|warning| texts::without_paths(deploys, warning)).collect()
            }),
        });
    }
    let active = match placement.active_deployment_id {
        Some(id) => Some(view(deploys, scope, id).await?),
        None => None,
    };
    let serving: Vec<_> = shown.iter().filter(|instance| matches!(instance.state.as_str(), "running" | "crashed")).collect();
    let state = if placement.wanted == "stopped" {
        "stopped"
    } else if active.is_none() {
        if shown.is_empty() { "not_deployed" } else { "starting" }
    } else if serving.iter().any(|instance| instance.state == "crashed") {
        "crashed"
    } else {
        "running"
    };
    let warnings = warnings(deploys, scope, &placement).await?;
    Ok(ServiceState {
        service_id,
        environment_name: placement.environment_name,
        url: deploys.url(&placement.host),
        state: state.into(),
        active,
        instances: shown,
        warnings,
    })
}

/// What the plan of the deployment that serves says of versions; of the newest, where none serves.
async fn warnings(deploys: &Deploys, scope: &impl Scope, placement: &Placement) -> Result<Vec<String>, Problem> {
    let plan = match placement.active_deployment_id {
        Some(id) => scoped!(scope, "SELECT plan FROM deployments WHERE organization_id = :tenant AND id = $1", id),
        None => scoped!(
            scope,
            "SELECT plan FROM deployments WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 \
             ORDER BY number DESC LIMIT 1",
            placement.service_id,
            placement.environment_id
        ),
    };
    let plan = deploys.store.read().value::<Option<String>>(plan).await?.flatten();
    // A plan that cannot be read any more warns of nothing.
    let mismatches = plan.and_then(|text| deployments::read_plan(Some(&text)).ok()).map(|plan| plan.mismatches);
    Ok(mismatches.unwrap_or_default().iter().map(version_warning).collect())
}
