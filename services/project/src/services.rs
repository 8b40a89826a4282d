//! Services of a project.

use std::sync::Arc;

use capsule_bus::{Call, emit};
use capsule_contracts::list::PageQuery;
use capsule_contracts::project::{
    CreateService, DeleteService, GetService, ListServices, Service, ServiceRenamed, ServicesRemoved, UpdateService,
};
use capsule_contracts::{Empty, Page, Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Scope, Statement, page, scoped};

use crate::{ProjectService, quotas, reach, sort_key};

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
    let query = PageQuery::of(&call.message)?;
    let rows = page!(
        query,
        scoped &call.grant,
        "SELECT id, organization_id, project_id, name, created_at FROM services WHERE organization_id = :tenant AND project_id = :project \
         AND substr(name, 1, length(:name_prefix)) = :name_prefix",
        "id" uuid,
        ["created_at" => "created_at" integer, "name" => "name" text],
        project = call.message.project_id,
        name_prefix = call.message.name_prefix.unwrap_or_default()
    );
    let rows = projects.store.read().all::<Row>(rows?).await?;
    Ok(query.page(rows, |row| (sort_key(&query, &row.name, row.created_at), row.id)).map(Service::from))
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

fn select(scope: &impl Scope, id: Uuid) -> Statement {
    scoped!(
        scope,
        "SELECT id, organization_id, project_id, name, created_at FROM services WHERE organization_id = :tenant AND id = :id",
        id
    )
}

fn found(row: Option<Row>) -> Result<Service, Problem> {
    row.map(Service::from).ok_or_else(|| Problem::not_found("service"))
}

async fn get(projects: &ProjectService, scope: &impl Scope, id: Uuid) -> Result<Service, Problem> {
    found(projects.store.read().first(select(scope, id)).await?)
}

pub async fn get_service(projects: Arc<ProjectService>, call: Call<GetService>) -> Result<Service, Problem> {
    get(&projects, &call.grant, call.message.id).await
}

pub async fn update_service(projects: Arc<ProjectService>, call: Call<UpdateService>) -> Result<Service, Problem> {
    let Call { message, grant, context } = call;
    let tx = projects.store.begin().await?;
    let mut service = found(tx.read().first(select(&grant, message.id)).await?)?;
    context.check_if_match(&service)?;
    if service.name == message.name {
        return Ok(service);
    }
    service.name = message.name;
    tx.run(scoped!(
        &grant,
        "UPDATE services SET name = :name WHERE organization_id = :tenant AND id = :id",
        name = service.name.as_str(),
        id = service.id
    ))
    .await?;
    let renamed = ServiceRenamed { organization_id: service.organization_id, service_id: service.id, name: service.name.clone() };
    emit(&tx, &context, &renamed).await?;
    tx.commit().await?;
    Ok(service)
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
