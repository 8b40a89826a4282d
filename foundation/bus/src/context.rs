//! What travels with every message: who asks, until when, and under which correlation id.

use std::time::{Duration, Instant};

use capsule_contracts::Uuid;

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

/// What travels with a message.
#[derive(Clone, Debug)]
pub struct Context {
    /// Follows a request through every message, log line and event it causes.
    pub correlation_id: String,
    pub principal: Principal,
    /// A command not begun by then is refused, never run late.
    pub deadline: Instant,
}

impl Context {
    /// How long an answer is waited for unless said otherwise.
    pub const PATIENCE: Duration = Duration::from_secs(30);

    /// A request of `principal`, to be answered within [`Context::PATIENCE`].
    #[must_use]
    pub fn new(correlation_id: String, principal: Principal) -> Self {
        Self { correlation_id, principal, deadline: Instant::now() + Self::PATIENCE }
    }

    /// The same request, carried on by a service on its own account.
    #[must_use]
    pub fn on_behalf(&self, service: &'static str) -> Self {
        Self { principal: Principal::Service(service), ..self.clone() }
    }

    /// Work that a service begins by itself.
    #[must_use]
    pub fn background(service: &'static str) -> Self {
        Self::new(capsule_contracts::new_id().to_string(), Principal::Service(service))
    }
}
