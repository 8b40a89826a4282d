//! The list of revoked sessions in the shared cache: kept from the database, whatever happens to the cache.

use std::time::Duration;

use capsule_cache::revocation;
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::unscoped;
use sea_orm::FromQueryResult;

use crate::{Identity, tokens};

/// How often sessions are looked for that were revoked meanwhile.
const PERIOD: Duration = Duration::from_millis(400);
/// The list says for so long that it is complete: a little longer than it takes to say so again.
const COMPLETE: Duration = Duration::from_secs(3);

#[derive(FromQueryResult)]
struct Revoked {
    id: Uuid,
    revoked_at: i64,
}

/// Keeps the list, for as long as this process leads the service.
pub async fn keep(identity: &Identity) {
    if !identity.cache.is_shared() {
        return std::future::pending().await;
    }
    let mut written = 0;
    loop {
        match publish(identity, written).await {
            Ok(Some(newest)) => written = newest,
            // The cache is down, or has forgotten everything: the whole list is written again.
            Ok(None) => written = 0,
            Err(problem) => tracing::warn!(%problem, "the list of revoked sessions cannot be kept"),
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// Writes what was revoked since `written`. How far the list goes now, if it is complete.
async fn publish(identity: &Identity, written: i64) -> Result<Option<i64>, Problem> {
    let there = identity.cache.get(&[revocation::COMPLETE_KEY]).await;
    // One that was emptied must not be called complete for what was written to it before.
    let since = if matches!(there.as_deref(), Some([Some(_)])) { written } else { 0 };
    let lived = Timestamp::now().plus_seconds(-tokens::ACCESS_SECONDS).0;
    let revoked = unscoped!(
        "sessions belong to a user",
        "SELECT id, revoked_at FROM sessions WHERE revoked_at >= $1 ORDER BY revoked_at",
        lived.max(since)
    );
    let mut newest = since;
    for session in identity.store.read().all::<Revoked>(revoked).await? {
        let time = Duration::from_secs(tokens::ACCESS_SECONDS.unsigned_abs());
        if !identity.cache.put(&revocation::key(session.id), b"1", time).await {
            return Ok(None);
        }
        newest = session.revoked_at;
    }
    Ok(identity.cache.put(revocation::COMPLETE_KEY, b"1", COMPLETE).await.then_some(newest))
}
