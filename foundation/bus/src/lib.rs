//! Communication between services: requests with a reply and a deadline, streams, duplex
//! connections, and durable events; within one process, or between processes over a broker ([`transport::Transport`]).
//!
//! Authorization happens only in this crate: the dispatcher checks a message's access rule and passes a
//! grant ([`Tenant`], [`Caller`]) to the handler, which passes it to every query.

mod access;
mod context;
mod duplex;
mod erasure;
mod events;
mod operations;
mod precondition;
mod quotas;
pub mod retention;
pub mod saga;
mod service;
mod stream_access;
mod streams;
pub mod transport;
mod wire;

use std::collections::HashMap;
use std::sync::{Arc, RwLock};
use std::time::Instant;

use capsule_contracts::{Access, DuplexMessage, EventEnvelope, Kind, Message, Problem, StreamMessage, new_id};
use capsule_store::{Keyring, Migration};
use futures_util::future::{BoxFuture, try_join_all};
use tokio::sync::mpsc;
use tracing::Instrument;
use tracing::field::Empty;

pub use access::{Authorize, Caller, Condition, Invitee, SystemAccess, SystemGrant, Tenant, UserGrant};
pub use context::{Command, Context, Principal};
pub use duplex::{Duplex, Frame};
pub use events::emit;
pub use precondition::{entity_tag, matches_entity_tag};
pub use quotas::quotas;
pub use service::{Call, Delivery, Router, Service, StreamSink};

use stream_access::StreamAccess;
use streams::{Offer, Streams};
use transport::{OutgoingRequest, Rejection, ServiceEndpoint, Transport};
use wire::Wire;

/// The tables that every service's database has for the bus: events, commands, leases, sagas, memberships, quotas.
pub const MIGRATIONS: &[Migration] = capsule_store::migrations![1 "create_outbox_and_inbox", 2 "create_leases_and_commands", 3 "create_sagas_and_error_history", 4 "keep_quotas"];

/// How many items of a stream are buffered until its reader takes them.
const STREAM_BUFFER: usize = 16;

type Reply = Result<Vec<u8>, Problem>;
/// Takes the context, the payload, and whether they came from another process.
type Handler = Box<dyn Fn(Context, Vec<u8>, bool) -> BoxFuture<'static, Reply> + Send + Sync>;
/// Authorizes the reader and starts the handler of a stream or of a duplex connection.
type Opener<T> = Box<dyn Fn(Context, Vec<u8>) -> BoxFuture<'static, Result<T, Problem>> + Send + Sync>;

struct Route {
    kind: Kind,
    access: Access,
    handler: Handler,
}

/// The inbox of one service.
trait Inbox: Send + Sync {
    /// Whether the service consumes events of this kind.
    fn subscribes_to(&self, kind: &str) -> bool;
    /// The kinds of event that the service consumes.
    fn kinds(&self) -> Vec<&'static str>;
    /// Stores a message that cannot be handled as a dead letter.
    fn store_dead_letter<'a>(&'a self, body: &'a [u8], reason: &'a str) -> BoxFuture<'a, Result<(), Problem>>;
    /// Stores an event for the service's consumers.
    fn enqueue<'a>(&'a self, envelope: &'a EventEnvelope) -> BoxFuture<'a, Result<(), Problem>>;
}

#[derive(Default)]
struct Table {
    routes: HashMap<&'static str, Arc<Route>>,
    streams: HashMap<&'static str, Arc<Opener<mpsc::Receiver<Vec<u8>>>>>,
    duplexes: HashMap<&'static str, Arc<Opener<Duplex>>>,
    inboxes: Vec<Arc<dyn Inbox>>,
}

/// The connection to other processes.
struct Remote {
    transport: Arc<dyn Transport>,
    wire: Wire,
    streams: Arc<Streams>,
}

/// The bus, within one process or over a broker. Its interface is the same in both cases.
#[derive(Clone, Default)]
pub struct Bus {
    table: Arc<RwLock<Table>>,
    remote: Option<Arc<Remote>>,
    /// Whether events are relayed: true once every service of this process is registered.
    delivers_events: Arc<tokio::sync::watch::Sender<bool>>,
    /// The open streams of all services of this process.
    stream_access: Arc<StreamAccess>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bus")
    }
}

impl Bus {
    /// A bus within this process, without services.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A bus over a broker. Other processes of the installation fetch streams from [`Bus::stream_routes`] at
    /// `address` (`host:port`).
    #[must_use]
    pub fn with_transport(transport: Arc<dyn Transport>, keyring: &Keyring, address: String) -> Self {
        let wire = Wire::new(keyring);
        let streams = Arc::new(Streams::new(address, wire.clone()));
        let remote = Some(Arc::new(Remote { transport, wire, streams }));
        Self { remote, ..Self::default() }
    }

