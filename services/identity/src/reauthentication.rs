//! Dangerous acts take the password once more: a token that was stolen, or a terminal that was left, is not enough.

use std::sync::Arc;

use capsule_bus::Call;
use capsule_contracts::identity::{ChangePassword, Reauthenticate};
use capsule_contracts::{Empty, Problem, Uuid};
use capsule_store::unscoped;
use sea_orm::FromQueryResult;

use crate::{Identity, sessions, tokens};

#[derive(FromQueryResult)]
struct Row {
    email: String,
    platform_admin: bool,
    password_hash: Option<String>,
}

async fn row(identity: &Identity, user: Uuid) -> Result<Row, Problem> {
    let row = unscoped!(
        "credentials belong to a user",
        "SELECT u.email, u.platform_admin, c.password_hash FROM users u LEFT JOIN credentials c ON c.user_id = u.id \
         WHERE u.id = $1 AND u.closed_at IS NULL",
        user
    );
    identity.store.read().first(row).await?.ok_or_else(|| Problem::not_found("user"))
}

/// Checks that whoever uses a session of this user knows the password. For an administrator the server's local token
/// does as well: its bearer can read everything anyway, and the local administrator has no password.
pub async fn confirm(identity: &Identity, user: Uuid, password: Option<&str>) -> Result<(), Problem> {
    let row = row(identity, user).await?;
    let Some(password) = password.filter(|password| !password.is_empty()) else {
        return Err(Problem::reauthentication_required("This act takes your password."));
    };
    if row.platform_admin && tokens::same(password, &identity.local_token) {
        return Ok(());
    }
    if identity.passwords.verify(password.to_owned(), row.password_hash).await? {
        return Ok(());
    }
    tracing::warn!(%user, "a password that should confirm an act is wrong");
    Err(Problem::reauthentication_required("The password is wrong."))
}

pub async fn reauthenticate(identity: Arc<Identity>, call: Call<Reauthenticate>) -> Result<Empty, Problem> {
    confirm(&identity, call.message.user_id, call.message.password.as_deref()).await?;
    Ok(Empty {})
}

pub async fn change_password(identity: Arc<Identity>, call: Call<ChangePassword>) -> Result<Empty, Problem> {
    let Call { message, proof, context } = call;
    let user = proof.user();
    confirm(&identity, user, message.password.as_deref()).await?;
    let email = row(&identity, user).await?.email;
    if message.new_password.eq_ignore_ascii_case(&email) {
        return Err(Problem::invalid_field("new_password", "must not be your e-mail address"));
    }
    if message.password.as_deref() == Some(&message.new_password) {
        return Err(Problem::invalid_field("new_password", "must differ from the present one"));
    }
    let hash = identity.passwords.hash(message.new_password).await?;
    let tx = identity.store.begin().await?;
    tx.run(unscoped!(
        "credentials belong to a user",
        "INSERT INTO credentials (user_id, password_hash) VALUES ($1, $2) \
         ON CONFLICT (user_id) DO UPDATE SET password_hash = excluded.password_hash",
        user,
        hash
    ))
    .await?;
    sessions::end_others(&tx, &context, user, proof.session()).await?;
    tx.commit().await?;
    tracing::info!(%user, correlation_id = context.correlation_id, "password changed");
    Ok(Empty {})
}
