//! Requests of other services: the owner of a resource, and the configuration of a deployment.

use std::sync::Arc;

use capsule_bus::{Call, Service};
use capsule_contracts::project::{Configuration, GetConfiguration, Locate, Location};
use capsule_contracts::{Problem, Uuid};
use capsule_store::{FromRow, unscoped};

use crate::{ProjectService, environments, variables};

#[derive(FromRow)]
struct Row {
    organization_id: Uuid,
    project_id: Uuid,
    service_name: String,
    environment_id: Uuid,
    environment_kind: String,
    archived_at: Option<i64>,
}

pub async fn get_configuration(projects: Arc<ProjectService>, call: Call<GetConfiguration>) -> Result<Configuration, Problem> {
    let row = unscoped!(
        "asked by a service that authorized its own caller",
        "SELECT s.organization_id, s.project_id, s.name AS service_name, e.id AS environment_id, e.kind AS environment_kind, \
         p.archived_at \
         FROM services s JOIN projects p ON p.id = s.project_id JOIN environments e ON e.project_id = s.project_id \
         WHERE s.id = :id AND e.name = :name",
        id = call.message.service_id,
        name = call.message.environment.as_str()
    );
    let row = projects.store.read().first::<Row>(row).await?.ok_or_else(|| Problem::not_found("service in that environment"))?;
    let grant = call.grant.organization(row.organization_id, "a deployment takes its configuration");
    let (environment, secrets) = variables::decrypt_all(&projects, &grant, row.environment_id).await?;
    Ok(Configuration {
        organization_id: row.organization_id,
        project_id: row.project_id,
        service_id: call.message.service_id,
        service_name: row.service_name,
        environment_id: row.environment_id,
        environment_name: call.message.environment,
        environment_kind: environments::parse_kind(&row.environment_kind)?,
        archived: row.archived_at.is_some(),
        environment,
        secrets,
    })
}

pub async fn locate(projects: Arc<ProjectService>, call: Call<Locate>) -> Result<Location, Problem> {
    Service::locate(&*projects, &call.message.target).await?.ok_or_else(|| Problem::not_found(call.message.target.noun()))
}
