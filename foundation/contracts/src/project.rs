//! Projects, environments with their variables and secrets, and services.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::access::EnvironmentKind;
use crate::{Count, Empty, Event, Page, Timestamp, Uuid, list, message};

/// A group of services with common environments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Project {
    pub id: Uuid,
    pub organization_id: Uuid,
    pub name: String,
    /// Unique in the organization.
    pub slug: String,
    pub archived: bool,
    pub created_at: Timestamp,
}

list! {
    /// Lists the projects of an organization.
    ListProjects by ["created_at", "name"] {
        organization_id: Uuid,
        /// Only those whose name begins with this.
        name_prefix: Option<String>,
        /// Only archived projects, or only others.
        archived: Option<bool>,
    }
}
message!(ListProjects, query "project.list_projects", Granted(ProjectView) at Organization(organization_id) => Page<Project>, |m, check| check.list(m));

/// Creates a project with a production environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CreateProject {
    pub organization_id: Uuid,
    pub name: String,
    /// Default: derived from the name.
    #[serde(default)]
    pub slug: Option<String>,
}
message!(CreateProject, command "project.create_project", Granted(ProjectCreate) at Organization(organization_id) => Project, |m, check| {
    check.title("name", &m.name);
    if let Some(slug) = &m.slug {
        check.label("slug", slug);
    }
});

/// Returns a project.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetProject {
    pub id: Uuid,
}
message!(GetProject, query "project.get_project", Granted(ProjectView) at Project(id) => Project);

/// Renames a project.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UpdateProject {
    pub id: Uuid,
    #[serde(default)]
    pub name: Option<String>,
}
message!(UpdateProject, command "project.update_project", Granted(ServiceManage) at Project(id) => Project, |m, check| {
    if let Some(name) = &m.name {
        check.title("name", name);
    }
});

/// Deletes a project with its services, their instances and releases.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteProject {
    pub id: Uuid,
}
message!(DeleteProject, command "project.delete_project", GrantedAndDeploy(ProjectDelete) at ProjectEverywhere(id) => Empty);

/// Archives a project. Its services keep running, but cannot be deployed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ArchiveProject {
    pub id: Uuid,
}
message!(ArchiveProject, command "project.archive_project", GrantedAndDeploy(ProjectDelete) at ProjectEverywhere(id) => Project);

/// Restores an archived project, so that its services can be deployed again.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RestoreProject {
    pub id: Uuid,
}
message!(RestoreProject, command "project.restore_project", GrantedAndDeploy(ProjectDelete) at ProjectEverywhere(id) => Project);

/// An environment of a project, such as production, with its own variables and secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Environment {
    pub id: Uuid,
    pub project_id: Uuid,
    /// Unique in the project. Part of the services' host names.
    pub name: String,
    pub kind: EnvironmentKind,
    pub created_at: Timestamp,
}

list! {
    /// Lists the environments of a project.
    ListEnvironments by ["created_at", "name"] {
        id: Uuid,
        /// Only those whose name begins with this.
        name_prefix: Option<String>,
        /// Only environments of this kind.
        kind: Option<EnvironmentKind>,
    }
}
message!(ListEnvironments, query "project.list_environments", Granted(ProjectView) at Project(id) => Page<Environment>, |m, check| check.list(m));

/// Creates an environment in a project.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CreateEnvironment {
    pub id: Uuid,
    pub name: String,
    pub kind: EnvironmentKind,
}
message!(CreateEnvironment, command "project.create_environment", Granted(ServiceManage) at Project(id) => Environment, |m, check| {
    check.label("name", &m.name);
});

/// Returns an environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetEnvironment {
    pub id: Uuid,
}
message!(GetEnvironment, query "project.get_environment", Granted(ProjectView) at Environment(id) => Environment);

/// Changes an environment's kind. Its name is part of host names and cannot change. A change to or from a kind requires
/// the permission to deploy to it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UpdateEnvironment {
    pub id: Uuid,
    pub name: String,
    pub kind: EnvironmentKind,
}
message!(UpdateEnvironment, command "project.update_environment", GrantedAndDeploy(ServiceManage) at Environment(id) => Environment);

/// Deletes an environment with everything that runs in it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteEnvironment {
    pub id: Uuid,
}
message!(DeleteEnvironment, command "project.delete_environment", GrantedAndDeploy(ServiceManage) at Environment(id) => Empty);

/// The variables of an environment, and the names of its secrets.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Variables {
    pub variables: BTreeMap<String, String>,
    /// Names only: the values of secrets cannot be read.
    pub secrets: Vec<String>,
}

/// Returns the variables of an environment, and the names of its secrets.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetVariables {
    pub id: Uuid,
}
message!(GetVariables, query "project.get_variables", Granted(ServiceView) at Environment(id) => Variables);

/// Replaces all variables of an environment. Takes effect with the next deployment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ReplaceVariables {
    pub id: Uuid,
    pub variables: BTreeMap<String, String>,
}
message!(ReplaceVariables, command "project.replace_variables", GrantedDeploy at Environment(id) => Variables, |m, check| {
    for (name, value) in &m.variables {
        check.variable_name(&format!("variables.{name}"), name);
        check.variable_value(&format!("variables.{name}"), value);
    }
});

/// Sets variables of an environment; null removes a variable. Takes effect with the next deployment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ChangeVariables {
    pub id: Uuid,
    pub variables: BTreeMap<String, Option<String>>,
}
message!(ChangeVariables, command "project.change_variables", GrantedDeploy at Environment(id) => Variables, |m, check| {
    for (name, value) in &m.variables {
        check.variable_name(&format!("variables.{name}"), name);
        check.variable_value(&format!("variables.{name}"), value.as_deref().unwrap_or_default());
    }
});

