//! Services of a project.

use std::sync::Arc;

use capsule_bus::{Call, emit};
use capsule_contracts::project::{CreateService, DeleteService, GetService, ListServices, Service, ServicesRemoved};
use capsule_contracts::{Empty, Page, Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Scope, scoped};

use crate::{ProjectService, quotas, reach};

#[derive(FromRow)]
struct Row {
    id: Uuid,
    organization_id: Uuid,
    project_id: Uuid,
    name: String,
    created_at: i64,
}

impl From<Row> for Service {
    fn from(row: Row) -> Self {
        Self {
            id: row.id,
            organization_id: row.organization_id,
            project_id: row.project_id,
            name: row.name,
            created_at: Timestamp(row.created_at),
        }
    }
}

pub async fn list_services(projects: Arc<ProjectService>, call: Call<ListServices>) -> Result<Page<Service>, Problem> {
    let rows = scoped!(
        &call.grant,
        "SELECT id, organization_id, project_id, name, created_at FROM services WHERE organization_id = :tenant \
         AND project_id = :project_id ORDER BY id",
        project_id = call.message.project_id
    );
    Ok(Page::whole(projects.store.read().all::<Row>(rows).await?.into_iter().map(Service::from).collect()))
}

pub async fn create_service(projects: Arc<ProjectService>, call: Call<CreateService>) -> Result<Service, Problem> {
    let Call { message, grant, .. } = call;
    let service = Service {
        id: new_id(),
        organization_id: grant.organization(),
        project_id: message.project_id,
        name: message.name,
        created_at: Timestamp::now(),
    };
    let limits = capsule_bus::quotas(&*projects, service.organization_id).await?;
    let tx = projects.store.begin().await?;
    quotas::check_another_service(&tx, &grant, &limits).await?;
    tx.run(scoped!(
        &grant,
        "INSERT INTO services (id, organization_id, project_id, name, created_at) \
         VALUES (:id, :tenant, :project_id, :name, :created_at)",
        id = service.id,
        project_id = service.project_id,
        name = service.name.as_str(),
        created_at = service.created_at.0
    ))
    .await?;
    tx.commit().await?;
    Ok(service)
}

async fn get(projects: &ProjectService, scope: &impl Scope, id: Uuid) -> Result<Service, Problem> {
    let row = scoped!(
        scope,
        "SELECT id, organization_id, project_id, name, created_at FROM services WHERE organization_id = :tenant AND id = :id",
        id
    );
    projects.store.read().first::<Row>(row).await?.map(Service::from).ok_or_else(|| Problem::not_found("service"))
}

pub async fn get_service(projects: Arc<ProjectService>, call: Call<GetService>) -> Result<Service, Problem> {
    get(&projects, &call.grant, call.message.id).await
}

pub async fn delete_service(projects: Arc<ProjectService>, call: Call<DeleteService>) -> Result<Empty, Problem> {
    let service = get(&projects, &call.grant, call.message.id).await?;
    reach::close_service(&projects, &call.context, &call.grant, service.id, service.project_id).await?;
    let tx = projects.store.begin().await?;
    tx.run(scoped!(&call.grant, "DELETE FROM services WHERE organization_id = :tenant AND id = :id", id = service.id)).await?;
    let event = ServicesRemoved {
        organization_id: service.organization_id,
        project_id: service.project_id,
        service_id: Some(service.id),
        environment_id: None,
    };
    emit(&tx, &call.context, &event).await?;
    tx.commit().await?;
    Ok(Empty {})
}
