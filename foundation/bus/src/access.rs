//! Authorization: turns a message's access rule into the grant that its handler takes.

use std::future::Future;

use capsule_contracts::access::{EnvironmentKind, rule};
use capsule_contracts::project::Location;
use capsule_contracts::{Access, Message, Permission, Permissions, Problem, Role, Target, Uuid};
use capsule_store::{Scope, UserScope};

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

    /// Grants access to a user's rows: to the caller's own, and for an administrator of the installation to any user's.
    ///
    /// # Errors
    /// [`Problem::not_found`] if the caller may not access them.
    pub fn access_to(&self, user: Uuid) -> Result<UserGrant, Problem> {
        match user == self.user || self.platform_admin {
            true => Ok(UserGrant { user }),
            false => Err(Problem::not_found("user")),
        }
    }

    fn from_context(context: &Context) -> Result<Self, Problem> {
        match context.principal {
            Principal::User { id, session, platform_admin } => Ok(Self { user: id, session, platform_admin }),
            Principal::ApiKey { .. } => {
                Err(Problem::forbidden("An API key has access only to the resources of its organization.")
                    .hint("Sign in with `capsule login`."))
            }
            Principal::Anonymous | Principal::Service(_) => Err(Problem::unauthenticated("You are not signed in.")),
        }
    }
}

impl UserScope for Caller {
    fn user(&self) -> Uuid {
        self.user
    }
}

/// A grant for the rows of a user, made from [`Caller::access_to`] or [`SystemAccess::user`].
#[derive(Clone, Copy, Debug)]
pub struct UserGrant {
    user: Uuid,
}

impl UserScope for UserGrant {
    fn user(&self) -> Uuid {
        self.user
    }
}

/// The grant of a member of an organization who has the permissions that the message requires, or of an API key of such a
/// member. Made only here.
#[derive(Clone, Copy, Debug)]
pub struct Tenant {
    organization: Uuid,
    user: Uuid,
    role: Role,
    /// The scopes of an API key.
    scopes: Option<Permissions>,
    /// The lowest role that has the required permissions.
    min_role: Role,
}

impl Tenant {
    /// The member who sent the message, or the owner of the API key.
    #[must_use]
    pub fn user(&self) -> Uuid {
        self.user
    }

    /// The member's role. For an API key, the highest role that its scopes contain entirely, at most its owner's.
    #[must_use]
    pub fn role(&self) -> Role {
        effective_role(self.role, self.scopes)
    }

