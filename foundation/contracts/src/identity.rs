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

/// How an installation lets people make accounts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Registration {
    /// Nobody, but for the first account.
    Closed,
    /// Whoever holds a registration token, made when an organization adds an address that has no account.
    #[default]
    Invited,
    /// Anybody.
    Open,
}

/// How long an invitation, and the registration token that belongs to it, can be used, in seconds.
pub const INVITATION_SECONDS: i64 = 7 * 24 * 3600;

/// Creates an account. The first account with a password becomes platform administrator and
/// takes the set-up token that the server keeps in its data directory; whether others take a registration
/// token is a setting of the installation.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Register {
    pub email: String,
    #[schema(format = Password)]
    pub password: String,
    #[serde(default)]
    pub name: Option<String>,
    /// Needed for the first account of an installation only.
    #[serde(default)]
    #[schema(format = Password)]
    pub setup_token: Option<String>,
    /// What follows the `#` in a registration link. It works once, for the address that was invited.
    #[serde(default)]
    #[schema(format = Password)]
    pub registration_token: Option<String>,
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
pub struct DeleteProfile {
    /// Confirms the act: the account's password, or the local token where the account has none.
    #[serde(default)]
    #[schema(format = Password)]
    pub password: Option<String>,
}
message!(DeleteProfile, command "auth.delete_profile", SignedIn => Empty);

/// Changes the signed-in user's password, and ends their other sessions.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ChangePassword {
    /// The password until now, or the local token where the account has none.
    #[serde(default)]
    #[schema(format = Password)]
    pub password: Option<String>,
    #[schema(format = Password)]
    pub new_password: String,
}
message!(ChangePassword, command "auth.change_password", SignedIn => Empty, |m, check| {
    check_password(check, "new_password", &m.new_password, "");
});

/// The accounts of the installation, the oldest first.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListUsers {
    /// At most this many, 1 to 100.
    #[serde(default)]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default)]
    pub cursor: Option<Uuid>,
}
message!(ListUsers, query "auth.list_users", PlatformAdmin => crate::Page<User>, |m, check| {
    check.that(m.limit.is_none_or(|n| (1..=100).contains(&n)), "limit", "must be 1 to 100");
});

/// Makes a user an administrator of the installation, or ends that; never of the last one.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UpdateUser {
    pub id: Uuid,
    pub platform_admin: bool,
    /// Confirms the act: the caller's password, or the local token where the caller has none.
    #[serde(default)]
    #[schema(format = Password)]
    pub password: Option<String>,
}
message!(UpdateUser, command "auth.update_user", PlatformAdmin => User);

/// Erases a user's account, as they could themselves.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteUser {
    pub id: Uuid,
    /// Confirms the act: the caller's password, or the local token where the caller has none.
    #[serde(default)]
    #[schema(format = Password)]
    pub password: Option<String>,
}
message!(DeleteUser, command "auth.delete_user", PlatformAdmin => Empty);

/// Checks that the bearer of a user's session knows the user's password: asked by services before a dangerous act.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Reauthenticate {
    pub user_id: Uuid,
    #[schema(format = Password)]
    pub password: Option<String>,
}
message!(Reauthenticate, query "auth.reauthenticate", Internal => Empty);

/// Which of these sessions are live: asked about those that have a stream open.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CheckSessions {
    pub ids: Vec<Uuid>,
}
message!(CheckSessions, query "auth.check_sessions", Internal => LiveSessions);

/// The live ones of several sessions.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct LiveSessions {
    pub ids: Vec<Uuid>,
    /// Those of them whose user administers the installation.
    pub platform_admins: Vec<Uuid>,
}

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

/// Invites an address that has no account: reserves the id that its account will have, and makes a token that
/// the account can be registered with. An earlier token for the same organization holds no longer.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct InviteUser {
    pub email: String,
    pub organization_id: Uuid,
}
message!(InviteUser, command "auth.invite_user", Internal => InvitedUser, |m, check| {
    check_email(check, &m.email);
});

/// Somebody who can register.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct InvitedUser {
    /// The id that the account will have.
    pub user_id: Uuid,
    /// As it is stored.
    pub email: String,
    /// Kept nowhere; absent where the address has an account already.
    pub registration_token: Option<String>,
}

/// Voids the registration token that was made for an organization to add somebody.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RevokeInvitation {
    pub user_id: Uuid,
    pub organization_id: Uuid,
}
message!(RevokeInvitation, command "auth.revoke_invitation", Internal => Empty);

/// Names the users with these ids, those that were invited and have not registered yet among them.
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
        Register { email: email.into(), password: password.into(), name: None, setup_token: None, registration_token: None }
    }

    #[test]
    fn weak_passwords_and_bad_addresses_are_named_field_by_field() {
        let problem = register("nobody", "password12").validate().expect_err("both are wrong");
        let fields: Vec<_> = problem.errors.iter().map(|e| e.field.as_str()).collect();
        assert_eq!(fields, ["email", "password"]);
        register("ada@example.com", "correct horse battery").validate().expect("both are fine");
    }
}
