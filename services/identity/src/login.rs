//! Sign-in with e-mail and password, or with the local token on the server itself.

use std::sync::Arc;

use capsule_bus::{Call, emit};
use capsule_contracts::identity::{LocalLogin, Login, Session, User, UserLoggedIn};
use capsule_contracts::{Problem, Timestamp, new_id};
use capsule_store::unscoped;

use crate::profile::{self, UserRow};
use crate::{IdentityService, register, sessions, tokens};

pub async fn login(identity: Arc<IdentityService>, call: Call<Login>) -> Result<Session, Problem> {
    let email = call.message.email.trim().to_lowercase();
    let user = profile::by_email(&identity, &email).await?;
    let hash = match &user {
        Some(user) => {
            let hash = unscoped!(
                "credentials belong to a user",
                "SELECT password_hash FROM credentials WHERE user_id = :user_id",
                user_id = user.id
            );
            identity.store.read().value::<String>(hash).await?
        }
        None => None,
    };
    let holds = identity.passwords.verify(call.message.password, hash.clone()).await?;
    let (Some(user), true) = (user, holds) else {
        return Err(Problem::unauthenticated("Wrong e-mail or password."));
    };
    let tx = identity.store.begin().await?;
    // The password may have been changed, or the account closed, during the verification. Either ends all sessions.
    let present = unscoped!(
        "credentials belong to a user",
        "SELECT c.password_hash FROM credentials c JOIN users u ON u.id = c.user_id WHERE u.id = :id AND u.closed_at IS NULL",
        id = user.id
    );
    if tx.read().value::<String>(present).await? != hash {
        return Err(Problem::unauthenticated("The password has just been changed.").hint("Sign in with the new one."));
    }
    let session = sessions::open(&identity, &tx, &call.context, user).await?;
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
    if !tokens::constant_time_eq(&call.message.token, &identity.local_token) {
        return Err(Problem::unauthenticated("The local token is wrong.")
            .hint("It is in the file `local-token` in the server's data directory."));
    }
    let tx = identity.store.begin().await?;
    let local = unscoped!(
        "users belong to no tenant",
        "SELECT id, email, name, platform_admin, created_at FROM users WHERE email = :email AND closed_at IS NULL",
        email = LOCAL_ADMINISTRATOR
    );
    let user = match tx.read().first::<UserRow>(local).await?.map(User::from) {
        Some(user) if user.platform_admin => user,
        Some(_) => {
            return Err(Problem::forbidden("The local administrator is no longer an administrator of this installation.")
                .hint("Sign in with your own account: `capsule login`."));
        }
        None => {
            let user = User {
                id: new_id(),
                email: LOCAL_ADMINISTRATOR.into(),
                name: "Local administrator".into(),
                platform_admin: true,
                created_at: Timestamp::now(),
            };
            register::create_user(&tx, &call.context, &user).await?;
            user
        }
    };
    let session = sessions::open(&identity, &tx, &call.context, user).await?;
    tx.commit().await?;
    Ok(session)
}
