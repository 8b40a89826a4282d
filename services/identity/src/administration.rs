//! Administration of accounts by administrators of the installation. The last administrator cannot be removed.

use std::sync::Arc;

use capsule_bus::{Call, Caller};
use capsule_contracts::identity::{DeleteUser, ListUsers, UpdateUser, User};
use capsule_contracts::list::{PageQuery, SortKey};
use capsule_contracts::{Empty, Page, Problem};
use capsule_store::{Transaction, page, user_scoped};

use crate::profile::{self, UserRow};
use crate::{IdentityService, erasure, reauthentication, sessions};

pub async fn list_users(identity: Arc<IdentityService>, call: Call<ListUsers>) -> Result<Page<User>, Problem> {
    let query = PageQuery::of(&call.message)?;
    let rows = page!(
        query,
        unscoped "users belong to no tenant",
        "SELECT id, email, name, platform_admin, created_at FROM users WHERE closed_at IS NULL \
         AND substr(email, 1, length(:email_prefix)) = :email_prefix AND (:any OR platform_admin = :platform_admin)",
        "id" uuid,
        ["created_at" => "created_at" integer, "email" => "email" text],
        email_prefix = call.message.email_prefix.unwrap_or_default().to_lowercase(),
        any = call.message.platform_admin.is_none(),
        platform_admin = call.message.platform_admin.unwrap_or_default()
    );
    let users: Vec<User> = identity.store.read().all::<UserRow>(rows?).await?.into_iter().map(User::from).collect();
    let key =
        |user: &User| -> SortKey { if query.sort() == "email" { user.email.as_str().into() } else { user.created_at.0.into() } };
    Ok(query.page(users, |user| (key(user), user.id)))
}

/// Fails unless the caller is an administrator of the installation now. The session may predate the loss of the role.
pub async fn check_admin(tx: &Transaction<'_>, caller: &Caller) -> Result<(), Problem> {
    let admin = user_scoped!(caller, "SELECT 1 FROM users WHERE id = :user AND platform_admin AND closed_at IS NULL");
    match tx.read().exists(admin).await? {
        true => Ok(()),
        false => Err(Problem::forbidden("You are no longer an administrator of this installation.")),
    }
}

pub async fn update_user(identity: Arc<IdentityService>, call: Call<UpdateUser>) -> Result<User, Problem> {
    let Call { message, grant, context } = call;
    let confirmation = reauthentication::confirm(&identity, &grant, message.password.as_deref()).await?;
    let tx = identity.store.begin().await?;
    confirmation.check_still_valid(&tx, &grant).await?;
    check_admin(&tx, &grant).await?;
    let other = grant.access_to(message.id)?;
    let user = profile::by_id(&tx, &other).await?.ok_or_else(|| Problem::not_found("user"))?;
    context.check_if_match(&user)?;
    if message.platform_admin {
        tx.run(user_scoped!(&other, "UPDATE users SET platform_admin = TRUE WHERE id = :user AND closed_at IS NULL")).await?;
    } else if user.platform_admin {
        let revoked = user_scoped!(
            &other,
            "UPDATE users SET platform_admin = FALSE WHERE id = :user AND platform_admin AND EXISTS \
             (SELECT 1 FROM users u WHERE u.platform_admin AND u.closed_at IS NULL AND u.id <> :user)"
        );
        if tx.run(revoked).await? == 0 {
            return Err(Problem::conflict(format!("{} is the last administrator of this installation.", user.email))
                .hint("Make another user an administrator first: capsule admin users grant EMAIL"));
        }
        // Their access tokens still contain the role.
        sessions::end_all(&tx, &context, &other).await?;
    }
    tx.commit().await?;
    tracing::info!(user = %message.id, platform_admin = message.platform_admin, by = %grant.user(), "administrator changed");
    Ok(User { platform_admin: message.platform_admin, ..user })
}

pub async fn delete_user(identity: Arc<IdentityService>, call: Call<DeleteUser>) -> Result<Empty, Problem> {
    let Call { message, grant, context } = call;
    let confirmation = reauthentication::confirm(&identity, &grant, message.password.as_deref()).await?;
    erasure::begin(&identity, &context, (&grant, &confirmation), message.id).await?;
    tracing::info!(user = %message.id, by = %grant.user(), "account erasure begun by an administrator");
    Ok(Empty {})
}
