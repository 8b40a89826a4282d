//! Creates the project, environment and service of a deployment. Everything is checked before anything is created: a
//! user without permission to deploy changes nothing.

use std::collections::HashSet;

use anyhow::bail;
use capsule_contracts::Permission;
use capsule_contracts::access::EnvironmentKind;
use capsule_contracts::organization::{Organization, RolePermissions};
use capsule_contracts::project::{Environment, Project, Service};
use serde_json::json;

use super::service::{self, ServiceEnvironment, announce};
use crate::arguments::Deploy;
use crate::client::Client;
use crate::folder::Selection;
use crate::terminal::{Failure, Terminal, can_prompt, confirm};

/// The environment that every new project has.
const FIRST_ENVIRONMENT: &str = "production";

/// The resources of a deployment that exist already.
struct Existing {
    organization: Organization,
    project: Option<Project>,
    environments: Vec<Environment>,
    service: Option<Service>,
}

/// Finds the service and its environment, and creates what is missing where the user agrees.
///
/// # Errors
/// When something is missing and may not be created, or a permission is missing.
pub fn prepare(
    client: &mut Client,
    selection: &Selection,
    deploy: &Deploy,
    terminal: Terminal,
) -> anyhow::Result<ServiceEnvironment> {
    let names = &selection.names;
    let existing = find_existing(client, selection, terminal)?;
    if let Some(project) = existing.project.as_ref().filter(|project| project.archived) {
        return Err(Failure::new("archived", format!("The project {} is archived.", project.slug))
            .hint("Restore the project, then deploy again.")
            .into());
    }
    let kind = environment_kind(&existing, &names.environment);
    if kind.is_none() && !deploy.create {
        let missing = match &existing.project {
            Some(project) => service::no_environment(&existing.environments, &project.slug, &names.environment),
            None => Failure::new(
                "no_such_environment",
                format!("The new project {} will have only the environment {FIRST_ENVIRONMENT}.", names.project),
            ),
        };
        return Err(missing.hint(format!("Use --create to create the environment {}.", names.environment)).into());
    }
    let is_confirmed = deploy.yes || selection.was_prompted;
    if let Some(missing) = missing(client, selection, &existing)? {
        let question = format!("{} Create it in {}?", missing.message.trim_end_matches('.'), existing.organization.slug);
        let may_create = is_confirmed || (can_prompt() && confirm(&question, false)?);
        if !may_create {
            return Err(missing.into());
        }
    }
    check_permissions(client, &existing, kind.unwrap_or_else(|| kind_of(&names.environment)), selection)?;
    announce(client, &existing.organization, &names.project, &names.service, Some(&names.environment), terminal);
    create(client, existing, selection, terminal)
}

fn find_existing(client: &mut Client, selection: &Selection, terminal: Terminal) -> anyhow::Result<Existing> {
    let organization = service::organization(client, &selection.names, terminal)?;
    let projects = service::projects(client, &organization)?;
    let Some(project) = projects.into_iter().find(|project| project.slug == selection.names.project) else {
        return Ok(Existing { organization, project: None, environments: Vec::new(), service: None });
    };
    let environments = service::environments(client, &project)?;
    let services = service::services(client, &project)?;
    let service = services.into_iter().find(|service| service.name == selection.names.service);
    Ok(Existing { organization, project: Some(project), environments, service })
}

/// The kind of the environment, if it exists or is created with the project.
fn environment_kind(existing: &Existing, name: &str) -> Option<EnvironmentKind> {
    match existing.environments.iter().find(|environment| environment.name == name) {
        Some(environment) => Some(environment.kind),
        None => (existing.project.is_none() && name == FIRST_ENVIRONMENT).then_some(EnvironmentKind::Production),
    }
}

/// The kind that an environment of this name is created with.
fn kind_of(name: &str) -> EnvironmentKind {
    match name {
        "production" => EnvironmentKind::Production,
        "staging" => EnvironmentKind::Staging,
        "development" | "dev" => EnvironmentKind::Development,
        _ => EnvironmentKind::Custom,
    }
}