    /// Starts to relay events. Call it once every service of this process is registered: within one process, an
    /// event reaches only the services that are registered when it is relayed.
    pub fn start_event_delivery(&self) {
        self.delivers_events.send_replace(true);
    }

    /// Resolves once [`Bus::start_event_delivery`] was called.
    async fn wait_for_event_delivery(&self) {
        // `self` holds the sender, so this cannot fail.
        let _ = self.delivers_events.subscribe().wait_for(|delivers| *delivers).await;
    }

    /// The HTTP routes that other processes fetch streams from.
    pub fn stream_routes(&self) -> axum::Router {
        self.remote.as_ref().map_or_else(axum::Router::new, |remote| remote.streams.clone().routes())
    }

    /// Whether the broker is connected; `None` without a broker.
    #[must_use]
    pub fn broker_ready(&self) -> Option<bool> {
        self.remote.as_ref().map(|remote| remote.transport.is_ready())
    }

    /// Stops deliveries from the broker; resolves when those in flight are done.
    pub async fn drain(&self) {
        if let Some(remote) = &self.remote {
            remote.transport.drain().await;
        }
    }

    /// Sends a message and waits for the reply, at most until the context's deadline.
    ///
    /// Dropping the future or reaching the deadline cancels a query. A command that has started runs to its end.
    ///
    /// # Errors
    /// What the handler or the dispatcher returns, [`Problem::unavailable`] when no service handles the
    /// subject, [`Problem::deadline`] when there is no reply before the deadline.
    pub async fn request<M: Message>(&self, context: &Context, message: &M) -> Result<M::Reply, Problem> {
        let payload = serde_json::to_vec(message).map_err(|_| Problem::internal())?;
        let reply = self.request_raw(context, M::SUBJECT, payload).await?;
        serde_json::from_slice(&reply).map_err(|cause| {
            tracing::error!(subject = M::SUBJECT, %cause, "a reply does not match its declared type");
            Problem::internal()
        })
    }

