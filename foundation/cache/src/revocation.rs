//! The revoked sessions whose access tokens have not expired yet. The identity service writes the list; the gateway
//! reads it before it accepts an access token without asking that service.

use capsule_contracts::Uuid;

/// This key exists while the list is complete. It expires within seconds unless it is renewed. While it is missing,
/// the list must not be used.
pub const COMPLETE_KEY: &str = "capsule:revocations-complete";

/// The key of a revoked session.
#[must_use]
pub fn key(session: Uuid) -> String {
    format!("capsule:revoked:{session}")
}
