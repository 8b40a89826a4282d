//! Authorization: from a message's rule to the proof its handler takes.

use std::future::Future;

use capsule_contracts::access::{EnvironmentKind, rule};
use capsule_contracts::project::Place;
use capsule_contracts::{Access, Message, Permission, Problem, Role, Uuid};
use capsule_store::Scope;

use crate::context::{Context, Principal};
use crate::service::Service;

/// A signed-in user.
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

    fn of(context: &Context) -> Result<Self, Problem> {
        match context.principal {
            Principal::User { id, session, platform_admin } => Ok(Self { user: id, session, platform_admin }),
            Principal::Anonymous | Principal::Service(_) => Err(Problem::unauthenticated("This takes a signed-in user.")),
        }
    }
}

/// Proof that a member of an organization may do what the message asks. Made only here.
#[derive(Clone, Copy, Debug)]
pub struct Tenant {
    organization: Uuid,
    user: Uuid,
    role: Role,
    /// The least role that may do it.
    least: Role,
}

impl Tenant {
    /// The member who asks.
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

/// Leave for background work to touch an organization's data, with its reason on record.
#[derive(Clone, Copy, Debug)]
pub struct SystemGrant {
    organization: Uuid,
}

impl SystemGrant {
    /// Takes leave to touch `organization`'s data because of `reason`.
    #[must_use]
    pub fn new(organization: Uuid, reason: &'static str) -> Self {
        tracing::debug!(%organization, reason, "system grant");
        Self { organization }
    }
}

impl Scope for SystemGrant {
    fn organization(&self) -> Uuid {
        self.organization
    }
}

/// What must go on holding while something lasts that a proof allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing.
    None,
    /// That the session lives.
    Session,
    /// That the session lives, and its user administers the installation.
    PlatformAdmin,
    /// That the session lives, and its user has at least this role in this organization.
    Member { organization: Uuid, least: Role },
}

/// Turns an access rule into the proof that its handlers take.
pub trait Prove {
    type Proof: std::fmt::Debug + Send + Sync + 'static;

    /// What must hold for as long as the proof is used.
    fn condition(proof: &Self::Proof) -> Condition;

    /// Checks the rule.
    fn prove<S: Service, M: Message>(
        service: &S,
        context: &Context,
        message: &M,
    ) -> impl Future<Output = Result<Self::Proof, Problem>> + Send;
}

impl Prove for rule::Public {
    type Proof = ();

    fn condition((): &()) -> Condition {
        Condition::None
    }

    async fn prove<S: Service, M: Message>(_: &S, _: &Context, _: &M) -> Result<(), Problem> {
        Ok(())
    }
}

impl Prove for rule::SignedIn {
    type Proof = Caller;

    fn condition(_: &Caller) -> Condition {
        Condition::Session
    }

    async fn prove<S: Service, M: Message>(_: &S, context: &Context, _: &M) -> Result<Caller, Problem> {
        Caller::of(context)
    }
}

impl Prove for rule::PlatformAdmin {
    type Proof = Caller;

    fn condition(_: &Caller) -> Condition {
        Condition::PlatformAdmin
    }

    async fn prove<S: Service, M: Message>(_: &S, context: &Context, _: &M) -> Result<Caller, Problem> {
        let caller = Caller::of(context)?;
        if caller.platform_admin {
            Ok(caller)
        } else {
            Err(Problem::forbidden("This takes an administrator of the installation."))
        }
    }
}

impl Prove for rule::Internal {
    type Proof = ();

    fn condition((): &()) -> Condition {
        Condition::None
    }

    async fn prove<S: Service, M: Message>(_: &S, context: &Context, _: &M) -> Result<(), Problem> {
        match context.principal {
            Principal::Service(_) => Ok(()),
            Principal::User { .. } | Principal::Anonymous => Err(Problem::not_found("endpoint")),
        }
    }
}

/// The permissions that a rule takes at a place.
fn permissions(access: Access, place: &Place) -> Result<Vec<Permission>, Problem> {
    let reached = place.environment.iter().chain(&place.environments).map(|kind| EnvironmentKind::deploy_permission(*kind));
    match access {
        Access::Granted(permission) => Ok(vec![permission]),
        // What is in no environment may be in any.
        Access::GrantedDeploy => {
            Ok(vec![place.environment.map_or(Permission::DeployProduction, EnvironmentKind::deploy_permission)])
        }
        Access::GrantedAndDeploy(permission) => Ok(std::iter::once(permission).chain(reached).collect()),
        Access::Public | Access::SignedIn | Access::PlatformAdmin | Access::Internal => Err(Problem::internal()),
    }
}

impl Prove for rule::Granted {
    type Proof = Tenant;

    fn condition(proof: &Tenant) -> Condition {
        Condition::Member { organization: proof.organization, least: proof.least }
    }

    async fn prove<S: Service, M: Message>(service: &S, context: &Context, message: &M) -> Result<Tenant, Problem> {
        let caller = Caller::of(context)?;
        let target = message.target().ok_or_else(Problem::internal)?;
        let place = service.locate(&target).await?.ok_or_else(|| Problem::not_found("thing"))?;
        let permissions = permissions(M::ACCESS, &place)?;
        let missing = |role: Role| permissions.iter().copied().find(|permission| !role.allows(*permission));
        let cached = service.cached_role(place.organization_id, caller.user).await?;
        let role = match cached {
            Some(role) if missing(role).is_none() => role,
            // Before refusing, the owner of the fact is asked: the cache may not have heard yet.
            _ => service.true_role(place.organization_id, caller.user).await?.ok_or_else(|| Problem::not_found("thing"))?,
        };
        if let Some(permission) = missing(role) {
            return Err(Problem::forbidden(format!(
                "You need the {} permission here; your role is {}.",
                permission.name(),
                role.name()
            ))
            .hint("Ask an owner or admin of the organization."));
        }
        let least = Role::ALL.into_iter().find(|role| missing(*role).is_none()).unwrap_or(role);
        Ok(Tenant { organization: place.organization_id, user: caller.user, role, least })
    }
}

#[cfg(test)]
mod tests {
    use super::permissions;
    use capsule_contracts::access::EnvironmentKind as Kind;
    use capsule_contracts::project::Place;
    use capsule_contracts::{Access, Permission, Uuid};

    #[test]
    fn what_reaches_several_environments_takes_the_deploy_permission_of_each() {
        let place = Place { environments: vec![Kind::Staging, Kind::Production], ..Place::of(Uuid::nil()) };
        let taken = permissions(Access::GrantedAndDeploy(Permission::ServiceManage), &place).expect("a rule of members");
        assert_eq!(taken, [Permission::ServiceManage, Permission::DeployStaging, Permission::DeployProduction]);
        let nowhere = permissions(Access::GrantedAndDeploy(Permission::ServiceManage), &Place::of(Uuid::nil()));
        assert_eq!(nowhere.expect("a rule of members"), [Permission::ServiceManage]);
    }
}
