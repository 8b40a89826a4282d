//! Invitations of addresses that have no account: the id that the account will have, and tokens to register it with.
//! An address proves nothing, for nobody has checked whose it is: only the bearer of a token gets the reserved id, and
//! with it the membership that waits for it. Each organization reserves an id of its own, so that its token is good for
//! its own invitation only.

use std::sync::Arc;

use capsule_bus::Call;
use capsule_contracts::identity::{INVITATION_SECONDS, InviteUser, InvitedUser, Registration, RevokeInvitation};
use capsule_contracts::{Empty, Problem, Timestamp, Uuid, new_id};
use capsule_store::{Transaction, unscoped};
use sea_orm::FromQueryResult;

use crate::{Identity, tokens};

#[derive(FromQueryResult)]
pub struct Invited {
    pub user_id: Uuid,
    pub email: String,
}

pub async fn invite_user(identity: Arc<Identity>, call: Call<InviteUser>) -> Result<InvitedUser, Problem> {
    let email = call.message.email.trim().to_lowercase();
    let tx = identity.store.begin().await?;
    let known =
        unscoped!("users belong to no tenant", "SELECT id FROM users WHERE email = $1 AND closed_at IS NULL", email.as_str());
    let organization = call.message.organization_id;
    let reserved = unscoped!(
        "invited users belong to no tenant",
        "SELECT user_id FROM invited_users WHERE email = $1 AND organization_id = $2",
        email.as_str(),
        organization
    );
    let known = tx.read().value::<Uuid>(known).await?;
    if let Some(user_id) = known {
        // They have registered in another way: nobody can have that id any more.
        let reserved = tx.read().value::<Uuid>(reserved).await?;
        if let Some(reserved) = reserved {
            forget(&tx, reserved).await?;
            tx.commit().await?;
        }
        return Ok(InvitedUser { user_id, email, registration_token: None });
    }
    if identity.registration == Registration::Closed {
        return Err(Problem::invalid_field("email", "no account has this address, and this installation registers nobody")
            .hint("Its operator can change the setting `registration` to `invited`."));
    }
    prune(&tx, Timestamp::now()).await?;
    let user_id = match tx.read().value::<Uuid>(reserved).await? {
        Some(user_id) => user_id,
        None => {
            let user_id = new_id();
            tx.run(unscoped!(
                "invited users belong to no tenant",
                "INSERT INTO invited_users (user_id, email, organization_id, created_at) VALUES ($1, $2, $3, $4)",
                user_id,
                email.as_str(),
                organization,
                Timestamp::now().0
            ))
            .await?;
            user_id
        }
    };
    let token = tokens::secret()?;
    tx.run(unscoped!(
        "registration tokens belong to an invited user",
        "INSERT INTO registration_tokens (digest, user_id, organization_id, expires_at) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (user_id, organization_id) DO UPDATE SET digest = excluded.digest, expires_at = excluded.expires_at",
        tokens::digest(&token),
        user_id,
        organization,
        Timestamp::now().plus_seconds(INVITATION_SECONDS).0
    ))
    .await?;
    tx.commit().await?;
    Ok(InvitedUser { user_id, email, registration_token: Some(token) })
}

/// Uses a token up, if it was made for this address. Who registers has the id that its organization reserved.
pub async fn redeem(tx: &Transaction<'_>, token: &str, email: &str) -> Result<Option<Uuid>, Problem> {
    let invited = unscoped!(
        "invited users belong to no tenant",
        "SELECT i.user_id, i.email FROM invited_users i \
         JOIN registration_tokens t ON t.user_id = i.user_id AND t.organization_id = i.organization_id \
         WHERE t.digest = $1 AND t.expires_at > $2",
        tokens::digest(token),
        Timestamp::now().0
    );
    let Some(invited) = tx.read().first::<Invited>(invited).await?.filter(|invited| invited.email == email) else {
        return Ok(None);
    };
    forget(tx, invited.user_id).await?;
    Ok(Some(invited.user_id))
}

/// Those of these ids that were invited and have not registered.
pub async fn named(identity: &Identity, id: Uuid) -> Result<Option<Invited>, Problem> {
    let row = unscoped!("invited users belong to no tenant", "SELECT user_id, email FROM invited_users WHERE user_id = $1", id);
    identity.store.read().first(row).await
}

pub async fn revoke_invitation(identity: Arc<Identity>, call: Call<RevokeInvitation>) -> Result<Empty, Problem> {
    let tx = identity.store.begin().await?;
    tx.run(unscoped!(
        "registration tokens belong to an invited user",
        "DELETE FROM registration_tokens WHERE user_id = $1 AND organization_id = $2",
        call.message.user_id,
        call.message.organization_id
    ))
    .await?;
    prune(&tx, Timestamp::now()).await?;
    tx.commit().await?;
    Ok(Empty {})
}

/// Voids what a deleted organization has invited.
pub async fn organization_deleted(tx: &Transaction<'_>, organization: Uuid) -> Result<(), Problem> {
    tx.run(unscoped!(
        "registration tokens belong to an invited user",
        "DELETE FROM registration_tokens WHERE organization_id = $1",
        organization
    ))
    .await?;
    prune(tx, Timestamp::now()).await
}

/// Forgets the addresses of people who had not registered in time at `now`.
pub async fn purge(identity: &Identity, now: Timestamp) -> Result<(), Problem> {
    let tx = identity.store.begin().await?;
    prune(&tx, now).await?;
    tx.commit().await
}

async fn forget(tx: &Transaction<'_>, user: Uuid) -> Result<(), Problem> {
    tx.run(unscoped!(
        "registration tokens belong to an invited user",
        "DELETE FROM registration_tokens WHERE user_id = $1",
        user
    ))
    .await?;
    tx.run(unscoped!("invited users belong to no tenant", "DELETE FROM invited_users WHERE user_id = $1", user)).await?;
    Ok(())
}

async fn prune(tx: &Transaction<'_>, now: Timestamp) -> Result<(), Problem> {
    tx.run(unscoped!(
        "registration tokens belong to an invited user",
        "DELETE FROM registration_tokens WHERE expires_at <= $1",
        now.0
    ))
    .await?;
    tx.run(unscoped!(
        "invited users belong to no tenant",
        "DELETE FROM invited_users WHERE NOT EXISTS (SELECT 1 FROM registration_tokens t WHERE t.user_id = invited_users.user_id)"
    ))
    .await?;
    Ok(())
}
