//! Environments of a project.

use std::sync::Arc;

use capsule_bus::{Call, emit};
use capsule_contracts::access::EnvironmentKind;
use capsule_contracts::list::PageQuery;
use capsule_contracts::project::{
    CreateEnvironment, DeleteEnvironment, Environment, GetEnvironment, ListEnvironments, ServicesRemoved, UpdateEnvironment,
};
use capsule_contracts::{Empty, Page, Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Scope, Statement, Transaction, page, scoped};

use crate::{ProjectService, kind_to_text, quotas, sort_key};

#[derive(FromRow)]
struct Row {
    id: Uuid,
    project_id: Uuid,
    name: String,
    kind: String,
    created_at: i64,
}

impl TryFrom<Row> for Environment {
    type Error = Problem;

    fn try_from(row: Row) -> Result<Self, Problem> {
        Ok(Self {
            id: row.id,
            project_id: row.project_id,
            name: row.name,
            kind: parse_kind(&row.kind)?,
            created_at: Timestamp(row.created_at),
        })
    }
}

/// Parses the stored text of a kind of environment.
pub fn parse_kind(text: &str) -> Result<EnvironmentKind, Problem> {
    serde_json::from_value(serde_json::Value::String(text.into())).map_err(|_| Problem::internal())
}

/// Creates an environment of a project.
pub async fn insert(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    project_id: Uuid,
    name: String,
    kind: EnvironmentKind,
) -> Result<Environment, Problem> {
    let environment = Environment { id: new_id(), project_id, name, kind, created_at: Timestamp::now() };
    tx.run(scoped!(
        scope,
        "INSERT INTO environments (id, organization_id, project_id, name, kind, created_at) \
         VALUES (:id, :tenant, :project_id, :name, :kind, :created_at)",
        id = environment.id,
        project_id = environment.project_id,
        name = environment.name.as_str(),
        kind = kind_to_text(kind),
        created_at = environment.created_at.0
    ))
    .await?;
    Ok(environment)
}

pub async fn list_environments(
    projects: Arc<ProjectService>,
    call: Call<ListEnvironments>,
) -> Result<Page<Environment>, Problem> {
    let query = PageQuery::of(&call.message)?;
    let rows = page!(
        query,
        scoped &call.grant,
        "SELECT id, project_id, name, kind, created_at FROM environments WHERE organization_id = :tenant AND project_id = :project \
         AND substr(name, 1, length(:name_prefix)) = :name_prefix AND (:kind = '' OR kind = :kind)",
        "id" uuid,
        ["created_at" => "created_at" integer, "name" => "name" text],
        project = call.message.id,
        name_prefix = call.message.name_prefix.unwrap_or_default(),
        kind = call.message.kind.map_or("", kind_to_text)
    );
    let rows = projects.store.read().all::<Row>(rows?).await?;
    query.page(rows, |row| (sort_key(&query, &row.name, row.created_at), row.id)).try_map(TryInto::try_into)
}

pub async fn create_environment(projects: Arc<ProjectService>, call: Call<CreateEnvironment>) -> Result<Environment, Problem> {
    let Call { message, grant, .. } = call;
    let limits = capsule_bus::quotas(&*projects, grant.organization()).await?;
    let tx = projects.store.begin().await?;
    quotas::check_another_environment(&tx, &grant, &limits, message.id).await?;
    let environment = insert(&tx, &grant, message.id, message.name, message.kind).await?;
    tx.commit().await?;
    Ok(environment)
}

fn select(scope: &impl Scope, id: Uuid) -> Statement {
    scoped!(
        scope,
        "SELECT id, project_id, name, kind, created_at FROM environments WHERE organization_id = :tenant AND id = :id",
        id
    )
}

fn found(row: Option<Row>) -> Result<Environment, Problem> {
    row.ok_or_else(|| Problem::not_found("environment"))?.try_into()
}

async fn get(projects: &ProjectService, scope: &impl Scope, id: Uuid) -> Result<Environment, Problem> {
    found(projects.store.read().first(select(scope, id)).await?)
}

pub async fn get_environment(projects: Arc<ProjectService>, call: Call<GetEnvironment>) -> Result<Environment, Problem> {
    get(&projects, &call.grant, call.message.id).await
}

pub async fn update_environment(projects: Arc<ProjectService>, call: Call<UpdateEnvironment>) -> Result<Environment, Problem> {
    let Call { message, grant, context } = call;
    let tx = projects.store.begin().await?;
    let mut environment = found(tx.read().first(select(&grant, message.id)).await?)?;
    // The kind may have changed since the dispatcher checked the rule.
    for permission in [environment.kind, message.kind].map(EnvironmentKind::deploy_permission) {
        if !grant.role().allows(permission) {
            return Err(Problem::missing_permission(permission, grant.role()));
        }
    }
    context.check_if_match(&environment)?;
    if message.name != environment.name {
        return Err(Problem::conflict("The name of an environment cannot change: it is part of host names.")
            .hint("Create another environment, deploy to it, and delete this one."));
    }
    environment.kind = message.kind;
    tx.run(scoped!(
        &grant,
        "UPDATE environments SET kind = :kind WHERE organization_id = :tenant AND id = :id",
        kind = kind_to_text(environment.kind),
        id = environment.id
    ))
    .await?;
    tx.commit().await?;
    Ok(environment)
}

pub async fn delete_environment(projects: Arc<ProjectService>, call: Call<DeleteEnvironment>) -> Result<Empty, Problem> {
    let environment = get(&projects, &call.grant, call.message.id).await?;
    let tx = projects.store.begin().await?;
    tx.run(scoped!(&call.grant, "DELETE FROM environments WHERE organization_id = :tenant AND id = :id", id = environment.id))
        .await?;
    let event = ServicesRemoved {
        organization_id: call.grant.organization(),
        project_id: environment.project_id,
        service_id: None,
        environment_id: Some(environment.id),
    };
    emit(&tx, &call.context, &event).await?;
    tx.commit().await?;
    Ok(Empty {})
}
