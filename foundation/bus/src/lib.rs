//! How services talk: requests with a reply and a deadline, streams, and durable events. In one
//! process here; a broker takes the same calls.
//!
//! Authorization happens in this crate and nowhere else: the dispatcher turns a message's access
//! rule into a proof ([`Tenant`], [`Caller`]) that the handler, and through it every query, takes.

mod access;
mod context;
mod events;
mod service;

use std::collections::HashMap;
use std::sync::{Arc, RwLock};
use std::time::Instant;

use capsule_contracts::{Access, EventEnvelope, Kind, Message, Problem, StreamMessage};
use capsule_store::Migration;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

pub use access::{Caller, Prove, SystemGrant, Tenant};
pub use context::{Context, Principal};
pub use events::emit;
pub use service::{Call, Items, Router, Service};

/// The tables every service's database has for events and memberships.
pub const MIGRATIONS: &[Migration] = capsule_store::migrations![1 "create_outbox_and_inbox"];

/// Items that a stream may run ahead of its reader.
const STREAM_CREDIT: usize = 64;

type Reply = Result<Vec<u8>, Problem>;
type Handler = Box<dyn Fn(Context, Vec<u8>) -> BoxFuture<'static, Reply> + Send + Sync>;
type Streamer = Box<dyn Fn(Context, Vec<u8>) -> BoxFuture<'static, Result<mpsc::Receiver<Vec<u8>>, Problem>> + Send + Sync>;

struct Route {
    kind: Kind,
    access: Access,
    handler: Handler,
}

/// Where one service's incoming events go.
trait Inbox: Send + Sync {
    fn wants(&self, kind: &str) -> bool;
    fn put<'a>(&'a self, envelope: &'a EventEnvelope) -> BoxFuture<'a, Result<(), Problem>>;
}

#[derive(Default)]
struct Table {
    routes: HashMap<&'static str, Arc<Route>>,
    streams: HashMap<&'static str, Arc<Streamer>>,
    inboxes: Vec<Arc<dyn Inbox>>,
}

/// The bus within one process.
#[derive(Clone, Default)]
pub struct Bus {
    table: Arc<RwLock<Table>>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bus")
    }
}

impl Bus {
    /// A bus that nobody serves on yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sends a message and waits for the reply, at most until the context's deadline.
    ///
    /// A query is dropped when nobody waits for it any more; a command that was begun runs to its end.
    ///
    /// # Errors
    /// What the handler or the dispatcher answers, [`Problem::unavailable`] when nobody serves the
    /// subject, [`Problem::deadline`] when no answer came in time.
    pub async fn request<M: Message>(&self, context: &Context, message: &M) -> Result<M::Reply, Problem> {
        let payload = serde_json::to_vec(message).map_err(|_| Problem::internal())?;
        let reply = self.request_raw(context, M::SUBJECT, payload).await?;
        serde_json::from_slice(&reply).map_err(|cause| {
            tracing::error!(subject = M::SUBJECT, %cause, "a reply does not have its declared type");
            Problem::internal()
        })
    }

    /// As [`Bus::request`], for a message and a reply that are JSON already.
    ///
    /// # Errors
    /// As [`Bus::request`].
    pub async fn request_raw(&self, context: &Context, subject: &'static str, payload: Vec<u8>) -> Reply {
        let route = self.read_table().routes.get(subject).cloned();
        let Some(route) = route else {
            return Err(Problem::unavailable(format!("Nobody serves {subject} at the moment.")));
        };
        if route.access == Access::Internal && !matches!(context.principal, Principal::Service(_)) {
            return Err(Problem::not_found("endpoint"));
        }
        let remaining = context.deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(Problem::deadline(subject));
        }
        let began = Instant::now();
        let work = (route.handler)(context.clone(), payload);
        let outcome = match route.kind {
            Kind::Query => tokio::time::timeout(remaining, work).await,
            Kind::Command => {
                tokio::time::timeout(remaining, async { tokio::spawn(work).await.unwrap_or_else(|_| Err(Problem::internal())) })
                    .await
            }
        };
        let reply = outcome.unwrap_or_else(|_| Err(Problem::deadline(subject)));
        let result = match &reply {
            Ok(_) => "ok".to_owned(),
            Err(problem) => problem.code.clone(),
        };
        metrics::counter!("capsule_messages_total", "subject" => subject, "result" => result).increment(1);
        metrics::histogram!("capsule_message_duration_seconds", "subject" => subject).record(began.elapsed());
        reply
    }

    /// Opens a stream; its items are JSON. Dropping the receiver ends it. The sender waits while the
    /// reader is behind.
    ///
    /// # Errors
    /// As [`Bus::request`], before the first item.
    pub async fn open<M: StreamMessage>(&self, context: &Context, message: &M) -> Result<mpsc::Receiver<Vec<u8>>, Problem> {
        let payload = serde_json::to_vec(message).map_err(|_| Problem::internal())?;
        self.open_raw(context, M::SUBJECT, payload).await
    }

    /// As [`Bus::open`], for a message that is JSON already.
    ///
    /// # Errors
    /// As [`Bus::open`].
    pub async fn open_raw(
        &self,
        context: &Context,
        subject: &'static str,
        payload: Vec<u8>,
    ) -> Result<mpsc::Receiver<Vec<u8>>, Problem> {
        let streamer = self.read_table().streams.get(subject).cloned();
        match streamer {
            Some(streamer) => streamer(context.clone(), payload).await,
            None => Err(Problem::unavailable(format!("Nobody serves {subject} at the moment."))),
        }
    }

    /// Hands an event to the inbox of every service that wants it.
    async fn deliver(&self, envelope: &EventEnvelope) -> Result<(), Problem> {
        let inboxes: Vec<_> = self.read_table().inboxes.iter().filter(|inbox| inbox.wants(&envelope.kind)).cloned().collect();
        for inbox in inboxes {
            inbox.put(envelope).await?;
        }
        Ok(())
    }

    fn read_table(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write_table(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
