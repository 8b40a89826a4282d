//! Sagas: a bounded sequence of actions over several services that is done to its end, or undone.
//!
//! What is done is recorded after each step, and each action may be run twice without harm, so a saga goes
//! on wherever its process died. An action that can never succeed, or that has not within the saga's
//! patience, makes everything be undone, last step first. A step without an undo is the point of no
//! return: what comes after it is tried until it succeeds.

use std::sync::Arc;
use std::time::Duration;

use capsule_contracts::operations::SagaEvent;
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_store::{Store, Transaction, unscoped};
use futures_util::future::BoxFuture;
use sea_orm::FromQueryResult;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::context::{Context, Principal};
use crate::events::backoff;
use crate::service::Service;

/// Looks for something to do this often.
const PERIOD: Duration = Duration::from_millis(500);
/// A step that waits for something tries again after this long at the most.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// So many events of a saga's history are kept.
const HISTORY: usize = 100;

/// Something a saga does. May be run twice without harm.
pub type Action<S> = for<'a> fn(&'a S, &'a Run) -> BoxFuture<'a, Result<(), Problem>>;

/// A sequence of steps.
pub struct Saga<S: 'static> {
    pub name: &'static str,
    /// What is not past the point of no return by then is undone.
    pub patience: Duration,
    pub steps: &'static [Step<S>],
}

/// An action beside its undo.
pub struct Step<S: 'static> {
    pub name: &'static str,
    pub act: Action<S>,
    /// Undoes the action, or whatever part of it was done. `None` is the point of no return.
    pub undo: Option<Action<S>>,
}

impl<S> std::fmt::Debug for Saga<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Saga({})", self.name)
    }
}

impl<S> std::fmt::Debug for Step<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Step({})", self.name)
    }
}

/// A saga under way, as its actions see it.
#[derive(Debug)]
pub struct Run {
    id: Uuid,
    input: String,
    correlation_id: String,
    service: &'static str,
    /// Which step, and whether it is done or undone.
    moment: String,
}

impl Run {
    /// What the saga was begun with.
    ///
    /// # Errors
    /// When it was begun with something else.
    pub fn input<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        serde_json::from_str(&self.input).map_err(|_| Problem::internal())
    }

    /// For questions to other services.
    #[must_use]
    pub fn context(&self) -> Context {
        Context::new(self.correlation_id.clone(), Principal::Service(self.service))
    }

    /// For the command to another service that this action consists of: sent again after a crash, it is
    /// known there.
    #[must_use]
    pub fn command(&self) -> Context {
        let name = format!("{}/{}", self.id, self.moment);
        self.context().once(Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes()), self.moment.clone())
    }
}

/// Begins a saga, in the transaction that accepts it.
///
/// # Errors
/// When the row cannot be written.
pub async fn begin<S>(tx: &Transaction<'_>, context: &Context, saga: &Saga<S>, input: &impl Serialize) -> Result<Uuid, Problem> {
    let (id, now) = (new_id(), Timestamp::now().0);
    tx.run(unscoped!(
        "sagas belong to the service",
        "INSERT INTO sagas (id, name, input, correlation_id, state, step, attempts, next_attempt_at, history, started_at) \
         VALUES ($1, $2, $3, $4, 'running', 0, 0, $5, '[]', $6)",
        id,
        saga.name,
        serde_json::to_string(input).map_err(|_| Problem::internal())?,
        context.correlation_id.as_str(),
        now,
        now
    ))
    .await?;
    Ok(id)
}

#[derive(Clone, FromQueryResult)]
struct Row {
    id: Uuid,
    name: String,
    input: String,
    correlation_id: String,
    state: String,
    step: i32,
    attempts: i32,
    history: String,
    started_at: i64,
}

