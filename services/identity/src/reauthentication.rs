//! Dangerous acts take the password once more: a token that was stolen, or a terminal that was left, is not enough.

use std::sync::Arc;

use capsule_bus::{Call, Caller};
use capsule_contracts::identity::{ChangePassword, Reauthenticate};
use capsule_contracts::{Empty, Problem, Uuid};
use capsule_store::{Transaction, unscoped};
use sea_orm::FromQueryResult;

use crate::login::LOCAL_ADMINISTRATOR;
use crate::{Identity, sessions, tokens};

/// An account as it was when its user confirmed an act.
#[derive(FromQueryResult)]
pub struct Confirmed {
    email: String,
    platform_admin: bool,
    password_hash: Option<String>,
}

impl Confirmed {
    /// Fails unless the caller's session lives and the password is the one of then: checked in the transaction of the
    /// act, for a change of the password ends what was under way with the one before.
    pub async fn still(&self, tx: &Transaction<'_>, caller: &Caller) -> Result<(), Problem> {
        let present = unscoped!(
            "credentials belong to a user",
            "SELECT c.password_hash FROM sessions s JOIN users u ON u.id = s.user_id \
             LEFT JOIN credentials c ON c.user_id = u.id \
             WHERE s.id = $1 AND s.user_id = $2 AND s.revoked_at IS NULL AND u.closed_at IS NULL",
            caller.session(),
            caller.user()
        );
        match tx.read().value::<Option<String>>(present).await? {
            None => Err(Problem::unauthenticated("Your session has ended meanwhile.")),
            Some(hash) if hash == self.password_hash => Ok(()),
            Some(_) => Err(Problem::reauthentication_required("The password was changed meanwhile.")),
        }
    }
}

async fn row(identity: &Identity, user: Uuid) -> Result<Confirmed, Problem> {
    let row = unscoped!(
        "credentials belong to a user",
        "SELECT u.email, u.platform_admin, c.password_hash FROM users u LEFT JOIN credentials c ON c.user_id = u.id \
         WHERE u.id = $1 AND u.closed_at IS NULL",
        user
    );
    identity.store.read().first(row).await?.ok_or_else(|| Problem::not_found("user"))
}

/// Checks that whoever uses a session of this user knows the password. For the local administrator, who may have no
/// password, the server's local token does as well.
pub async fn confirm(identity: &Identity, user: Uuid, password: Option<&str>) -> Result<Confirmed, Problem> {
    let row = row(identity, user).await?;
    let Some(password) = password.filter(|password| !password.is_empty()) else {
        return Err(Problem::reauthentication_required("This act takes your password."));
    };
    if row.email == LOCAL_ADMINISTRATOR && row.platform_admin && tokens::same(password, &identity.local_token) {
        return Ok(row);
    }
    if identity.passwords.verify(password.to_owned(), row.password_hash.clone()).await? {
        return Ok(row);
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
    let confirmed = confirm(&identity, user, message.password.as_deref()).await?;
    if message.new_password.eq_ignore_ascii_case(&confirmed.email) {
        return Err(Problem::invalid_field("new_password", "must not be your e-mail address"));
    }
    if message.password.as_deref() == Some(&message.new_password) {
        return Err(Problem::invalid_field("new_password", "must differ from the present one"));
    }
    let hash = identity.passwords.hash(message.new_password).await?;
    let tx = identity.store.begin().await?;
    // Nobody else writes until this is committed.
    confirmed.still(&tx, &proof).await?;
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
