//! The messages for operators that every service handles: its dead letters and sagas.

use std::sync::Arc;

use capsule_contracts::list::PageQuery;
use capsule_contracts::operations::{
    DeadLetter, DiscardDeadLetter, Failure, GetDeadLetter, GetSaga, ListDeadLetters, ListSagas, ReplayDeadLetter, Saga, SagaEvent,
};
use capsule_contracts::{Page, Problem, Timestamp, Uuid};
use capsule_store::{FromRow, Store, page, unscoped};

use crate::events;
use crate::service::{Call, Router, Service};

/// Adds the handlers of these messages to a service.
pub fn serve<S: Service>(router: Router<S>) -> Router<S> {
    router
        .handle_per_service(list_dead_letters)
        .handle_per_service(get_dead_letter)
        .handle_per_service(replay_dead_letter)
        .handle_per_service(discard_dead_letter)
        .handle_per_service(list_sagas)
        .handle_per_service(get_saga)
}

#[derive(FromRow)]
struct DeadRow {
    id: Uuid,
    kind: String,
    envelope: String,
    attempts: i32,
    received_at: i64,
    last_error: Option<String>,
    errors: Option<String>,
}

impl DeadRow {
    fn view(self, service: &str, with_envelope: bool) -> DeadLetter {
        let errors: Vec<Failure> = self.errors.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
        let envelope = || serde_json::from_str(&self.envelope).unwrap_or(serde_json::Value::String(self.envelope.clone()));
        DeadLetter {
            id: self.id,
            service: service.into(),
            kind: self.kind,
            attempts: self.attempts,
            received_at: Timestamp(self.received_at),
            last_error: self.last_error.unwrap_or_default(),
            errors,
            envelope: with_envelope.then(envelope),
        }
    }
}

async fn list_dead_letters<S: Service>(service: Arc<S>, call: Call<ListDeadLetters>) -> Result<Page<DeadLetter>, Problem> {
    let query = PageQuery::of(&call.message)?;
    let rows = page!(
        query,
        unscoped "the inbox belongs to the service",
        "SELECT id, kind, envelope, attempts, received_at, last_error, errors FROM inbox \
         WHERE state = 'dead' AND (:kind = '' OR kind = :kind)",
        "id" uuid,
        ["id" => "id" uuid],
        kind = call.message.kind.unwrap_or_default()
    );
    let rows = service.store().read().all::<DeadRow>(rows?).await?;
    Ok(query.page(rows, |row| (row.id.into(), row.id)).map(|row| row.view(service.store().name(), false)))
}

async fn dead_letter(store: &Store, id: Uuid) -> Result<DeadLetter, Problem> {
    let row = unscoped!(
        "the inbox belongs to the service",
        "SELECT id, kind, envelope, attempts, received_at, last_error, errors FROM inbox WHERE state = 'dead' AND id = :id",
        id
    );
    let row = store.read().first::<DeadRow>(row).await?.ok_or_else(|| Problem::not_found("dead letter"))?;
    Ok(row.view(store.name(), true))
}

async fn get_dead_letter<S: Service>(service: Arc<S>, call: Call<GetDeadLetter>) -> Result<DeadLetter, Problem> {
    dead_letter(service.store(), call.message.id).await
}

async fn replay_dead_letter<S: Service>(service: Arc<S>, call: Call<ReplayDeadLetter>) -> Result<DeadLetter, Problem> {
    let letter = dead_letter(service.store(), call.message.id).await?;
    if letter.kind == events::UNREADABLE {
        return Err(Problem::conflict("The dead letter is not a readable event, so it cannot be replayed.")
            .hint("Discard it: `capsule admin dead-letters discard ID`."));
    }
    set_state(service.store(), letter, "pending").await
}

async fn discard_dead_letter<S: Service>(service: Arc<S>, call: Call<DiscardDeadLetter>) -> Result<DeadLetter, Problem> {
    let letter = dead_letter(service.store(), call.message.id).await?;
    tracing::info!(service = service.store().name(), id = %letter.id, kind = letter.kind, by = %call.grant.user(), "a dead letter was discarded");
    // The row stays until its retention ends, so that a redelivered event is not handled again.
    set_state(service.store(), letter, "done").await
}

