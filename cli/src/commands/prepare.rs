//! What a deployment takes: everything is looked at first, then what is missing is created. Whoever may not deploy
//! leaves nothing behind.

use std::collections::HashSet;

use anyhow::bail;
use capsule_contracts::access::EnvironmentKind;
use capsule_contracts::organization::{Organization, RolePermissions};
use capsule_contracts::project::{Environment, Project, Service};
use capsule_contracts::{Page, Permission};
use serde_json::json;

use super::service::{self, Found, announce};
use crate::arguments::Deploy;
use crate::client::Client;
use crate::folder::Chosen;
use crate::terminal::{Failure, Terminal, can_ask, confirm};

/// The environment that comes with a project.
const FIRST_ENVIRONMENT: &str = "production";

/// What is there of what a deployment takes.
struct State {
    organization: Organization,
    project: Option<Project>,
    environments: Vec<Environment>,
    service: Option<Service>,
}

/// Finds the service and its environment, and creates what may be created.
pub fn prepare(client: &mut Client, chosen: &Chosen, deploy: &Deploy, terminal: Terminal) -> anyhow::Result<Found> {
    let wanted = &chosen.wanted;
    let state = look(client, chosen, terminal)?;
    if let Some(project) = state.project.as_ref().filter(|project| project.archived) {
        return Err(Failure::new("archived", format!("The project {} is archived.", project.slug))
            .hint("Restore it first.")
            .into());
    }
    let kind = environment_kind(&state, &wanted.environment);
    if kind.is_none() && !deploy.create {
        let missing = match &state.project {
            Some(project) => service::no_environment(&state.environments, &project.slug, &wanted.environment),
            None => Failure::new(
                "no_such_environment",
                format!("The project {} is new, and begins with the environment {FIRST_ENVIRONMENT}.", wanted.project),
            ),
        };
        return Err(missing.hint(format!("Give --create to create the environment {}.", wanted.environment)).into());
    }
    let is_willing = deploy.yes || chosen.was_asked;
    if let Some(missing) = missing(client, chosen, &state)? {
        let question = format!("{} Create it in {}?", missing.message.trim_end_matches('.'), state.organization.slug);
        let is_agreed = is_willing || (can_ask() && confirm(&question, false)?);
        if !is_agreed {
            return Err(missing.into());
        }
    }
    permitted(client, &state, kind.unwrap_or_else(|| kind_of(&wanted.environment)), chosen)?;
    announce(client, &state.organization, &wanted.project, &wanted.service, Some(&wanted.environment), terminal);
    create(client, state, chosen, terminal)
}

fn look(client: &mut Client, chosen: &Chosen, terminal: Terminal) -> anyhow::Result<State> {
    let organization = service::organization(client, &chosen.wanted, terminal)?;
    let projects = service::projects(client, &organization)?;
    let Some(project) = projects.into_iter().find(|project| project.slug == chosen.wanted.project) else {
        return Ok(State { organization, project: None, environments: Vec::new(), service: None });
    };
    let environments = service::environments(client, &project)?;
    let services = service::services(client, &project)?;
    let service = services.into_iter().find(|service| service.name == chosen.wanted.service);
    Ok(State { organization, project: Some(project), environments, service })
}

