//! Roles, permissions, and the access rules of messages.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Problem, Uuid};

/// A permission of a member of an organization.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum Permission {
    #[serde(rename = "org:view")]
    OrgView,
    #[serde(rename = "org:manage")]
    OrgManage,
    #[serde(rename = "org:billing")]
    OrgBilling,
    #[serde(rename = "project:view")]
    ProjectView,
    #[serde(rename = "project:create")]
    ProjectCreate,
    #[serde(rename = "project:delete")]
    ProjectDelete,
    #[serde(rename = "deploy:dev")]
    DeployDev,
    #[serde(rename = "deploy:staging")]
    DeployStaging,
    #[serde(rename = "deploy:production")]
    DeployProduction,
    #[serde(rename = "service:view")]
    ServiceView,
    #[serde(rename = "service:manage")]
    ServiceManage,
    #[serde(rename = "service:scale")]
    ServiceScale,
    #[serde(rename = "logs:view")]
    LogsView,
    #[serde(rename = "metrics:view")]
    MetricsView,
    #[serde(rename = "alerts:manage")]
    AlertsManage,
}

impl Permission {
    /// Every permission, in display order.
    pub const ALL: [Self; 15] = [
        Self::OrgView,
        Self::OrgManage,
        Self::OrgBilling,
        Self::ProjectView,
        Self::ProjectCreate,
        Self::ProjectDelete,
        Self::DeployDev,
        Self::DeployStaging,
        Self::DeployProduction,
        Self::ServiceView,
        Self::ServiceManage,
        Self::ServiceScale,
        Self::LogsView,
        Self::MetricsView,
        Self::AlertsManage,
    ];

    /// Its bit in [`Permissions`]. Not stored or sent.
    fn bit(self) -> u32 {
        1 << self as u32
    }

    /// The name in the API and the documentation.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::OrgView => "org:view",
            Self::OrgManage => "org:manage",
            Self::OrgBilling => "org:billing",
            Self::ProjectView => "project:view",
            Self::ProjectCreate => "project:create",
            Self::ProjectDelete => "project:delete",
            Self::DeployDev => "deploy:dev",
            Self::DeployStaging => "deploy:staging",
            Self::DeployProduction => "deploy:production",
            Self::ServiceView => "service:view",
            Self::ServiceManage => "service:manage",
            Self::ServiceScale => "service:scale",
            Self::LogsView => "logs:view",
            Self::MetricsView => "metrics:view",
            Self::AlertsManage => "alerts:manage",
        }
    }
}

/// A set of permissions, such as the scopes of an API key. In JSON it is a list of names; unknown names are ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<String>", into = "Vec<String>")]
pub struct Permissions(u32);

impl Permissions {
    /// Whether the set has a permission.
    #[must_use]
    pub fn contains(self, permission: Permission) -> bool {
        self.0 & permission.bit() != 0
    }

    /// The permissions of the set, in display order.
    pub fn iter(self) -> impl Iterator<Item = Permission> {
        Permission::ALL.into_iter().filter(move |permission| self.contains(*permission))
    }
}

impl FromIterator<Permission> for Permissions {
    fn from_iter<I: IntoIterator<Item = Permission>>(permissions: I) -> Self {
        Self(permissions.into_iter().fold(0, |bits, permission| bits | permission.bit()))
    }
}

impl From<Vec<String>> for Permissions {
    fn from(names: Vec<String>) -> Self {
        Permission::ALL.into_iter().filter(|permission| names.iter().any(|name| name == permission.name())).collect()
    }
}

impl From<Permissions> for Vec<String> {
    fn from(permissions: Permissions) -> Self {
        permissions.iter().map(|permission| permission.name().to_owned()).collect()
    }
}

/// A member's role in an organization.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Viewer,
    Developer,
    Admin,
    Owner,
}

impl Role {
    /// Every role, in ascending order.
    pub const ALL: [Self; 4] = [Self::Viewer, Self::Developer, Self::Admin, Self::Owner];

    /// The name in the API and the databases.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Developer => "developer",
            Self::Admin => "admin",
            Self::Owner => "owner",
        }
    }

    /// Whether the role has a permission. A role has all permissions of the lower roles.
    #[must_use]
    pub fn allows(self, permission: Permission) -> bool {
        use Permission as P;
        let min_role = match permission {
            P::OrgView | P::ProjectView | P::ServiceView | P::LogsView | P::MetricsView => Self::Viewer,
            P::ProjectCreate | P::DeployDev | P::DeployStaging | P::ServiceManage | P::ServiceScale => Self::Developer,
            P::OrgManage | P::ProjectDelete | P::DeployProduction | P::AlertsManage => Self::Admin,
            P::OrgBilling => Self::Owner,
        };
        self >= min_role
    }
}

