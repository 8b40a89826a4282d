//! Invitations of e-mail addresses without an account: a reserved user id, and a registration token.
//!
//! Addresses are not verified, so an address alone gives no access: only a registration with the token gets the
//! reserved id, and with it the pending membership. Each organization reserves its own id, so that a token is valid
//! only for the invitation of that organization.

use std::sync::Arc;

use capsule_bus::Call;
use capsule_contracts::identity::{INVITATION_SECONDS, InviteUser, InvitedUser, Registration, RevokeInvitation};
use capsule_contracts::{Empty, Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Transaction, unscoped};

use crate::{IdentityService, tokens};

#[derive(FromRow)]
pub struct Invited {
    pub user_id: Uuid,
    pub email: String,
}

pub async fn invite_user(identity: Arc<IdentityService>, call: Call<InviteUser>) -> Result<InvitedUser, Problem> {
    let email = call.message.email.trim().to_lowercase();
    let tx = identity.store.begin().await?;
    let known = unscoped!(
        "users belong to no tenant",
        "SELECT id FROM users WHERE email = :email AND closed_at IS NULL",
        email = email.as_str()
    );
    let organization = call.message.organization_id;
    let reserved = unscoped!(
        "invited users belong to no tenant",
        "SELECT user_id FROM invited_users WHERE email = :email AND organization_id = :organization",
        email = email.as_str(),
        organization
    );
    let known = tx.read().value::<Uuid>(known).await?;
    if let Some(user_id) = known {
        // They registered without the invitation: the reserved id must not be used any more.
        let reserved = tx.read().value::<Uuid>(reserved).await?;
        if let Some(reserved) = reserved {
            delete(&tx, reserved).await?;
            tx.commit().await?;
        }
        return Ok(InvitedUser { user_id, email, registration_token: None });
    }
    if identity.registration == Registration::Closed {
        return Err(Problem::invalid_field(
            "email",
            "no account has this address, and registration is closed on this installation",
        )
        .hint("Ask its operator to set `registration` to `invited`."));
    }
    prune(&tx, Timestamp::now()).await?;
    let user_id = match tx.read().value::<Uuid>(reserved).await? {
        Some(user_id) => user_id,
        None => {
            let user_id = new_id();
            tx.run(unscoped!(
                "invited users belong to no tenant",
                "INSERT INTO invited_users (user_id, email, organization_id, created_at) \
                 VALUES (:user_id, :email, :organization, :created_at)",
                user_id,
                email = email.as_str(),
                organization,
                created_at = Timestamp::now().0
            ))
            .await?;
            user_id
        }
    };
    let token = tokens::secret()?;
    tx.run(unscoped!(
        "registration tokens belong to an invited user",
        "INSERT INTO registration_tokens (digest, user_id, organization_id, expires_at) \
         VALUES (:digest, :user_id, :organization, :expires_at) \
         ON CONFLICT (user_id, organization_id) DO UPDATE SET digest = excluded.digest, expires_at = excluded.expires_at",
        digest = tokens::digest(&token),
        user_id,
        organization,
        expires_at = Timestamp::now().plus_seconds(INVITATION_SECONDS).0
    ))
    .await?;
    tx.commit().await?;
    Ok(InvitedUser { user_id, email, registration_token: Some(token) })
}

/// Consumes a registration token and returns the reserved user id. `None` if the token is not valid for this address.
pub async fn redeem(tx: &Transaction<'_>, token: &str, email: &str) -> Result<Option<Uuid>, Problem> {
    let invited = unscoped!(
        "invited users belong to no tenant",
        "SELECT i.user_id, i.email FROM invited_users i \
         JOIN registration_tokens t ON t.user_id = i.user_id AND t.organization_id = i.organization_id \
         WHERE t.digest = :digest AND t.expires_at > :now",
        digest = tokens::digest(token),
        now = Timestamp::now().0
    );
    let Some(invited) = tx.read().first::<Invited>(invited).await?.filter(|invited| invited.email == email) else {
        return Ok(None);
    };
    delete(tx, invited.user_id).await?;
    Ok(Some(invited.user_id))
}

/// The invitation of a reserved user id. `None` once its user has registered.
pub async fn find(identity: &IdentityService, id: Uuid) -> Result<Option<Invited>, Problem> {
    let row = unscoped!("invited users belong to no tenant", "SELECT user_id, email FROM invited_users WHERE user_id = :id", id);
    identity.store.read().first(row).await
}

pub async fn revoke_invitation(identity: Arc<IdentityService>, call: Call<RevokeInvitation>) -> Result<Empty, Problem> {
    let tx = identity.store.begin().await?;
    tx.run(unscoped!(
        "registration tokens belong to an invited user",
        "DELETE FROM registration_tokens WHERE user_id = :user_id AND organization_id = :organization_id",
        user_id = call.message.user_id,
        organization_id = call.message.organization_id
    ))
    .await?;
    prune(&tx, Timestamp::now()).await?;
    tx.commit().await?;
    Ok(Empty {})
}

/// Revokes the invitations of a deleted organization.
pub async fn organization_deleted(tx: &Transaction<'_>, organization: Uuid) -> Result<(), Problem> {
    tx.run(unscoped!(
        "registration tokens belong to an invited user",
        "DELETE FROM registration_tokens WHERE organization_id = :organization",
        organization
    ))
    .await?;
    prune(tx, Timestamp::now()).await
}

/// Deletes invitations that have expired at `now`.
pub async fn purge(identity: &IdentityService, now: Timestamp) -> Result<(), Problem> {
    let tx = identity.store.begin().await?;
    prune(&tx, now).await?;
    tx.commit().await
}

async fn delete(tx: &Transaction<'_>, user: Uuid) -> Result<(), Problem> {
    tx.run(unscoped!(
        "registration tokens belong to an invited user",
        "DELETE FROM registration_tokens WHERE user_id = :user",
        user
    ))
    .await?;
    tx.run(unscoped!("invited users belong to no tenant", "DELETE FROM invited_users WHERE user_id = :user", user)).await?;
    Ok(())
}

async fn prune(tx: &Transaction<'_>, now: Timestamp) -> Result<(), Problem> {
    tx.run(unscoped!(
        "registration tokens belong to an invited user",
        "DELETE FROM registration_tokens WHERE expires_at <= :now",
        now = now.0
    ))
    .await?;
    tx.run(unscoped!(
        "invited users belong to no tenant",
        "DELETE FROM invited_users WHERE NOT EXISTS (SELECT 1 FROM registration_tokens t WHERE t.user_id = invited_users.user_id)"
    ))
    .await?;
    Ok(())
}
