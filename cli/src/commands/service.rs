//! A service in an environment: found by its names.

use anyhow::bail;
use capsule_contracts::Page;
use capsule_contracts::deploy::{Deployment, ServiceState};
use capsule_contracts::organization::Organization;
use capsule_contracts::project::{Environment, Project, Service};
use serde_json::json;

use super::organizations;
use crate::client::Client;
use crate::folder::Wanted;
use crate::nearest::did_you_mean;
use crate::terminal::{Failure, Terminal};

/// What was found of the names.
pub struct Found {
    pub organization: Organization,
    pub project: Project,
    pub service: Service,
    /// The environment's name.
    pub environment: String,
    pub environments: Vec<Environment>,
}

impl Found {
    /// How the service is in its environment.
    pub fn state(&self, client: &mut Client) -> anyhow::Result<ServiceState> {
        self.state_in(client, &self.environment)
    }

    /// How the service is in another of its project's environments.
    pub fn state_in(&self, client: &mut Client, environment: &str) -> anyhow::Result<ServiceState> {
        client.get(&format!("/services/{}/state?environment={environment}", self.service.id))
    }

    /// Its newest deployments here.
    pub fn deployments(&self, client: &mut Client, limit: u32) -> anyhow::Result<Vec<Deployment>> {
        let path = format!("/deployments?service_id={}&environment={}&limit={limit}", self.service.id, self.environment);
        Ok(client.get::<Page<Deployment>>(&path)?.items)
    }

    /// Tells the server to do something with it.
    pub fn tell(&self, client: &mut Client, verb: &str) -> anyhow::Result<ServiceState> {
        client.post(&format!("/services/{}/{verb}", self.service.id), &json!({"environment": self.environment}))
    }

    /// The environment. It is there: [`find`] has looked.
    pub fn environment(&self) -> anyhow::Result<&Environment> {
        in_environment(&self.environments, &self.project, &self.environment)
    }

    /// Says what a command is about to change.
    pub fn announce(&self, client: &Client, terminal: Terminal) {
        announce(client, &self.organization, &self.project.slug, &self.service.name, Some(&self.environment), terminal);
    }
}

/// Says, in one line, what a command is about to change.
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
    terminal.say(&format!(
        "Server {server}, organization {}, project {project}, service {service}, {environment}",
        organization.slug
    ));
}

/// Finds a service in an environment that is there.
pub fn find(client: &mut Client, wanted: &Wanted, terminal: Terminal) -> anyhow::Result<Found> {
    let found = find_in_any(client, wanted, terminal)?;
    found.environment()?;
    Ok(found)
}

/// Finds a service, whether or not there is the environment.
pub fn find_in_any(client: &mut Client, wanted: &Wanted, terminal: Terminal) -> anyhow::Result<Found> {
    let organization = organization(client, wanted, terminal)?;
    let projects = projects(client, &organization)?;
    let Some(project) = projects.iter().find(|project| project.slug == wanted.project).cloned() else {
        let elsewhere = organizations_with_project(client, wanted, &organization)?;
        return Err(no_project(client, wanted, &organization, &projects, &elsewhere).into());
    };
    let services = services(client, &project)?;
    let Some(service) = services.iter().find(|service| service.name == wanted.service).cloned() else {
        return Err(no_service(wanted, &project, &services).into());
    };
    let environments = environments(client, &project)?;
    Ok(Found { organization, project, service, environment: wanted.environment.clone(), environments })
}

/// The organization that a folder or a command names, or else the user's personal one.
pub fn organization(client: &mut Client, wanted: &Wanted, terminal: Terminal) -> anyhow::Result<Organization> {
    if let Some(slug) = &wanted.organization {
        return organizations::find(client, slug, Some(wanted.organization_from));
    }
    let (personal, count) = organizations::personal(client)?;
    if count > 1 {
        terminal.say(&format!("Using your personal organization {}; --organization chooses another.", personal.slug));
    }
    Ok(personal)
}

pub fn projects(client: &mut Client, organization: &Organization) -> anyhow::Result<Vec<Project>> {
    Ok(client.get::<Page<Project>>(&format!("/projects?organization_id={}", organization.id))?.items)
}

pub fn services(client: &mut Client, project: &Project) -> anyhow::Result<Vec<Service>> {
    Ok(client.get::<Page<Service>>(&format!("/services?project_id={}", project.id))?.items)
}

pub fn environments(client: &mut Client, project: &Project) -> anyhow::Result<Vec<Environment>> {
    Ok(client.get::<Page<Environment>>(&format!("/projects/{}/environments", project.id))?.items)
}

/// The other organizations of the user that have a project of the wanted name. None where an organization was named.
pub fn organizations_with_project(
    client: &mut Client,
    wanted: &Wanted,
    organization: &Organization,
) -> anyhow::Result<Vec<String>> {
    let mut slugs = Vec::new();
    if wanted.organization.is_none() {
        for other in client.get::<Page<Organization>>("/organizations")?.items {
            if other.id != organization.id && projects(client, &other)?.iter().any(|project| project.slug == wanted.project) {
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
    wanted: &Wanted,
    organization: &Organization,
    projects: &[Project],
    elsewhere: &[String],
) -> Failure {
    let near = did_you_mean(&wanted.project, projects.iter().map(|project| project.slug.as_str()));
    let message = format!("There is no project {} in {} at {}.{near}", wanted.project, organization.slug, client.name());
    let hint = match elsewhere {
        [] => "`capsule deploy --yes` creates it.".into(),
        slugs => format!("There is one in {}: name it with --organization, or in capsule.toml.", slugs.join(", ")),
    };
    Failure::new("no_such_project", message).hint(hint)
}

/// Why there is no such service, with the one that was probably meant.
pub fn no_service(wanted: &Wanted, project: &Project, services: &[Service]) -> Failure {
    let near = did_you_mean(&wanted.service, services.iter().map(|service| service.name.as_str()));
    Failure::new("no_such_service", format!("The project {} has no service {}.{near}", project.slug, wanted.service))
        .hint("`capsule deploy --yes` creates it.")
}

/// The environment of this name.
///
/// # Errors
/// When there is none, with the one that was probably meant.
pub fn in_environment<'a>(all: &'a [Environment], project: &Project, name: &str) -> anyhow::Result<&'a Environment> {
    match all.iter().find(|environment| environment.name == name) {
        Some(environment) => Ok(environment),
        None => Err(no_environment(all, &project.slug, name).into()),
    }
}

/// Why there is no such environment, with the one that was probably meant.
pub fn no_environment(all: &[Environment], project: &str, name: &str) -> Failure {
    let known: Vec<&str> = all.iter().map(|environment| environment.name.as_str()).collect();
    let near = did_you_mean(name, known.iter().copied());
    Failure::new("no_such_environment", format!("The project {project} has no environment {name}.{near}"))
        .hint(format!("It has {}. `capsule deploy --create` creates another.", known.join(", ")))
}

/// The newest deployment of this number, or the newest of all for 0.
pub fn deployment(client: &mut Client, found: &Found, number: i64) -> anyhow::Result<Deployment> {
    let known = found.deployments(client, 100)?;
    let Some(deployment) = known.into_iter().find(|known| number == 0 || known.number == number) else {
        bail!(
            "{} has no deployment {number} in {} among the newest 100. `capsule status` lists the deployments.",
            found.service.name,
            found.environment
        );
    };
    Ok(deployment)
}
