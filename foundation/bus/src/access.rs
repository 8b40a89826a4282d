//! Authorization: turns a message's access rule into the grant that its handler takes.

use std::future::Future;

use capsule_contracts::access::{EnvironmentKind, rule};
use capsule_contracts::project::Location;
use capsule_contracts::{Access, Message, Permission, Problem, Role, Target, Uuid};
use capsule_store::Scope;

use crate::context::{Context, Principal};
use crate::service::Service;

/// The grant of a signed-in user.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    user: Uuid,
    session: Uuid,
    platform_admin: bool,
}

impl Caller {
    #[must_use]
    pub fn user(&self) -> Uuid {
        self.user
    }

    #[must_use]
    pub fn session(&self) -> Uuid {
        self.session
    }

    #[must_use]
    pub fn platform_admin(&self) -> bool {
        self.platform_admin
    }

    fn from_context(context: &Context) -> Result<Self, Problem> {
        match context.principal {
            Principal::User { id, session, platform_admin } => Ok(Self { user: id, session, platform_admin }),
            Principal::Anonymous | Principal::Service(_) => Err(Problem::unauthenticated("You are not signed in.")),
        }
    }
}

/// The grant of a member of an organization who has the permissions that the message requires. Made only here.
#[derive(Clone, Copy, Debug)]
pub struct Tenant {
    organization: Uuid,
    user: Uuid,
    role: Role,
    /// The lowest role that has the required permissions.
    min_role: Role,
}

impl Tenant {
    /// The member who sent the message.
    #[must_use]
    pub fn user(&self) -> Uuid {
        self.user
    }

    /// The member's role.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }
}

impl Scope for Tenant {
    fn organization(&self) -> Uuid {
        self.organization
    }
}

/// The capability of the platform's own work to make grants. The bus passes it to leader tasks, consumers, sagas, and
/// handlers of internal messages. A handler of a user's message has none, and cannot make one:
///
/// ```compile_fail
/// let system = capsule_bus::SystemAccess { service: "project" };
/// ```
///
/// ```compile_fail
/// let system = capsule_bus::SystemAccess::new("project");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SystemAccess {
    service: &'static str,
}

impl SystemAccess {
    pub(crate) fn new(service: &'static str) -> Self {
        Self { service }
    }

    /// Grants access to an organization's data. `reason` is logged.
    #[must_use]
    pub fn organization(&self, organization: Uuid, reason: &'static str) -> SystemGrant {
        tracing::debug!(service = self.service, %organization, reason, "system grant");
        SystemGrant { organization }
    }
}

/// A grant for the platform's own work on an organization's data. Made only from [`SystemAccess`]:
///
/// ```compile_fail
/// let grant = capsule_bus::SystemGrant { organization: capsule_contracts::Uuid::nil() };
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SystemGrant {
    organization: Uuid,
}

impl Scope for SystemGrant {
    fn organization(&self) -> Uuid {
        self.organization
    }
}

/// The grant of a user who accepts an invitation to an organization. Made only here.
#[derive(Clone, Copy, Debug)]
pub struct Invitee {
    organization: Uuid,
    user: Uuid,
}

impl Invitee {
    /// The invited user, who sent the message.
    #[must_use]
    pub fn user(&self) -> Uuid {
        self.user
    }
}

impl Scope for Invitee {
    fn organization(&self) -> Uuid {
        self.organization
    }
}

/// What must stay true while a stream that was granted is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing.
    None,
    /// The session is live.
    Session,
    /// The session is live, and its user is an administrator of the installation.
    PlatformAdmin,
    /// The session is live, and its user has at least this role in the organization.
    Member { organization: Uuid, min_role: Role },
}

/// An access rule: checks a message and returns the grant that its handler takes.
pub trait Authorize {
    type Grant: std::fmt::Debug + Send + Sync + 'static;

    /// What must stay true while the grant is used.
    fn condition(grant: &Self::Grant) -> Condition;

    /// Checks the rule.
    fn authorize<S: Service, M: Message>(
        service: &S,
        context: &Context,
        message: &M,
    ) -> impl Future<Output = Result<Self::Grant, Problem>> + Send;
}

impl Authorize for rule::Public {
    type Grant = ();

    fn condition((): &()) -> Condition {
        Condition::None
    }

    async fn authorize<S: Service, M: Message>(_: &S, _: &Context, _: &M) -> Result<(), Problem> {
        Ok(())
    }
}

impl Authorize for rule::SignedIn {
    type Grant = Caller;

    fn condition(_: &Caller) -> Condition {
        Condition::Session
    }

    async fn authorize<S: Service, M: Message>(_: &S, context: &Context, _: &M) -> Result<Caller, Problem> {
        Caller::from_context(context)
    }
}

impl Authorize for rule::PlatformAdmin {
    type Grant = Caller;

