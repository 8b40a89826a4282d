//! Accounts of the installation, as its administrators see and change them. One administrator always stays.

use std::sync::Arc;

use capsule_bus::Call;
use capsule_contracts::identity::{DeleteUser, ListUsers, UpdateUser, User};
use capsule_contracts::{Empty, Page, Problem, Uuid};
use capsule_store::{Transaction, unscoped};

use crate::profile::{self, UserRow};
use crate::{Identity, erasure, reauthentication, sessions};

pub async fn list_users(identity: Arc<Identity>, call: Call<ListUsers>) -> Result<Page<User>, Problem> {
    let limit = call.message.limit.unwrap_or(100);
    let rows = unscoped!(
        "users belong to no tenant",
        "SELECT id, email, name, platform_admin, created_at FROM users WHERE closed_at IS NULL AND id > $1 ORDER BY id LIMIT $2",
        call.message.cursor.unwrap_or(Uuid::nil()),
        i64::from(limit) + 1
    );
    let mut items: Vec<User> = identity.store.read().all::<UserRow>(rows).await?.into_iter().map(User::from).collect();
    let more = items.len() > limit as usize;
    items.truncate(limit as usize);
    let next_cursor = items.last().filter(|_| more).map(|user| user.id.to_string());
    Ok(Page { items, next_cursor })
}

/// Fails unless `user` administers the installation now; the session may be older than the loss of that.
pub async fn still_admin(tx: &Transaction<'_>, user: Uuid) -> Result<(), Problem> {
    let admin = unscoped!(
        "users belong to no tenant",
        "SELECT 1 FROM users WHERE id = $1 AND platform_admin AND closed_at IS NULL",
        user
    );
    match tx.read().exists(admin).await? {
        true => Ok(()),
        false => Err(Problem::forbidden("You do not administer this installation any more.")),
    }
}

pub async fn update_user(identity: Arc<Identity>, call: Call<UpdateUser>) -> Result<User, Problem> {
    let Call { message, proof, context } = call;
    let confirmed = reauthentication::confirm(&identity, proof.user(), message.password.as_deref()).await?;
    let tx = identity.store.begin().await?;
    confirmed.still(&tx, &proof).await?;
    still_admin(&tx, proof.user()).await?;
    let user = profile::by_id(&tx, message.id).await?.ok_or_else(|| Problem::not_found("user"))?;
    if message.platform_admin {
        tx.run(unscoped!(
            "users belong to no tenant",
            "UPDATE users SET platform_admin = TRUE WHERE id = $1 AND closed_at IS NULL",
            message.id
        ))
        .await?;
    } else if user.platform_admin {
        let revoked = unscoped!(
            "users belong to no tenant",
            "UPDATE users SET platform_admin = FALSE WHERE id = $1 AND platform_admin AND EXISTS \
             (SELECT 1 FROM users u WHERE u.platform_admin AND u.closed_at IS NULL AND u.id <> $2)",
            message.id,
            message.id
        );
        if tx.run(revoked).await? == 0 {
            return Err(Problem::conflict(format!("{} is the last administrator of this installation.", user.email))
                .hint("Make somebody else an administrator first: capsule admin users grant EMAIL"));
        }
        // Their tokens say that they are one.
        sessions::end_all(&tx, &context, message.id).await?;
    }
    tx.commit().await?;
    tracing::info!(user = %message.id, platform_admin = message.platform_admin, by = %proof.user(), "administrator changed");
    Ok(User { platform_admin: message.platform_admin, ..user })
}

pub async fn delete_user(identity: Arc<Identity>, call: Call<DeleteUser>) -> Result<Empty, Problem> {
    let Call { message, proof, context } = call;
    let confirmed = reauthentication::confirm(&identity, proof.user(), message.password.as_deref()).await?;
    erasure::begin(&identity, &context, (&proof, &confirmed), message.id).await?;
    tracing::info!(user = %message.id, by = %proof.user(), "an administrator erases an account");
    Ok(Empty {})
}
