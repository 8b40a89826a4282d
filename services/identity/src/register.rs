//! Registration. The first user of an installation becomes its administrator, and must know the
//! token in the server's data directory: whoever finds a fresh server first must not own it.

use std::sync::Arc;

use capsule_bus::{Call, Context, emit};
use capsule_contracts::identity::{Register, Session, User, UserRegistered};
use capsule_contracts::{Problem, Timestamp, new_id};
use capsule_store::{Transaction, unscoped};

use crate::{Identity, sessions, tokens};

pub async fn register(identity: Arc<Identity>, call: Call<Register>) -> Result<Session, Problem> {
    let Call { message, context, .. } = call;
    let email = message.email.trim().to_lowercase();
    let hash = identity.passwords.hash(message.password).await?;
    let name = message.name.unwrap_or_else(|| email.split('@').next().unwrap_or_default().to_owned());

    let tx = identity.store.begin().await?;
    let first = count_users(&tx).await? == 0;
    if first && !message.setup_token.as_deref().is_some_and(|token| tokens::same(token, &identity.local_token)) {
        return Err(Problem::invalid_field("setup_token", "the first user must give the set-up token of this installation")
            .hint("It is in the file `local-token` in the server's data directory."));
    }
    let user = create_user(&tx, &context, email, name, first).await?;
    tx.run(unscoped!(
        "credentials belong to a user",
        "INSERT INTO credentials (user_id, password_hash) VALUES ($1, $2)",
        user.id,
        hash
    ))
    .await?;
    let session = sessions::open(&identity, &tx, &context, user).await?;
    tx.commit().await?;
    Ok(session)
}

pub async fn count_users(tx: &Transaction<'_>) -> Result<i64, Problem> {
    Ok(tx.read().value::<i64>(unscoped!("counts users", "SELECT COUNT(*) FROM users")).await?.unwrap_or_default())
}

pub async fn create_user(
    tx: &Transaction<'_>,
    context: &Context,
    email: String,
    name: String,
    platform_admin: bool,
) -> Result<User, Problem> {
    let user = User { id: new_id(), email, name, platform_admin, created_at: Timestamp::now() };
    tx.run(unscoped!(
        "users belong to no tenant",
        "INSERT INTO users (id, email, name, platform_admin, created_at) VALUES ($1, $2, $3, $4, $5)",
        user.id,
        user.email.as_str(),
        user.name.as_str(),
        user.platform_admin,
        user.created_at.0
    ))
    .await
    .map_err(|problem| match problem.code.as_str() {
        "conflict" => Problem::conflict("There is an account with this e-mail address already.").hint("Sign in instead."),
        _ => problem,
    })?;
    emit(tx, context, &UserRegistered { user: user.clone() }).await?;
    Ok(user)
}
