//! What whoever runs the installation looks at. Every service answers these messages for itself; the
//! gateway asks all of them.

use std::collections::HashSet;
use std::sync::{LazyLock, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Event, Page, Timestamp, Uuid, message};

/// Every service that has a database, by its name.
pub const SERVICES: [&str; 4] = ["identity", "organization", "project", "deploy"];

/// The subject under which one service answers a message that all of them do.
#[must_use]
pub fn addressed(service: &str, subject: &str) -> &'static str {
    static KNOWN: LazyLock<Mutex<HashSet<&'static str>>> = LazyLock::new(Mutex::default);
    let wanted = format!("{service}.{subject}");
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(subject) = known.get(wanted.as_str()) {
        return subject;
    }
    // As many as there are services and such messages, once each.
    let subject: &'static str = Box::leak(wanted.into_boxed_str());
    known.insert(subject);
    subject
}

/// An event that a service could not handle, however often it tried.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeadLetter {
    pub id: Uuid,
    /// The service that could not handle it.
    pub service: String,
    /// The event's type; `unreadable` for what was none.
    pub kind: String,
    /// How often it was tried.
    pub attempts: i32,
    pub received_at: Timestamp,
    /// Why the last attempt failed.
    pub last_error: String,
    /// When and why each attempt failed, the newest last.
    pub errors: Vec<Failure>,
    /// The event as it arrived; only where one is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envelope: Option<serde_json::Value>,
}

/// An attempt that failed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    pub at: Timestamp,
    pub error: String,
}

/// Lists the events that could not be handled.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ListDeadLetters {}
message!(ListDeadLetters, query "operations.list_dead_letters", PlatformAdmin => Page<DeadLetter>);

/// Shows an event that could not be handled.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetDeadLetter {
    pub id: Uuid,
}
message!(GetDeadLetter, query "operations.get_dead_letter", PlatformAdmin => DeadLetter);

/// Tries again to handle an event that could not be.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ReplayDeadLetter {
    pub id: Uuid,
}
message!(ReplayDeadLetter, command "operations.replay_dead_letter", PlatformAdmin => DeadLetter);

/// Gives an event up that could not be handled.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiscardDeadLetter {
    pub id: Uuid,
}
message!(DiscardDeadLetter, command "operations.discard_dead_letter", PlatformAdmin => DeadLetter);

/// A process over several services, and how far it has come.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Saga {
    pub id: Uuid,
    /// The service that carries it out.
    pub service: String,
    /// What it does, such as `organization_deletion`.
    pub name: String,
    /// `running`, `undoing`, `done` or `undone`.
    pub state: String,
    /// The step it is at.
    pub step: String,
    /// How often that step has failed.
    pub attempts: i32,
    /// Why it failed last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    pub started_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// What was done and undone, and what failed.
    pub history: Vec<SagaEvent>,
}

/// Something that happened in a saga.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SagaEvent {
    pub at: Timestamp,
    pub step: String,
    /// `done`, `undone`, or why it failed.
    pub what: String,
}

/// Lists the processes over several services, the newest first.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ListSagas {}
message!(ListSagas, query "operations.list_sagas", PlatformAdmin => Page<Saga>);

/// Shows a process over several services.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetSaga {
    pub id: Uuid,
}
message!(GetSaga, query "operations.get_saga", PlatformAdmin => Saga);

/// A service could not handle an event and has given it up until somebody looks at it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeadLettered {
    pub id: Uuid,
    pub service: String,
    pub kind: String,
    pub error: String,
}
impl Event for DeadLettered {
    const TYPE: &'static str = "operations.dead_lettered";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.id
    }
}
