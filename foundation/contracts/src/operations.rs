//! Messages for operators of an installation: dead letters and sagas. Every service handles them for its own
//! database; the gateway sends them to all services and merges the replies.

use std::collections::HashSet;
use std::sync::{LazyLock, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Event, Page, Timestamp, Uuid, list, message};

/// The names of the services, each of which has a database.
pub const SERVICES: [&str; 4] = ["identity", "organization", "project", "deploy"];

/// The subject of `service` for a message that every service handles.
#[must_use]
pub fn service_subject(service: &str, subject: &str) -> &'static str {
    static SUBJECTS: LazyLock<Mutex<HashSet<&'static str>>> = LazyLock::new(Mutex::default);
    let wanted = format!("{service}.{subject}");
    let mut subjects = SUBJECTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(subject) = subjects.get(wanted.as_str()) {
        return subject;
    }
    // The leak is bounded: once for each service and message.
    let subject: &'static str = Box::leak(wanted.into_boxed_str());
    subjects.insert(subject);
    subject
}

/// An event that a service could not handle in any of its attempts.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeadLetter {
    pub id: Uuid,
    /// The service that could not handle it.
    pub service: String,
    /// The event's type; `unreadable` if it is not an event.
    pub kind: String,
    /// The number of attempts.
    pub attempts: i32,
    pub received_at: Timestamp,
    /// Why the last attempt failed.
    pub last_error: String,
    /// When and why each attempt failed, oldest first.
    pub errors: Vec<Failure>,
    /// The event as it was received. Only in the reply for a single dead letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envelope: Option<serde_json::Value>,
}

/// An attempt that failed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    pub at: Timestamp,
    pub error: String,
}

list! {
    /// Lists the dead letters, newest first.
    ListDeadLetters by ["-id"] {
        /// Only events of this kind.
        kind: Option<String>,
    }
}
message!(ListDeadLetters, query "operations.list_dead_letters", PlatformAdmin => Page<DeadLetter>, |m, check| check.list(m));

/// Returns a dead letter with its event.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetDeadLetter {
    pub id: Uuid,
}
message!(GetDeadLetter, query "operations.get_dead_letter", PlatformAdmin => DeadLetter);

/// Replays a dead letter: the service handles its event again.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ReplayDeadLetter {
    pub id: Uuid,
}
message!(ReplayDeadLetter, command "operations.replay_dead_letter", PlatformAdmin => DeadLetter);

/// Discards a dead letter: its event is not handled.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiscardDeadLetter {
    pub id: Uuid,
}
message!(DiscardDeadLetter, command "operations.discard_dead_letter", PlatformAdmin => DeadLetter);

/// A saga: a sequence of steps across several services, which is completed or undone.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Saga {
    pub id: Uuid,
    /// The service that runs it.
    pub service: String,
    /// Its name, such as `organization_deletion`.
    pub name: String,
    /// `running`, `undoing`, `done` or `undone`.
    pub state: String,
    /// The current step.
    pub step: String,
    /// How often the current step has failed.
    pub attempts: i32,
    /// Why it last failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    pub started_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// The steps that were done and undone, and their failures, oldest first.
    pub history: Vec<SagaEvent>,
}

/// The outcome of a saga's step.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SagaEvent {
    pub at: Timestamp,
    pub step: String,
    /// `done`, `undone`, or why it failed.
    pub what: String,
}

list! {
    /// Lists the sagas, newest first.
    ListSagas by ["-id"] {
        /// Only sagas in this state.
        state: Option<String>,
    }
}
message!(ListSagas, query "operations.list_sagas", PlatformAdmin => Page<Saga>, |m, check| check.list(m));

/// Returns a saga.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetSaga {
    pub id: Uuid,
}
message!(GetSaga, query "operations.get_saga", PlatformAdmin => Saga);

/// An event became a dead letter.
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
