//! Durable events: the outbox, the relay and the inbox (transactional outbox pattern).

use std::time::Duration;

use capsule_contracts::operations::{DeadLettered, Failure};
use capsule_contracts::organization::Membership;
use capsule_contracts::{Event, EventEnvelope, Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Store, Transaction, unscoped};
use rand::RngExt;

use crate::Bus;
use crate::context::Context;

/// How often the relay and the inbox poll the database when they are not notified.
pub const POLL: Duration = Duration::from_secs(1);

/// After this many failed attempts an event becomes a dead letter.
const MAX_ATTEMPTS: i32 = 10;

/// The kind of a dead letter that is not a readable event.
pub const UNREADABLE: &str = "unreadable";

/// Writes `event` to the outbox, in the transaction of the change that it reports.
///
/// # Errors
/// When the row cannot be written.
pub async fn emit<E: Event>(tx: &Transaction<'_>, context: &Context, event: &E) -> Result<(), Problem> {
    let envelope = EventEnvelope::wrap(tx.name(), &context.correlation_id, event).map_err(|_| Problem::internal())?;
    let text = serde_json::to_string(&envelope).map_err(|_| Problem::internal())?;
    tx.run(unscoped!(
        "the outbox belongs to the service",
        "INSERT INTO outbox (id, kind, envelope) VALUES (:id, :kind, :text)",
        id = envelope.id,
        kind = E::TYPE,
        text
    ))
    .await?;
    Ok(())
}

#[derive(FromRow)]
struct OutboxRow {
    id: Uuid,
    envelope: String,
}

/// Publishes every outbox row at least once, while this process is the service's leader.
pub async fn relay(store: &Store, bus: &Bus) {
    bus.wait_for_event_delivery().await;
    loop {
        match relay_once(store, bus).await {
            Ok(0) => {
                let _ = tokio::time::timeout(POLL, store.committed()).await;
            }
            Ok(_) => {}
            Err(problem) => {
                tracing::warn!(service = store.name(), %problem, "events cannot be relayed; retrying");
                tokio::time::sleep(POLL).await;
            }
        }
    }
}

async fn relay_once(store: &Store, bus: &Bus) -> Result<usize, Problem> {
    let rows = store
        .read()
        .all::<OutboxRow>(unscoped!(
            "the outbox belongs to the service",
            "SELECT id, envelope FROM outbox WHERE relayed_at IS NULL ORDER BY id LIMIT 100"
        ))
        .await?;
    let envelopes = rows.iter().map(|row| serde_json::from_str(&row.envelope).map_err(|_| Problem::internal()));
    bus.publish(&envelopes.collect::<Result<Vec<EventEnvelope>, _>>()?).await?;
    if !rows.is_empty() {
        let now = Timestamp::now();
        let tx = store.begin().await?;
        for row in &rows {
            tx.run(unscoped!(
                "the outbox belongs to the service",
                "UPDATE outbox SET relayed_at = :relayed_at WHERE id = :id",
                relayed_at = now.0,
                id = row.id
            ))
            .await?;
        }
        tx.commit().await?;
        metrics::counter!("capsule_events_relayed_total", "service" => store.name()).increment(rows.len() as u64);
    }
    Ok(rows.len())
}

/// Stores an event in the inbox. Does nothing if an event with its id is there.
pub async fn enqueue(store: &Store, envelope: &EventEnvelope) -> Result<(), Problem> {
    let text = serde_json::to_string(envelope).map_err(|_| Problem::internal())?;
    let now = Timestamp::now().0;
    let tx = store.begin().await?;
    tx.run(unscoped!(
        "the inbox belongs to the service",
        "INSERT INTO inbox (id, kind, envelope, state, attempts, next_attempt_at, received_at) \
         VALUES (:id, :kind, :text, 'pending', 0, :now, :now) ON CONFLICT (id) DO NOTHING",
        id = envelope.id,
        kind = envelope.kind.as_str(),
        text,
        now
    ))
    .await?;
    tx.commit().await
}

/// An event in the inbox.
#[derive(FromRow)]
pub struct InboxRow {
    pub id: Uuid,
    pub kind: String,
    pub envelope: String,
    pub attempts: i32,
    pub errors: Option<String>,
}

/// The pending events whose next attempt is due.
pub async fn due_events(store: &Store) -> Result<Vec<InboxRow>, Problem> {
    store
        .read()
        .all(unscoped!(
            "the inbox belongs to the service",
            "SELECT id, kind, envelope, attempts, errors FROM inbox WHERE state = 'pending' \
             AND next_attempt_at <= :now ORDER BY id LIMIT 100",
            now = Timestamp::now().0
        ))
        .await
}

