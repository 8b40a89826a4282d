//! Copies the list of revoked sessions from the database to the shared cache, and restores it when the cache loses it.

use std::time::Duration;

use capsule_cache::revocation;
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::{FromRow, unscoped};

use crate::{IdentityService, tokens};

/// Interval between reads of newly revoked sessions.
const SYNC_INTERVAL: Duration = Duration::from_millis(400);
/// Lifetime of the key that marks the list as complete. Longer than the interval in which it is renewed.
const COMPLETE_TTL: Duration = Duration::from_secs(3);

#[derive(FromRow)]
struct Revoked {
    id: Uuid,
    revoked_at: i64,
}

/// Maintains the list while this process leads the service.
pub async fn maintain_list(identity: &IdentityService) {
    if !identity.cache.is_shared() {
        return std::future::pending().await;
    }
    let mut written = 0;
    loop {
        match publish(identity, written).await {
            Ok(Some(newest)) => written = newest,
            // The cache is down or was emptied: write the whole list again.
            Ok(None) => written = 0,
            Err(problem) => tracing::warn!(%problem, "cannot update the list of revoked sessions"),
        }
        tokio::time::sleep(SYNC_INTERVAL).await;
    }
}

/// Writes the sessions revoked since `written`. Returns the newest revocation written, `None` if the list is incomplete.
async fn publish(identity: &IdentityService, written: i64) -> Result<Option<i64>, Problem> {
    let there = identity.cache.get(&[revocation::COMPLETE_KEY]).await;
    // Without the key, the cache may have been emptied: start from the beginning.
    let since = if matches!(there.as_deref(), Some([Some(_)])) { written } else { 0 };
    let lived = Timestamp::now().plus_seconds(-tokens::ACCESS_SECONDS).0;
    let revoked = unscoped!(
        "sessions belong to a user",
        "SELECT id, revoked_at FROM sessions WHERE revoked_at >= :since ORDER BY revoked_at",
        since = lived.max(since)
    );
    let mut newest = since;
    for session in identity.store.read().all::<Revoked>(revoked).await? {
        let time = Duration::from_secs(tokens::ACCESS_SECONDS.unsigned_abs());
        if !identity.cache.put(&revocation::key(session.id), b"1", time).await {
            return Ok(None);
        }
        newest = session.revoked_at;
    }
    Ok(identity.cache.put(revocation::COMPLETE_KEY, b"1", COMPLETE_TTL).await.then_some(newest))
}
