//! The environments that the deletion of a service or project affects. It requires the permission to deploy to each.

use capsule_bus::{Context, Tenant};
use capsule_contracts::access::EnvironmentKind;
use capsule_contracts::deploy::{CloseService, ListServiceEnvironments};
use capsule_contracts::project::Location;
use capsule_contracts::{Problem, Uuid};
use capsule_store::{FromRow, Scope, Transaction, scoped, unscoped};

use crate::{ProjectService, environments};

#[derive(FromRow)]
struct Owner {
    organization_id: Uuid,
    project_id: Uuid,
}

#[derive(FromRow)]
struct Row {
    id: Uuid,
    kind: String,
}

/// Locates a service, with the kinds of the environments it runs in, which the deploy service provides.
pub async fn service(projects: &ProjectService, id: Uuid) -> Result<Option<Location>, Problem> {
    let owner = unscoped!("finds out whose it is", "SELECT organization_id, project_id FROM services WHERE id = :id", id);
    let Some(owner) = projects.store.read().first::<Owner>(owner).await? else { return Ok(None) };
    let ask = ListServiceEnvironments { service_id: id };
    let runs_in = projects.bus.request(&Context::background(crate::NAME), &ask).await?.environment_ids;
    let all = unscoped!(
        "finds out where it runs",
        "SELECT id, kind FROM environments WHERE project_id = :project_id",
        project_id = owner.project_id
    );
    let all = projects.store.read().all::<Row>(all).await?;
    let kinds = all.iter().filter(|row| runs_in.contains(&row.id)).map(|row| environments::parse_kind(&row.kind));
    Ok(Some(Location { environments: distinct(kinds)?, ..Location::in_organization(owner.organization_id) }))
}

/// Locates a project, with the kinds of all its environments.
pub async fn project(projects: &ProjectService, id: Uuid) -> Result<Option<Location>, Problem> {
    let owner = unscoped!("finds out whose it is", "SELECT organization_id, id AS project_id FROM projects WHERE id = :id", id);
    let Some(owner) = projects.store.read().first::<Owner>(owner).await? else { return Ok(None) };
    let all = unscoped!("finds out what is in it", "SELECT id, kind FROM environments WHERE project_id = :id", id);
    let all = projects.store.read().all::<Row>(all).await?;
    let kinds = all.iter().map(|row| environments::parse_kind(&row.kind));
    Ok(Some(Location { environments: distinct(kinds)?, ..Location::in_organization(owner.organization_id) }))
}

fn distinct(kinds: impl Iterator<Item = Result<EnvironmentKind, Problem>>) -> Result<Vec<EnvironmentKind>, Problem> {
    Ok(kinds.collect::<Result<std::collections::BTreeSet<_>, _>>()?.into_iter().collect())
}

/// Closes a service to deployments before it is deleted. A deployment may have begun since access was checked, so the
/// deploy service rejects the request if the service runs in an environment that the caller may not deploy to.
pub async fn close_service(
    projects: &ProjectService,
    context: &Context,
    tenant: &Tenant,
    service: Uuid,
    project: Uuid,
) -> Result<(), Problem> {
    let all =
        scoped!(tenant, "SELECT id, kind FROM environments WHERE organization_id = :tenant AND project_id = :project", project);
    let mut environment_ids = Vec::new();
    for row in projects.store.read().all::<Row>(all).await? {
        if tenant.check(environments::parse_kind(&row.kind)?.deploy_permission()).is_ok() {
            environment_ids.push(row.id);
        }
    }
    let close = CloseService { organization_id: tenant.organization(), service_id: service, environment_ids };
    projects.bus.request(&context.as_service(crate::NAME), &close).await?;
    Ok(())
}

/// Checks again, in the transaction that deletes a project, that the caller may deploy to all of its environments.
pub async fn check_project(tx: &Transaction<'_>, tenant: &Tenant, project: Uuid) -> Result<(), Problem> {
    let all =
        scoped!(tenant, "SELECT id, kind FROM environments WHERE organization_id = :tenant AND project_id = :project", project);
    for row in tx.read().all::<Row>(all).await? {
        tenant.check(environments::parse_kind(&row.kind)?.deploy_permission())?;
    }
    Ok(())
}
