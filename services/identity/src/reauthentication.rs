//! Reauthentication: dangerous actions require the password again, so that a stolen token or an unattended terminal
//! is not enough.

use std::sync::Arc;

use capsule_bus::{Call, Caller};
use capsule_contracts::identity::{ChangePassword, Reauthenticate};
use capsule_contracts::{Empty, Problem};
use capsule_store::{FromRow, Transaction, UserScope, user_scoped};

use crate::login::LOCAL_ADMINISTRATOR;
use crate::{IdentityService, sessions, tokens};

/// A confirmation by password, with the account as it was then.
#[derive(FromRow)]
pub struct Confirmation {
    email: String,
    platform_admin: bool,
    password_hash: Option<String>,
}

impl Confirmation {
    /// Fails if the caller's session ended or the password changed since. Call it in the transaction of the action, so
    /// that a change of the password stops actions confirmed with the old one.
    pub async fn check_still_valid(&self, tx: &Transaction<'_>, caller: &Caller) -> Result<(), Problem> {
        let present = user_scoped!(
            caller,
            "SELECT c.password_hash FROM sessions s JOIN users u ON u.id = s.user_id \
             LEFT JOIN credentials c ON c.user_id = u.id \
             WHERE s.id = :session AND s.user_id = :user AND s.revoked_at IS NULL AND u.closed_at IS NULL",
            session = caller.session()
        );
        match tx.read().value::<Option<String>>(present).await? {
            None => Err(Problem::unauthenticated("Your session has ended.")),
            Some(hash) if hash == self.password_hash => Ok(()),
            Some(_) => Err(Problem::reauthentication_required("Your password was changed.")),
        }
    }
}

async fn row(identity: &IdentityService, scope: &impl UserScope) -> Result<Confirmation, Problem> {
    let row = user_scoped!(
        scope,
        "SELECT u.email, u.platform_admin, c.password_hash FROM users u LEFT JOIN credentials c ON c.user_id = u.id \
         WHERE u.id = :user AND u.closed_at IS NULL"
    );
    identity.store.read().first(row).await?.ok_or_else(|| Problem::not_found("user"))
}

/// Checks the user's password. The local administrator, who may have no password, can use the server's local token
/// instead.
pub async fn confirm(
    identity: &IdentityService,
    scope: &impl UserScope,
    password: Option<&str>,
) -> Result<Confirmation, Problem> {
    let row = row(identity, scope).await?;
    let Some(password) = password.filter(|password| !password.is_empty()) else {
        return Err(Problem::reauthentication_required("This action requires your password."));
    };
    if row.email == LOCAL_ADMINISTRATOR && row.platform_admin && tokens::constant_time_eq(password, &identity.local_token) {
        return Ok(row);
    }
    if identity.passwords.verify(password.to_owned(), row.password_hash.clone()).await? {
        return Ok(row);
    }
    tracing::warn!(user = %scope.user(), "wrong password in a confirmation");
    Err(Problem::reauthentication_required("The password is wrong."))
}

pub async fn reauthenticate(identity: Arc<IdentityService>, call: Call<Reauthenticate>) -> Result<Empty, Problem> {
    let grant = call.grant.user(call.message.user_id, "a service asks for the password");
    confirm(&identity, &grant, call.message.password.as_deref()).await?;
    Ok(Empty {})
}

pub async fn change_password(identity: Arc<IdentityService>, call: Call<ChangePassword>) -> Result<Empty, Problem> {
    let Call { message, grant, context } = call;
    let user = grant.user();
    let confirmation = confirm(&identity, &grant, message.password.as_deref()).await?;
    if message.new_password.eq_ignore_ascii_case(&confirmation.email) {
        return Err(Problem::invalid_field("new_password", "must not be your e-mail address"));
    }
    if message.password.as_deref() == Some(&message.new_password) {
        return Err(Problem::invalid_field("new_password", "must differ from the current password"));
    }
    let hash = identity.passwords.hash(message.new_password).await?;
    let tx = identity.store.begin().await?;
    // The transaction is the only writer, so the check holds until the commit.
    confirmation.check_still_valid(&tx, &grant).await?;
    tx.run(user_scoped!(
        &grant,
        "INSERT INTO credentials (user_id, password_hash) VALUES (:user, :hash) \
         ON CONFLICT (user_id) DO UPDATE SET password_hash = excluded.password_hash",
        hash
    ))
    .await?;
    sessions::end_others(&tx, &context, &grant, grant.session()).await?;
    tx.commit().await?;
    tracing::info!(%user, correlation_id = context.correlation_id, "password changed");
    Ok(Empty {})
}
