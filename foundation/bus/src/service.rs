//! A service on the bus: its handlers, the events it consumes, and the work it does for both.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use capsule_contracts::identity::UserErased;
use capsule_contracts::operations::service_subject;
use capsule_contracts::organization::{GetMembership, MembershipChanged};
use capsule_contracts::project::Location;
use capsule_contracts::{
    DuplexMessage, Event, EventEnvelope, Kind, Message, Problem, Role, StreamMessage, Target, Timestamp, Uuid,
};
use capsule_store::{Store, Transaction, idempotency, lease, unscoped};
use futures_util::future::BoxFuture;
use tokio::sync::{Notify, mpsc};
use tracing::Instrument;
use tracing::field::Empty;

use crate::access::{Authorize, SystemAccess};
use crate::context::{Command, Context, Principal};
use crate::duplex::Duplex;
use crate::retention::{self, Purge};
use crate::saga::{self, Saga};
use crate::stream_access::StreamAccess;
use crate::{Bus, Inbox, Route, STREAM_BUFFER, erasure, events, operations};

/// How long a cached membership is valid after the organization service confirmed it, in seconds. It limits how long a
/// process that receives no events uses an outdated role.
const MEMBERSHIP_LEASE_SECONDS: i64 = 60;

/// A service, as the dispatcher uses it.
pub trait Service: Send + Sync + 'static {
    /// Its database.
    fn store(&self) -> &Arc<Store>;

    /// The bus it serves on.
    fn bus(&self) -> &Bus;

    /// Finds the organization and environment of a target: the only look-up without an organization's scope. `None` if
    /// the target does not exist.
    fn locate(&self, target: &Target) -> impl Future<Output = Result<Option<Location>, Problem>> + Send;

    /// The organization that an invitation is for, if it is an invitation of this user that has not expired.
    fn invited_to(&self, _invitation: Uuid, _user: Uuid) -> impl Future<Output = Result<Option<Uuid>, Problem>> + Send {
        std::future::ready(Ok(None))
    }

    /// A member's role from this service's cache, if it was confirmed recently enough.
    fn cached_role(&self, organization: Uuid, user: Uuid) -> impl Future<Output = Result<Option<Role>, Problem>> + Send {
        async move {
            let role = unscoped!(
                "the cache decides who may act for a tenant",
                "SELECT role FROM memberships WHERE organization_id = :organization AND user_id = :user \
                 AND confirmed_at > :since",
                organization,
                user,
                since = Timestamp::now().plus_seconds(-MEMBERSHIP_LEASE_SECONDS).0
            );
            let role = self.store().read().value::<Option<String>>(role).await?.flatten();
            role.map(|role| role.parse()).transpose()
        }
    }

    /// Requests a member's role from the organization service, and caches it.
    fn fetch_role(&self, organization: Uuid, user: Uuid) -> impl Future<Output = Result<Option<Role>, Problem>> + Send {
        async move {
            let request = GetMembership { organization_id: organization, user_id: user };
            let membership = self.bus().request(&Context::background(self.store().name()), &request).await?;
            if membership.sequence > 0 {
                let tx = self.store().begin().await?;
                events::cache_membership(&tx, &membership).await?;
                tx.commit().await?;
            }
            Ok(membership.role)
        }
    }
}

/// An authorized message for its handler, with the grant that its access rule gives.
#[derive(Debug)]
pub struct Call<M: Message>
where
    M::Rule: Authorize,
{
    pub message: M,
    pub grant: <M::Rule as Authorize>::Grant,
    pub context: Context,
}

/// An event, as its consumer gets it.
#[derive(Debug)]
pub struct Delivery<E> {
    pub event: E,
    /// The context for what the event causes: its correlation id, with the consuming service as principal.
    pub context: Context,
    pub system: SystemAccess,
}

/// Sends a stream's items to its reader.
#[derive(Debug)]
pub struct StreamSink<T> {
    channel: mpsc::Sender<Vec<u8>>,
    item: std::marker::PhantomData<fn(T)>,
}

