//! What every service drops of a person whose account is erased: their name and address are in the events that it
//! sent and received, in the replies that it keeps, and may be in what a saga was refused with.

use capsule_contracts::event::PERSONAL;
use capsule_contracts::{Problem, Uuid};
use capsule_store::{Transaction, idempotency, unscoped};
use futures_util::future::BoxFuture;

use crate::events::UNREADABLE;

/// Drops it, in the transaction that consumes [`UserErased`](capsule_contracts::identity::UserErased).
pub fn erase<'a>(tx: &'a Transaction<'_>, user: Uuid) -> BoxFuture<'a, Result<(), Problem>> {
    Box::pin(async move {
        let named = format!("%{user}%");
        for kind in PERSONAL.into_iter().chain([UNREADABLE]) {
            tx.run(unscoped!(
                "the outbox belongs to the service",
                "DELETE FROM outbox WHERE kind = $1 AND envelope LIKE $2",
                kind,
                named.as_str()
            ))
            .await?;
            // The row stays for a while: the event is not handled if it arrives again.
            tx.run(unscoped!(
                "the inbox belongs to the service",
                "UPDATE inbox SET state = 'done', envelope = '{}', last_error = NULL, errors = NULL WHERE kind = $1 AND envelope LIKE $2",
                kind,
                named.as_str()
            ))
            .await?;
        }
        tx.run(unscoped!(
            "sagas belong to the service",
            "UPDATE sagas SET history = '[]', last_error = NULL WHERE ended_at IS NOT NULL AND input LIKE $1",
            named
        ))
        .await?;
        idempotency::erase(tx, user).await
    })
}
