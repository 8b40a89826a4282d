//! A service in an environment: found by its names, or made.

use anyhow::bail;
use capsule_contracts::deploy::{Deployment, ServiceState};
use capsule_contracts::organization::Organization;
use capsule_contracts::project::{Environment, Project, Service};
use capsule_contracts::{Page, Uuid};
use serde_json::json;

use crate::client::Client;
use crate::folder::Wanted;
use crate::terminal::Terminal;

/// What was found of the names.
pub struct Found {
    pub service: Service,
    pub project: Project,
    pub environment: String,
}

impl Found {
    /// How the service is in its environment.
    pub fn state(&self, client: &mut Client) -> anyhow::Result<ServiceState> {
        client.get(&format!("/services/{}/state?environment={}", self.service.id, self.environment))
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

    /// The id of the environment.
    pub fn environment_id(&self, client: &mut Client) -> anyhow::Result<Uuid> {
        match environment(client, &self.project, &self.environment)? {
            Some(environment) => Ok(environment.id),
            None => bail!("the project {} has no environment {}", self.project.slug, self.environment),
        }
    }
}

/// Finds a service.
pub fn find(client: &mut Client, wanted: &Wanted) -> anyhow::Result<Found> {
    let Some(project) = project(client, wanted)? else {
        bail!("there is no project {} at {}; `capsule deploy` makes it", wanted.project, client.name());
    };
    match service(client, &project, &wanted.service)? {
        Some(service) => Ok(Found { service, project, environment: wanted.environment.clone() }),
        None => bail!("the project {} has no service {}; `capsule deploy` makes it", project.slug, wanted.service),
    }
}

/// Finds a service, or makes it with all that it needs.
pub fn find_or_create(client: &mut Client, wanted: &Wanted, terminal: Terminal) -> anyhow::Result<Found> {
    let project = match project(client, wanted)? {
        Some(project) => project,
        None => {
            let organization = organization(client, wanted)?;
            terminal.say(&format!("Creating the project {} in {}", wanted.project, organization.name));
            let body = json!({"organization_id": organization.id, "name": wanted.project, "slug": wanted.project});
            client.post("/projects", &body)?
        }
    };
    if environment(client, &project, &wanted.environment)?.is_none() {
        terminal.say(&format!("Creating the environment {}", wanted.environment));
        let kind = match wanted.environment.as_str() {
            "production" => "production",
            "staging" => "staging",
            "development" | "dev" => "development",
            _ => "custom",
        };
        let _: Environment =
            client.post(&format!("/projects/{}/environments", project.id), &json!({"name": wanted.environment, "kind": kind}))?;
    }
    let service = match service(client, &project, &wanted.service)? {
        Some(service) => service,
        None => {
            terminal.say(&format!("Creating the service {}", wanted.service));
            client.post("/services", &json!({"project_id": project.id, "name": wanted.service}))?
        }
    };
    Ok(Found { service, project, environment: wanted.environment.clone() })
}

fn organizations(client: &mut Client, wanted: &Wanted) -> anyhow::Result<Vec<Organization>> {
    let all = client.get::<Page<Organization>>("/organizations")?.items;
    let Some(slug) = &wanted.organization else { return Ok(all) };
    let known = all.iter().map(|organization| organization.slug.clone()).collect::<Vec<_>>().join(", ");
    match all.into_iter().find(|organization| organization.slug == *slug) {
        Some(organization) => Ok(vec![organization]),
        None => bail!("you are in no organization {slug}; you are in {known}"),
    }
}

/// Where something new belongs: the organization that was named, or one's own.
fn organization(client: &mut Client, wanted: &Wanted) -> anyhow::Result<Organization> {
    // One's own is made by an event right after registration.
    for _ in 0..50 {
        let mut all = organizations(client, wanted)?;
        if let Some(index) =
            all.iter().position(|organization| organization.personal).or(if all.is_empty() { None } else { Some(0) })
        {
            return Ok(all.swap_remove(index));
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    bail!("you are in no organization yet")
}

fn project(client: &mut Client, wanted: &Wanted) -> anyhow::Result<Option<Project>> {
    let mut found = Vec::new();
    for organization in organizations(client, wanted)? {
        let page: Page<Project> = client.get(&format!("/projects?organization_id={}", organization.id))?;
        found.extend(
            page.items
                .into_iter()
                .filter(|project| project.slug == wanted.project)
                .map(|project| (organization.slug.clone(), project)),
        );
    }
    if found.len() > 1 {
        let slugs = found.iter().map(|(slug, _)| slug.as_str()).collect::<Vec<_>>().join(", ");
        bail!("there is a project {} in {slugs}: say which with --organization", wanted.project);
    }
    Ok(found.pop().map(|(_, project)| project))
}

fn service(client: &mut Client, project: &Project, name: &str) -> anyhow::Result<Option<Service>> {
    let page: Page<Service> = client.get(&format!("/services?project_id={}", project.id))?;
    Ok(page.items.into_iter().find(|service| service.name == name))
}

fn environment(client: &mut Client, project: &Project, name: &str) -> anyhow::Result<Option<Environment>> {
    let page: Page<Environment> = client.get(&format!("/projects/{}/environments", project.id))?;
    Ok(page.items.into_iter().find(|environment| environment.name == name))
}
