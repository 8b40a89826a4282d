//! Retention: expired rows are deleted periodically, whether or not the service receives events.

use std::sync::Arc;
use std::time::Duration;

use capsule_contracts::{Problem, Timestamp};
use capsule_store::{Store, idempotency, unscoped};
use futures_util::future::BoxFuture;

use crate::service::Service;

/// The time between two purges.
const PURGE_PERIOD: Duration = Duration::from_secs(600);
/// How long handled and relayed events are kept, so that a redelivered event is recognized.
const EVENT_RETENTION_SECONDS: i64 = 7 * 24 * 3600;
/// How long sagas are kept after their end, for operators.
const SAGA_RETENTION_SECONDS: i64 = 30 * 24 * 3600;

/// Deletes the expired rows of a service's own tables.
pub type Purge<S> = for<'a> fn(&'a Arc<S>, Timestamp) -> BoxFuture<'a, Result<(), Problem>>;

/// Purges now and then periodically, while this process is the service's leader.
pub(crate) async fn run<S: Service>(service: &Arc<S>, service_purge: Option<Purge<S>>) {
    loop {
        let now = Timestamp::now();
        let purged = async {
            purge(service.store(), now).await?;
            match service_purge {
                Some(service_purge) => service_purge(service, now).await,
                None => Ok(()),
            }
        };
        if let Err(problem) = purged.await {
            tracing::warn!(service = service.store().name(), %problem, "expired rows cannot be deleted; retrying later");
        }
        tokio::time::sleep(PURGE_PERIOD).await;
    }
}

/// Deletes the events, commands and sagas whose retention has ended at `now`.
///
/// # Errors
/// When the database is unavailable.
pub async fn purge(store: &Store, now: Timestamp) -> Result<(), Problem> {
    let (events, sagas) = (now.plus_seconds(-EVENT_RETENTION_SECONDS).0, now.plus_seconds(-SAGA_RETENTION_SECONDS).0);
    let tx = store.begin().await?;
    tx.run(unscoped!("the outbox belongs to the service", "DELETE FROM outbox WHERE relayed_at < :events", events)).await?;
    tx.run(unscoped!(
        "the inbox belongs to the service",
        "DELETE FROM inbox WHERE state = 'done' AND received_at < :events",
        events
    ))
    .await?;
    tx.run(unscoped!("sagas belong to the service", "DELETE FROM sagas WHERE ended_at < :sagas", sagas)).await?;
    idempotency::prune(&tx, now).await?;
    tx.commit().await
}
