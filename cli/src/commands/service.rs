//! Finds a service in an environment by names.

use anyhow::bail;
use capsule_contracts::Page;
use capsule_contracts::deploy::{Deployment, ServiceState};
use capsule_contracts::organization::Organization;
use capsule_contracts::project::{Environment, Project, Service};
use serde_json::json;

use super::organizations;
use crate::client::Client;
use crate::folder::ServiceNames;
use crate::nearest::did_you_mean;
use crate::terminal::{Failure, Terminal};

/// A service in an environment, with everything it belongs to.
pub struct ServiceEnvironment {
    pub organization: Organization,
    pub project: Project,
    pub service: Service,
    /// The environment's name.
    pub environment: String,
    pub environments: Vec<Environment>,
}

impl ServiceEnvironment {
    /// The state of the service in its environment.
    pub fn state(&self, client: &mut Client) -> anyhow::Result<ServiceState> {
        self.state_in(client, &self.environment)
    }

    /// The state of the service in the given environment of its project.
    pub fn state_in(&self, client: &mut Client, environment: &str) -> anyhow::Result<ServiceState> {
        client.get(&format!("/services/{}/state?environment={environment}", self.service.id))
    }

    /// The newest deployments of the service in its environment.
    pub fn deployments(&self, client: &mut Client, limit: u32) -> anyhow::Result<Vec<Deployment>> {
        let path = format!("/deployments?service_id={}&environment={}&limit={limit}", self.service.id, self.environment);
        Ok(client.get::<Page<Deployment>>(&path)?.items)
    }

    /// Runs an action on the service in its environment, such as `restart`.
    pub fn act(&self, client: &mut Client, verb: &str) -> anyhow::Result<ServiceState> {
        client.post(&format!("/services/{}/{verb}", self.service.id), &json!({"environment": self.environment}))
    }

    /// The environment. Never fails after [`find`].
    pub fn environment(&self) -> anyhow::Result<&Environment> {
        in_environment(&self.environments, &self.project, &self.environment)
    }

    /// Prints what a command is about to change.
    pub fn announce(&self, client: &Client, terminal: Terminal) {
        announce(client, &self.organization, &self.project.slug, &self.service.name, Some(&self.environment), terminal);
    }
}

/// Prints, in one line, what a command is about to change.
pub fn announce(
    client: &Client,
    organization: &Organization,
    project: &str,
    service: &str,
    environment: Option<&str>,
    terminal: Terminal,
) {
    let server = client.name();
    let environment = environment.map_or_else(|| "all environments".into(), |name| format!("environment {name}"));
    terminal.note(&format!(
        "Server {server}, organization {}, project {project}, service {service}, {environment}",
        organization.slug
    ));
}

/// Finds a service in an environment.
///
/// # Errors
/// When one of them does not exist.
pub fn find(client: &mut Client, names: &ServiceNames, terminal: Terminal) -> anyhow::Result<ServiceEnvironment> {
    let found = find_in_any(client, names, terminal)?;
    found.environment()?;
    Ok(found)
}

/// Finds a service, whether or not the environment exists.
///
/// # Errors
/// When the organization, the project or the service does not exist.
pub fn find_in_any(client: &mut Client, names: &ServiceNames, terminal: Terminal) -> anyhow::Result<ServiceEnvironment> {
    let organization = organization(client, names, terminal)?;
    let projects = projects(client, &organization)?;
    let Some(project) = projects.iter().find(|project| project.slug == names.project).cloned() else {
        let elsewhere = organizations_with_project(client, names, &organization)?;
        return Err(no_project(client, names, &organization, &projects, &elsewhere).into());
    };
    let services = services(client, &project)?;
    let Some(service) = services.iter().find(|service| service.name == names.service).cloned() else {
        return Err(no_service(names, &project, &services).into());
    };
    let environments = environments(client, &project)?;
    Ok(ServiceEnvironment { organization, project, service, environment: names.environment.clone(), environments })
}

