//! Retention: rows that are kept only for a while are deleted by a timer, whether or not anything happens.

use std::sync::Arc;
use std::time::Duration;

use capsule_contracts::{Problem, Timestamp};
use capsule_store::{Store, idempotency, unscoped};
use futures_util::future::BoxFuture;

use crate::service::Service;

/// The time between two purges.
const PERIOD: Duration = Duration::from_secs(600);
/// Handled and relayed events are kept this long, so that an event that arrives twice is recognized.
const EVENT_SECONDS: i64 = 7 * 24 * 3600;
/// Sagas that ended are kept this long, for operators.
const SAGA_SECONDS: i64 = 30 * 24 * 3600;

/// Deletes what a service keeps only for a while and the bus does not know of.
pub type Purge<S> = for<'a> fn(&'a Arc<S>, Timestamp) -> BoxFuture<'a, Result<(), Problem>>;

/// Purges at once and then periodically, for as long as this process leads the service.
pub(crate) async fn run<S: Service>(service: &Arc<S>, own: Option<Purge<S>>) {
    loop {
        let now = Timestamp::now();
        let purged = async {
            purge(service.store(), now).await?;
            match own {
                Some(own) => own(service, now).await,
                None => Ok(()),
            }
        };
        if let Err(problem) = purged.await {
            tracing::warn!(service = service.store().name(), %problem, "old rows could not be deleted; trying again later");
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// Deletes events, remembered commands and sagas whose retention is over at `now`.
///
/// # Errors
/// When the database does not answer.
pub async fn purge(store: &Store, now: Timestamp) -> Result<(), Problem> {
    let (events, sagas) = (now.plus_seconds(-EVENT_SECONDS).0, now.plus_seconds(-SAGA_SECONDS).0);
    let tx = store.begin().await?;
    tx.run(unscoped!("the outbox belongs to the service", "DELETE FROM outbox WHERE relayed_at < $1", events)).await?;
    tx.run(unscoped!("the inbox belongs to the service", "DELETE FROM inbox WHERE state = 'done' AND received_at < $1", events))
        .await?;
    tx.run(unscoped!("sagas belong to the service", "DELETE FROM sagas WHERE ended_at < $1", sagas)).await?;
    idempotency::prune(&tx, now).await?;
    tx.commit().await
}
