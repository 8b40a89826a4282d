//! The organization service: organizations, members and roles. It owns all memberships; other services cache them and
//! update their caches by [`MembershipChanged`](capsule_contracts::organization::MembershipChanged).

mod deletion;
mod invitations;
mod leaving;
mod members;
mod organizations;
mod personal;
mod quotas;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use capsule_bus::{Bus, Router, Service};
use capsule_contracts::identity::{UserErased, UserRegistered};
use capsule_contracts::project::Location;
use capsule_contracts::{Problem, Role, Target, Uuid};
use capsule_store::{Databases, Keyring, Migrations, Store, StoreError, unscoped};

pub use quotas::Limits;

/// The organization service.
#[derive(Debug)]
pub struct OrganizationService {
    store: Arc<Store>,
    bus: Bus,
    limits: Limits,
}

impl Service for OrganizationService {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }

    fn bus(&self) -> &Bus {
        &self.bus
    }

    async fn locate(&self, target: &Target) -> Result<Option<Location>, Problem> {
        let Target::Organization(id) = target else {
            return Ok(None);
        };
        let known = unscoped!(
            "finds out whose it is",
            "SELECT id FROM organizations WHERE id = :id AND closed_at IS NULL AND deleted_at IS NULL",
            id = *id
        );
        let known = self.store.read().value::<Uuid>(known).await?;
        Ok(known.map(Location::in_organization))
    }

    async fn invited_to(&self, invitation: Uuid, user: Uuid) -> Result<Option<Uuid>, Problem> {
        invitations::organization_of(self, invitation, user).await
    }

    /// Reads the membership itself, as this service owns it.
    async fn cached_role(&self, organization: Uuid, user: Uuid) -> Result<Option<Role>, Problem> {
        Ok(members::membership(self, organization, user).await?.role)
    }

    async fn fetch_role(&self, organization: Uuid, user: Uuid) -> Result<Option<Role>, Problem> {
        self.cached_role(organization, user).await
    }
}

/// The name of the service and of its database.
pub const NAME: &str = "organization";

/// The migrations of its database.
pub const MIGRATIONS: Migrations = &[
    ("bus", capsule_bus::MIGRATIONS),
    (
        NAME,
        capsule_store::migrations![1 "create_organizations", 2 "close_organizations", 3 "set_quotas", 4 "invite_members", 5 "remember_who_left"],
    ),
];

/// Opens the service's database and registers the service on the bus.
///
/// # Errors
/// When its database cannot be opened.
pub async fn start(
    databases: &Databases,
    bus: &Bus,
    keyring: Keyring,
    limits: Limits,
) -> Result<Arc<OrganizationService>, StoreError> {
    let store = Store::open(databases, NAME, keyring, MIGRATIONS).await?;
    let organizations = Arc::new(OrganizationService { store: Arc::new(store), bus: bus.clone(), limits });
    Router::new(organizations.clone())
        .handle(organizations::list_organizations)
        .handle(organizations::create_organization)
        .handle(organizations::get_organization)
        .handle(organizations::update_organization)
        .handle(organizations::delete_organization)
        .handle(members::list_members)
        .handle(invitations::add_member)
        .handle(invitations::list_invitations)
        .handle(invitations::accept_invitation)
        .handle(invitations::reject_invitation)
        .handle(members::leave_organization)
        .handle(members::change_role)
        .handle(members::remove_member)
        .handle(members::list_permissions)
        .handle(members::get_membership)
        .handle(quotas::get_quotas)
        .handle(quotas::inspect_quotas)
        .handle(quotas::set_quotas)
        .handle(quotas::inspect_organizations)
        .handle(quotas::confirm_quotas)
        .handle(members::get_memberships)
        .handle(leaving::check_leaving)
        .handle(leaving::leave_organizations)
        .handle(leaving::count_memberships)
        .saga(&deletion::DELETION)
        // The user has already left; this removes memberships created since by late events.
        .consume::<UserErased>(|_, tx, delivery| {
            Box::pin(async move { leaving::leave(tx, &delivery.context, &delivery.system, delivery.event.user_id).await })
        })
        .consume::<UserRegistered>(|_, tx, delivery| {
            Box::pin(async move { personal::create_if_missing(tx, &delivery.event.user).await })
        })
        .start();
    Ok(organizations)
}
