//! The project service: projects, their environments with variables and secrets, and their services.

mod configuration;
mod environments;
mod projects;
mod quotas;
mod reach;
mod services;
mod variables;

use std::sync::Arc;

use capsule_bus::{Bus, Router, Service};
use capsule_contracts::access::EnvironmentKind;
use capsule_contracts::list::{PageQuery, SortKey};
use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::project::Location;
use capsule_contracts::{Problem, Target, Uuid};
use capsule_store::{Databases, FromRow, Keyring, Migrations, Store, StoreError, unscoped};

/// The project service.
#[derive(Debug)]
pub struct ProjectService {
    store: Arc<Store>,
    bus: Bus,
}

#[derive(FromRow)]
struct Located {
    organization_id: Uuid,
    kind: Option<String>,
}

impl Service for ProjectService {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }

    fn bus(&self) -> &Bus {
        &self.bus
    }

    async fn locate(&self, target: &Target) -> Result<Option<Location>, Problem> {
        let found = match target {
            // Not checked for existence: an organization that does not exist has no members, so access is denied.
            Target::Organization(id) => return Ok(Some(Location::in_organization(*id))),
            Target::ServiceEverywhere(id) => return reach::service(self, *id).await,
            Target::ProjectEverywhere(id) => return reach::project(self, *id).await,
            Target::Project(id) => {
                unscoped!("finds out whose it is", "SELECT organization_id, NULL AS kind FROM projects WHERE id = :id", id = *id)
            }
            Target::Environment(id) => {
                unscoped!("finds out whose it is", "SELECT organization_id, kind FROM environments WHERE id = :id", id = *id)
            }
            Target::Service(id) => {
                unscoped!("finds out whose it is", "SELECT organization_id, NULL AS kind FROM services WHERE id = :id", id = *id)
            }
            Target::ServiceIn(id, environment) => unscoped!(
                "finds out whose it is",
                "SELECT s.organization_id, e.kind FROM services s JOIN environments e ON e.project_id = s.project_id \
                 WHERE s.id = :id AND e.name = :name",
                id = *id,
                name = environment.as_str()
            ),
            Target::Deployment(_) | Target::Upload(_) | Target::Invitation(_) => return Ok(None),
        };
        let Some(found) = self.store.read().first::<Located>(found).await? else {
            return Ok(None);
        };
        let environment = found.kind.as_deref().map(environments::parse_kind).transpose()?;
        Ok(Some(Location { environment, ..Location::in_organization(found.organization_id) }))
    }
}

/// An item's value of the sort field of a list: its name or its creation time.
fn sort_key(query: &PageQuery, name: &str, created_at: i64) -> SortKey {
    if query.sort() == "name" { name.into() } else { created_at.into() }
}

/// The stored text of a kind of environment.
fn kind_to_text(kind: EnvironmentKind) -> &'static str {
    match kind {
        EnvironmentKind::Development => "development",
        EnvironmentKind::Staging => "staging",
        EnvironmentKind::Production => "production",
        EnvironmentKind::Preview => "preview",
        EnvironmentKind::Custom => "custom",
    }
}

/// The name of the service and of its database.
pub const NAME: &str = "project";

/// The migrations of its database.
pub const MIGRATIONS: Migrations =
    &[("bus", capsule_bus::MIGRATIONS), (NAME, capsule_store::migrations![1 "create_projects", 2 "close_organizations"])];

/// Opens the service's database and registers the service on the bus.
///
/// # Errors
/// When its database cannot be opened.
pub async fn start(databases: &Databases, bus: &Bus, keyring: Keyring) -> Result<Arc<ProjectService>, StoreError> {
    let store = Store::open(databases, NAME, keyring, MIGRATIONS).await?;
    let projects = Arc::new(ProjectService { store: Arc::new(store), bus: bus.clone() });
    Router::new(projects.clone())
        .keep_quotas()
        .handle(projects::list_projects)
        .handle(projects::create_project)
        .handle(projects::get_project)
        .handle(projects::update_project)
        .handle(projects::delete_project)
        .handle(projects::archive_project)
        .handle(projects::restore_project)
        .handle(environments::list_environments)
        .handle(environments::create_environment)
        .handle(environments::get_environment)
        .handle(environments::update_environment)
        .handle(environments::delete_environment)
        .handle(variables::get_variables)
        .handle(variables::replace_variables)
        .handle(variables::change_variables)
        .handle(variables::put_secret)
        .handle(variables::delete_secret)
        .handle(services::list_services)
        .handle(services::create_service)
        .handle(services::get_service)
        .handle(services::update_service)
        .handle(services::delete_service)
        .handle(configuration::get_configuration)
        .handle(configuration::locate)
        .handle(projects::archive_organization)
        .handle(projects::count_projects)
        .handle(quotas::count_use)
        .consume::<OrganizationDeleted>(|_, tx, delivery| Box::pin(projects::remove_all(tx, delivery)))
        .start();
    Ok(projects)
}
