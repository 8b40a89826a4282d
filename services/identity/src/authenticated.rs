//! The grant of a user whose credential this request presented: a password, a refresh token, the local token, or none for an
//! account that it creates. Only this file makes it.

use capsule_bus::{Context, emit};
use capsule_contracts::identity::{User, UserRegistered};
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Transaction, UserScope, unscoped, user_scoped};

use crate::login::LOCAL_ADMINISTRATOR;
use crate::profile::UserRow;
use crate::{IdentityService, tokens};

/// A user who has authenticated.
#[derive(Clone, Copy, Debug)]
pub struct Authenticated {
    user: Uuid,
}

impl UserScope for Authenticated {
    fn user(&self) -> Uuid {
        self.user
    }
}

/// A refresh token, with its session.
#[derive(FromRow)]
pub struct RefreshRow {
    pub session_id: Uuid,
    user_id: Uuid,
    pub expires_at: i64,
    pub used_at: Option<i64>,
    pub revoked_at: Option<i64>,
}

impl Authenticated {
    /// Verifies a password; as slowly without a user. Returns the grant, and the hash that the password was verified with.
    pub async fn by_password(
        identity: &IdentityService,
        user: Option<&User>,
        password: String,
    ) -> Result<Option<(Self, String)>, Problem> {
        let hash = match user {
            Some(user) => {
                let hash =
                    unscoped!("verifies the user", "SELECT password_hash FROM credentials WHERE user_id = :id", id = user.id);
                identity.store.read().value::<String>(hash).await?
            }
            None => None,
        };
        let holds = identity.passwords.verify(password, hash.clone()).await?;
        Ok(user.zip(hash).filter(|_| holds).map(|(user, hash)| (Self { user: user.id }, hash)))
    }

    /// Finds the session of a refresh token by the token's digest. The caller checks whether it is still valid.
    pub async fn by_refresh_token(tx: &Transaction<'_>, digest: &str) -> Result<Option<(Self, RefreshRow)>, Problem> {
        let row = unscoped!(
            "finds out whose it is",
            "SELECT t.session_id, s.user_id, t.expires_at, t.used_at, s.revoked_at \
             FROM refresh_tokens t JOIN sessions s ON s.id = t.session_id WHERE t.digest = :digest",
            digest
        );
        let row = tx.read().first::<RefreshRow>(row).await?;
        Ok(row.map(|row| (Self { user: row.user_id }, row)))
    }

    /// Authenticates the local administrator by the local token. Creates the account if it is missing.
    pub async fn by_local_token(
        identity: &IdentityService,
        tx: &Transaction<'_>,
        context: &Context,
        token: &str,
    ) -> Result<(Self, User), Problem> {
        if !tokens::constant_time_eq(token, &identity.local_token) {
            return Err(Problem::unauthenticated("The local token is wrong.")
                .hint("It is in the file `local-token` in the server's data directory."));
        }
        let local = unscoped!(
            "finds out whose it is",
            "SELECT id, email, name, platform_admin, created_at FROM users WHERE email = :email AND closed_at IS NULL",
            email = LOCAL_ADMINISTRATOR
        );
        match tx.read().first::<UserRow>(local).await?.map(User::from) {
            Some(user) if user.platform_admin => Ok((Self { user: user.id }, user)),
            Some(_) => Err(Problem::forbidden("The local administrator is no longer an administrator of this installation.")
                .hint("Sign in with your own account: `capsule login`.")),
            None => {
                let user = User {
                    id: new_id(),
                    email: LOCAL_ADMINISTRATOR.into(),
                    name: "Local administrator".into(),
                    platform_admin: true,
                    created_at: Timestamp::now(),
                };
                Ok((Self::by_registration(tx, context, &user).await?, user))
            }
        }
    }

    /// Creates an account and emits [`UserRegistered`]. The caller has checked that the registration is allowed.
    pub async fn by_registration(tx: &Transaction<'_>, context: &Context, user: &User) -> Result<Self, Problem> {
        let grant = Self { user: user.id };
        tx.run(user_scoped!(
            &grant,
            "INSERT INTO users (id, email, name, platform_admin, created_at) VALUES (:user, :email, :name, :platform_admin, :created_at)",
            email = user.email.as_str(),
            name = user.name.as_str(),
            platform_admin = user.platform_admin,
            created_at = user.created_at.0
        ))
        .await
        .map_err(|problem| match problem.code.as_str() {
            "conflict" => {
                Problem::conflict("An account with this e-mail address already exists.").hint("Sign in with `capsule login`.")
            }
            _ => problem,
        })?;
        emit(tx, context, &UserRegistered { user: user.clone() }).await?;
        Ok(grant)
    }
}
