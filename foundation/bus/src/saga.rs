//! Sagas: a sequence of actions across several services that is either completed or undone.
//!
//! Each step is recorded when it is done, and every action is idempotent, so a saga resumes after a crash. If
//! an action fails permanently, or has not succeeded within the saga's timeout, the steps are undone in reverse
//! order. A step without an undo is the point of no return: later steps are retried until they succeed.

use std::sync::Arc;
use std::time::Duration;

use capsule_contracts::operations::SagaEvent;
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Store, Transaction, unscoped};
use futures_util::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::access::SystemAccess;
use crate::context::{Context, Principal};
use crate::events::backoff;
use crate::service::Service;

/// How often due steps are looked for.
const POLL_PERIOD: Duration = Duration::from_millis(500);
/// The longest delay between two attempts of a step.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(15);
/// How many events of a saga's history are kept.
const MAX_HISTORY: usize = 100;

/// An action of a saga. It must be idempotent.
pub type Action<S> = for<'a> fn(&'a S, &'a Run) -> BoxFuture<'a, Result<(), Problem>>;

/// A sequence of steps.
pub struct Saga<S: 'static> {
    pub name: &'static str,
    /// A saga that has not passed its point of no return by then is undone.
    pub timeout: Duration,
    pub steps: &'static [Step<S>],
}

/// An action and its undo.
pub struct Step<S: 'static> {
    pub name: &'static str,
    pub act: Action<S>,
    /// Undoes the action, even if only a part of it was done. `None` is the point of no return.
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

/// A running saga, as its actions see it.
#[derive(Debug)]
pub struct Run {
    id: Uuid,
    input: String,
    correlation_id: String,
    service: &'static str,
    /// The step's name, and `do` or `undo`.
    action: String,
}

impl Run {
    /// The input that the saga was started with.
    ///
    /// # Errors
    /// When the input does not have the type `T`.
    pub fn input<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        serde_json::from_str(&self.input).map_err(|_| Problem::internal())
    }

    /// The capability to make grants.
    #[must_use]
    pub fn system(&self) -> SystemAccess {
        SystemAccess::new(self.service)
    }

    /// The context for queries to other services.
    #[must_use]
    pub fn context(&self) -> Context {
        Context::new(self.correlation_id.clone(), Principal::Service(self.service))
    }

    /// The context for this action's command to another service: sent again after a crash, the command does not run
    /// again.
    #[must_use]
    pub fn command(&self) -> Context {
        let name = format!("{}/{}", self.id, self.action);
        self.context().with_command_id(Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes()), self.action.clone())
    }
}

/// Starts a saga, in the transaction that accepts the request for it.
///
/// # Errors
/// When the row cannot be written.
pub async fn begin<S>(tx: &Transaction<'_>, context: &Context, saga: &Saga<S>, input: &impl Serialize) -> Result<Uuid, Problem> {
    let (id, now) = (new_id(), Timestamp::now().0);
    tx.run(unscoped!(
        "sagas belong to the service",
        "INSERT INTO sagas (id, name, input, correlation_id, state, step, attempts, next_attempt_at, history, started_at) \
         VALUES (:id, :name, :input, :correlation_id, 'running', 0, 0, :now, '[]', :now)",
        id,
        name = saga.name,
        input = serde_json::to_string(input).map_err(|_| Problem::internal())?,
        correlation_id = context.correlation_id.as_str(),
        now
    ))
    .await?;
    Ok(id)
}

#[derive(Clone, FromRow)]
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

/// Runs the steps of sagas, while this process is the service's leader.
pub async fn run<S: Service>(service: &Arc<S>, sagas: &[&'static Saga<S>]) {
    if sagas.is_empty() {
        return std::future::pending().await;
    }
    loop {
        match due_sagas(service.store()).await {
            Ok(rows) if rows.is_empty() => tokio::time::sleep(POLL_PERIOD).await,
            Ok(rows) => {
                let steps = rows.into_iter().filter_map(|row| {
                    let saga = sagas.iter().find(|saga| saga.name == row.name)?;
                    Some(step(service, saga, row))
                });
                futures_util::future::join_all(steps).await;
            }
            Err(problem) => {
                tracing::warn!(service = service.store().name(), %problem, "due sagas cannot be read; retrying");
                tokio::time::sleep(POLL_PERIOD).await;
            }
        }
    }
}

async fn due_sagas(store: &Store) -> Result<Vec<Row>, Problem> {
    let rows = unscoped!(
        "sagas belong to the service",
        "SELECT id, name, input, correlation_id, state, step, attempts, history, started_at FROM sagas \
         WHERE ended_at IS NULL AND next_attempt_at <= :now ORDER BY next_attempt_at LIMIT 16",
        now = Timestamp::now().0
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
        action: format!("{}/{}", step.name, if undoing { "undo" } else { "do" }),
    };
    let action = if undoing { step.undo } else { Some(step.act) };
    let outcome = match action {
        Some(action) => tokio::time::timeout(Context::DEFAULT_TIMEOUT, action(service, &run))
            .await
            .unwrap_or_else(|_| Err(Problem::deadline(step.name))),
        None => Ok(()),
    };
    let next = next_state(saga, &row, at, undoing, &outcome);
    if let Err(problem) = &outcome {
        tracing::warn!(saga = saga.name, id = %row.id, step = step.name, undoing, %problem, "a step of a saga failed");
    }
    if let Err(problem) = record(store, step.name, &row, undoing, &outcome, next).await {
        // The step runs again, which is safe because its actions are idempotent.
        tracing::warn!(saga = saga.name, id = %row.id, %problem, "a step of a saga cannot be recorded");
        tokio::time::sleep(POLL_PERIOD).await;
    }
}

/// The next state, step and number of attempts, and the delay before the next attempt.
fn next_state<S>(
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
            let permanent = (400..500).contains(&problem.status) && ![408, 429].contains(&problem.status);
            let timed_out = Timestamp::now().0 - row.started_at > i64::try_from(saga.timeout.as_micros()).unwrap_or(i64::MAX);
            let can_undo = !undoing && saga.steps[..=at].iter().all(|step| step.undo.is_some());
            if can_undo && (permanent || timed_out) {
                return ("undoing", at, 0, Duration::ZERO);
            }
            (if undoing { "undoing" } else { "running" }, at, attempts, backoff(attempts).min(MAX_RETRY_DELAY))
        }
    }
}

