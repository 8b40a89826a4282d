//! The list of sessions that were revoked while their access tokens still hold. The identity service writes
//! it; whoever believes an access token without asking that service looks here first.

use capsule_contracts::Uuid;

/// There only while the list is complete, which is said anew every few seconds: where it is missing, the list
/// says nothing.
pub const COMPLETE: &str = "capsule:revocations-complete";

/// The key of a revoked session.
#[must_use]
pub fn key(session: Uuid) -> String {
    format!("capsule:revoked:{session}")
}
