//! A service on the bus: its handlers, the events it consumes, and the work it does for both.

use std::any::TypeId;
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use capsule_contracts::identity::{InvitedUser, Session, UserErased};
use capsule_contracts::operations::addressed;
use capsule_contracts::organization::{AddedMember, GetMembership, MembershipChanged};
use capsule_contracts::project::Place;
use capsule_contracts::{Event, EventEnvelope, Kind, Message, Problem, Role, StreamMessage, Target, Timestamp, Uuid};
use capsule_store::{Store, Transaction, idempotency, lease, unscoped};
use futures_util::future::BoxFuture;
use tokio::sync::{Notify, mpsc};
use tracing::Instrument;
use tracing::field::Empty;

use crate::access::Prove;
use crate::context::{Command, Context};
use crate::retention::{self, Purge};
use crate::saga::{self, Saga};
use crate::watch::Watch;
use crate::{Bus, Inbox, Route, STREAM_CREDIT, erasure, events, operations};

/// A membership is taken for true so long, in seconds, after its owner last confirmed it: a process that hears
/// of no change any more must not go by what it knew for ever.
const MEMBERSHIP_LEASE: i64 = 60;

/// What the dispatcher needs to know of a service.
pub trait Service: Send + Sync + 'static {
    /// Its database.
    fn store(&self) -> &Arc<Store>;

    /// The bus it serves on.
    fn bus(&self) -> &Bus;

    /// Whose a thing is: the one unscoped look-up there is. `None` where there is no such thing.
    fn locate(&self, target: &Target) -> impl Future<Output = Result<Option<Place>, Problem>> + Send;

    /// A member's role as this service was told it, if that was not too long ago.
    fn cached_role(&self, organization: Uuid, user: Uuid) -> impl Future<Output = Result<Option<Role>, Problem>> + Send {
        async move {
            let role = unscoped!(
                "the cache decides who may act for a tenant",
                "SELECT role FROM memberships WHERE organization_id = $1 AND user_id = $2 AND confirmed_at > $3",
                organization,
                user,
                Timestamp::now().plus_seconds(-MEMBERSHIP_LEASE).0
            );
            let role = self.store().read().value::<Option<String>>(role).await?.flatten();
            role.map(|role| role.parse()).transpose()
        }
    }

    /// A member's role as its owner, the organization service, knows it; remembered here.
    fn true_role(&self, organization: Uuid, user: Uuid) -> impl Future<Output = Result<Option<Role>, Problem>> + Send {
        async move {
            let ask = GetMembership { organization_id: organization, user_id: user };
            let membership = self.bus().request(&Context::background(self.store().name()), &ask).await?;
            if membership.sequence > 0 {
                let tx = self.store().begin().await?;
                events::remember(&tx, &membership).await?;
                tx.commit().await?;
            }
            Ok(membership.role)
        }
    }
}

/// A message on its way into its handler, with the proof that its rule was met.
#[derive(Debug)]
pub struct Call<M: Message>
where
    M::Rule: Prove,
{
    pub message: M,
    pub proof: <M::Rule as Prove>::Proof,
    pub context: Context,
}

/// Where a stream's handler puts its items. Waits while the reader is behind.
#[derive(Debug)]
pub struct Items<T> {
    channel: mpsc::Sender<Vec<u8>>,
    item: std::marker::PhantomData<fn(T)>,
}

impl<T: serde::Serialize> Items<T> {
    /// Sends one item. `false` once nobody reads any more.
    pub async fn send(&self, item: &T) -> bool {
        match serde_json::to_vec(item) {
            Ok(bytes) => self.channel.send(bytes).await.is_ok(),
            Err(_) => false,
        }
    }

    /// Resolves once nobody reads any more.
    pub async fn closed(&self) {
        self.channel.closed().await;
    }
}

type Consumer<S> =
    Box<dyn for<'a> Fn(&'a S, &'a Transaction<'a>, serde_json::Value) -> BoxFuture<'a, Result<(), Problem>> + Send + Sync>;

