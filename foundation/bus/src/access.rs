//! Authorization: from a message's rule to the proof its handler takes.

use std::future::Future;

use capsule_contracts::access::rule;
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

/// Turns an access rule into the proof that its handlers take.
pub trait Prove {
    type Proof: std::fmt::Debug + Send + Sync + 'static;

    /// Checks the rule.
    fn prove<S: Service, M: Message>(
        service: &S,
        context: &Context,
        message: &M,
    ) -> impl Future<Output = Result<Self::Proof, Problem>> + Send;
}

impl Prove for rule::Public {
    type Proof = ();

    async fn prove<S: Service, M: Message>(_: &S, _: &Context, _: &M) -> Result<(), Problem> {
        Ok(())
    }
}

impl Prove for rule::SignedIn {
    type Proof = Caller;

    async fn prove<S: Service, M: Message>(_: &S, context: &Context, _: &M) -> Result<Caller, Problem> {
        Caller::of(context)
    }
}

impl Prove for rule::PlatformAdmin {
    type Proof = Caller;

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

    async fn prove<S: Service, M: Message>(_: &S, context: &Context, _: &M) -> Result<(), Problem> {
        match context.principal {
            Principal::Service(_) => Ok(()),
            Principal::User { .. } | Principal::Anonymous => Err(Problem::not_found("endpoint")),
        }
    }
}

impl Prove for rule::Granted {
    type Proof = Tenant;

    async fn prove<S: Service, M: Message>(service: &S, context: &Context, message: &M) -> Result<Tenant, Problem> {
        let caller = Caller::of(context)?;
        let target = message.target().ok_or_else(Problem::internal)?;
        let place = service.locate(&target).await?.ok_or_else(|| Problem::not_found("thing"))?;
        let permission = match M::ACCESS {
            Access::Granted(permission) => permission,
            Access::GrantedDeploy => place
                .environment
                .map_or(Permission::DeployProduction, capsule_contracts::access::EnvironmentKind::deploy_permission),
            Access::Public | Access::SignedIn | Access::PlatformAdmin | Access::Internal => return Err(Problem::internal()),
        };
        let cached = service.cached_role(place.organization_id, caller.user).await?;
        let role = match cached {
            Some(role) if role.allows(permission) => role,
            // Before refusing, the owner of the fact is asked: the cache may not have heard yet.
            _ => service.true_role(place.organization_id, caller.user).await?.ok_or_else(|| Problem::not_found("thing"))?,
        };
        if role.allows(permission) {
            Ok(Tenant { organization: place.organization_id, user: caller.user, role })
        } else {
            Err(Problem::forbidden(format!("This takes the permission {}; your role is {}.", permission.name(), role.name()))
                .hint("Ask an owner or admin of the organization."))
        }
    }
}