impl std::str::FromStr for Role {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        Self::ALL.into_iter().find(|role| role.name() == text).ok_or_else(|| {
            Problem::invalid_field("role", format!("`{text}` is not a role; use viewer, developer, admin or owner"))
        })
    }
}

/// The kind of an environment. It decides which permission is required to deploy to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EnvironmentKind {
    Development,
    Staging,
    Production,
    Preview,
    Custom,
}

impl EnvironmentKind {
    /// The permission that is required to deploy to an environment of this kind.
    #[must_use]
    pub fn deploy_permission(self) -> Permission {
        match self {
            Self::Production => Permission::DeployProduction,
            Self::Staging | Self::Custom => Permission::DeployStaging,
            Self::Development | Self::Preview => Permission::DeployDev,
        }
    }
}

/// The target of a message. The service that owns the target finds its organization.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    Organization(Uuid),
    Project(Uuid),
    Environment(Uuid),
    Service(Uuid),
    /// A service in one environment of its project, by the environment's name.
    ServiceIn(Uuid, String),
    /// A service in every environment that it runs in.
    ServiceEverywhere(Uuid),
    /// A project with all its environments.
    ProjectEverywhere(Uuid),
    Deployment(Uuid),
    Upload(Uuid),
    Invitation(Uuid),
}

impl Target {
    /// What the target is, for messages.
    #[must_use]
    pub fn noun(&self) -> &'static str {
        match self {
            Self::Organization(_) => "organization",
            Self::Project(_) | Self::ProjectEverywhere(_) => "project",
            Self::Environment(_) => "environment",
            Self::Service(_) | Self::ServiceEverywhere(_) => "service",
            Self::ServiceIn(..) => "service or environment",
            Self::Deployment(_) => "deployment",
            Self::Upload(_) => "upload",
            Self::Invitation(_) => "invitation",
        }
    }
}

/// A message's access rule: who may send it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anyone, signed in or not.
    Public,
    /// Any signed-in user.
    SignedIn,
    /// Administrators of this installation.
    PlatformAdmin,
    /// The signed-in user who has the invitation that is the message's target.
    Invited,
    /// Only other services of the platform. The gateway has no endpoint for it.
    Internal,
    /// Members of the organization that the message's target belongs to, with this permission.
    Granted(Permission),
    /// Members with the permission to deploy to the target's environment.
    GrantedDeploy,
    /// Members with this permission and the permission to deploy to every environment that the target is in or
    /// affects.
    GrantedAndDeploy(Permission),
}

/// Marker types, one for each access rule: a message's rule decides the type of the grant that its handler takes.
pub mod rule {
    /// See [`super::Access::Public`].
    #[derive(Debug)]
    pub enum Public {}
    /// See [`super::Access::SignedIn`].
    #[derive(Debug)]
    pub enum SignedIn {}
    /// See [`super::Access::PlatformAdmin`].
    #[derive(Debug)]
    pub enum PlatformAdmin {}
    /// See [`super::Access::Invited`].
    #[derive(Debug)]
    pub enum Invited {}
    /// See [`super::Access::Internal`].
    #[derive(Debug)]
    pub enum Internal {}
    /// See [`super::Access::Granted`], [`super::Access::GrantedDeploy`] and [`super::Access::GrantedAndDeploy`].
    #[derive(Debug)]
    pub enum Granted {}
}

#[cfg(test)]
mod tests {
    use super::{Permission, Permissions, Role};

    #[test]
    fn a_set_of_permissions_has_what_it_was_made_of() {
        for permission in Permission::ALL {
            let one: Permissions = [permission].into_iter().collect();
            assert_eq!(one.iter().collect::<Vec<_>>(), [permission]);
            let text = serde_json::to_string(&one).expect("JSON");
            assert_eq!(text, format!("[\"{}\"]", permission.name()));
            assert_eq!(serde_json::from_str::<Permissions>(&text).expect("a set"), one);
        }
        let all: Permissions = Permission::ALL.into_iter().collect();
        assert!(Permission::ALL.into_iter().all(|permission| all.contains(permission)));
        let later: Permissions = serde_json::from_str("[\"fly:moon\",\"org:view\"]").expect("a set");
        assert_eq!(later.iter().collect::<Vec<_>>(), [Permission::OrgView]);
    }

    #[test]
    fn an_owner_has_every_permission_and_a_viewer_only_those_to_view() {
        for permission in Permission::ALL {
            assert!(Role::Owner.allows(permission), "{}", permission.name());
            assert_eq!(Role::Viewer.allows(permission), permission.name().ends_with(":view"), "{}", permission.name());
        }
    }

    #[test]
    fn only_admins_and_owners_deploy_to_production() {
        let allowed: Vec<_> = Role::ALL.into_iter().filter(|role| role.allows(Permission::DeployProduction)).collect();
        assert_eq!(allowed, [Role::Admin, Role::Owner]);
    }
}
