//! The bus over `RabbitMQ`.
//!
//! Requests go to the direct exchange `capsule.commands` by their subject, into one quorum queue per
//! service; replies come back by direct reply-to. Events go to the topic exchange `capsule.events` by
//! their type, into one quorum queue per service that wants any. What a service cannot take now waits in
//! a retry queue beside its own; what it never can goes through `capsule.dead-letters`, from where the
//! service keeps it for people to look at.
//!
//! A lost connection is made again with growing, jittered delays, with the whole topology. Requests that
//! wait for their reply are sent again, which is safe: they go by an id.

mod topology;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use capsule_bus::transport::{Outgoing, Published, Refusal, Served, Transport};
use capsule_contracts::Problem;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer};
use rand::RngExt;
use tokio::sync::{Notify, OnceCell, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use topology::{COMMANDS, EVENTS, Kind};

/// Deliveries that a service has in its hands at a time, per queue.
const PREFETCH: u16 = 128;
/// The longest pause between two attempts to connect.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Connecting and declaring may take so long.
const CONNECT: Duration = Duration::from_secs(15);
/// How often a peer that went silent is looked for, in seconds: it is given up after two.
const HEARTBEAT: u16 = 5;
/// The header that carries an event's signature.
const SIGNATURE: &str = "capsule-signature";
/// The header that counts how often an event was put off.
const ATTEMPT: &str = "capsule-attempt";

/// A `RabbitMQ` server, or a cluster of them.
#[derive(Clone)]
pub struct RabbitMq(Arc<Shared>);

struct Shared {
    /// Holds a password: never shown.
    url: String,
    session: watch::Sender<Option<Session>>,
    /// Services whose queues must be there before an event is published.
    hearers: &'static [&'static str],
    served: Mutex<Vec<Served>>,
    /// A service was added.
    added: Notify,
    /// Requests that wait for their replies, by correlation id.
    waiting: Mutex<HashMap<String, oneshot::Sender<Vec<u8>>>>,
    next: AtomicU64,
    draining: CancellationToken,
    under_way: TaskTracker,
}

/// A connection with all that is declared over it.
#[derive(Clone)]
struct Session {
    connection: Arc<Connection>,
    /// Requests are sent, and replies arrive, on one channel: direct reply-to wants that.
    requests: Channel,
    events: Channel,
    /// Every service that is to hear of events has its queue.
    heard: Arc<OnceCell<()>>,
    /// Something on this connection failed: it is to be made anew.
    broken: CancellationToken,
    /// How many services are being delivered to.
    served: usize,
}

impl std::fmt::Debug for RabbitMq {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RabbitMq")
    }
}

impl RabbitMq {
    /// Begins to connect to `url` (`amqp://user:password@host:port/vhost`), and goes on as long as the
    /// process lives. `name` is what the server's operators see of this connection. No event is published before
    /// each of `hearers` has declared its queue once: it would never hear of it.
    #[must_use]
    pub fn connect(url: &str, name: &str, hearers: &'static [&'static str]) -> Self {
        let separator = if url.contains('?') { '&' } else { '?' };
        let url = if url.contains("heartbeat=") { url.into() } else { format!("{url}{separator}heartbeat={HEARTBEAT}") };
        let shared = Arc::new(Shared {
            url,
            session: watch::Sender::new(None),
            hearers,
            served: Mutex::default(),
            added: Notify::new(),
            waiting: Mutex::default(),
            next: AtomicU64::default(),
            draining: CancellationToken::new(),
            under_way: TaskTracker::new(),
        });
        tokio::spawn(keep_connected(shared.clone(), name.to_owned()));
        Self(shared)
    }
}

async fn keep_connected(shared: Arc<Shared>, name: String) {
    let mut failures = 0_u32;
    loop {
        let connected = tokio::time::timeout(CONNECT, connect(&shared, &name)).await;
        let session =
            match connected.map_err(|_| "no answer".to_owned()).and_then(|result| result.map_err(|error| error.to_string())) {
                Ok(session) => session,
                Err(cause) => {
                    failures += 1;
                    tracing::warn!(cause, failures, "RabbitMQ cannot be reached; trying again");
                    pause(failures).await;
                    continue;
                }
            };
        failures = 0;
        tracing::info!("connected to RabbitMQ");
        hold(&shared, session).await;
        shared.session.send_replace(None);
        metrics::counter!("capsule_broker_disconnections_total").increment(1);
        tracing::warn!("the connection to RabbitMQ is lost");
    }
}