/// The kind of the environment, if it is there or comes with the project.
fn environment_kind(state: &State, name: &str) -> Option<EnvironmentKind> {
    match state.environments.iter().find(|environment| environment.name == name) {
        Some(environment) => Some(environment.kind),
        None => (state.project.is_none() && name == FIRST_ENVIRONMENT).then_some(EnvironmentKind::Production),
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

/// The project or else the service, if it is missing.
fn missing(client: &mut Client, chosen: &Chosen, state: &State) -> anyhow::Result<Option<Failure>> {
    let wanted = &chosen.wanted;
    let missing = match (&state.project, &state.service) {
        (None, _) => {
            let projects = service::projects(client, &state.organization)?;
            let elsewhere = service::organizations_with_project(client, wanted, &state.organization)?;
            let missing = service::no_project(client, wanted, &state.organization, &projects, &elsewhere);
            if elsewhere.is_empty() { missing.hint("Give --yes to create it.") } else { missing }
        }
        (Some(project), None) => {
            let services = service::services(client, project)?;
            service::no_service(wanted, project, &services).hint("Give --yes to create it.")
        }
        (Some(_), Some(_)) => return Ok(None),
    };
    Ok(Some(missing))
}

/// Asks the server what the person's role may do, before anything is created or uploaded.
fn permitted(client: &mut Client, state: &State, kind: EnvironmentKind, chosen: &Chosen) -> anyhow::Result<()> {
    let roles = client.get::<Page<RolePermissions>>("/permissions")?.items;
    let role = state.organization.role;
    let Some(own) = roles.into_iter().find(|known| known.role == role) else {
        bail!("The server does not tell what the role {} may do.", role.name());
    };
    let missing = lacking(&own.permissions, state.project.is_none(), kind);
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        "forbidden",
        format!(
            "You cannot deploy to {} of {}: it takes {}, and your role in {} is {}. Nothing was created or uploaded.",
            chosen.wanted.environment,
            chosen.wanted.project,
            missing.join(" and "),
            state.organization.slug,
            role.name()
        ),
    )
    .hint("Ask an owner or admin of the organization.")
    .into())
}

/// What a deployment takes that is not among these.
fn lacking(permissions: &[Permission], is_new_project: bool, kind: EnvironmentKind) -> Vec<&'static str> {
    let has: HashSet<Permission> = permissions.iter().copied().collect();
    let mut needed = vec![kind.deploy_permission(), Permission::ServiceManage];
    if is_new_project {
        needed.push(Permission::ProjectCreate);
    }
    needed.into_iter().filter(|permission| !has.contains(permission)).map(Permission::name).collect()
}

fn create(client: &mut Client, state: State, chosen: &Chosen, terminal: Terminal) -> anyhow::Result<Found> {
    let wanted = &chosen.wanted;
    let State { organization, project, mut environments, service } = state;
    let project = match project {
        Some(project) => project,
        None => {
            terminal.say(&format!("Creating the project {} in {}", wanted.project, organization.slug));
            let body = json!({"organization_id": organization.id, "name": wanted.project, "slug": wanted.project});
            let project: Project = client.post("/projects", &body)?;
            environments = service::environments(client, &project)?;
            project
        }
    };
    if !environments.iter().any(|environment| environment.name == wanted.environment) {
        terminal.say(&format!("Creating the environment {}", wanted.environment));
        let body = json!({"name": wanted.environment, "kind": kind_of(&wanted.environment)});
        environments.push(client.post(&format!("/projects/{}/environments", project.id), &body)?);
    }
    let service = match service {
        Some(service) => service,
        None => {
            terminal.say(&format!("Creating the service {}", wanted.service));
            client.post("/services", &json!({"project_id": project.id, "name": wanted.service}))?
        }
    };
    Ok(Found { organization, project, service, environment: wanted.environment.clone(), environments })
}

#[cfg(test)]
mod tests {
    use super::{kind_of, lacking};
    use capsule_contracts::{Permission, Role};

    #[test]
    fn a_role_lacks_what_the_environment_takes() {
        let may = |role: Role| Permission::ALL.into_iter().filter(|permission| role.allows(*permission)).collect::<Vec<_>>();
        let lacks = |role, new, environment: &str| lacking(&may(role), new, kind_of(environment));
        assert_eq!(lacks(Role::Developer, false, "production"), ["deploy:production"]);
        assert!(lacks(Role::Developer, true, "staging").is_empty());
        assert!(lacks(Role::Developer, false, "of-my-own").is_empty());
        assert_eq!(lacks(Role::Viewer, true, "dev"), ["deploy:dev", "service:manage", "project:create"]);
        assert!(lacks(Role::Admin, true, "production").is_empty());
    }
}
