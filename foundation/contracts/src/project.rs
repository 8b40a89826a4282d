//! Projects, their environments with variables and secrets, and the services in them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::access::EnvironmentKind;
use crate::{Count, Empty, Event, Page, Timestamp, Uuid, message};

/// A set of services that belong together.
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

/// The projects of an organization.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListProjects {
    pub organization_id: Uuid,
}
message!(ListProjects, query "project.list_projects", Granted(ProjectView) at Organization(organization_id) => Page<Project>);

/// Creates a project with a production environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CreateProject {
    pub organization_id: Uuid,
    pub name: String,
    /// Made from the name when absent.
    #[serde(default)]
    pub slug: Option<String>,
}
message!(CreateProject, command "project.create_project", Granted(ProjectCreate) at Organization(organization_id) => Project, |m, check| {
    check.title("name", &m.name);
    if let Some(slug) = &m.slug {
        check.label("slug", slug);
    }
});

/// One project.
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

/// Deletes a project; its services stop and their releases are removed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteProject {
    pub id: Uuid,
}
message!(DeleteProject, command "project.delete_project", GrantedAndDeploy(ProjectDelete) at ProjectEverywhere(id) => Empty);

/// Puts a project aside: it stays, but nothing can be deployed in it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ArchiveProject {
    pub id: Uuid,
}
message!(ArchiveProject, command "project.archive_project", GrantedAndDeploy(ProjectDelete) at ProjectEverywhere(id) => Project);

/// Takes an archived project back into use.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RestoreProject {
    pub id: Uuid,
}
message!(RestoreProject, command "project.restore_project", GrantedAndDeploy(ProjectDelete) at ProjectEverywhere(id) => Project);

/// A place where a project's services run, with its own variables and secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Environment {
    pub id: Uuid,
    pub project_id: Uuid,
    /// Unique in the project; part of the services' host names.
    pub name: String,
    pub kind: EnvironmentKind,
    pub created_at: Timestamp,
}

/// The environments of a project.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListEnvironments {
    pub id: Uuid,
}
message!(ListEnvironments, query "project.list_environments", Granted(ProjectView) at Project(id) => Page<Environment>);

/// Creates an environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CreateEnvironment {
    pub id: Uuid,
    pub name: String,
    pub kind: EnvironmentKind,
}
message!(CreateEnvironment, command "project.create_environment", Granted(ServiceManage) at Project(id) => Environment, |m, check| {
    check.label("name", &m.name);
});

/// One environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetEnvironment {
    pub id: Uuid,
}
message!(GetEnvironment, query "project.get_environment", Granted(ProjectView) at Environment(id) => Environment);

/// Deletes an environment with what runs in it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteEnvironment {
    pub id: Uuid,
}
message!(DeleteEnvironment, command "project.delete_environment", GrantedAndDeploy(ServiceManage) at Environment(id) => Empty);

/// The variables of an environment, and the names of its secrets.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Variables {
    pub variables: BTreeMap<String, String>,
    /// Names only: a secret's value is never shown again.
    pub secrets: Vec<String>,
}

/// Reads an environment's variables.
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

/// Changes some variables of an environment; null removes one.
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

/// A deployable part of a project.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Service {
    pub id: Uuid,
    pub organization_id: Uuid,
    pub project_id: Uuid,
    /// Unique in the project; part of its host names.
    pub name: String,
    pub created_at: Timestamp,
}

/// The services of a project.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListServices {
    pub project_id: Uuid,
}
message!(ListServices, query "project.list_services", Granted(ServiceView) at Project(project_id) => Page<Service>);

/// Creates a service in a project.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CreateService {
    pub project_id: Uuid,
    pub name: String,
}
message!(CreateService, command "project.create_service", Granted(ServiceManage) at Project(project_id) => Service, |m, check| {
    check.label("name", &m.name);
});

/// One service.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetService {
    pub id: Uuid,
}
message!(GetService, query "project.get_service", Granted(ServiceView) at Service(id) => Service);

/// Deletes a service; its instances stop and its releases are removed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteService {
    pub id: Uuid,
}
message!(DeleteService, command "project.delete_service", GrantedAndDeploy(ServiceManage) at ServiceEverywhere(id) => Empty);

/// Where a service stands, and with which configuration it would be deployed: asked by the deploy
/// service, which seals what it keeps of it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetConfiguration {
    pub service_id: Uuid,
    pub environment: String,
}
message!(GetConfiguration, query "project.get_configuration", Internal => Configuration);

/// All that a deployment needs to know from the project service.
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
    /// Variables and secrets together, in the clear.
    pub environment: BTreeMap<String, String>,
    /// The names of those that are secrets.
    #[serde(default)]
    pub secrets: Vec<String>,
}

/// Whose a project, environment or service is: asked by services that hold things below it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Locate {
    pub target: crate::Target,
}
message!(Locate, query "project.locate", Internal => Place);

/// Where a thing stands in the tree of organizations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Place {
    pub organization_id: Uuid,
    /// The kind of environment it lies in, where it lies in one.
    pub environment: Option<EnvironmentKind>,
    /// The kinds of the environments that it reaches, where it reaches several.
    #[serde(default)]
    pub environments: Vec<EnvironmentKind>,
}

impl Place {
    /// Of an organization, in no environment.
    #[must_use]
    pub fn of(organization_id: Uuid) -> Self {
        Self { organization_id, environment: None, environments: Vec::new() }
    }
}

/// A project came to be.
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

/// Services ceased to be, with all that runs of them: a service, an environment, a project was
/// deleted. An absent environment means all of them.
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

/// Archives every project of an organization that is being deleted, or takes that back.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ArchiveOrganization {
    pub organization_id: Uuid,
    pub archived: bool,
}
message!(ArchiveOrganization, command "project.archive_organization", Internal => Empty);

/// How many projects an organization has.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CountProjects {
    pub organization_id: Uuid,
}
message!(CountProjects, query "project.count_projects", Internal => Count);