/// The error for a missing project, or else for a missing service. `None` if both exist.
fn missing(client: &mut Client, selection: &Selection, existing: &Existing) -> anyhow::Result<Option<Failure>> {
    let names = &selection.names;
    let missing = match (&existing.project, &existing.service) {
        (None, _) => {
            let projects = service::projects(client, &existing.organization)?;
            let elsewhere = service::organizations_with_project(client, names, &existing.organization)?;
            let missing = service::no_project(client, names, &existing.organization, &projects, &elsewhere);
            if elsewhere.is_empty() { missing.hint("Use --yes to create it.") } else { missing }
        }
        (Some(project), None) => {
            let services = service::services(client, project)?;
            service::no_service(names, project, &services).hint("Use --yes to create it.")
        }
        (Some(_), Some(_)) => return Ok(None),
    };
    Ok(Some(missing))
}

/// Checks the permissions of the user's role, before anything is created or uploaded.
fn check_permissions(
    client: &mut Client,
    existing: &Existing,
    kind: EnvironmentKind,
    selection: &Selection,
) -> anyhow::Result<()> {
    let roles = client.list::<RolePermissions>("/permissions")?;
    let role = existing.organization.role;
    let Some(own) = roles.into_iter().find(|known| known.role == role) else {
        bail!("The server did not return the permissions of the role {}.", role.name());
    };
    let missing = missing_permissions(&own.permissions, existing.project.is_none(), kind);
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        "forbidden",
        format!(
            "You cannot deploy to {} of {}: you need {}, and your role in {} is {}. Nothing was created or uploaded.",
            selection.names.environment,
            selection.names.project,
            missing.join(" and "),
            existing.organization.slug,
            role.name()
        ),
    )
    .hint("Ask an owner or admin of the organization to deploy, or to change your role.")
    .into())
}

/// The permissions that a deployment needs and `permissions` does not contain.
fn missing_permissions(permissions: &[Permission], is_new_project: bool, kind: EnvironmentKind) -> Vec<&'static str> {
    let has: HashSet<Permission> = permissions.iter().copied().collect();
    let mut needed = vec![kind.deploy_permission(), Permission::ServiceManage];
    if is_new_project {
        needed.push(Permission::ProjectCreate);
    }
    needed.into_iter().filter(|permission| !has.contains(permission)).map(Permission::name).collect()
}

fn create(
    client: &mut Client,
    existing: Existing,
    selection: &Selection,
    terminal: Terminal,
) -> anyhow::Result<ServiceEnvironment> {
    let names = &selection.names;
    let Existing { organization, project, mut environments, service } = existing;
    let project = match project {
        Some(project) => project,
        None => {
            terminal.note(&format!("Creating the project {} in {}", names.project, organization.slug));
            let body = json!({"organization_id": organization.id, "name": names.project, "slug": names.project});
            let project: Project = client.post("/projects", &body)?;
            environments = service::environments(client, &project)?;
            project
        }
    };
    if !environments.iter().any(|environment| environment.name == names.environment) {
        terminal.note(&format!("Creating the environment {}", names.environment));
        let body = json!({"name": names.environment, "kind": kind_of(&names.environment)});
        environments.push(client.post(&format!("/projects/{}/environments", project.id), &body)?);
    }
    let service = match service {
        Some(service) => service,
        None => {
            terminal.note(&format!("Creating the service {}", names.service));
            client.post("/services", &json!({"project_id": project.id, "name": names.service}))?
        }
    };
    Ok(ServiceEnvironment { organization, project, service, environment: names.environment.clone(), environments })
}

#[cfg(test)]
mod tests {
    use super::{kind_of, missing_permissions};
    use capsule_contracts::{Permission, Role};

    #[test]
    fn permissions_that_the_deployment_needs_and_the_role_lacks_are_named() {
        let granted = |role: Role| Permission::ALL.into_iter().filter(|permission| role.allows(*permission)).collect::<Vec<_>>();
        let missing = |role, new, environment: &str| missing_permissions(&granted(role), new, kind_of(environment));
        assert_eq!(missing(Role::Developer, false, "production"), ["deploy:production"]);
        assert!(missing(Role::Developer, true, "staging").is_empty());
        assert!(missing(Role::Developer, false, "of-my-own").is_empty());
        assert_eq!(missing(Role::Viewer, true, "dev"), ["deploy:dev", "service:manage", "project:create"]);
        assert!(missing(Role::Admin, true, "production").is_empty());
    }
}