/// Sets a secret of an environment. It is encrypted at rest and cannot be read back.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct PutSecret {
    pub id: Uuid,
    pub name: String,
    #[schema(format = Password)]
    pub value: String,
}
message!(PutSecret, command "project.put_secret", GrantedDeploy at Environment(id) => Empty, |m, check| {
    check.variable_name("name", &m.name);
    check.variable_value("value", &m.value);
});

/// Removes a secret of an environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteSecret {
    pub id: Uuid,
    pub name: String,
}
message!(DeleteSecret, command "project.delete_secret", GrantedDeploy at Environment(id) => Empty);

/// A deployable app in a project.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Service {
    pub id: Uuid,
    pub organization_id: Uuid,
    pub project_id: Uuid,
    /// Unique in the project. Part of the service's host names.
    pub name: String,
    pub created_at: Timestamp,
}

list! {
    /// Lists the services of a project.
    ListServices by ["created_at", "name"] {
        project_id: Uuid,
        /// Only those whose name begins with this.
        name_prefix: Option<String>,
    }
}
message!(ListServices, query "project.list_services", Granted(ServiceView) at Project(project_id) => Page<Service>, |m, check| check.list(m));

/// Creates a service in a project.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CreateService {
    pub project_id: Uuid,
    pub name: String,
}
message!(CreateService, command "project.create_service", Granted(ServiceManage) at Project(project_id) => Service, |m, check| {
    check.label("name", &m.name);
});

/// Returns a service.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetService {
    pub id: Uuid,
}
message!(GetService, query "project.get_service", Granted(ServiceView) at Service(id) => Service);

/// Deletes a service with its instances and releases.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteService {
    pub id: Uuid,
}
message!(DeleteService, command "project.delete_service", GrantedAndDeploy(ServiceManage) at ServiceEverywhere(id) => Empty);

/// Renames a service. The hosts that it has keep their names.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UpdateService {
    pub id: Uuid,
    pub name: String,
}
message!(UpdateService, command "project.update_service", Granted(ServiceManage) at Service(id) => Service, |m, check| {
    check.label("name", &m.name);
});

/// A service was renamed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceRenamed {
    pub organization_id: Uuid,
    pub service_id: Uuid,
    pub name: String,
}
impl Event for ServiceRenamed {
    const TYPE: &'static str = "project.service_renamed";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.service_id
    }
    fn organization(&self) -> Option<Uuid> {
        Some(self.organization_id)
    }
}

/// Returns a service's configuration in an environment. Sent by the deploy service, which stores it encrypted.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetConfiguration {
    pub service_id: Uuid,
    pub environment: String,
}
message!(GetConfiguration, query "project.get_configuration", Internal => Configuration);

/// A service's configuration in an environment, for a deployment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Configuration {
    pub organization_id: Uuid,
    pub project_id: Uuid,
    pub service_id: Uuid,
    pub service_name: String,
    pub environment_id: Uuid,
    pub environment_name: String,
    pub environment_kind: EnvironmentKind,
    pub archived: bool,
    /// Variables and secrets, unencrypted.
    pub environment: BTreeMap<String, String>,
    /// The names in `environment` that are secrets.
    #[serde(default)]
    pub secrets: Vec<String>,
}

/// Returns the organization and environments of a target. Sent by services that authorize messages about it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Locate {
    pub target: crate::Target,
}
message!(Locate, query "project.locate", Internal => Location);

/// The organization and environments of a target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Location {
    pub organization_id: Uuid,
    /// The kind of its environment, if it is in one.
    pub environment: Option<EnvironmentKind>,
    /// The kinds of the environments that it affects, if it affects several.
    #[serde(default)]
    pub environments: Vec<EnvironmentKind>,
}

impl Location {
    /// In an organization, in no environment.
    #[must_use]
    pub fn in_organization(organization_id: Uuid) -> Self {
        Self { organization_id, environment: None, environments: Vec::new() }
    }
}

/// A project was created.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProjectCreated {
    pub organization_id: Uuid,
    pub project_id: Uuid,
    pub name: String,
}
impl Event for ProjectCreated {
    const TYPE: &'static str = "project.project_created";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.project_id
    }
    fn organization(&self) -> Option<Uuid> {
        Some(self.organization_id)
    }
}

/// A service, an environment or a project was deleted. Consumers delete everything that runs in it. Without a service
/// or environment, all of them are meant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServicesRemoved {
    pub organization_id: Uuid,
    pub project_id: Uuid,
    pub service_id: Option<Uuid>,
    pub environment_id: Option<Uuid>,
}
impl Event for ServicesRemoved {
    const TYPE: &'static str = "project.services_removed";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.service_id.or(self.environment_id).unwrap_or(self.project_id)
    }
    fn organization(&self) -> Option<Uuid> {
        Some(self.organization_id)
    }
}

/// Archives every project of an organization that is being deleted, or restores them if the deletion is undone.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ArchiveOrganization {
    pub organization_id: Uuid,
    pub archived: bool,
}
message!(ArchiveOrganization, command "project.archive_organization", Internal => Empty);

/// Counts the projects of an organization.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CountProjects {
    pub organization_id: Uuid,
}
message!(CountProjects, query "project.count_projects", Internal => Count);