    /// Checks a further permission.
    ///
    /// # Errors
    /// [`Problem::forbidden`] if the role does not have it, or it is not among the scopes of the API key.
    pub fn check(&self, permission: Permission) -> Result<(), Problem> {
        check_permission(self.role, self.scopes, permission)
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

    /// Grants access to a user's rows. `reason` is logged.
    #[must_use]
    pub fn user(&self, user: Uuid, reason: &'static str) -> UserGrant {
        tracing::debug!(service = self.service, %user, reason, "user grant");
        UserGrant { user }
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
            Principal::User { .. } | Principal::ApiKey { .. } | Principal::Anonymous => Err(Problem::not_found("endpoint")),
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

/// Fails unless the role has the permission and it is among the scopes of the API key, if there is one.
fn check_permission(role: Role, scopes: Option<Permissions>, permission: Permission) -> Result<(), Problem> {
    if !role.allows(permission) {
        return Err(Problem::missing_permission(permission, role));
    }
    match scopes {
        Some(scopes) if !scopes.contains(permission) => Err(Problem::missing_scope(permission)),
        _ => Ok(()),
    }
}

/// The highest role up to `role` whose permissions are all among the scopes; the lowest role if there is none.
fn effective_role(role: Role, scopes: Option<Permissions>) -> Role {
    let Some(scopes) = scopes else { return role };
    let is_within =
        |one: &Role| Permission::ALL.into_iter().all(|permission| !one.allows(permission) || scopes.contains(permission));
    Role::ALL.into_iter().filter(|one| *one <= role && is_within(one)).max().unwrap_or(Role::Viewer)
}

/// The sender of a message on the resources of an organization.
struct Sender {
    user: Uuid,
    /// The organization and the scopes of an API key.
    key: Option<(Uuid, Permissions)>,
}

impl Sender {
    fn from_context(context: &Context) -> Result<Self, Problem> {
        match context.principal {
            Principal::User { id, .. } => Ok(Self { user: id, key: None }),
            Principal::ApiKey { owner, organization, scopes, .. } => Ok(Self { user: owner, key: Some((organization, scopes)) }),
            Principal::Anonymous | Principal::Service(_) => Err(Problem::unauthenticated("You are not signed in.")),
        }
    }

    /// Whether the sender can have access to an organization at all.
    fn reaches(&self, organization: Uuid) -> bool {
        self.key.is_none_or(|(own, _)| own == organization)
    }
}

impl Authorize for rule::Granted {
    type Grant = Tenant;

    fn condition(grant: &Tenant) -> Condition {
        Condition::Member { organization: grant.organization, min_role: grant.min_role }
    }

    async fn authorize<S: Service, M: Message>(service: &S, context: &Context, message: &M) -> Result<Tenant, Problem> {
        let sender = Sender::from_context(context)?;
        let target = message.target().ok_or_else(Problem::internal)?;
        // The same for a missing target and for one of an organization that the sender has no access to.
        let not_found = || Problem::not_found(target.noun());
        let location = service.locate(&target).await?.filter(|location| sender.reaches(location.organization_id));
        let location = location.ok_or_else(not_found)?;
        let permissions = required_permissions(M::ACCESS, &location)?;
        let missing = |role: Role| permissions.iter().copied().find(|permission| !role.allows(*permission));
        let cached = service.cached_role(location.organization_id, sender.user).await?;
        let role = match cached {
            Some(role) if missing(role).is_none() => role,
            // The cache may be outdated: request the role before refusing.
            _ => service.fetch_role(location.organization_id, sender.user).await?.ok_or_else(not_found)?,
        };
        let scopes = sender.key.map(|(_, scopes)| scopes);
        for permission in &permissions {
            check_permission(role, scopes, *permission)?;
        }
        let min_role = Role::ALL.into_iter().find(|role| missing(*role).is_none()).unwrap_or(role);
        Ok(Tenant { organization: location.organization_id, user: sender.user, role, scopes, min_role })
    }
}

#[cfg(test)]
mod tests {
    use super::{check_permission, effective_role, required_permissions};
    use capsule_contracts::access::EnvironmentKind as Kind;
    use capsule_contracts::project::Location;
    use capsule_contracts::{Access, Permission, Permissions, Role, Uuid};

    #[test]
    fn the_scopes_of_a_key_bound_what_its_owners_role_permits() {
        let all: Permissions = Permission::ALL.into_iter().collect();
        for role in Role::ALL {
            for permission in Permission::ALL {
                let only: Permissions = [permission].into_iter().collect();
                let others: Permissions = Permission::ALL.into_iter().filter(|one| *one != permission).collect();
                let check = |scopes| check_permission(role, scopes, permission);
                let (name, allowed) = (format!("{} of {}", permission.name(), role.name()), role.allows(permission));
                for scopes in [None, Some(all), Some(only)] {
                    assert_eq!(check(scopes).is_ok(), allowed, "{name}");
                }
                for scopes in [others, Permissions::default()] {
                    let problem = check(Some(scopes)).expect_err(&name);
                    assert_eq!((problem.status, problem.detail.contains("API key")), (403, allowed), "{name}");
                }
            }
        }
    }

    #[test]
    fn a_key_has_a_role_only_with_all_of_its_permissions() {
        for owner in Role::ALL {
            assert_eq!(effective_role(owner, None), owner);
            for role in Role::ALL {
                let scopes: Permissions = Permission::ALL.into_iter().filter(|permission| role.allows(*permission)).collect();
                assert_eq!(effective_role(owner, Some(scopes)), role.min(owner), "{role:?} of {owner:?}");
                for left_out in scopes.iter() {
                    let fewer: Permissions = scopes.iter().filter(|permission| *permission != left_out).collect();
                    let effective = effective_role(owner, Some(fewer));
                    assert!(
                        effective == Role::Viewer || !effective.allows(left_out),
                        "{role:?} of {owner:?} without {left_out:?}"
                    );
                }
            }
            assert_eq!(effective_role(owner, Some(Permissions::default())), Role::Viewer);
        }
    }

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
