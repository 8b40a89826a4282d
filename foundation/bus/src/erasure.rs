//! Erasure of a person's data in the bus's tables of every service: name and e-mail address are in events, in stored
//! replies, and may be in the errors of sagas.

use capsule_contracts::event::PERSONAL_EVENTS;
use capsule_contracts::{Problem, Uuid};
use capsule_store::{Transaction, idempotency, unscoped};
use futures_util::future::BoxFuture;

use crate::events::UNREADABLE;

/// Deletes a user's data, in the transaction that consumes [`UserErased`](capsule_contracts::identity::UserErased).
pub fn erase<'a>(tx: &'a Transaction<'_>, user: Uuid) -> BoxFuture<'a, Result<(), Problem>> {
    Box::pin(async move {
        let pattern = format!("%{user}%");
        for kind in PERSONAL_EVENTS.into_iter().chain([UNREADABLE]) {
            tx.run(unscoped!(
                "the outbox belongs to the service",
                "DELETE FROM outbox WHERE kind = :kind AND envelope LIKE :envelope",
                kind,
                envelope = pattern.as_str()
            ))
            .await?;
            // The row stays until its retention ends, so that a redelivered event is not handled again.
            tx.run(unscoped!(
                "the inbox belongs to the service",
                "UPDATE inbox SET state = 'done', envelope = '{}', last_error = NULL, errors = NULL WHERE kind = :kind \
                 AND envelope LIKE :envelope",
                kind,
                envelope = pattern.as_str()
            ))
            .await?;
        }
        tx.run(unscoped!(
            "sagas belong to the service",
            "UPDATE sagas SET history = '[]', last_error = NULL WHERE ended_at IS NOT NULL AND input LIKE :pattern",
            pattern
        ))
        .await?;
        idempotency::erase(tx, user).await
    })
}
