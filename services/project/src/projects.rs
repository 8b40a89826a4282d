//! Projects: create, list, get, rename, archive, delete.

use std::sync::Arc;

use capsule_bus::{Call, Context, Delivery, emit};
use capsule_contracts::access::EnvironmentKind;
use capsule_contracts::list::PageQuery;
use capsule_contracts::message::to_label;
use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::project::{
    ArchiveOrganization, ArchiveProject, CountProjects, CreateProject, DeleteProject, GetProject, ListProjects, Project,
    ProjectCreated, RestoreProject, ServicesRemoved, UpdateProject,
};
use capsule_contracts::{Count, Empty, Page, Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Scope, Statement, Transaction, page, scoped};

use crate::{ProjectService, environments, quotas, reach, sort_key};

#[derive(FromRow)]
struct Row {
    id: Uuid,
    organization_id: Uuid,
    name: String,
    slug: String,
    archived_at: Option<i64>,
    created_at: i64,
}

impl From<Row> for Project {
    fn from(row: Row) -> Self {
        Self {
            id: row.id,
            organization_id: row.organization_id,
            name: row.name,
            slug: row.slug,
            archived: row.archived_at.is_some(),
            created_at: Timestamp(row.created_at),
        }
    }
}

pub async fn list_projects(projects: Arc<ProjectService>, call: Call<ListProjects>) -> Result<Page<Project>, Problem> {
    let query = PageQuery::of(&call.message)?;
    let rows = page!(
        query,
        scoped &call.grant,
        "SELECT id, organization_id, name, slug, archived_at, created_at FROM projects WHERE organization_id = :tenant \
         AND substr(name, 1, length(:name_prefix)) = :name_prefix AND (:any OR (archived_at IS NOT NULL) = :archived)",
        "id" uuid,
        ["created_at" => "created_at" integer, "name" => "name" text],
        name_prefix = call.message.name_prefix.unwrap_or_default(),
        any = call.message.archived.is_none(),
        archived = call.message.archived.unwrap_or_default()
    );
    let rows = projects.store.read().all::<Row>(rows?).await?;
    Ok(query.page(rows, |row| (sort_key(&query, &row.name, row.created_at), row.id)).map(Project::from))
}

pub async fn create_project(projects: Arc<ProjectService>, call: Call<CreateProject>) -> Result<Project, Problem> {
    let Call { message, grant, context } = call;
    let project = Project {
        id: new_id(),
        organization_id: grant.organization(),
        slug: message.slug.unwrap_or_else(|| to_label(&message.name, "project")),
        name: message.name.trim().to_owned(),
        archived: false,
        created_at: Timestamp::now(),
    };
    let limits = capsule_bus::quotas(&*projects, project.organization_id).await?;
    let tx = projects.store.begin().await?;
    quotas::check_another_project(&tx, &grant, &limits).await?;
    tx.run(scoped!(
        &grant,
        "INSERT INTO projects (id, organization_id, name, slug, created_at) VALUES (:id, :tenant, :name, :slug, :created_at)",
        id = project.id,
        name = project.name.as_str(),
        slug = project.slug.as_str(),
        created_at = project.created_at.0
    ))
    .await?;
    environments::insert(&tx, &grant, project.id, "production".into(), EnvironmentKind::Production).await?;
    let event = ProjectCreated { organization_id: project.organization_id, project_id: project.id, name: project.name.clone() };
    emit(&tx, &context, &event).await?;
    tx.commit().await?;
    Ok(project)
}

fn select(scope: &impl Scope, id: Uuid) -> Statement {
    scoped!(
        scope,
        "SELECT id, organization_id, name, slug, archived_at, created_at FROM projects WHERE organization_id = :tenant \
         AND id = :id",
        id
    )
}

fn found(row: Option<Row>) -> Result<Project, Problem> {
    row.map(Project::from).ok_or_else(|| Problem::not_found("project"))
}

async fn get(projects: &ProjectService, scope: &impl Scope, id: Uuid) -> Result<Project, Problem> {
    found(projects.store.read().first(select(scope, id)).await?)
}

pub async fn get_project(projects: Arc<ProjectService>, call: Call<GetProject>) -> Result<Project, Problem> {
    get(&projects, &call.grant, call.message.id).await
}

