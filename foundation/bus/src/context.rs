//! What travels with every message: who asks, until when, and under which correlation id.

use std::time::{Duration, Instant};

use capsule_contracts::Uuid;
use serde::{Deserialize, Serialize};

/// Who sends a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Principal {
    /// Nobody in particular.
    Anonymous,
    /// A signed-in user, whose access token was verified.
    User { id: Uuid, session: Uuid, platform_admin: bool },
    /// A service of the platform itself.
    Service(&'static str),
}

/// What makes a command known when it arrives again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    pub id: Uuid,
    /// The digest of its body: the same id with another body is a mistake.
    pub digest: String,
}

/// What travels with a message.
#[derive(Clone, Debug)]
pub struct Context {
    /// Follows a request through every message, log line and event it causes.
    pub correlation_id: String,
    /// W3C Trace Context: the span that this message is sent in.
    pub traceparent: Option<String>,
    pub principal: Principal,
    /// A command not begun by then is refused, never run late.
    pub deadline: Instant,
    /// By what a command is known that may arrive twice.
    pub command: Option<Command>,
}

impl Context {
    /// How long an answer is waited for unless said otherwise.
    pub const PATIENCE: Duration = Duration::from_secs(30);

    /// A request of `principal`, to be answered within [`Context::PATIENCE`].
    #[must_use]
    pub fn new(correlation_id: String, principal: Principal) -> Self {
        let deadline = Instant::now() + Self::PATIENCE;
        Self { correlation_id, traceparent: None, principal, deadline, command: None }
    }

    /// The same request, carried on by a service on its own account.
    #[must_use]
    pub fn on_behalf(&self, service: &'static str) -> Self {
        Self { principal: Principal::Service(service), command: None, ..self.clone() }
    }

    /// Work that a service begins by itself.
    #[must_use]
    pub fn background(service: &'static str) -> Self {
        Self::new(capsule_contracts::new_id().to_string(), Principal::Service(service))
    }

    /// The same, as the command of this id: sent again, it is not carried out again.
    #[must_use]
    pub fn once(self, id: Uuid, digest: String) -> Self {
        Self { command: Some(Command { id, digest }), ..self }
    }
}
