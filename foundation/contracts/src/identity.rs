//! Users, credentials and sessions.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Check, Empty, Event, Timestamp, Uuid, list, message};

/// A user account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct User {
    pub id: Uuid,
    pub email: String,
    pub name: String,
    /// Whether the user is an administrator of the installation. The first user is.
    pub platform_admin: bool,
    pub created_at: Timestamp,
}

/// An access token, and a refresh token to get the next pair.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Session {
    pub user: User,
    /// JWT, sent as `Authorization: Bearer`.
    pub access_token: String,
    /// Seconds until the access token expires.
    pub expires_in: i64,
    /// Can be used once. Using it again ends every session that descends from it.
    pub refresh_token: String,
}

/// Who can create an account in an installation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Registration {
    /// Nobody, except for the first account.
    Closed,
    /// People with a registration token, which is made when an organization invites an address without an account.
    #[default]
    Invited,
    /// Everybody.
    Open,
}

/// How long an invitation and its registration token are valid, in seconds.
pub const INVITATION_SECONDS: i64 = 7 * 24 * 3600;

/// Creates an account. The first account with a password becomes an administrator of the installation, and requires
/// the set-up token from the server's data directory. The installation's settings decide whether other accounts
/// require a registration token.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Register {
    pub email: String,
    #[schema(format = Password)]
    pub password: String,
    #[serde(default)]
    pub name: Option<String>,
    /// Required for the first account of an installation only.
    #[serde(default)]
    #[schema(format = Password)]
    pub setup_token: Option<String>,
    /// The part of a registration link after the `#`. It can be used once, by the invited address.
    #[serde(default)]
    #[schema(format = Password)]
    pub registration_token: Option<String>,
}
message!(Register, command "auth.register", Public => Session; credentials, |m, check| {
    check_email(check, &m.email);
    check_password(check, "password", &m.password, &m.email);
    if let Some(name) = &m.name {
        check.title("name", name);
    }
});

/// Signs in with an e-mail address and a password.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Login {
    pub email: String,
    #[schema(format = Password)]
    pub password: String,
}
message!(Login, command "auth.login", Public => Session; credentials);

/// Signs in as the local administrator, with the token from the server's data directory, which only the server's
/// owner can read.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct LocalLogin {
    #[schema(format = Password)]
    pub token: String,
}
message!(LocalLogin, command "auth.local_login", Public => Session; credentials);

/// Exchanges a refresh token for a new access token and refresh token.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RefreshToken {
    pub refresh_token: String,
}
message!(RefreshToken, command "auth.refresh_token", Public => Session; credentials);

/// Ends the session of the access token.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Logout {}
message!(Logout, command "auth.logout", SignedIn => Empty);

/// Returns whether an access token is valid, and its user.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ValidateToken {
    pub token: String,
}
message!(ValidateToken, query "auth.validate_token", Public => TokenStatus);

/// The state of an access token.
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

/// Returns the signed-in user.
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

/// Erases the signed-in user's account and personal data. The user leaves every organization; organizations without
/// other members are deleted with everything in them.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteProfile {
    /// The account's password as a confirmation; for an account without a password, the server's local token.
    #[serde(default)]
    #[schema(format = Password)]
    pub password: Option<String>,
}
message!(DeleteProfile, command "auth.delete_profile", SignedIn => Empty);

/// Changes the signed-in user's password, and ends their other sessions.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ChangePassword {
    /// The current password; for an account without a password, the server's local token.
    #[serde(default)]
    #[schema(format = Password)]
    pub password: Option<String>,
    #[schema(format = Password)]
    pub new_password: String,
}
message!(ChangePassword, command "auth.change_password", SignedIn => Empty, |m, check| {
    check_password(check, "new_password", &m.new_password, "");
});

list! {
    /// Lists the accounts of the installation, oldest first.
    ListUsers by ["created_at", "email"] {
        /// Only those whose e-mail address begins with this.
        email_prefix: Option<String>,
        /// Only administrators of the installation, or only others.
        platform_admin: Option<bool>,
    }
}
message!(ListUsers, query "auth.list_users", PlatformAdmin => crate::Page<User>, |m, check| check.list(m));

