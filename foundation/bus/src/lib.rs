//! How services talk: requests with a reply and a deadline, streams, and durable events; within one
//! process, or over a broker ([`transport::Transport`]) between many.
//!
//! Authorization happens in this crate and nowhere else: the dispatcher turns a message's access
//! rule into a proof ([`Tenant`], [`Caller`]) that the handler, and through it every query, takes.

mod access;
mod context;
mod erasure;
mod events;
mod operations;
mod quotas;
pub mod retention;
pub mod saga;
mod service;
mod streams;
pub mod transport;
mod watch;
mod wire;

use std::collections::HashMap;
use std::sync::{Arc, RwLock};
use std::time::Instant;

use capsule_contracts::{Access, EventEnvelope, Kind, Message, Problem, StreamMessage, new_id};
use capsule_store::{Keyring, Migration};
use futures_util::future::{BoxFuture, try_join_all};
use tokio::sync::mpsc;
use tracing::Instrument;
use tracing::field::Empty;

pub use access::{Caller, Condition, Prove, SystemGrant, Tenant};
pub use context::{Command, Context, Principal};
pub use events::emit;
pub use quotas::quotas;
pub use service::{Call, Items, Router, Service};

use streams::Streams;
use transport::{Outgoing, Refusal, Served, Transport};
use watch::Watch;
use wire::Wire;

/// The tables every service's database has for events and memberships.
pub const MIGRATIONS: &[Migration] = capsule_store::migrations![1 "create_outbox_and_inbox", 2 "create_leases_and_commands", 3 "create_sagas_and_error_history", 4 "keep_quotas"];

/// Items that a stream may run ahead of its reader.
const STREAM_CREDIT: usize = 16;

type Reply = Result<Vec<u8>, Problem>;
/// Context, payload, and whether they came from another process.
type Handler = Box<dyn Fn(Context, Vec<u8>, bool) -> BoxFuture<'static, Reply> + Send + Sync>;
type Streamer = Box<dyn Fn(Context, Vec<u8>) -> BoxFuture<'static, Result<mpsc::Receiver<Vec<u8>>, Problem>> + Send + Sync>;

struct Route {
    kind: Kind,
    access: Access,
    handler: Handler,
}

/// Where one service's incoming events go.
trait Inbox: Send + Sync {
    fn wants(&self, kind: &str) -> bool;
    fn kinds(&self) -> Vec<&'static str>;
    /// Keeps what can never be taken as a dead letter.
    fn set_aside<'a>(&'a self, body: &'a [u8], why: &'a str) -> BoxFuture<'a, Result<(), Problem>>;
    fn put<'a>(&'a self, envelope: &'a EventEnvelope) -> BoxFuture<'a, Result<(), Problem>>;
}

#[derive(Default)]
struct Table {
    routes: HashMap<&'static str, Arc<Route>>,
    streams: HashMap<&'static str, Arc<Streamer>>,
    inboxes: Vec<Arc<dyn Inbox>>,
}

/// What carries messages to other processes, and how they look on the way.
struct Remote {
    transport: Arc<dyn Transport>,
    wire: Wire,
    streams: Arc<Streams>,
}

/// The bus: within one process, or over a broker between many. Who uses it cannot tell which.
#[derive(Clone, Default)]
pub struct Bus {
    table: Arc<RwLock<Table>>,
    remote: Option<Arc<Remote>>,
    /// Whether every service of this process is on the bus.
    complete: Arc<tokio::sync::watch::Sender<bool>>,
    /// The open streams of this process, whoever serves them.
    watch: Arc<Watch>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bus")
    }
}

impl Bus {
    /// A bus within this process, that nobody serves on yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A bus over a broker. Other processes of the installation reach this one's private pages, with
    /// [`Bus::pages`] among them, at `address` (`host:port`).
    #[must_use]
    pub fn over(transport: Arc<dyn Transport>, keyring: &Keyring, address: String) -> Self {
        let wire = Wire::new(keyring);
        let streams = Arc::new(Streams::new(address, wire.clone()));
        let remote = Some(Arc::new(Remote { transport, wire, streams }));
        Self { remote, ..Self::default() }
    }

    /// Says that every service of this process is on the bus. Events are told only from now on: within one
    /// process, who is not there yet would never hear of them.
    pub fn complete(&self) {
        self.complete.send_replace(true);
    }

    /// Resolves once every service of this process is on the bus.
    async fn completed(&self) {
        // The sender is this value's own.
        let _ = self.complete.subscribe().wait_for(|complete| *complete).await;
    }

    /// The pages that other processes fetch streams from.
    pub fn pages(&self) -> axum::Router {
        self.remote.as_ref().map_or_else(axum::Router::new, |remote| remote.streams.clone().pages())
    }

    /// Whether the broker is there; `None` within one process.
    #[must_use]
    pub fn broker(&self) -> Option<bool> {
        self.remote.as_ref().map(|remote| remote.transport.is_ready())
    }

    /// Takes nothing new from the broker any more; resolves when what was begun is done.
    pub async fn drain(&self) {
        if let Some(remote) = &self.remote {
            remote.transport.drain().await;
        }
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
        match (route, &self.remote) {
            (Some(route), _) => dispatch(&route, subject, context.clone(), payload, false).await,
            (None, Some(remote)) => {
                let span = tracing::info_span!("send", otel.name = Empty, otel.kind = Empty, subject);
                capsule_observe::name_span(&span, subject, "client");
                remote.request(context, subject, &payload).instrument(span).await
            }
            (None, None) => Err(nobody(subject)),
        }
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
        match (streamer, &self.remote) {
            (Some(streamer), _) => streamer(context.clone(), payload).await,
            (None, Some(remote)) => {
                let ticket = remote.request(context, subject, &payload).await?;
                let ticket = serde_json::from_slice(&ticket).map_err(|_| Problem::internal())?;
                remote.streams.fetch(ticket).await
            }
            (None, None) => Err(nobody(subject)),
        }
    }

