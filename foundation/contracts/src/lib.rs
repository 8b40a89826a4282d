//! The messages, events and API types of Capsule, one module for each service. Types only.
//!
//! One type is a message's payload on the bus, the request's body in the REST API and its `OpenAPI` schema.
//! [`message!`] defines its subject, access rule and reply; a message without an access rule does not compile.

pub mod access;
pub mod deploy;
pub mod event;
pub mod identity;
pub mod list;
pub mod message;
pub mod operations;
pub mod organization;
pub mod problem;
pub mod project;
pub mod quotas;
pub mod text;
pub mod time;

pub use access::{Access, Permission, Permissions, Role, Target};
pub use event::{Event, EventEnvelope};
pub use message::{Check, Count, Download, DuplexMessage, Empty, Kind, Message, Page, Redirect, StreamMessage};
pub use problem::{FieldError, Problem};
pub use time::Timestamp;

/// An id: a `UUIDv7`, so that ids sort by creation time.
pub use uuid::Uuid;

/// Creates a new id.
#[must_use]
pub fn new_id() -> Uuid {
    Uuid::now_v7()
}