/// Marks an event as handled, in the transaction that handles it. Returns `false` if it was handled before.
pub async fn mark_done(tx: &Transaction<'_>, id: Uuid) -> Result<bool, Problem> {
    let done =
        unscoped!("the inbox belongs to the service", "UPDATE inbox SET state = 'done' WHERE id = :id AND state = 'pending'", id);
    Ok(tx.run(done).await? == 1)
}

/// Stores a message that cannot be handled as a dead letter.
pub async fn store_dead_letter(store: &Store, body: &[u8], reason: &str) -> Result<(), Problem> {
    let (id, now) = (new_id(), Timestamp::now().0);
    let tx = store.begin().await?;
    tx.run(unscoped!(
        "the inbox belongs to the service",
        "INSERT INTO inbox (id, kind, envelope, state, attempts, next_attempt_at, last_error, received_at) \
         VALUES (:id, :kind, :envelope, 'dead', 1, :now, :reason, :now)",
        id,
        kind = UNREADABLE,
        envelope = String::from_utf8_lossy(body).into_owned(),
        now,
        reason
    ))
    .await?;
    emit(&tx, &Context::background(store.name()), &alert(store, id, UNREADABLE, reason)).await?;
    tx.commit().await?;
    metrics::counter!("capsule_events_dead_total", "service" => store.name()).increment(1);
    Ok(())
}

/// Schedules the next attempt of a failed event with exponential back-off, or makes it a dead letter.
pub async fn record_failure(store: &Store, row: &InboxRow, problem: &Problem) {
    let attempts = row.attempts + 1;
    // A malformed event fails every time.
    let dead = attempts >= MAX_ATTEMPTS || problem.code == "bad_request";
    let delay = backoff(attempts);
    tracing::warn!(service = store.name(), event = row.kind, id = %row.id, attempts, dead, %problem, "an event cannot be handled");
    if dead {
        metrics::counter!("capsule_events_dead_total", "service" => store.name()).increment(1);
    }
    let mut errors: Vec<Failure> = row.errors.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    errors.push(Failure { at: Timestamp::now(), error: problem.to_string() });
    let errors = serde_json::to_string(&errors).unwrap_or_default();
    let result = async {
        let tx = store.begin().await?;
        tx.run(unscoped!(
            "the inbox belongs to the service",
            "UPDATE inbox SET state = :state, attempts = :attempts, next_attempt_at = :next_attempt_at, \
             last_error = :last_error, errors = :errors \
             WHERE id = :id AND state = 'pending'",
            state = if dead { "dead" } else { "pending" },
            attempts,
            next_attempt_at = Timestamp::now().0.saturating_add(i64::try_from(delay.as_micros()).unwrap_or(i64::MAX)),
            last_error = problem.to_string(),
            errors,
            id = row.id
        ))
        .await?;
        if dead {
            let alert = alert(store, row.id, &row.kind, &problem.to_string());
            emit(&tx, &Context::background(store.name()), &alert).await?;
        }
        tx.commit().await
    }
    .await;
    if result.is_err() {
        tokio::time::sleep(POLL).await;
    }
}

/// The alert that an event became a dead letter.
fn alert(store: &Store, id: Uuid, kind: &str, error: &str) -> DeadLettered {
    DeadLettered { id, service: store.name().into(), kind: kind.into(), error: error.into() }
}

/// Exponential back-off: 0.2 s, doubling up to 5 minutes, times a random factor from 0.5 to 1.5.
pub fn backoff(attempts: i32) -> Duration {
    let seconds = 0.2 * 2_f64.powi(attempts.clamp(0, 20));
    Duration::from_secs_f64(seconds.min(300.0) * rand::rng().random_range(0.5..1.5))
}

/// Caches a membership, unless the cached one is newer.
pub async fn cache_membership(tx: &Transaction<'_>, membership: &Membership) -> Result<(), Problem> {
    tx.run(unscoped!(
        "the cache decides who may act for a tenant",
        "INSERT INTO memberships (organization_id, user_id, role, sequence, confirmed_at) \
         VALUES (:organization_id, :user_id, :role, :sequence, :confirmed_at) \
         ON CONFLICT (organization_id, user_id) DO UPDATE \
         SET role = excluded.role, sequence = excluded.sequence, confirmed_at = excluded.confirmed_at \
         WHERE excluded.sequence >= memberships.sequence",
        organization_id = membership.organization_id,
        user_id = membership.user_id,
        role = membership.role.map(|role| role.name().to_owned()),
        sequence = membership.sequence,
        confirmed_at = Timestamp::now().0
    ))
    .await?;
    Ok(())
}
