//! Sign-in with e-mail and password, or with the local token on the server itself.

use std::sync::Arc;

use capsule_bus::{Call, emit};
use capsule_contracts::Problem;
use capsule_contracts::identity::{LocalLogin, Login, Session, UserLoggedIn};
use capsule_store::user_scoped;

use crate::authenticated::Authenticated;
use crate::{IdentityService, profile, sessions};

pub async fn login(identity: Arc<IdentityService>, call: Call<Login>) -> Result<Session, Problem> {
    let email = call.message.email.trim().to_lowercase();
    let user = profile::by_email(&identity, &email).await?;
    let verified = Authenticated::by_password(&identity, user.as_ref(), call.message.password).await?;
    let (Some(user), Some((grant, hash))) = (user, verified) else {
        return Err(Problem::unauthenticated("Wrong e-mail or password."));
    };
    let tx = identity.store.begin().await?;
    // The password may have been changed, or the account closed, during the verification. Either ends all sessions.
    let present = user_scoped!(
        &grant,
        "SELECT c.password_hash FROM credentials c JOIN users u ON u.id = c.user_id WHERE u.id = :user AND u.closed_at IS NULL"
    );
    if tx.read().value::<String>(present).await? != Some(hash) {
        return Err(Problem::unauthenticated("The password has just been changed.").hint("Sign in with the new one."));
    }
    let session = sessions::open(&identity, &tx, &call.context, &grant, user).await?;
    let event = UserLoggedIn { user_id: session.user.id, session_id: sessions::id_of(&identity, &session)? };
    emit(&tx, &call.context, &event).await?;
    tx.commit().await?;
    Ok(session)
}

/// The e-mail address of the local administrator's account. It cannot be registered or invited.
pub const LOCAL_ADMINISTRATOR: &str = "admin@localhost";

/// Signs the bearer of the local token in as the local administrator: who can read the server's data directory has
/// access to everything anyway. Creates the account if it is missing. Fails if the account is no longer an
/// administrator.
pub async fn local_login(identity: Arc<IdentityService>, call: Call<LocalLogin>) -> Result<Session, Problem> {
    let tx = identity.store.begin().await?;
    let (grant, user) = Authenticated::by_local_token(&identity, &tx, &call.context, &call.message.token).await?;
    let session = sessions::open(&identity, &tx, &call.context, &grant, user).await?;
    tx.commit().await?;
    Ok(session)
}
