//! Registration. The first account with a password becomes administrator, and takes the token in the server's data
//! directory: whoever finds a fresh server first must not own it, also after the local administrator has signed in.

use std::sync::Arc;

use capsule_bus::{Call, Context, emit};
use capsule_contracts::identity::{Register, Registration, Session, User, UserRegistered};
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_store::{Transaction, unscoped};

use crate::login::LOCAL_ADMINISTRATOR;
use crate::{Identity, invitations, sessions, tokens};

/// By what somebody may register.
enum Admission {
    /// The first account, by the set-up token.
    First,
    /// By a registration token: the id that was reserved.
    Invited(Uuid),
    /// Because anybody may.
    Anybody,
}

pub async fn register(identity: Arc<Identity>, call: Call<Register>) -> Result<Session, Problem> {
    let Call { message, context, .. } = call;
    let email = message.email.trim().to_lowercase();
    // Refused before the password costs anything. The transaction is undone.
    let tx = identity.store.begin().await?;
    admit(&identity, &tx, &message, &email).await?;
    drop(tx);
    let hash = identity.passwords.hash(message.password.clone()).await?;

    let tx = identity.store.begin().await?;
    let (id, platform_admin) = match admit(&identity, &tx, &message, &email).await? {
        Admission::First => (new_id(), true),
        Admission::Invited(id) => (id, false),
        Admission::Anybody => (new_id(), false),
    };
    let name = message.name.unwrap_or_else(|| email.split('@').next().unwrap_or_default().to_owned());
    let user = User { id, email, name, platform_admin, created_at: Timestamp::now() };
    create_user(&tx, &context, &user).await?;
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

/// Decides whether somebody may register; uses their registration token up.
async fn admit(identity: &Identity, tx: &Transaction<'_>, message: &Register, email: &str) -> Result<Admission, Problem> {
    if email == LOCAL_ADMINISTRATOR {
        return Err(Problem::invalid_field("email", "is the address of the local administrator"));
    }
    let first = !tx
        .read()
        .exists(unscoped!(
            "users belong to no tenant",
            "SELECT 1 FROM users u JOIN credentials c ON c.user_id = u.id WHERE u.platform_admin AND u.closed_at IS NULL"
        ))
        .await?;
    if first && message.setup_token.as_deref().is_some_and(|token| tokens::same(token, &identity.local_token)) {
        return Ok(Admission::First);
    }
    if let (Some(token), true) = (&message.registration_token, identity.registration != Registration::Closed) {
        let invited = invitations::redeem(tx, token, email).await?;
        return invited.map(Admission::Invited).ok_or_else(|| {
            Problem::invalid_field(
                "registration_token",
                "is not a valid token for this address: it was used, voided or has expired",
            )
            .hint("Ask whoever invited you to add you to the organization again, and use the address that they gave.")
        });
    }
    if first {
        return Err(Problem::invalid_field("setup_token", "the first account takes the set-up token of this installation")
            .hint("It is in the file `local-token` in the server's data directory."));
    }
    match identity.registration {
        Registration::Open => Ok(Admission::Anybody),
        Registration::Invited => Err(Problem::forbidden("This installation registers only people who were invited.")
            .hint("Ask a member to add you to their organization, and register with the link that they get.")),
        Registration::Closed => {
            Err(Problem::forbidden("This installation registers nobody.").hint("Ask its operator for an account."))
        }
    }
}

/// Adds an account, and tells of it.
pub async fn create_user(tx: &Transaction<'_>, context: &Context, user: &User) -> Result<(), Problem> {
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
    emit(tx, context, &UserRegistered { user: user.clone() }).await
}