    fn condition(_: &Caller) -> Condition {
        Condition::PlatformAdmin
    }

    async fn authorize<S: Service, M: Message>(_: &S, context: &Context, _: &M) -> Result<Caller, Problem> {
        let caller = Caller::from_context(context)?;
        if caller.platform_admin {
            Ok(caller)
        } else {
            Err(Problem::forbidden("You need to be an administrator of the installation.")
                .hint("Ask an administrator to run `capsule admin users grant EMAIL`."))
        }
    }
}

impl Authorize for rule::Invited {
    type Grant = Invitee;

    fn condition(_: &Invitee) -> Condition {
        Condition::Session
    }

    async fn authorize<S: Service, M: Message>(service: &S, context: &Context, message: &M) -> Result<Invitee, Problem> {
        let user = Caller::from_context(context)?.user;
        let Some(Target::Invitation(id)) = message.target() else { return Err(Problem::internal()) };
        // The same for a missing invitation and for one of another user.
        let organization = service.invited_to(id, user).await?.ok_or_else(|| Problem::not_found("invitation"))?;
        Ok(Invitee { organization, user })
    }
}

impl Authorize for rule::Internal {
    type Grant = SystemAccess;

    fn condition(_: &SystemAccess) -> Condition {
        Condition::None
    }

    async fn authorize<S: Service, M: Message>(service: &S, context: &Context, _: &M) -> Result<SystemAccess, Problem> {
        match context.principal {
            Principal::Service(_) => Ok(SystemAccess::new(service.store().name())),
            Principal::User { .. } | Principal::Anonymous => Err(Problem::not_found("endpoint")),
        }
    }
}

/// The permissions that a rule requires for a target in `location`.
fn required_permissions(access: Access, location: &Location) -> Result<Vec<Permission>, Problem> {
    let affected =
        location.environment.iter().chain(&location.environments).map(|kind| EnvironmentKind::deploy_permission(*kind));
    match access {
        Access::Granted(permission) => Ok(vec![permission]),
        // Outside of an environment, it may affect all of them.
        Access::GrantedDeploy => {
            Ok(vec![location.environment.map_or(Permission::DeployProduction, EnvironmentKind::deploy_permission)])
        }
        Access::GrantedAndDeploy(permission) => Ok(std::iter::once(permission).chain(affected).collect()),
        Access::Public | Access::SignedIn | Access::PlatformAdmin | Access::Invited | Access::Internal => {
            Err(Problem::internal())
        }
    }
}

impl Authorize for rule::Granted {
    type Grant = Tenant;

    fn condition(grant: &Tenant) -> Condition {
        Condition::Member { organization: grant.organization, min_role: grant.min_role }
    }

    async fn authorize<S: Service, M: Message>(service: &S, context: &Context, message: &M) -> Result<Tenant, Problem> {
        let caller = Caller::from_context(context)?;
        let target = message.target().ok_or_else(Problem::internal)?;
        // The same for a missing target and for one of an organization that the caller is not a member of.
        let not_found = || Problem::not_found(target.noun());
        let location = service.locate(&target).await?.ok_or_else(not_found)?;
        let permissions = required_permissions(M::ACCESS, &location)?;
        let missing = |role: Role| permissions.iter().copied().find(|permission| !role.allows(*permission));
        let cached = service.cached_role(location.organization_id, caller.user).await?;
        let role = match cached {
            Some(role) if missing(role).is_none() => role,
            // The cache may be outdated: request the role before refusing.
            _ => service.fetch_role(location.organization_id, caller.user).await?.ok_or_else(not_found)?,
        };
        if let Some(permission) = missing(role) {
            return Err(Problem::missing_permission(permission, role));
        }
        let min_role = Role::ALL.into_iter().find(|role| missing(*role).is_none()).unwrap_or(role);
        Ok(Tenant { organization: location.organization_id, user: caller.user, role, min_role })
    }
}

#[cfg(test)]
mod tests {
    use super::required_permissions;
    use capsule_contracts::access::EnvironmentKind as Kind;
    use capsule_contracts::project::Location;
    use capsule_contracts::{Access, Permission, Uuid};

    #[test]
    fn a_target_in_several_environments_requires_the_deploy_permission_of_each() {
        let location = Location { environments: vec![Kind::Staging, Kind::Production], ..Location::in_organization(Uuid::nil()) };
        let required =
            required_permissions(Access::GrantedAndDeploy(Permission::ServiceManage), &location).expect("a rule for members");
        assert_eq!(required, [Permission::ServiceManage, Permission::DeployStaging, Permission::DeployProduction]);
        let without_environment =
            required_permissions(Access::GrantedAndDeploy(Permission::ServiceManage), &Location::in_organization(Uuid::nil()));
        assert_eq!(without_environment.expect("a rule for members"), [Permission::ServiceManage]);
    }
}