/// Carries sagas on, for as long as this process leads the service.
pub async fn run<S: Service>(service: &Arc<S>, sagas: &[&'static Saga<S>]) {
    if sagas.is_empty() {
        return std::future::pending().await;
    }
    loop {
        match due(service.store()).await {
            Ok(rows) if rows.is_empty() => tokio::time::sleep(PERIOD).await,
            Ok(rows) => {
                let steps = rows.into_iter().filter_map(|row| {
                    let saga = sagas.iter().find(|saga| saga.name == row.name)?;
                    Some(step(service, saga, row))
                });
                futures_util::future::join_all(steps).await;
            }
            Err(problem) => {
                tracing::warn!(service = service.store().name(), %problem, "sagas could not be looked for");
                tokio::time::sleep(PERIOD).await;
            }
        }
    }
}

async fn due(store: &Store) -> Result<Vec<Row>, Problem> {
    let rows = unscoped!(
        "sagas belong to the service",
        "SELECT id, name, input, correlation_id, state, step, attempts, history, started_at FROM sagas \
         WHERE ended_at IS NULL AND next_attempt_at <= $1 ORDER BY next_attempt_at LIMIT 16",
        Timestamp::now().0
    );
    store.read().all(rows).await
}

/// Does or undoes the next step of a saga, and records it.
async fn step<S: Service>(service: &Arc<S>, saga: &'static Saga<S>, row: Row) {
    let store = service.store();
    let at = usize::try_from(row.step).unwrap_or_default();
    let undoing = row.state == "undoing";
    let Some(step) = saga.steps.get(at) else { return };
    let run = Run {
        id: row.id,
        input: row.input.clone(),
        correlation_id: row.correlation_id.clone(),
        service: store.name(),
        moment: format!("{}/{}", step.name, if undoing { "undo" } else { "do" }),
    };
    let action = if undoing { step.undo } else { Some(step.act) };
    let outcome = match action {
        Some(action) => tokio::time::timeout(Context::PATIENCE, action(service, &run))
            .await
            .unwrap_or_else(|_| Err(Problem::deadline(step.name))),
        None => Ok(()),
    };
    let next = next(saga, &row, at, undoing, &outcome);
    if let Err(problem) = &outcome {
        tracing::warn!(saga = saga.name, id = %row.id, step = step.name, undoing, %problem, "a step of a saga failed");
    }
    if let Err(problem) = record(store, step.name, &row, undoing, &outcome, next).await {
        // It is run again; its actions bear that.
        tracing::warn!(saga = saga.name, id = %row.id, %problem, "a step of a saga could not be recorded");
        tokio::time::sleep(PERIOD).await;
    }
}

/// State, step, attempts and pause that follow.
fn next<S>(
    saga: &Saga<S>,
    row: &Row,
    at: usize,
    undoing: bool,
    outcome: &Result<(), Problem>,
) -> (&'static str, usize, i32, Duration) {
    match (outcome, undoing) {
        (Ok(()), false) if at + 1 == saga.steps.len() => ("done", at, 0, Duration::ZERO),
        (Ok(()), false) => ("running", at + 1, 0, Duration::ZERO),
        (Ok(()), true) if at == 0 => ("undone", 0, 0, Duration::ZERO),
        (Ok(()), true) => ("undoing", at - 1, 0, Duration::ZERO),
        (Err(problem), _) => {
            let attempts = row.attempts.saturating_add(1);
            let never = (400..500).contains(&problem.status) && ![408, 429].contains(&problem.status);
            let late = Timestamp::now().0 - row.started_at > i64::try_from(saga.patience.as_micros()).unwrap_or(i64::MAX);
            let returns = !undoing && saga.steps[..=at].iter().all(|step| step.undo.is_some());
            if returns && (never || late) {
                return ("undoing", at, 0, Duration::ZERO);
            }
            (if undoing { "undoing" } else { "running" }, at, attempts, backoff(attempts).min(LONGEST_PAUSE))
        }
    }
}

async fn record(
    store: &Store,
    name: &str,
    row: &Row,
    undoing: bool,
    outcome: &Result<(), Problem>,
    (state, step, attempts, pause): (&'static str, usize, i32, Duration),
) -> Result<(), Problem> {
    let now = Timestamp::now();
    let mut history: Vec<SagaEvent> = serde_json::from_str(&row.history).unwrap_or_default();
    let what = match outcome {
        Ok(()) if undoing => "undone".to_owned(),
        Ok(()) => "done".to_owned(),
        Err(problem) => problem.to_string(),
    };
    history.push(SagaEvent { at: now, step: name.into(), what });
    history.drain(..history.len().saturating_sub(HISTORY));
    let ended = matches!(state, "done" | "undone").then_some(now.0);
    let tx = store.begin().await?;
    tx.run(unscoped!(
        "sagas belong to the service",
        "UPDATE sagas SET state = $1, step = $2, attempts = $3, next_attempt_at = $4, last_error = $5, history = $6, ended_at = $7 \
         WHERE id = $8",
        state,
        i32::try_from(step).unwrap_or_default(),
        attempts,
        now.0 + i64::try_from(pause.as_micros()).unwrap_or_default(),
        outcome.as_ref().err().map(ToString::to_string),
        serde_json::to_string(&history).map_err(|_| Problem::internal())?,
        ended,
        row.id
    ))
    .await?;
    tx.commit().await?;
    if ended.is_some() {
        metrics::counter!("capsule_sagas_total", "saga" => row.name.clone(), "result" => state).increment(1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Row, Saga, Step, next};
    use capsule_contracts::{Problem, Timestamp, Uuid};
    use std::time::Duration;

    const NOTHING: super::Action<()> = |(), _| Box::pin(async { Ok(()) });
    const SAGA: Saga<()> = Saga {
        name: "test",
        patience: Duration::from_secs(60),
        steps: &[
            Step { name: "first", act: NOTHING, undo: Some(NOTHING) },
            Step { name: "no return", act: NOTHING, undo: None },
            Step { name: "last", act: NOTHING, undo: None },
        ],
    };

    fn row(started_at: i64) -> Row {
        let (name, input, correlation_id) = ("test".into(), "{}".into(), "c".into());
        let (state, history) = ("running".into(), "[]".into());
        Row { id: Uuid::nil(), name, input, correlation_id, state, step: 0, attempts: 0, history, started_at }
    }

    fn after(at: usize, undoing: bool, outcome: &Result<(), Problem>, started_at: i64) -> (&'static str, usize) {
        let (state, step, ..) = next(&SAGA, &row(started_at), at, undoing, outcome);
        (state, step)
    }

    #[test]
    fn steps_follow_each_other_to_the_end_or_back_to_the_beginning() {
        let now = Timestamp::now().0;
        assert_eq!(after(0, false, &Ok(()), now), ("running", 1));
        assert_eq!(after(2, false, &Ok(()), now), ("done", 2));
        assert_eq!(after(1, true, &Ok(()), now), ("undoing", 0));
        assert_eq!(after(0, true, &Ok(()), now), ("undone", 0));
    }

    #[test]
    fn what_can_never_succeed_or_comes_too_late_is_undone_but_not_past_the_point_of_no_return() {
        let now = Timestamp::now().0;
        assert_eq!(after(0, false, &Err(Problem::conflict("no")), now), ("undoing", 0));
        assert_eq!(after(0, false, &Err(Problem::unavailable("later")), now), ("running", 0));
        assert_eq!(after(0, false, &Err(Problem::unavailable("later")), 0), ("undoing", 0));
        assert_eq!(after(2, false, &Err(Problem::conflict("no")), 0), ("running", 2));
        assert_eq!(after(0, true, &Err(Problem::conflict("no")), now), ("undoing", 0));
    }
}