    /// Hands events to whoever wants them; returns once all are in safe keeping.
    async fn publish(&self, envelopes: &[EventEnvelope]) -> Result<(), Problem> {
        if let Some(remote) = &self.remote {
            // Sent one after the other, confirmed all together.
            let events = envelopes.iter().map(|envelope| remote.wire.event(envelope)).collect::<Result<Vec<_>, _>>()?;
            return try_join_all(events.into_iter().map(|event| remote.transport.publish(event))).await.map(|_| ());
        }
        for envelope in envelopes {
            let inboxes: Vec<_> = self.read_table().inboxes.iter().filter(|inbox| inbox.wants(&envelope.kind)).cloned().collect();
            for inbox in inboxes {
                inbox.put(envelope).await?;
            }
        }
        Ok(())
    }

    /// Puts a service in reach of other processes.
    fn serve(&self, name: &'static str, subjects: Vec<&'static str>, inbox: &Arc<dyn Inbox>) {
        let Some(remote) = self.remote.clone() else {
            self.write_table().inboxes.push(inbox.clone());
            return;
        };
        let (bus, answering) = (self.clone(), remote.clone());
        let answer = move |sealed: Vec<u8>| {
            let (bus, remote) = (bus.clone(), answering.clone());
            Box::pin(async move { remote.answer(&bus, &sealed).await }) as BoxFuture<'static, _>
        };
        let (taking, wire) = (inbox.clone(), remote.wire.clone());
        let receive = move |body: Vec<u8>, signature: String| {
            let (inbox, wire) = (taking.clone(), wire.clone());
            Box::pin(async move {
                let envelope = wire.open_event(&body, &signature)?;
                inbox.put(&envelope).await.map_err(Refusal::Later)
            }) as BoxFuture<'static, _>
        };
        let aside = inbox.clone();
        let set_aside = move |body: Vec<u8>, why: String| {
            let inbox = aside.clone();
            Box::pin(async move { inbox.set_aside(&body, &why).await }) as BoxFuture<'static, _>
        };
        remote.transport.serve(Served {
            name,
            subjects,
            kinds: inbox.kinds(),
            answer: Arc::new(answer),
            receive: Arc::new(receive),
            set_aside: Arc::new(set_aside),
        });
    }

    fn read_table(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write_table(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Remote {
    async fn request(&self, context: &Context, subject: &'static str, payload: &[u8]) -> Reply {
        let patience = context.deadline.saturating_duration_since(Instant::now());
        if patience.is_zero() {
            return Err(Problem::deadline(subject));
        }
        // It may arrive twice: it goes by an id, so that it is not carried out twice.
        let mut context = context.clone();
        context.traceparent = capsule_observe::traceparent().or(context.traceparent);
        context.command.get_or_insert_with(|| Command { id: new_id(), digest: String::new() });
        let (id, body) = self.wire.request(&context, subject, payload)?;
        let sent = self.transport.request(Outgoing { subject, body, patience });
        let reply = tokio::time::timeout(patience, sent).await.map_err(|_| Problem::deadline(subject))??;
        self.wire.open_reply(id, &reply)
    }

    /// Answers a request of another process.
    async fn answer(&self, bus: &Bus, sealed: &[u8]) -> Vec<u8> {
        let Some(request) = self.wire.open_request(sealed) else {
            tracing::error!("a request does not open: another installation's, or another master key");
            return Vec::new();
        };
        let (id, subject) = (request.id, request.subject.as_str());
        let (route, streamer) = {
            let table = bus.read_table();
            let route = table.routes.get_key_value(subject).map(|(subject, route)| (*subject, route.clone()));
            (route, table.streams.get(subject).cloned())
        };
        let reply = match (route, streamer) {
            (Some((subject, route)), _) => dispatch(&route, subject, request.context, request.payload, true).await,
            (None, Some(streamer)) => streamer(request.context, request.payload)
                .await
                .and_then(|items| self.streams.offer(items))
                .and_then(|ticket| serde_json::to_vec(&ticket).map_err(|_| Problem::internal())),
            (None, None) => Err(nobody(subject)),
        };
        self.wire.reply(id, &reply).unwrap_or_default()
    }
}

fn nobody(subject: &str) -> Problem {
    Problem::unavailable(format!("Nobody serves {subject} at the moment."))
}

/// Runs a handler of this process.
async fn dispatch(route: &Route, subject: &'static str, context: Context, payload: Vec<u8>, remote: bool) -> Reply {
    if route.access == Access::Internal && !matches!(context.principal, Principal::Service(_)) {
        return Err(Problem::not_found("endpoint"));
    }
    let remaining = context.deadline.saturating_duration_since(Instant::now());
    if remaining.is_zero() {
        return Err(Problem::deadline(subject));
    }
    let began = Instant::now();
    let work = (route.handler)(context, payload, remote);
    let outcome = match route.kind {
        Kind::Query => tokio::time::timeout(remaining, work).await,
        Kind::Command => {
            tokio::time::timeout(remaining, async { tokio::spawn(work).await.unwrap_or_else(|_| Err(Problem::internal())) }).await
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