impl<T: serde::Serialize> StreamSink<T> {
    /// Sends one item; waits while the buffer is full. Returns `false` once the reader has gone.
    pub async fn send(&self, item: &T) -> bool {
        match serde_json::to_vec(item) {
            Ok(bytes) => self.channel.send(bytes).await.is_ok(),
            Err(_) => false,
        }
    }

    /// Resolves once the reader has gone.
    pub async fn closed(&self) {
        self.channel.closed().await;
    }
}

type Consumer<S> =
    Box<dyn for<'a> Fn(&'a S, &'a Transaction<'a>, &EventEnvelope) -> BoxFuture<'a, Result<(), Problem>> + Send + Sync>;

/// Collects a service's handlers and consumers, then registers it on the bus.
pub struct Router<S: Service> {
    service: Arc<S>,
    subjects: Vec<&'static str>,
    sagas: Vec<&'static Saga<S>>,
    purge: Option<Purge<S>>,
    consumers: HashMap<&'static str, Vec<Consumer<S>>>,
}

impl<S: Service> std::fmt::Debug for Router<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Router({})", self.service.store().name())
    }
}

impl<S: Service> Router<S> {
    /// A router that maintains the service's membership cache and deletes the data of erased users.
    #[must_use]
    pub fn new(service: Arc<S>) -> Self {
        let router = Self { service, subjects: Vec::new(), sagas: Vec::new(), purge: None, consumers: HashMap::new() };
        operations::serve(router)
            .consume::<MembershipChanged>(|_, tx, delivery| {
                Box::pin(async move { events::cache_membership(tx, &delivery.event.membership).await })
            })
            .consume::<UserErased>(|_, tx, delivery| erasure::erase(tx, delivery.event.user_id))
    }