/// Collects a service's handlers and consumers, then puts it on the bus.
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
    /// A router that keeps the service's membership cache, forgets erased users, and does nothing else yet.
    #[must_use]
    pub fn new(service: Arc<S>) -> Self {
        let router = Self { service, subjects: Vec::new(), sagas: Vec::new(), purge: None, consumers: HashMap::new() };
        operations::serve(router)
            .consume::<MembershipChanged>(|_, tx, event| Box::pin(async move { events::remember(tx, &event.membership).await }))
            .consume::<UserErased>(|_, tx, event| Box::pin(erasure::erase(tx, event.user_id)))
    }

    /// Serves a message. The proof in its [`Call`] follows from its access rule.
    #[must_use]
    pub fn handle<M, F, Fut>(self, handler: F) -> Self
    where
        M: Message,
        M::Rule: Prove,
        F: Fn(Arc<S>, Call<M>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<M::Reply, Problem>> + Send + 'static,
    {
        self.handle_as(M::SUBJECT, handler)
    }

    /// Serves a message that every service answers for itself.
    pub(crate) fn handle_own<M, F, Fut>(self, handler: F) -> Self
    where
        M: Message,
        M::Rule: Prove,
        F: Fn(Arc<S>, Call<M>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<M::Reply, Problem>> + Send + 'static,
    {
        let subject = addressed(self.service.store().name(), M::SUBJECT);
        self.handle_as(subject, handler)
    }

    fn handle_as<M, F, Fut>(mut self, subject: &'static str, handler: F) -> Self
    where
        M: Message,
        M::Rule: Prove,
        F: Fn(Arc<S>, Call<M>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<M::Reply, Problem>> + Send + 'static,
    {
        let service = self.service.clone();
        let run = move |context: Context, payload: Vec<u8>, remote: bool| {
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
                let call = admit::<S, M>(&service, context, &payload).await?;
                match (M::KIND, call.context.command.clone()) {
                    (Kind::Command, Some(command)) => once(service, command, call, handler).await,
                    _ => encode::<M>(&handler(service, call).await?),
                }
            };
            Box::pin(work.instrument(span)) as BoxFuture<'static, _>
        };
        let route = Route { kind: M::KIND, access: M::ACCESS, handler: Box::new(run) };
        self.service.bus().write_table().routes.insert(subject, Arc::new(route));
        self.subjects.push(subject);
        self
    }

    /// Serves a stream. The rule is checked before the first item, and for as long as the stream is open: it ends within
    /// a second of the loss of the right to read it.
    #[must_use]
    pub fn stream<M, F, Fut>(mut self, handler: F) -> Self
    where
        M: StreamMessage,
        M::Rule: Prove,
        F: Fn(Arc<S>, Call<M>, Items<M::Reply>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<(), Problem>> + Send + 'static,
    {
        let service = self.service.clone();
        let run = move |context: Context, payload: Vec<u8>| {
            let (service, handler) = (service.clone(), handler.clone());
            let work = async move {
                let call = admit::<S, M>(&service, context, &payload).await?;
                let (channel, items) = mpsc::channel(STREAM_CREDIT);
                let sink = Items { channel, item: std::marker::PhantomData };
                let watched = Watch::begin(service.bus(), &call.context, M::Rule::condition(&call.proof));
                tokio::spawn(async move {
                    let lost = async {
                        match watched {
                            Some(mut watched) => watched.lost().await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        outcome = handler(service, call, sink) => if let Err(problem) = outcome {
                            tracing::warn!(subject = M::SUBJECT, %problem, "a stream ended early");
                        },
                        () = lost => tracing::info!(subject = M::SUBJECT, "a stream ended: its reader lost the right to read it"),
                    }
                });
                Ok(items)
            };
            Box::pin(work) as BoxFuture<'static, _>
        };
        self.service.bus().write_table().streams.insert(M::SUBJECT, Arc::new(Box::new(run)));
        self.subjects.push(M::SUBJECT);
        self
    }

    /// Consumes an event, beside whoever else of the service does. What the consumers write and the mark that the event was handled are one
    /// transaction; an error makes it come again later, and in the end a dead letter.
    #[must_use]
    pub fn consume<E: Event>(
        mut self,
        consumer: impl for<'a> Fn(&'a S, &'a Transaction<'a>, E) -> BoxFuture<'a, Result<(), Problem>> + Send + Sync + 'static,
    ) -> Self {
        let run: Consumer<S> = Box::new(move |service, tx, data| match serde_path_to_error::deserialize::<_, E>(data) {
            Ok(event) => consumer(service, tx, event),
            Err(cause) => Box::pin(async move {
                Err(Problem::bad_request(format!("{} is not understood: {}: {}", E::TYPE, cause.path(), cause.inner())))
            }),
        });
        self.consumers.entry(E::TYPE).or_default().push(run);
        self
    }

    /// Carries a saga of this service on, wherever it was left.
    #[must_use]
    pub fn saga(mut self, saga: &'static Saga<S>) -> Self {
        self.sagas.push(saga);
        self
    }

    /// Deletes what this service keeps only for a while, periodically and with the present time.
    #[must_use]
    pub fn purge(mut self, purge: Purge<S>) -> Self {
        self.purge = Some(purge);
        self
    }

    /// Puts the service on the bus: begins to consume events of others, and, whenever this process leads the
    /// service, to relay its own.
    pub fn start(self) {
        self.start_with(|_| Box::pin(std::future::pending()));
    }

    /// As [`Router::start`], with other work that only the leader does.
    pub fn start_with(self, lead: impl Fn(Arc<S>) -> BoxFuture<'static, ()> + Send + Sync + 'static) {
        let Self { service, subjects, sagas, purge, consumers } = self;
        let inbox = Arc::new(ServiceInbox { service: service.clone(), consumers, arrived: Notify::new() });
        let shared: Arc<dyn Inbox> = inbox.clone();
        service.bus().serve(service.store().name(), subjects, &shared);
        tokio::spawn(async move { inbox.work().await });
        tokio::spawn(async move {
            let leading = || async {
                let store = service.store();
                let relay = events::relay(store, service.bus());
                tokio::join!(
                    relay,
                    saga::run(&service, &sagas),
                    operations::census(store),
                    retention::run(&service, purge),
                    lead(service.clone())
                );
            };
            lease::lead(service.store().clone(), leading).await;
        });
    }
}

fn encode<M: Message>(reply: &M::Reply) -> Result<Vec<u8>, Problem> {
    serde_json::to_vec(reply).map_err(|_| Problem::internal())
}

/// Carries a command out unless it was before; then its reply is given again.
async fn once<S, M, F, Fut>(service: Arc<S>, command: Command, call: Call<M>, handler: F) -> Result<Vec<u8>, Problem>
where
    S: Service,
    M: Message,
    M::Rule: Prove,
    F: Fn(Arc<S>, Call<M>) -> Fut,
    Fut: Future<Output = Result<M::Reply, Problem>>,
{
    let store = service.store().clone();
    let deadline = call.context.deadline;
    if let Some(known) = idempotency::find(&store, command.id).await? {
        return replay::<M>(&store, &command, known, deadline).await;
    }
    let (outcome, committed) = idempotency::run(&store, command.id, &command.digest, handler(service, call)).await;
    match outcome {
        Ok(reply) => {
            let reply = encode::<M>(&reply)?;
            if committed && !holds_credentials::<M>() {
                idempotency::store_reply(&store, command.id, &reply).await?;
            }
            Ok(reply)
        }
        Err(problem) if problem.code == idempotency::REPEATED => {
            let known = idempotency::find(&store, command.id).await?.ok_or(problem)?;
            replay::<M>(&store, &command, known, deadline).await
        }
        Err(problem) => Err(problem),
    }
}

/// Tokens are given out once, and never kept.
fn holds_credentials<M: Message>() -> bool {
    [TypeId::of::<Session>(), TypeId::of::<InvitedUser>(), TypeId::of::<AddedMember>()].contains(&TypeId::of::<M::Reply>())
}

/// The reply of a command that was carried out before; waits for it where that is not over yet.
async fn replay<M: Message>(
    store: &Store,
    command: &Command,
    mut known: idempotency::CommandRecord,
    deadline: Instant,
) -> Result<Vec<u8>, Problem> {
    if known.digest != command.digest {
        return Err(Problem::conflict("This idempotency key was used for another request.").hint("Use a new key."));
    }
    loop {
        if let Some(reply) = &known.reply {
            return idempotency::open_reply(store, command.id, reply);
        }
        if holds_credentials::<M>() || Instant::now() + events::POLL > deadline {
            return Err(
                Problem::conflict("This was done, but its answer was lost.").hint("Look at what there is before you repeat it.")
            );
        }
        tokio::time::sleep(events::POLL / 10).await;
        known = idempotency::find(store, command.id).await?.ok_or_else(Problem::internal)?;
    }
}

/// Understands, authorizes and validates, in this order.
async fn admit<S: Service, M: Message>(service: &S, context: Context, payload: &[u8]) -> Result<Call<M>, Problem>
where
    M::Rule: Prove,
{
    let message: M = serde_json::from_slice(payload)
        .map_err(|cause| Problem::bad_request(format!("{} is not understood: {cause}", M::SUBJECT)))?;
    let proof = M::Rule::prove(service, &context, &message).await?;
    message.validate()?;
    Ok(Call { message, proof, context })
}

struct ServiceInbox<S: Service> {
    service: Arc<S>,
    consumers: HashMap<&'static str, Vec<Consumer<S>>>,
    arrived: Notify,
}

impl<S: Service> Inbox for ServiceInbox<S> {
    fn wants(&self, kind: &str) -> bool {
        self.consumers.contains_key(kind)
    }

    fn kinds(&self) -> Vec<&'static str> {
        self.consumers.keys().copied().collect()
    }

    fn set_aside<'a>(&'a self, body: &'a [u8], why: &'a str) -> BoxFuture<'a, Result<(), Problem>> {
        Box::pin(events::set_aside(self.service.store(), body, why))
    }

    fn put<'a>(&'a self, envelope: &'a EventEnvelope) -> BoxFuture<'a, Result<(), Problem>> {
        Box::pin(async move {
            events::receive(self.service.store(), envelope).await?;
            self.arrived.notify_one();
            Ok(())
        })
    }
}

