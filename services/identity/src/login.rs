//! Signing in: with e-mail and password, or on the server's own machine with its local token.

use std::sync::Arc;

use capsule_bus::{Call, emit};
use capsule_contracts::identity::{LocalLogin, Login, Session, User, UserLoggedIn};
use capsule_contracts::{Problem, Timestamp, new_id};
use capsule_store::unscoped;

use crate::profile::{self, UserRow};
use crate::{Identity, register, sessions, tokens};

pub async fn login(identity: Arc<Identity>, call: Call<Login>) -> Result<Session, Problem> {
    let email = call.message.email.trim().to_lowercase();
    let user = profile::by_email(&identity, &email).await?;
    let hash = match &user {
        Some(user) => {
            let hash =
                unscoped!("credentials belong to a user", "SELECT password_hash FROM credentials WHERE user_id = $1", user.id);
            identity.store.read().value::<String>(hash).await?
        }
        None => None,
    };
    let holds = identity.passwords.verify(call.message.password, hash.clone()).await?;
    let (Some(user), true) = (user, holds) else {
        return Err(Problem::unauthenticated("The e-mail address and the password do not belong together.").hint("Check both."));
    };
    let tx = identity.store.begin().await?;
    // It may have been changed, or the account closed, while it was verified: whoever did that has ended every session.
    let present = unscoped!(
        "credentials belong to a user",
        "SELECT c.password_hash FROM credentials c JOIN users u ON u.id = c.user_id WHERE u.id = $1 AND u.closed_at IS NULL",
        user.id
    );
    if tx.read().value::<String>(present).await? != hash {
        return Err(Problem::unauthenticated("The password was changed just now.").hint("Sign in with the new one."));
    }
    let session = sessions::open(&identity, &tx, &call.context, user).await?;
    let event = UserLoggedIn { user_id: session.user.id, session_id: sessions::id_of(&identity, &session)? };
    emit(&tx, &call.context, &event).await?;
    tx.commit().await?;
    Ok(session)
}

/// The address of the local administrator's account. It can be neither registered nor invited.
pub const LOCAL_ADMINISTRATOR: &str = "admin@localhost";

/// The bearer of the local token can read the server's data directory, and with it everything: it is signed in as the
/// local administrator, never as anybody else. The account is made if there is none; if it no longer administers the
/// installation, the token signs nobody in.
pub async fn local_login(identity: Arc<Identity>, call: Call<LocalLogin>) -> Result<Session, Problem> {
    if !tokens::same(&call.message.token, &identity.local_token) {
        return Err(Problem::unauthenticated("This is not the local token of this server.")
            .hint("It is in the file `local-token` in the server's data directory."));
    }
    let tx = identity.store.begin().await?;
    let local = unscoped!(
        "users belong to no tenant",
        "SELECT id, email, name, platform_admin, created_at FROM users WHERE email = $1 AND closed_at IS NULL",
        LOCAL_ADMINISTRATOR
    );
    let user = match tx.read().first::<UserRow>(local).await?.map(User::from) {
        Some(user) if user.platform_admin => user,
        Some(_) => {
            return Err(Problem::forbidden("The local administrator does not administer this installation any more.")
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
