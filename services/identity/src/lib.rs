//! The identity service: users, passwords, sessions and tokens.
//!
//! Access tokens are JWTs (Ed25519) valid for 15 minutes. Refresh tokens are valid for 7 days and for one use. A
//! second use means that the token was stolen, so it ends the session.

mod administration;
mod authenticated;
mod erasure;
mod invitations;
mod login;
mod password;
mod profile;
mod reauthentication;
mod register;
mod revocations;
mod sessions;
#[cfg(test)]
mod tests;
mod tokens;

use std::sync::Arc;

use capsule_bus::{Bus, Router, Service};
use capsule_cache::Cache;
use capsule_contracts::identity::Registration;
use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::project::Location;
use capsule_contracts::{Problem, Target};
use capsule_store::{Databases, Keyring, Migrations, Store, StoreError};

use tokens::Signer;

/// The identity service.
#[derive(Debug)]
pub struct IdentityService {
    store: Arc<Store>,
    bus: Bus,
    cache: Cache,
    signer: Signer,
    passwords: password::Hasher,
    /// The secret in the data directory. It authenticates whoever can read that directory.
    local_token: String,
    registration: Registration,
}

impl Service for IdentityService {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }

    fn bus(&self) -> &Bus {
        &self.bus
    }

    async fn locate(&self, _: &Target) -> Result<Option<Location>, Problem> {
        Ok(None)
    }
}

/// The name of the service and of its database.
pub const NAME: &str = "identity";

/// The migrations of its database.
pub const MIGRATIONS: Migrations = &[
    ("bus", capsule_bus::MIGRATIONS),
    (
        NAME,
        capsule_store::migrations![1 "create_users_and_sessions", 2 "erase_users", 3 "invite_users", 4 "reserve_ids_per_organization"],
    ),
];

/// Opens the service's database and registers the service on the bus. The first administrator registers with
/// `local_token`; `registration` decides who else can.
///
/// # Errors
/// When its database cannot be opened.
pub async fn start(
    databases: &Databases,
    bus: &Bus,
    cache: Cache,
    keyring: Keyring,
    local_token: String,
    registration: Registration,
) -> Result<Arc<IdentityService>, StoreError> {
    let store = Store::open(databases, NAME, keyring, MIGRATIONS).await?;
    let signer = Signer::open(&store).await.map_err(|problem| StoreError(format!("identity: no signing key: {problem}")))?;
    let identity = Arc::new(IdentityService {
        store: Arc::new(store),
        bus: bus.clone(),
        cache,
        signer,
        passwords: password::Hasher::default(),
        local_token,
        registration,
    });
    Router::new(identity.clone())
        .handle(register::register)
        .handle(login::login)
        .handle(login::local_login)
        .handle(sessions::refresh_token)
        .handle(sessions::logout)
        .handle(sessions::validate_token)
        .handle(sessions::list_sessions)
        .handle(sessions::revoke_session)
        .handle(sessions::revoke_sessions)
        .handle(profile::get_profile)
        .handle(profile::update_profile)
        .handle(reauthentication::change_password)
        .handle(reauthentication::reauthenticate)
        .handle(sessions::check_sessions)
        .handle(administration::list_users)
        .handle(administration::update_user)
        .handle(administration::delete_user)
        .handle(erasure::delete_profile)
        .saga(&erasure::ERASURE)
        .handle(invitations::invite_user)
        .handle(invitations::revoke_invitation)
        .consume::<OrganizationDeleted>(|_, tx, delivery| {
            Box::pin(invitations::organization_deleted(tx, delivery.event.organization_id))
        })
        .handle(profile::get_users)
        .handle(tokens::get_keys)
        .purge(|identity, now| {
            Box::pin(async move {
                sessions::purge(identity, now).await?;
                invitations::purge(identity, now).await
            })
        })
        .start_with(|identity, _| Box::pin(async move { revocations::maintain_list(&identity).await }));
    Ok(identity)
}
