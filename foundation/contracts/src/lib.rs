//! Every message, event and API type of Capsule, one module per service. Types only.
//!
//! A message is defined once and serves as bus payload, REST body, `OpenAPI` schema and SDK model.
//! [`message!`] binds it to its subject, its access rule and its reply; without a rule it does not
//! compile.

pub mod access;
pub mod deploy;
pub mod event;
pub mod identity;
pub mod message;
pub mod operations;
pub mod organization;
pub mod problem;
pub mod project;
pub mod quotas;
pub mod text;
pub mod time;

pub use access::{Access, Permission, Role, Target};
pub use event::{Event, EventEnvelope};
pub use message::{Check, Count, Empty, Kind, Message, Page, StreamMessage};
pub use problem::{FieldError, Problem};
pub use time::Timestamp;

/// The id of anything in Capsule: a `UUIDv7`, so ids sort by the time they were made.
pub use uuid::Uuid;

/// Makes a new id.
#[must_use]
pub fn new_id() -> Uuid {
    Uuid::now_v7()
}