/// Makes a user an administrator of the installation, or removes that right. The last administrator keeps it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UpdateUser {
    pub id: Uuid,
    pub platform_admin: bool,
    /// The caller's password as a confirmation; for an account without a password, the server's local token.
    #[serde(default)]
    #[schema(format = Password)]
    pub password: Option<String>,
}
message!(UpdateUser, command "auth.update_user", PlatformAdmin => User);

/// Erases a user's account and personal data.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteUser {
    pub id: Uuid,
    /// The caller's password as a confirmation; for an account without a password, the server's local token.
    #[serde(default)]
    #[schema(format = Password)]
    pub password: Option<String>,
}
message!(DeleteUser, command "auth.delete_user", PlatformAdmin => Empty);

/// Checks a user's password again. Sent by services before a destructive command.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Reauthenticate {
    pub user_id: Uuid,
    #[schema(format = Password)]
    pub password: Option<String>,
}
message!(Reauthenticate, query "auth.reauthenticate", Internal => Empty);

/// Returns which of these sessions are live. Sent for the sessions with open streams.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CheckSessions {
    pub ids: Vec<Uuid>,
}
message!(CheckSessions, query "auth.check_sessions", Internal => LiveSessions);

/// The live sessions among those of the request.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct LiveSessions {
    pub ids: Vec<Uuid>,
    /// Those whose user is an administrator of the installation.
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

list! {
    /// Lists the signed-in user's live sessions, the last used first.
    ListSessions by ["-last_used_at", "created_at"] {}
}
message!(ListSessions, query "auth.list_sessions", SignedIn => crate::Page<SessionInfo>, |m, check| check.list(m));

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

/// Returns the public keys that access tokens are verified with (RFC 7517).
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetKeys {}
message!(GetKeys, query "auth.get_keys", Public => KeySet);

/// A JSON Web Key Set.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct KeySet {
    pub keys: Vec<serde_json::Value>,
}

/// Invites an address that has no account: reserves the account's id and makes its registration token. An earlier
/// token for the same organization becomes invalid.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct InviteUser {
    pub email: String,
    pub organization_id: Uuid,
}
message!(InviteUser, command "auth.invite_user", Internal => InvitedUser; credentials, |m, check| {
    check_email(check, &m.email);
});

/// An invited user.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct InvitedUser {
    /// The id that the account will have.
    pub user_id: Uuid,
    /// The address as it is stored.
    pub email: String,
    /// Not stored. Absent if the address has an account.
    pub registration_token: Option<String>,
}

/// Revokes the registration token that was made for a user and an organization.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RevokeInvitation {
    pub user_id: Uuid,
    pub organization_id: Uuid,
}
message!(RevokeInvitation, command "auth.revoke_invitation", Internal => Empty);

/// Returns the users with these ids, including invited users who have not registered.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetUsers {
    pub ids: Vec<Uuid>,
}
message!(GetUsers, query "auth.get_users", Internal => crate::Page<User>);

/// An account was registered.
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

/// A user signed in.
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

/// A session ended; its tokens are no longer valid.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionRevoked {
    pub user_id: Uuid,
    pub session_id: Uuid,
    /// When the last access token of the session expires.
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
    check.require(well_formed, "email", "must be an e-mail address such as ada@example.com");
}

fn check_password(check: &mut Check, field: &str, password: &str, email: &str) {
    let long_enough = (10..=1024).contains(&password.chars().count());
    check.require(long_enough, field, "must have 10 to 1024 characters");
    let distinct = password.chars().collect::<std::collections::BTreeSet<_>>().len();
    let obvious = distinct < 5
        || password.eq_ignore_ascii_case(email)
        || ["password", "1234567890", "qwertyuiop", "letmein"].iter().any(|common| {
            let rest = password.to_lowercase().replace(common, "");
            rest.len() < 4 && rest.len() < password.len()
        });
    check.require(!obvious, field, "is too easy to guess; use several words or a password manager");
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
