//! Who may do what: roles, permissions, and the rule that every message declares.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Problem, Uuid};

/// What a member of an organization may be allowed to do.
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
    /// Every permission, in the order in which they are documented.
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

    /// The name that the API and the documentation use.
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
    /// Every role, least to most.
    pub const ALL: [Self; 4] = [Self::Viewer, Self::Developer, Self::Admin, Self::Owner];

    /// The name that the API and the databases use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Developer => "developer",
            Self::Admin => "admin",
            Self::Owner => "owner",
        }
    }

    /// Whether a member of this role may do what `permission` names. A role may do all that the
    /// lesser ones may.
    #[must_use]
    pub fn allows(self, permission: Permission) -> bool {
        use Permission as P;
        let least = match permission {
            P::OrgView | P::ProjectView | P::ServiceView | P::LogsView | P::MetricsView => Self::Viewer,
            P::ProjectCreate | P::DeployDev | P::DeployStaging | P::ServiceManage | P::ServiceScale => Self::Developer,
            P::OrgManage | P::ProjectDelete | P::DeployProduction | P::AlertsManage => Self::Admin,
            P::OrgBilling => Self::Owner,
        };
        self >= least
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

/// What kind of environment it is; deploying to it takes the permission that fits.
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
    /// The permission that deploying to such an environment takes.
    #[must_use]
    pub fn deploy_permission(self) -> Permission {
        match self {
            Self::Production => Permission::DeployProduction,
            Self::Staging | Self::Custom => Permission::DeployStaging,
            Self::Development | Self::Preview => Permission::DeployDev,
        }
    }
}

/// The thing a message is about; the service that owns it can tell whose it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    Organization(Uuid),
    Project(Uuid),
    Environment(Uuid),
    Service(Uuid),
    /// A service in the environment of its project that has this name.
    ServiceIn(Uuid, String),
    /// A service with every environment that it runs in.
    ServiceEverywhere(Uuid),
    /// A project with every environment that it has.
    ProjectEverywhere(Uuid),
    Deployment(Uuid),
    Upload(Uuid),
}

/// The rule a message declares: who may send it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anyone, signed in or not.
    Public,
    /// Any signed-in user.
    SignedIn,
    /// Administrators of this installation.
    PlatformAdmin,
    /// Only other services of the platform; no door leads here from outside.
    Internal,
    /// Members of the organization that the message's target belongs to, with this permission.
    Granted(Permission),
    /// Members who may deploy to the kind of environment that the target lies in.
    GrantedDeploy,
    /// Members with this permission who may also deploy to every environment that the target lies in or reaches.
    GrantedAndDeploy(Permission),
}

/// Marker types that give each rule a type of its own, so that a handler's signature follows from
/// its message's rule.
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
    /// See [`super::Access::Internal`].
    #[derive(Debug)]
    pub enum Internal {}
    /// See [`super::Access::Granted`], [`super::Access::GrantedDeploy`] and [`super::Access::GrantedAndDeploy`].
    #[derive(Debug)]
    pub enum Granted {}
}

#[cfg(test)]
mod tests {
    use super::{Permission, Role};

    #[test]
    fn an_owner_may_do_everything_and_a_viewer_may_change_nothing() {
        for permission in Permission::ALL {
            assert!(Role::Owner.allows(permission), "{}", permission.name());
            assert_eq!(Role::Viewer.allows(permission), permission.name().ends_with(":view"), "{}", permission.name());
        }
    }

    #[test]
    fn only_admins_and_owners_deploy_to_production() {
        let allowed: Vec<_> = Role::ALL.into_iter().filter(|r| r.allows(Permission::DeployProduction)).collect();
        assert_eq!(allowed, [Role::Admin, Role::Owner]);
    }
}