    /// As [`Bus::request`], with the message and the reply as JSON.
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
            (None, None) => Err(no_handler(subject)),
        }
    }

    /// Opens a stream; its items are JSON. Dropping the receiver ends it. The sender waits while the
    /// buffer is full.
    ///
    /// # Errors
    /// As [`Bus::request`], before the first item.
    pub async fn open<M: StreamMessage>(&self, context: &Context, message: &M) -> Result<mpsc::Receiver<Vec<u8>>, Problem> {
        let payload = serde_json::to_vec(message).map_err(|_| Problem::internal())?;
        self.open_raw(context, M::SUBJECT, payload).await
    }

    /// As [`Bus::open`], with the message as JSON.
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
            (None, None) => Err(no_handler(subject)),
        }
    }

    /// Opens a duplex connection. Dropping its end closes it.
    ///
    /// # Errors
    /// As [`Bus::request`], before the first frame.
    pub async fn connect<M: DuplexMessage>(&self, context: &Context, message: &M) -> Result<Duplex, Problem> {
        let payload = serde_json::to_vec(message).map_err(|_| Problem::internal())?;
        self.connect_raw(context, M::SUBJECT, payload).await
    }

    /// As [`Bus::connect`], with the message as JSON.
    ///
    /// # Errors
    /// As [`Bus::connect`].
    pub async fn connect_raw(&self, context: &Context, subject: &'static str, payload: Vec<u8>) -> Result<Duplex, Problem> {
        let opener = self.read_table().duplexes.get(subject).cloned();
        match (opener, &self.remote) {
            (Some(opener), _) => opener(context.clone(), payload).await,
            (None, Some(remote)) => {
                let ticket = remote.request(context, subject, &payload).await?;
                let ticket = serde_json::from_slice(&ticket).map_err(|_| Problem::internal())?;
                remote.streams.connect(ticket).await
            }
            (None, None) => Err(no_handler(subject)),
        }
    }

    /// Delivers events to the services that subscribe to them; returns once all are stored in an inbox or in the broker.
    async fn publish(&self, envelopes: &[EventEnvelope]) -> Result<(), Problem> {
        if let Some(remote) = &self.remote {
            // The events are sent in order; their confirmations are awaited together.
            let events = envelopes.iter().map(|envelope| remote.wire.sign_event(envelope)).collect::<Result<Vec<_>, _>>()?;
            return try_join_all(events.into_iter().map(|event| remote.transport.publish(event))).await.map(|_| ());
        }
        for envelope in envelopes {
            let inboxes: Vec<_> =
                self.read_table().inboxes.iter().filter(|inbox| inbox.subscribes_to(&envelope.kind)).cloned().collect();
            for inbox in inboxes {
                inbox.enqueue(envelope).await?;
            }
        }
        Ok(())
    }

    /// Delivers the events and, over a broker, the requests of a service to it.
    fn serve(&self, name: &'static str, subjects: Vec<&'static str>, inbox: &Arc<dyn Inbox>) {
        let Some(remote) = self.remote.clone() else {
            self.write_table().inboxes.push(inbox.clone());
            return;
        };
        let (bus, own_remote) = (self.clone(), remote.clone());
        let handle_request = move |sealed: Vec<u8>| {
            let (bus, remote) = (bus.clone(), own_remote.clone());
            Box::pin(async move { remote.handle_request(&bus, &sealed).await }) as BoxFuture<'static, _>
        };
        let (event_inbox, wire) = (inbox.clone(), remote.wire.clone());
        let handle_event = move |body: Vec<u8>, signature: String| {
            let (inbox, wire) = (event_inbox.clone(), wire.clone());
            Box::pin(async move {
                let envelope = wire.open_event(&body, &signature)?;
                inbox.enqueue(&envelope).await.map_err(Rejection::Temporary)
            }) as BoxFuture<'static, _>
        };
        let dead_letter_inbox = inbox.clone();
        let store_dead_letter = move |body: Vec<u8>, reason: String| {
            let inbox = dead_letter_inbox.clone();
            Box::pin(async move { inbox.store_dead_letter(&body, &reason).await }) as BoxFuture<'static, _>
        };
        remote.transport.serve(ServiceEndpoint {
            name,
            subjects,
            kinds: inbox.kinds(),
            handle_request: Arc::new(handle_request),
            handle_event: Arc::new(handle_event),
            store_dead_letter: Arc::new(store_dead_letter),
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
        let timeout = context.deadline.saturating_duration_since(Instant::now());
        if timeout.is_zero() {
            return Err(Problem::deadline(subject));
        }
        // The transport may deliver the request twice: its id keeps the command from running twice.
        let mut context = context.clone();
        context.traceparent = capsule_observe::traceparent().or(context.traceparent);
        context.command.get_or_insert_with(|| Command { id: new_id(), digest: String::new() });
        let (id, body) = self.wire.seal_request(&context, subject, payload)?;
        let sent = self.transport.request(OutgoingRequest { subject, body, timeout });
        let reply = tokio::time::timeout(timeout, sent).await.map_err(|_| Problem::deadline(subject))??;
        self.wire.open_reply(id, &reply)
    }

    /// Handles a request of another process and returns the sealed reply.
    async fn handle_request(&self, bus: &Bus, sealed: &[u8]) -> Vec<u8> {
        let request = match self.wire.open_request(sealed) {
            Some(Ok(request)) => request,
            Some(Err(refused)) => return self.wire.seal_reply(refused.id, &Err(refused.problem)).unwrap_or_default(),
            None => {
                tracing::error!("a request cannot be decrypted: it comes from another installation, or the master keys differ");
                return Vec::new();
            }
        };
        let (id, subject) = (request.id, request.subject.as_str());
        let (route, streamer, duplex) = {
            let table = bus.read_table();
            let route = table.routes.get_key_value(subject).map(|(subject, route)| (*subject, route.clone()));
            (route, table.streams.get(subject).cloned(), table.duplexes.get(subject).cloned())
        };
        let offer = |offer| {
            let ticket = self.streams.offer(offer)?;
            serde_json::to_vec(&ticket).map_err(|_| Problem::internal())
        };
        let reply = match (route, streamer, duplex) {
            (Some((subject, route)), ..) => dispatch(&route, subject, request.context, request.payload, true).await,
            (None, Some(open), _) => open(request.context, request.payload).await.map(Offer::Stream).and_then(offer),
            (None, None, Some(open)) => open(request.context, request.payload).await.map(Offer::Duplex).and_then(offer),
            (None, None, None) => Err(no_handler(subject)),
        };
        self.wire.seal_reply(id, &reply).unwrap_or_default()
    }
}

fn no_handler(subject: &str) -> Problem {
    Problem::unavailable(format!("No running service handles {subject}."))
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
    let started = Instant::now();
    let handling = (route.handler)(context, payload, remote);
    let outcome = match route.kind {
        Kind::Query => tokio::time::timeout(remaining, handling).await,
        Kind::Command => {
            tokio::time::timeout(remaining, async { tokio::spawn(handling).await.unwrap_or_else(|_| Err(Problem::internal())) })
                .await
        }
    };
    let reply = outcome.unwrap_or_else(|_| Err(Problem::deadline(subject)));
    let result = match &reply {
        Ok(_) => "ok".to_owned(),
        Err(problem) => problem.code.clone(),
    };
    metrics::counter!("capsule_messages_total", "subject" => subject, "result" => result).increment(1);
    metrics::histogram!("capsule_message_duration_seconds", "subject" => subject).record(started.elapsed());
    reply
}
