//! Registration. The first account with a password becomes administrator of the installation and requires the set-up
//! token from the server's data directory, so that nobody else can take over a new server.

use std::sync::Arc;

use capsule_bus::Call;
use capsule_contracts::identity::{Register, Registration, Session, User};
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_store::{Transaction, unscoped, user_scoped};

use crate::authenticated::Authenticated;
use crate::login::LOCAL_ADMINISTRATOR;
use crate::{IdentityService, invitations, sessions, tokens};

/// Why a registration is allowed.
enum Admission {
    /// It is the first account, with the set-up token.
    First,
    /// It has a registration token, for which this id is reserved.
    Invited(Uuid),
    /// Registration is open.
    Open,
}

pub async fn register(identity: Arc<IdentityService>, call: Call<Register>) -> Result<Session, Problem> {
    let Call { message, context, .. } = call;
    let email = message.email.trim().to_lowercase();
    // Checked before the expensive hashing. Dropping the transaction rolls it back.
    let tx = identity.store.begin().await?;
    admit(&identity, &tx, &message, &email).await?;
    drop(tx);
    let hash = identity.passwords.hash(message.password.clone()).await?;

    let tx = identity.store.begin().await?;
    let (id, platform_admin) = match admit(&identity, &tx, &message, &email).await? {
        Admission::First => (new_id(), true),
        Admission::Invited(id) => (id, false),
        Admission::Open => (new_id(), false),
    };
    let name = message.name.unwrap_or_else(|| email.split('@').next().unwrap_or_default().to_owned());
    let user = User { id, email, name, platform_admin, created_at: Timestamp::now() };
    let grant = Authenticated::by_registration(&tx, &context, &user).await?;
    tx.run(user_scoped!(&grant, "INSERT INTO credentials (user_id, password_hash) VALUES (:user, :hash)", hash)).await?;
    let session = sessions::open(&identity, &tx, &context, &grant, user).await?;
    tx.commit().await?;
    Ok(session)
}

/// Decides whether the registration is allowed. Consumes its registration token.
async fn admit(identity: &IdentityService, tx: &Transaction<'_>, message: &Register, email: &str) -> Result<Admission, Problem> {
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
    if first && message.setup_token.as_deref().is_some_and(|token| tokens::constant_time_eq(token, &identity.local_token)) {
        return Ok(Admission::First);
    }
    if let (Some(token), true) = (&message.registration_token, identity.registration != Registration::Closed) {
        let invited = invitations::redeem(tx, token, email).await?;
        return invited.map(Admission::Invited).ok_or_else(|| {
            Problem::invalid_field("registration_token", "is not valid for this address: it was used, revoked or has expired")
                .hint("Ask for a new invitation, and register with the address that was invited.")
        });
    }
    if first {
        return Err(Problem::invalid_field("setup_token", "the first account requires the set-up token of this installation")
            .hint("It is in the file `local-token` in the server's data directory."));
    }
    match identity.registration {
        Registration::Open => Ok(Admission::Open),
        Registration::Invited => Err(Problem::forbidden("Registration on this installation requires an invitation.")
            .hint("Ask a member of an organization to add you, and register with the link that they receive.")),
        Registration::Closed => {
            Err(Problem::forbidden("Registration is closed on this installation.").hint("Ask its operator for an account."))
        }
    }
}