async fn record(
    store: &Store,
    name: &str,
    row: &Row,
    undoing: bool,
    outcome: &Result<(), Problem>,
    (state, step, attempts, delay): (&'static str, usize, i32, Duration),
) -> Result<(), Problem> {
    let now = Timestamp::now();
    let mut history: Vec<SagaEvent> = serde_json::from_str(&row.history).unwrap_or_default();
    let what = match outcome {
        Ok(()) if undoing => "undone".to_owned(),
        Ok(()) => "done".to_owned(),
        Err(problem) => problem.to_string(),
    };
    history.push(SagaEvent { at: now, step: name.into(), what });
    history.drain(..history.len().saturating_sub(MAX_HISTORY));
    let ended = matches!(state, "done" | "undone").then_some(now.0);
    let tx = store.begin().await?;
    tx.run(unscoped!(
        "sagas belong to the service",
        "UPDATE sagas SET state = :state, step = :step, attempts = :attempts, next_attempt_at = :next_attempt_at, \
         last_error = :last_error, history = :history, ended_at = :ended \
         WHERE id = :id",
        state,
        step = i32::try_from(step).unwrap_or_default(),
        attempts,
        next_attempt_at = now.0 + i64::try_from(delay.as_micros()).unwrap_or_default(),
        last_error = outcome.as_ref().err().map(ToString::to_string),
        history = serde_json::to_string(&history).map_err(|_| Problem::internal())?,
        ended,
        id = row.id
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
    use super::{Row, Saga, Step, next_state};
    use capsule_contracts::{Problem, Timestamp, Uuid};
    use std::time::Duration;

    const NO_ACTION: super::Action<()> = |(), _| Box::pin(async { Ok(()) });
    const SAGA: Saga<()> = Saga {
        name: "test",
        timeout: Duration::from_secs(60),
        steps: &[
            Step { name: "first", act: NO_ACTION, undo: Some(NO_ACTION) },
            Step { name: "no return", act: NO_ACTION, undo: None },
            Step { name: "last", act: NO_ACTION, undo: None },
        ],
    };

    fn row(started_at: i64) -> Row {
        let (name, input, correlation_id) = ("test".into(), "{}".into(), "c".into());
        let (state, history) = ("running".into(), "[]".into());
        Row { id: Uuid::nil(), name, input, correlation_id, state, step: 0, attempts: 0, history, started_at }
    }

    fn after(at: usize, undoing: bool, outcome: &Result<(), Problem>, started_at: i64) -> (&'static str, usize) {
        let (state, step, ..) = next_state(&SAGA, &row(started_at), at, undoing, outcome);
        (state, step)
    }

    #[test]
    fn steps_run_in_order_and_are_undone_in_reverse_order() {
        let now = Timestamp::now().0;
        assert_eq!(after(0, false, &Ok(()), now), ("running", 1));
        assert_eq!(after(2, false, &Ok(()), now), ("done", 2));
        assert_eq!(after(1, true, &Ok(()), now), ("undoing", 0));
        assert_eq!(after(0, true, &Ok(()), now), ("undone", 0));
    }

    #[test]
    fn a_permanent_failure_or_timeout_undoes_a_saga_before_its_point_of_no_return() {
        let now = Timestamp::now().0;
        assert_eq!(after(0, false, &Err(Problem::conflict("no")), now), ("undoing", 0));
        assert_eq!(after(0, false, &Err(Problem::unavailable("later")), now), ("running", 0));
        assert_eq!(after(0, false, &Err(Problem::unavailable("later")), 0), ("undoing", 0));
        assert_eq!(after(2, false, &Err(Problem::conflict("no")), 0), ("running", 2));
        assert_eq!(after(0, true, &Err(Problem::conflict("no")), now), ("undoing", 0));
    }
}