    /// Handles a message. The type of the grant in its [`Call`] follows from the message's access rule.
    #[must_use]
    pub fn handle<M, F, Fut>(self, handler: F) -> Self
    where
        M: Message,
        M::Rule: Authorize,
        F: Fn(Arc<S>, Call<M>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<M::Reply, Problem>> + Send + 'static,
    {
        self.handle_as(M::SUBJECT, handler)
    }

    /// Handles a message that every service handles under a subject of its own.
    pub(crate) fn handle_per_service<M, F, Fut>(self, handler: F) -> Self
    where
        M: Message,
        M::Rule: Authorize,
        F: Fn(Arc<S>, Call<M>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<M::Reply, Problem>> + Send + 'static,
    {
        let subject = service_subject(self.service.store().name(), M::SUBJECT);
        self.handle_as(subject, handler)
    }

    fn handle_as<M, F, Fut>(mut self, subject: &'static str, handler: F) -> Self
    where
        M: Message,
        M::Rule: Authorize,
        F: Fn(Arc<S>, Call<M>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<M::Reply, Problem>> + Send + 'static,
    {
        let service = self.service.clone();
        let handle = move |context: Context, payload: Vec<u8>, remote: bool| {
            let (service, handler) = (service.clone(), handler.clone());
            let span = tracing::info_span!(
                "message",
                otel.name = Empty,
                otel.kind = Empty,
                subject,
                correlation_id = context.correlation_id
            );
            capsule_observe::name_span(&span, subject, if remote { "server" } else { "internal" });
            if remote {
                capsule_observe::continue_trace(&span, context.traceparent.as_deref());
            }
            let work = async move {
                let call = decode_and_authorize::<S, M>(&service, context, &payload).await?;
                match (M::KIND, call.context.command.clone()) {
                    (Kind::Command, Some(command)) => run_once(service, command, call, handler).await,
                    _ => encode::<M>(&handler(service, call).await?),
                }
            };
            Box::pin(work.instrument(span)) as BoxFuture<'static, _>
        };
        let route = Route { kind: M::KIND, access: M::ACCESS, handler: Box::new(handle) };
        self.service.bus().write_table().routes.insert(subject, Arc::new(route));
        self.subjects.push(subject);
        self
    }

    /// Handles a stream. Access is checked before the first item and while the stream is open: it ends within a second
    /// after its reader loses access.
    #[must_use]
    pub fn stream<M, F, Fut>(mut self, handler: F) -> Self
    where
        M: StreamMessage,
        M::Rule: Authorize,
        F: Fn(Arc<S>, Call<M>, StreamSink<M::Reply>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<(), Problem>> + Send + 'static,
    {
        let service = self.service.clone();
        let open = move |context: Context, payload: Vec<u8>| {
            let (service, handler) = (service.clone(), handler.clone());
            let work = async move {
                let call = decode_and_authorize::<S, M>(&service, context, &payload).await?;
                let (channel, items) = mpsc::channel(STREAM_BUFFER);
                let sink = StreamSink { channel, item: std::marker::PhantomData };
                run_with_access(service, call, |service, call| handler(service, call, sink));
                Ok(items)
            };
            Box::pin(work) as BoxFuture<'static, _>
        };
        self.service.bus().write_table().streams.insert(M::SUBJECT, Arc::new(Box::new(open)));
        self.subjects.push(M::SUBJECT);
        self
    }

    /// Handles a duplex connection. Access is checked as for a stream: the connection closes within a second after its
    /// client loses access.
    #[must_use]
    pub fn duplex<M, F, Fut>(mut self, handler: F) -> Self
    where
        M: DuplexMessage,
        M::Rule: Authorize,
        F: Fn(Arc<S>, Call<M>, Duplex) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<(), Problem>> + Send + 'static,
    {
        let service = self.service.clone();
        let open = move |context: Context, payload: Vec<u8>| {
            let (service, handler) = (service.clone(), handler.clone());
            let work = async move {
                let call = decode_and_authorize::<S, M>(&service, context, &payload).await?;
                let (client, own) = Duplex::pair();
                run_with_access(service, call, |service, call| handler(service, call, own));
                Ok(client)
            };
            Box::pin(work) as BoxFuture<'static, _>
        };
        self.service.bus().write_table().duplexes.insert(M::SUBJECT, Arc::new(Box::new(open)));
        self.subjects.push(M::SUBJECT);
        self
    }

    /// Adds a consumer of an event. All consumers of an event, and the mark that it is handled, share one transaction.
    /// If it fails, the event is retried later, and becomes a dead letter after the last attempt.
    #[must_use]
    pub fn consume<E: Event>(
        mut self,
        consumer: impl for<'a> Fn(&'a S, &'a Transaction<'a>, Delivery<E>) -> BoxFuture<'a, Result<(), Problem>>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        let name = self.service.store().name();
        let run: Consumer<S> = Box::new(move |service, tx, envelope| {
            let context = Context::new(envelope.correlationid.clone(), Principal::Service(name));
            if let Err(problem) = check_version::<E>(envelope) {
                return Box::pin(std::future::ready(Err(problem)));
            }
            match serde_path_to_error::deserialize::<_, E>(&envelope.data) {
                Ok(event) => consumer(service, tx, Delivery { event, context, system: SystemAccess::new(name) }),
                Err(cause) => Box::pin(async move {
                    Err(Problem::bad_request(format!("Invalid event {}: {}: {}.", E::TYPE, cause.path(), cause.inner())))
                }),
            }
        });
        self.consumers.entry(E::TYPE).or_default().push(run);
        self
    }

    /// Registers a saga of this service, which resumes at the step it had reached.
    #[must_use]
    pub fn saga(mut self, saga: &'static Saga<S>) -> Self {
        self.sagas.push(saga);
        self
    }

    /// Registers a function that deletes this service's expired rows. It is called periodically, with the current time.
    #[must_use]
    pub fn purge(mut self, purge: Purge<S>) -> Self {
        self.purge = Some(purge);
        self
    }

    /// Registers the service on the bus and starts to consume events. While this process is the service's leader, it
    /// also relays the service's own events and runs its sagas.
    pub fn start(self) {
        self.start_with(|_, _| Box::pin(std::future::pending()));
    }

    /// As [`Router::start`]; `lead` is background work of the leader.
    pub fn start_with(self, lead: impl Fn(Arc<S>, SystemAccess) -> BoxFuture<'static, ()> + Send + Sync + 'static) {
        let Self { service, subjects, sagas, purge, consumers } = self;
        let inbox = Arc::new(ServiceInbox { service: service.clone(), consumers, arrived: Notify::new() });
        let shared: Arc<dyn Inbox> = inbox.clone();
        service.bus().serve(service.store().name(), subjects, &shared);
        tokio::spawn(async move { inbox.run().await });
        tokio::spawn(async move {
            let leading = || async {
                let store = service.store();
                let relay = events::relay(store, service.bus());
                tokio::join!(
                    relay,
                    saga::run(&service, &sagas),
                    operations::report_queue_metrics(store),
                    retention::run(&service, purge),
                    lead(service.clone(), SystemAccess::new(store.name()))
                );
            };
            lease::lead(service.store().clone(), leading).await;
        });
    }
}

/// Runs the handler of a stream or of a duplex connection until it ends or the client loses access.
fn run_with_access<S, M, Fut>(service: Arc<S>, call: Call<M>, handler: impl FnOnce(Arc<S>, Call<M>) -> Fut)
where
    S: Service,
    M: Message,
    M::Rule: Authorize,
    Fut: Future<Output = Result<(), Problem>> + Send + 'static,
{
    let checked = StreamAccess::begin(service.bus(), &call.context, M::Rule::condition(&call.grant));
    let running = handler(service, call);
    tokio::spawn(async move {
        let access_lost = async {
            match checked {
                Some(mut checked) => checked.access_lost().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            outcome = running => if let Err(problem) = outcome {
                tracing::warn!(subject = M::SUBJECT, %problem, "a stream failed");
            },
            () = access_lost => tracing::info!(subject = M::SUBJECT, "a stream ended: its client lost access"),
        }
    });
}

fn encode<M: Message>(reply: &M::Reply) -> Result<Vec<u8>, Problem> {
    serde_json::to_vec(reply).map_err(|_| Problem::internal())
}

/// Runs a command unless it ran before; then returns its stored reply.
async fn run_once<S, M, F, Fut>(service: Arc<S>, command: Command, call: Call<M>, handler: F) -> Result<Vec<u8>, Problem>
where
    S: Service,
    M: Message,
    M::Rule: Authorize,
    F: Fn(Arc<S>, Call<M>) -> Fut,
    Fut: Future<Output = Result<M::Reply, Problem>>,
{
    let store = service.store().clone();
    let deadline = call.context.deadline;
    if let Some(record) = idempotency::find(&store, command.id).await? {
        return stored_reply::<M>(&store, &command, record, deadline).await;
    }
    let (outcome, committed) = idempotency::run(&store, command.id, &command.digest, handler(service, call)).await;
    match outcome {
        Ok(reply) => {
            let reply = encode::<M>(&reply)?;
            if committed && !M::REPLY_HOLDS_CREDENTIALS {
                idempotency::store_reply(&store, command.id, &reply).await?;
            }
            Ok(reply)
        }
        Err(problem) if problem.code == idempotency::REPEATED => {
            let record = idempotency::find(&store, command.id).await?.ok_or(problem)?;
            stored_reply::<M>(&store, &command, record, deadline).await
        }
        Err(problem) => Err(problem),
    }
}

/// The stored reply of a command that ran before; waits for it while the command is still running.
async fn stored_reply<M: Message>(
    store: &Store,
    command: &Command,
    mut record: idempotency::CommandRecord,
    deadline: Instant,
) -> Result<Vec<u8>, Problem> {
    if record.digest != command.digest {
        return Err(Problem::conflict("This idempotency key was used for another request.").hint("Use a new key."));
    }
    loop {
        if let Some(reply) = &record.reply {
            return idempotency::open_reply(store, command.id, reply);
        }
        if M::REPLY_HOLDS_CREDENTIALS || Instant::now() + events::POLL > deadline {
            return Err(Problem::conflict("The command was carried out before, but its reply is not available.")
                .hint("Check its result before you send it again."));
        }
        tokio::time::sleep(events::POLL / 10).await;
        record = idempotency::find(store, command.id).await?.ok_or_else(Problem::internal)?;
    }
}

/// Decodes, authorizes and validates a message, in this order: a caller without access gets no validation errors.
async fn decode_and_authorize<S: Service, M: Message>(service: &S, context: Context, payload: &[u8]) -> Result<Call<M>, Problem>
where
    M::Rule: Authorize,
{
    let message: M = serde_json::from_slice(payload)
        .map_err(|cause| Problem::bad_request(format!("Invalid message {}: {cause}.", M::SUBJECT)))?;
    let grant = M::Rule::authorize(service, &context, &message).await?;
    message.validate()?;
    Ok(Call { message, grant, context })
}

/// Fails if the event has a later version than this process reads. It is retried, as another process may be upgraded.
fn check_version<E: Event>(envelope: &EventEnvelope) -> Result<(), Problem> {
    let version = envelope.dataschema.rsplit_once("/v").and_then(|(_, version)| version.parse::<u16>().ok());
    match version.filter(|version| *version > E::VERSION) {
        None => Ok(()),
        Some(version) => Err(Problem::unavailable(format!(
            "The event {} has version {version}; this process reads versions up to {}.",
            E::TYPE,
            E::VERSION
        ))
        .hint("Run the same version of Capsule in every process of the installation.")),
    }
}

struct ServiceInbox<S: Service> {
    service: Arc<S>,
    consumers: HashMap<&'static str, Vec<Consumer<S>>>,
    arrived: Notify,
}

impl<S: Service> Inbox for ServiceInbox<S> {
    fn subscribes_to(&self, kind: &str) -> bool {
        self.consumers.contains_key(kind)
    }

    fn kinds(&self) -> Vec<&'static str> {
        self.consumers.keys().copied().collect()
    }

    fn store_dead_letter<'a>(&'a self, body: &'a [u8], reason: &'a str) -> BoxFuture<'a, Result<(), Problem>> {
        Box::pin(events::store_dead_letter(self.service.store(), body, reason))
    }

    fn enqueue<'a>(&'a self, envelope: &'a EventEnvelope) -> BoxFuture<'a, Result<(), Problem>> {
        Box::pin(async move {
            events::enqueue(self.service.store(), envelope).await?;
            self.arrived.notify_one();
            Ok(())
        })
    }
}

impl<S: Service> ServiceInbox<S> {
    async fn run(&self) {
        loop {
            let wait = match events::due_events(self.service.store()).await {
                Ok(rows) if rows.is_empty() => events::POLL,
                Ok(rows) => {
                    for row in rows {
                        self.process(row).await;
                    }
                    continue;
                }
                Err(_) => events::POLL,
            };
            let _ = tokio::time::timeout(wait, self.arrived.notified()).await;
        }
    }

    async fn process(&self, row: events::InboxRow) {
        let store = self.service.store();
        let outcome = async {
            let envelope: EventEnvelope = serde_json::from_str(&row.envelope)
                .map_err(|cause| Problem::bad_request(format!("Invalid event envelope: {cause}.")))?;
            let tx = store.begin().await?;
            // False if another process of this service has handled it.
            if !events::mark_done(&tx, row.id).await? {
                return Ok(());
            }
            for consumer in self.consumers.get(row.kind.as_str()).into_iter().flatten() {
                consumer(&self.service, &tx, &envelope).await?;
            }
            tx.commit().await?;
            if row.kind == UserErased::TYPE {
                store.scrub().await;
            }
            Ok(())
        }
        .await;
        if let Err(problem) = outcome {
            events::record_failure(store, &row, &problem).await;
        }
    }
}
