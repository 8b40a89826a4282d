//! Users, credentials and sessions.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Check, Empty, Event, Timestamp, Uuid, message};

/// A person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct User {
    pub id: Uuid,
    pub email: String,
    pub name: String,
    /// Administers this installation; the first user does.
    pub platform_admin: bool,
    pub created_at: Timestamp,
}

/// A pair of tokens: one to call with, one to get the next pair.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Session {
    pub user: User,
    /// JWT, sent as `Authorization: Bearer`.
    pub access_token: String,
    /// Seconds until the access token expires.
    pub expires_in: i64,
    /// Good for one refresh; using it twice ends every session descended from it.
    pub refresh_token: String,
}

/// Creates an account. On a fresh installation the first one becomes platform administrator and
/// must give the set-up token that the server keeps in its data directory.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Register {
    pub email: String,
    #[schema(format = Password)]
    pub password: String,
    #[serde(default)]
    pub name: Option<String>,
    /// Needed for the first user of an installation only.
    #[serde(default)]
    pub setup_token: Option<String>,
}
message!(Register, command "auth.register", Public => Session, |m, check| {
    check_email(check, &m.email);
    check_password(check, "password", &m.password, &m.email);
    if let Some(name) = &m.name {
        check.title("name", name);
    }
});

/// Signs in with e-mail and password.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Login {
    pub email: String,
    #[schema(format = Password)]
    pub password: String,
}
message!(Login, command "auth.login", Public => Session);

/// Signs in as the administrator of a local server by the token that it keeps in its data
/// directory, which only the server's owner can read.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct LocalLogin {
    #[schema(format = Password)]
    pub token: String,
}
message!(LocalLogin, command "auth.local_login", Public => Session);

/// Exchanges a refresh token for a new pair.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RefreshToken {
    pub refresh_token: String,
}
message!(RefreshToken, command "auth.refresh_token", Public => Session);

/// Ends the session that the access token belongs to.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Logout {}
message!(Logout, command "auth.logout", SignedIn => Empty);

/// Tells whether an access token holds, and whose it is.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ValidateToken {
    pub token: String,
}
message!(ValidateToken, query "auth.validate_token", Public => TokenStatus);

/// What is known of an access token.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TokenStatus {
    pub active: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<Uuid>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<Uuid>,
    #[serde(default)]
    pub platform_admin: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// The signed-in user.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetProfile {}
message!(GetProfile, query "auth.get_profile", SignedIn => User);

/// Changes the signed-in user's profile.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UpdateProfile {
    #[serde(default)]
    pub name: Option<String>,
}
message!(UpdateProfile, command "auth.update_profile", SignedIn => User, |m, check| {
    if let Some(name) = &m.name {
        check.title("name", name);
    }
});

/// Erases the signed-in user's account: they leave every organization, those that are theirs alone are
/// deleted with all that runs in them, and nothing is kept that tells who they were.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteProfile {}
message!(DeleteProfile, command "auth.delete_profile", SignedIn => Empty);

/// A user's account was erased.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UserErased {
    pub user_id: Uuid,
}
impl Event for UserErased {
    const TYPE: &'static str = "auth.user_erased";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.user_id
    }
}

/// The signed-in user's live sessions.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListSessions {}
message!(ListSessions, query "auth.list_sessions", SignedIn => crate::Page<SessionInfo>);

/// A live session.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SessionInfo {
    pub id: Uuid,
    pub created_at: Timestamp,
    pub last_used_at: Timestamp,
    pub current: bool,
}

/// Ends one of the signed-in user's sessions.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RevokeSession {
    pub id: Uuid,
}
message!(RevokeSession, command "auth.revoke_session", SignedIn => Empty);

/// Ends every session of the signed-in user.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RevokeSessions {}
message!(RevokeSessions, command "auth.revoke_sessions", SignedIn => Empty);

/// The public keys that access tokens are signed with (RFC 7517).
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetKeys {}
message!(GetKeys, query "auth.get_keys", Public => KeySet);

/// A JSON Web Key Set.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct KeySet {
    pub keys: Vec<serde_json::Value>,
}

/// Finds the user with this e-mail address; asked by the organization service to add a member.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct FindUser {
    pub email: String,
}
message!(FindUser, query "auth.find_user", Internal => User);

/// Names the users with these ids.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetUsers {
    pub ids: Vec<Uuid>,
}
message!(GetUsers, query "auth.get_users", Internal => crate::Page<User>);

/// A new account exists.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UserRegistered {
    pub user: User,
}
impl Event for UserRegistered {
    const TYPE: &'static str = "identity.user_registered";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.user.id
    }
}

/// Somebody signed in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UserLoggedIn {
    pub user_id: Uuid,
    pub session_id: Uuid,
}
impl Event for UserLoggedIn {
    const TYPE: &'static str = "identity.user_logged_in";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.user_id
    }
}

/// A session ended; tokens of it no longer hold.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionRevoked {
    pub user_id: Uuid,
    pub session_id: Uuid,
    /// Until when an access token of it could still be presented.
    pub until: Timestamp,
}
impl Event for SessionRevoked {
    const TYPE: &'static str = "identity.session_revoked";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.session_id
    }
}

fn check_email(check: &mut Check, email: &str) {
    let well_formed = email.len() <= 254
        && !email.chars().any(|c| c.is_whitespace() || c.is_control())
        && email.rsplit_once('@').is_some_and(|(local, domain)| {
            !local.is_empty() && !local.contains('@') && domain.split('.').all(|label| !label.is_empty())
        });
    check.that(well_formed, "email", "must be an e-mail address such as ada@example.com");
}

fn check_password(check: &mut Check, field: &str, password: &str, email: &str) {
    let long_enough = (10..=1024).contains(&password.chars().count());
    check.that(long_enough, field, "must have 10 to 1024 characters");
    let distinct = password.chars().collect::<std::collections::BTreeSet<_>>().len();
    let obvious = distinct < 5
        || password.eq_ignore_ascii_case(email)
        || ["password", "1234567890", "qwertyuiop", "letmein"].iter().any(|common| {
            let rest = password.to_lowercase().replace(common, "");
            rest.len() < 4 && rest.len() < password.len()
        });
    check.that(!obvious, field, "is too easy to guess; use several words or a password manager");
}

#[cfg(test)]
mod tests {
    use super::Register;
    use crate::Message;

    fn register(email: &str, password: &str) -> Register {
        Register { email: email.into(), password: password.into(), name: None, setup_token: None }
    }

    #[test]
    fn weak_passwords_and_bad_addresses_are_named_field_by_field() {
        let problem = register("nobody", "password12").validate().expect_err("both are wrong");
        let fields: Vec<_> = problem.errors.iter().map(|e| e.field.as_str()).collect();
        assert_eq!(fields, ["email", "password"]);
        register("ada@example.com", "correct horse battery").validate().expect("both are fine");
    }
}