/// 0.1 s doubling to ten, each time half to one and a half of it by chance.
async fn pause(failures: u32) {
    let whole = Duration::from_millis(100).saturating_mul(1 << failures.min(10)).min(LONGEST_PAUSE);
    let jittered = whole.mul_f64(rand::rng().random_range(0.5..1.5));
    tokio::time::sleep(jittered).await;
}

async fn connect(shared: &Arc<Shared>, name: &str) -> lapin::Result<Session> {
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let connection = Connection::connect(&shared.url, properties).await?;
    let (requests, events) = (connection.create_channel().await?, connection.create_channel().await?);
    requests.confirm_select(ConfirmSelectOptions::default()).await?;
    events.confirm_select(ConfirmSelectOptions::default()).await?;
    topology::exchanges(&events).await?;
    let broken = CancellationToken::new();
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut replies = requests.basic_consume("amq.rabbitmq.reply-to".into(), "".into(), options, FieldTable::default()).await?;
    let (listening, failed) = (shared.clone(), broken.clone());
    tokio::spawn(async move {
        while let Some(Ok(reply)) = replies.next().await {
            let id = reply.properties.correlation_id().as_ref().map(ShortString::to_string);
            let waiting = id.and_then(|id| listening.waiting().remove(&id));
            if let Some(waiting) = waiting {
                let _ = waiting.send(reply.data);
            }
        }
        failed.cancel();
    });
    Ok(Session { connection: Arc::new(connection), requests, events, heard: Arc::default(), broken, served: 0 })
}

/// Keeps a session: everything that is served is delivered over it. Returns when it is lost.
async fn hold(shared: &Arc<Shared>, mut session: Session) {
    loop {
        let served: Vec<Served> = shared.served().iter().skip(session.served).cloned().collect();
        for service in served {
            let deadline = tokio::time::timeout(CONNECT, serve(shared, &session, service)).await;
            match deadline {
                Ok(Ok(())) => session.served += 1,
                Ok(Err(error)) => return tracing::warn!(%error, "a service cannot be served over RabbitMQ"),
                Err(_) => return,
            }
        }
        shared.session.send_replace(Some(session.clone()));
        tokio::select! {
            () = session.broken.cancelled() => return,
            () = shared.added.notified() => {}
            () = tokio::time::sleep(Duration::from_secs(1)) => if !session.connection.status().connected() { return },
        }
    }
}

/// Declares a service's queues and begins to deliver from them.
async fn serve(shared: &Arc<Shared>, session: &Session, service: Served) -> lapin::Result<()> {
    topology::queues(&session.events, &service).await?;
    for kind in Kind::ALL {
        let channel = session.connection.create_channel().await?;
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let options = BasicConsumeOptions::default();
        let consumer = channel.basic_consume(kind.queue(service.name).into(), "".into(), options, FieldTable::default()).await?;
        tokio::spawn(deliver(shared.clone(), session.broken.clone(), channel, consumer, service.clone(), kind));
    }
    Ok(())
}

/// Hands what arrives in one queue to the service, many at a time.
async fn deliver(
    shared: Arc<Shared>,
    broken: CancellationToken,
    channel: Channel,
    mut consumer: Consumer,
    service: Served,
    kind: Kind,
) {
    let ended = loop {
        let delivery = tokio::select! {
            delivery = consumer.next() => delivery,
            () = shared.draining.cancelled() => {
                // What was delivered but not begun goes back when the channel closes.
                let _ = channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await;
                return;
            }
        };
        let Some(Ok(delivery)) = delivery else { break delivery };
        let (channel, service, broken) = (channel.clone(), service.clone(), broken.clone());
        shared.under_way.spawn(async move {
            let done = match kind {
                Kind::Commands => command(&channel, &service, &delivery).await,
                Kind::Events => event(&channel, &service, &delivery).await,
                Kind::DeadLetters => dead_letter(&service, &delivery).await,
            };
            if let Err(error) = done {
                tracing::warn!(service = service.name, %error, "a delivery could not be settled; it will come again");
                broken.cancel();
            }
        });
    };
    if let Some(Err(error)) = ended {
        tracing::warn!(service = service.name, %error, "deliveries ended");
    }
    broken.cancel();
}