impl<S: Service> ServiceInbox<S> {
    async fn work(&self) {
        loop {
            let wait = match events::pending(self.service.store()).await {
                Ok(pending) if pending.is_empty() => events::POLL,
                Ok(pending) => {
                    for row in pending {
                        self.process(row).await;
                    }
                    continue;
                }
                Err(_) => events::POLL,
            };
            let _ = tokio::time::timeout(wait, self.arrived.notified()).await;
        }
    }

    async fn process(&self, row: events::Pending) {
        let store = self.service.store();
        let outcome = async {
            let envelope: EventEnvelope = serde_json::from_str(&row.envelope)
                .map_err(|cause| Problem::bad_request(format!("the envelope is not understood: {cause}")))?;
            let tx = store.begin().await?;
            // Another process of this service may have been faster.
            if !events::done(&tx, row.id).await? {
                return Ok(());
            }
            for consumer in self.consumers.get(row.kind.as_str()).into_iter().flatten() {
                consumer(&self.service, &tx, envelope.data.clone()).await?;
            }
            tx.commit().await?;
            if row.kind == UserErased::TYPE {
                store.scrub().await;
            }
            Ok(())
        }
        .await;
        if let Err(problem) = outcome {
            events::failed(store, &row, &problem).await;
        }
    }
}
