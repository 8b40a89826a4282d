//! The context of a message: its sender, deadline and correlation id.

use std::time::{Duration, Instant};

use capsule_contracts::{Permissions, Uuid};
use serde::{Deserialize, Serialize};

/// The sender of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Principal {
    /// A client that is not signed in.
    Anonymous,
    /// A signed-in user, whose access token was verified.
    User { id: Uuid, session: Uuid, platform_admin: bool },
    /// An API key, which was verified. It can do what its owner's role permits within its scopes, only in its
    /// organization.
    ApiKey { id: Uuid, owner: Uuid, organization: Uuid, scopes: Permissions },
    /// A service of the platform itself, by its name.
    Service(&'static str),
}

impl Principal {
    /// The account that the message is sent for: the user, or the owner of the API key.
    #[must_use]
    pub fn account(&self) -> Option<Uuid> {
        match *self {
            Self::User { id, .. } => Some(id),
            Self::ApiKey { owner, .. } => Some(owner),
            Self::Anonymous | Self::Service(_) => None,
        }
    }
}

/// Identifies a command, so that it does not run again when it is delivered again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    pub id: Uuid,
    /// The digest of its body: the same id with another body is refused.
    pub digest: String,
}

/// The context of a message.
#[derive(Clone, Debug)]
pub struct Context {
    /// The same in every message, log line and event that a request causes.
    pub correlation_id: String,
    /// W3C Trace Context: the span that this message is sent in.
    pub traceparent: Option<String>,
    pub principal: Principal,
    /// A command that has not started by then is refused.
    pub deadline: Instant,
    /// Set for a command that may be delivered twice.
    pub command: Option<Command>,
    /// The header `If-Match` of the request; see [`Context::check_if_match`].
    pub if_match: Option<String>,
}

impl Context {
    /// The default time until the deadline.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

    /// A context for `principal`, with the deadline [`Context::DEFAULT_TIMEOUT`] from now.
    #[must_use]
    pub fn new(correlation_id: String, principal: Principal) -> Self {
        let deadline = Instant::now() + Self::DEFAULT_TIMEOUT;
        Self { correlation_id, traceparent: None, principal, deadline, command: None, if_match: None }
    }

    /// This context with the service as principal, and without the command's id and precondition.
    #[must_use]
    pub fn as_service(&self, service: &'static str) -> Self {
        Self { principal: Principal::Service(service), command: None, if_match: None, ..self.clone() }
    }

    /// A context for a service's background work.
    #[must_use]
    pub fn background(service: &'static str) -> Self {
        Self::new(capsule_contracts::new_id().to_string(), Principal::Service(service))
    }

    /// This context with a command id: a command that is sent again with the same id does not run again.
    #[must_use]
    pub fn with_command_id(self, id: Uuid, digest: String) -> Self {
        Self { command: Some(Command { id, digest }), ..self }
    }
}