async fn command(channel: &Channel, service: &Served, delivery: &Delivery) -> lapin::Result<()> {
    let reply = (service.answer)(delivery.data.clone()).await;
    if let Some(to) = delivery.properties.reply_to() {
        let mut properties = BasicProperties::default();
        if let Some(id) = delivery.properties.correlation_id() {
            properties = properties.with_correlation_id(id.clone());
        }
        // Who asked may be gone; then the reply is dropped.
        drop(channel.basic_publish("".into(), to.clone(), BasicPublishOptions::default(), &reply, properties).await?);
    }
    delivery.ack(BasicAckOptions::default()).await.map(|_| ())
}

async fn event(channel: &Channel, service: &Served, delivery: &Delivery) -> lapin::Result<()> {
    let signature = header(delivery, SIGNATURE).and_then(|value| value.as_long_string().map(ToString::to_string));
    match (service.receive)(delivery.data.clone(), signature.unwrap_or_default()).await {
        Ok(()) => delivery.ack(BasicAckOptions::default()).await.map(|_| ()),
        Err(Refusal::Never(problem)) => {
            tracing::error!(service = service.name, %problem, "an event that can never be taken is a dead letter");
            delivery.nack(BasicNackOptions { requeue: false, ..BasicNackOptions::default() }).await.map(|_| ())
        }
        Err(Refusal::Later(problem)) => {
            let attempt = header(delivery, ATTEMPT).and_then(AMQPValue::as_long_int).unwrap_or_default();
            tracing::warn!(service = service.name, %problem, attempt, "an event cannot be taken now; it waits");
            let mut headers = delivery.properties.headers().clone().unwrap_or_default();
            headers.insert(ATTEMPT.into(), AMQPValue::LongInt(attempt.saturating_add(1)));
            let properties = delivery.properties.clone().with_headers(headers);
            let queue = topology::retry_queue(service.name, attempt);
            let options = BasicPublishOptions::default();
            let kept = channel.basic_publish("".into(), queue.into(), options, &delivery.data, properties).await?.await?;
            if kept.is_ack() {
                delivery.ack(BasicAckOptions::default()).await.map(|_| ())
            } else {
                delivery.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await.map(|_| ())
            }
        }
    }
}

/// Keeps a dead letter with its service, where people can look at it.
async fn dead_letter(service: &Served, delivery: &Delivery) -> lapin::Result<()> {
    let reason = header(delivery, "x-first-death-reason").and_then(AMQPValue::as_long_string).map(ToString::to_string);
    let queue = header(delivery, "x-first-death-queue").and_then(AMQPValue::as_long_string).map(ToString::to_string);
    let (reason, queue) = (reason.unwrap_or_default(), queue.unwrap_or_default());
    // A request that nobody took in time is its sender's to send again.
    if reason != "expired" {
        let body = match std::str::from_utf8(&delivery.data) {
            Ok(text) => text.as_bytes().to_vec(),
            Err(_) => format!("{} bytes, sealed", delivery.data.len()).into_bytes(),
        };
        let why = format!("RabbitMQ gave it up ({reason} in the queue {queue}).");
        if let Err(problem) = (service.set_aside)(body, why).await {
            tracing::warn!(service = service.name, %problem, "a dead letter cannot be kept now");
            tokio::time::sleep(Duration::from_secs(1)).await;
            return delivery.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await.map(|_| ());
        }
    }
    delivery.ack(BasicAckOptions::default()).await.map(|_| ())
}

fn header<'a>(delivery: &'a Delivery, name: &str) -> Option<&'a AMQPValue> {
    delivery.properties.headers().as_ref()?.inner().get(name)
}

impl Shared {
    fn served(&self) -> MutexGuard<'_, Vec<Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<String, oneshot::Sender<Vec<u8>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session, as soon as there is one.
    async fn session(&self, patience: Duration) -> Result<Session, Problem> {
        let mut sessions = self.session.subscribe();
        let session = tokio::time::timeout(patience, sessions.wait_for(Option::is_some)).await;
        session.ok().and_then(Result::ok).and_then(|session| session.clone()).ok_or_else(unreachable)
    }