/// The organization that a folder or a command names, or else the user's personal one.
pub fn organization(client: &mut Client, names: &ServiceNames, terminal: Terminal) -> anyhow::Result<Organization> {
    if let Some(slug) = &names.organization {
        return organizations::find(client, slug, Some(names.organization_from));
    }
    let (personal, count) = organizations::personal(client)?;
    if count > 1 {
        terminal.note(&format!("Using your personal organization {}; --organization chooses another.", personal.slug));
    }
    Ok(personal)
}

pub fn projects(client: &mut Client, organization: &Organization) -> anyhow::Result<Vec<Project>> {
    client.list::<Project>(&format!("/projects?organization_id={}", organization.id))
}

pub fn services(client: &mut Client, project: &Project) -> anyhow::Result<Vec<Service>> {
    client.list::<Service>(&format!("/services?project_id={}", project.id))
}

pub fn environments(client: &mut Client, project: &Project) -> anyhow::Result<Vec<Environment>> {
    client.list::<Environment>(&format!("/projects/{}/environments", project.id))
}

/// The other organizations of the user that have a project of the names name. None where an organization was named.
pub fn organizations_with_project(
    client: &mut Client,
    names: &ServiceNames,
    organization: &Organization,
) -> anyhow::Result<Vec<String>> {
    let mut slugs = Vec::new();
    if names.organization.is_none() {
        for other in client.list::<Organization>("/organizations")? {
            if other.id != organization.id && projects(client, &other)?.iter().any(|project| project.slug == names.project) {
                slugs.push(other.slug);
            }
        }
    }
    Ok(slugs)
}

/// The error for a project that does not exist: it suggests the nearest name, and the organizations in `elsewhere`,
/// which have a project of this name.
pub fn no_project(
    client: &Client,
    names: &ServiceNames,
    organization: &Organization,
    projects: &[Project],
    elsewhere: &[String],
) -> Failure {
    let near = did_you_mean(&names.project, projects.iter().map(|project| project.slug.as_str()));
    let message = format!("There is no project {} in {} at {}.{near}", names.project, organization.slug, client.name());
    let hint = match elsewhere {
        [] => "`capsule deploy --yes` creates it.".into(),
        slugs => {
            format!("There is one in {}. Choose the organization with --organization, or in capsule.toml.", slugs.join(", "))
        }
    };
    Failure::new("no_such_project", message).hint(hint)
}

/// The error for a service that does not exist. It suggests the nearest name.
pub fn no_service(names: &ServiceNames, project: &Project, services: &[Service]) -> Failure {
    let near = did_you_mean(&names.service, services.iter().map(|service| service.name.as_str()));
    Failure::new("no_such_service", format!("The project {} has no service {}.{near}", project.slug, names.service))
        .hint("`capsule deploy --yes` creates it.")
}

/// The environment of this name.
///
/// # Errors
/// When it does not exist. The error suggests the nearest name.
pub fn in_environment<'a>(all: &'a [Environment], project: &Project, name: &str) -> anyhow::Result<&'a Environment> {
    match all.iter().find(|environment| environment.name == name) {
        Some(environment) => Ok(environment),
        None => Err(no_environment(all, &project.slug, name).into()),
    }
}

/// The error for an environment that does not exist. It suggests the nearest name.
pub fn no_environment(all: &[Environment], project: &str, name: &str) -> Failure {
    let known: Vec<&str> = all.iter().map(|environment| environment.name.as_str()).collect();
    let near = did_you_mean(name, known.iter().copied());
    Failure::new("no_such_environment", format!("The project {project} has no environment {name}.{near}"))
        .hint(format!("Environments: {}. `capsule deploy --create` creates another.", known.join(", ")))
}

/// The deployment with this number, or the newest one for 0.
///
/// # Errors
/// When it is not among the newest 100.
pub fn deployment(client: &mut Client, found: &ServiceEnvironment, number: i64) -> anyhow::Result<Deployment> {
    let known = found.deployments(client, 100)?;
    let Some(deployment) = known.into_iter().find(|known| number == 0 || known.number == number) else {
        bail!(
            "{} has no deployment {number} in {} among the newest 100. `capsule status` lists the latest deployments.",
            found.service.name,
            found.environment
        );
    };
    Ok(deployment)
}