async fn set_state(store: &Store, letter: DeadLetter, state: &str) -> Result<DeadLetter, Problem> {
    let tx = store.begin().await?;
    tx.run(unscoped!(
        "the inbox belongs to the service",
        "UPDATE inbox SET state = :state, attempts = 0, next_attempt_at = :next_attempt_at WHERE id = :id AND state = 'dead'",
        state,
        next_attempt_at = Timestamp::now().0,
        id = letter.id
    ))
    .await?;
    tx.commit().await?;
    Ok(letter)
}

#[derive(FromRow)]
struct SagaRow {
    id: Uuid,
    name: String,
    state: String,
    step: i32,
    attempts: i32,
    last_error: Option<String>,
    history: String,
    started_at: i64,
    ended_at: Option<i64>,
}

impl SagaRow {
    fn view(self, service: &str) -> Saga {
        let history: Vec<SagaEvent> = serde_json::from_str(&self.history).unwrap_or_default();
        Saga {
            id: self.id,
            service: service.into(),
            name: self.name,
            state: self.state,
            step: history.last().map_or_else(|| self.step.to_string(), |event| event.step.clone()),
            attempts: self.attempts,
            last_error: self.last_error,
            started_at: Timestamp(self.started_at),
            ended_at: self.ended_at.map(Timestamp),
            history,
        }
    }
}

async fn list_sagas<S: Service>(service: Arc<S>, call: Call<ListSagas>) -> Result<Page<Saga>, Problem> {
    let query = PageQuery::of(&call.message)?;
    let rows = page!(
        query,
        unscoped "sagas belong to the service",
        "SELECT id, name, state, step, attempts, last_error, history, started_at, ended_at FROM sagas WHERE (:state = '' OR state = :state)",
        "id" uuid,
        ["id" => "id" uuid],
        state = call.message.state.unwrap_or_default()
    );
    let rows = service.store().read().all::<SagaRow>(rows?).await?;
    Ok(query.page(rows, |row| (row.id.into(), row.id)).map(|row| row.view(service.store().name())))
}

async fn get_saga<S: Service>(service: Arc<S>, call: Call<GetSaga>) -> Result<Saga, Problem> {
    let row = unscoped!(
        "sagas belong to the service",
        "SELECT id, name, state, step, attempts, last_error, history, started_at, ended_at FROM sagas WHERE id = :id",
        id = call.message.id
    );
    let row = service.store().read().first::<SagaRow>(row).await?.ok_or_else(|| Problem::not_found("saga"))?;
    Ok(row.view(service.store().name()))
}

#[derive(FromRow)]
struct StateCount {
    state: String,
    count: i64,
}

/// Updates the metrics of outbox, inbox and database connections, while this process is the service's leader.
pub async fn report_queue_metrics(store: &Store) {
    loop {
        let unrelayed = unscoped!("counts", "SELECT COUNT(*) FROM outbox WHERE relayed_at IS NULL");
        if let Ok(Some(unrelayed)) = store.read().value::<i64>(unrelayed).await {
            metrics::gauge!("capsule_outbox_pending", "service" => store.name()).set(unrelayed as f64);
        }
        let states = unscoped!("counts", "SELECT state, COUNT(*) AS count FROM inbox WHERE state <> 'done' GROUP BY state");
        if let Ok(states) = store.read().all::<StateCount>(states).await {
            let count_of = |state: &str| states.iter().find(|row| row.state == state).map_or(0, |row| row.count) as f64;
            metrics::gauge!("capsule_inbox_pending", "service" => store.name()).set(count_of("pending"));
            metrics::gauge!("capsule_dead_letters", "service" => store.name()).set(count_of("dead"));
        }
        store.report_connection_metrics();
        tokio::time::sleep(events::POLL * 10).await;
    }
}