    async fn request(&self, request: Outgoing) -> Result<Vec<u8>, Problem> {
        let deadline = Instant::now() + request.patience;
        loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return Err(Problem::deadline(request.subject));
            }
            let session = self.session(remaining).await?;
            let id = self.next.fetch_add(1, Ordering::Relaxed).to_string();
            let (sender, reply) = oneshot::channel();
            self.waiting().insert(id.clone(), sender);
            let outcome = tokio::select! {
                outcome = self.attempt(&session, &request, &id, remaining, reply) => outcome,
                () = session.broken.cancelled() => None,
            };
            self.waiting().remove(&id);
            match outcome {
                Some(outcome) => return outcome,
                // The connection was lost, or is about to be: the request is sent again over the next.
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Sends a request once. `None` where it has to be sent again.
    async fn attempt(
        &self,
        session: &Session,
        request: &Outgoing,
        id: &str,
        remaining: Duration,
        reply: oneshot::Receiver<Vec<u8>>,
    ) -> Option<Result<Vec<u8>, Problem>> {
        let properties = BasicProperties::default()
            .with_correlation_id(id.into())
            .with_reply_to("amq.rabbitmq.reply-to".into())
            .with_expiration(remaining.as_millis().to_string().into())
            .with_delivery_mode(2);
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let sent = session.requests.basic_publish(COMMANDS.into(), request.subject.into(), options, &request.body, properties);
        let confirmed = async {
            match sent.await.ok()?.await.ok()? {
                Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_)) => {
                    Some(Err(Problem::unavailable(format!("Nobody serves {} at the moment.", request.subject))))
                }
                Confirmation::Nack(None) => None,
                // It is in its queue: now only the reply counts.
                Confirmation::Ack(None) | Confirmation::NotRequested => std::future::pending().await,
            }
        };
        tokio::select! {
            reply = reply => reply.ok().map(Ok),
            outcome = confirmed => outcome,
        }
    }

    async fn publish(&self, event: Published) -> Result<(), Problem> {
        let session = self.session(Duration::from_secs(5)).await?;
        let there = session.heard.get_or_try_init(|| topology::are_there(&session.connection, self.hearers));
        there.await.map_err(|_| Problem::unavailable("Not every service has declared its queue for events yet."))?;
        let mut headers = FieldTable::default();
        headers.insert(SIGNATURE.into(), AMQPValue::LongString(event.signature.into()));
        headers.insert("capsule-key".into(), AMQPValue::LongString(event.key.into()));
        let properties = BasicProperties::default()
            .with_headers(headers)
            .with_content_type("application/cloudevents+json".into())
            .with_delivery_mode(2);
        let sent = session.events.basic_publish(
            EVENTS.into(),
            event.kind.into(),
            BasicPublishOptions::default(),
            &event.body,
            properties,
        );
        let confirmed = async {
            let confirmation = sent.await.map_err(|error| lost(&error))?.await.map_err(|error| lost(&error))?;
            if confirmation.is_ack() { Ok(()) } else { Err(unreachable()) }
        };
        tokio::select! {
            confirmed = confirmed => confirmed,
            () = session.broken.cancelled() => Err(unreachable()),
        }
    }
}

fn unreachable() -> Problem {
    Problem::unavailable("RabbitMQ cannot be reached.")
}

fn lost(error: &lapin::Error) -> Problem {
    tracing::warn!(%error, "an event could not be published");
    unreachable()
}

impl Transport for RabbitMq {
    fn request(&self, request: Outgoing) -> BoxFuture<'_, Result<Vec<u8>, Problem>> {
        Box::pin(self.0.request(request))
    }

    fn publish(&self, event: Published) -> BoxFuture<'_, Result<(), Problem>> {
        Box::pin(self.0.publish(event))
    }

    fn serve(&self, service: Served) {
        self.0.served().push(service);
        self.0.added.notify_one();
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.0.draining.cancel();
            self.0.under_way.close();
            self.0.under_way.wait().await;
        })
    }

    fn is_ready(&self) -> bool {
        let served = self.0.served().len();
        self.0.session.borrow().as_ref().is_some_and(|session| session.served == served)
    }
}