pub async fn update_project(projects: Arc<ProjectService>, call: Call<UpdateProject>) -> Result<Project, Problem> {
    let Call { message, grant, context } = call;
    let tx = projects.store.begin().await?;
    let mut project = found(tx.read().first(select(&grant, message.id)).await?)?;
    context.check_if_match(&project)?;
    if let Some(name) = message.name {
        name.trim().clone_into(&mut project.name);
        tx.run(scoped!(
            &grant,
            "UPDATE projects SET name = :name WHERE organization_id = :tenant AND id = :id",
            name = project.name.as_str(),
            id = project.id
        ))
        .await?;
        tx.commit().await?;
    }
    Ok(project)
}

async fn set_archived(projects: &ProjectService, scope: &impl Scope, id: Uuid, at: Option<i64>) -> Result<Project, Problem> {
    let tx = projects.store.begin().await?;
    tx.run(scoped!(scope, "UPDATE projects SET archived_at = :at WHERE organization_id = :tenant AND id = :id", at, id)).await?;
    tx.commit().await?;
    get(projects, scope, id).await
}

pub async fn archive_project(projects: Arc<ProjectService>, call: Call<ArchiveProject>) -> Result<Project, Problem> {
    set_archived(&projects, &call.grant, call.message.id, Some(Timestamp::now().0)).await
}

pub async fn restore_project(projects: Arc<ProjectService>, call: Call<RestoreProject>) -> Result<Project, Problem> {
    set_archived(&projects, &call.grant, call.message.id, None).await
}

pub async fn delete_project(projects: Arc<ProjectService>, call: Call<DeleteProject>) -> Result<Empty, Problem> {
    let tx = projects.store.begin().await?;
    reach::check_project(&tx, &call.grant, call.message.id).await?;
    remove(&tx, &call.context, &call.grant, call.message.id).await?;
    tx.commit().await?;
    Ok(Empty {})
}

async fn remove(tx: &Transaction<'_>, context: &Context, scope: &impl Scope, id: Uuid) -> Result<(), Problem> {
    tx.run(scoped!(scope, "DELETE FROM projects WHERE organization_id = :tenant AND id = :id", id)).await?;
    let event = ServicesRemoved { organization_id: scope.organization(), project_id: id, service_id: None, environment_id: None };
    emit(tx, context, &event).await
}

pub async fn archive_organization(projects: Arc<ProjectService>, call: Call<ArchiveOrganization>) -> Result<Empty, Problem> {
    let grant = call.grant.organization(call.message.organization_id, "the organization is being deleted");
    let tx = projects.store.begin().await?;
    tx.run(match call.message.archived {
        true => scoped!(
            &grant,
            "UPDATE projects SET archived_at = :archived_at, closed = TRUE WHERE organization_id = :tenant \
             AND archived_at IS NULL",
            archived_at = Timestamp::now().0
        ),
        // Projects that were archived before stay archived.
        false => {
            scoped!(&grant, "UPDATE projects SET archived_at = NULL, closed = FALSE WHERE organization_id = :tenant AND closed")
        }
    })
    .await?;
    tx.commit().await?;
    Ok(Empty {})
}

pub async fn count_projects(projects: Arc<ProjectService>, call: Call<CountProjects>) -> Result<Count, Problem> {
    let grant = call.grant.organization(call.message.organization_id, "the organization is being deleted");
    let count = scoped!(&grant, "SELECT COUNT(*) FROM projects WHERE organization_id = :tenant");
    Ok(Count { count: projects.store.read().value::<i64>(count).await?.unwrap_or_default() })
}

/// Deletes every project of a deleted organization.
pub async fn remove_all(tx: &Transaction<'_>, delivery: Delivery<OrganizationDeleted>) -> Result<(), Problem> {
    let grant = delivery.system.organization(delivery.event.organization_id, "the organization was deleted");
    let rows = scoped!(
        &grant,
        "SELECT id, organization_id, name, slug, archived_at, created_at FROM projects WHERE organization_id = :tenant"
    );
    for row in tx.read().all::<Row>(rows).await? {
        remove(tx, &delivery.context, &grant, row.id).await?;
    }
    Ok(())
}
