//! The bus over `RabbitMQ`.
//!
//! Requests are published to the direct exchange `capsule.commands` with their subject as routing key, into one
//! quorum queue for each service. Replies use direct reply-to. Events are published to the topic exchange
//! `capsule.events` with their type as routing key, into one quorum queue for each service. Events that a service
//! rejects temporarily wait in a retry queue. Messages that are rejected permanently or delivered too often go to
//! `capsule.dead-letters`, from which the service stores them for operators.
//!
//! A lost connection is re-established with exponential back-off, and the topology is declared again. Requests
//! that wait for their replies are sent again, which is safe because they have ids.

mod topology;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use capsule_bus::transport::{OutgoingEvent, OutgoingRequest, Rejection, ServiceEndpoint, Transport};
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

use topology::{COMMANDS, EVENTS, QueueKind};

/// The number of unacknowledged deliveries of a consumer.
const PREFETCH: u16 = 128;
/// The longest delay between two attempts to connect.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(10);
/// The timeout for connecting, and for declaring a service's queues.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The heartbeat interval in seconds. A connection is closed after two missed heartbeats.
const HEARTBEAT_SECONDS: u16 = 5;
/// The header that carries an event's signature.
const SIGNATURE: &str = "capsule-signature";
/// The header that counts an event's earlier attempts.
const ATTEMPT: &str = "capsule-attempt";

/// A `RabbitMQ` server, or a cluster of them.
#[derive(Clone)]
pub struct RabbitMq(Arc<Shared>);

struct Shared {
    /// Contains a password: it must not be logged.
    url: String,
    session: watch::Sender<Option<Session>>,
    /// Services that must have declared their queues before an event is published.
    required_consumers: &'static [&'static str],
    services: Mutex<Vec<ServiceEndpoint>>,
    service_added: Notify,
    /// Senders for the replies to requests in flight, by correlation id.
    pending_replies: Mutex<HashMap<String, oneshot::Sender<Vec<u8>>>>,
    next_request_id: AtomicU64,
    draining: CancellationToken,
    in_flight: TaskTracker,
}

/// A connection with its channels and consumers.
#[derive(Clone)]
struct Session {
    connection: Arc<Connection>,
    /// Sends requests and receives replies: direct reply-to requires one channel for both.
    requests: Channel,
    events: Channel,
    /// Set once every required consumer has declared its queue.
    consumers_ready: Arc<OnceCell<()>>,
    /// Cancelled when something on this connection failed and a new one is needed.
    broken: CancellationToken,
    /// The number of services that consume over this connection.
    services: usize,
}

impl std::fmt::Debug for RabbitMq {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RabbitMq")
    }
}

impl RabbitMq {
    /// Starts to connect to `url` (`amqp://user:password@host:port/vhost`), and reconnects while the process runs.
    /// `name` is the connection's name on the server. No event is published before each of `required_consumers` has
    /// declared its queue: it would not get the event.
    #[must_use]
    pub fn connect(url: &str, name: &str, required_consumers: &'static [&'static str]) -> Self {
        let separator = if url.contains('?') { '&' } else { '?' };
        let url = if url.contains("heartbeat=") { url.into() } else { format!("{url}{separator}heartbeat={HEARTBEAT_SECONDS}") };
        let shared = Arc::new(Shared {
            url,
            session: watch::Sender::new(None),
            required_consumers,
            services: Mutex::default(),
            service_added: Notify::new(),
            pending_replies: Mutex::default(),
            next_request_id: AtomicU64::default(),
            draining: CancellationToken::new(),
            in_flight: TaskTracker::new(),
        });
        tokio::spawn(keep_connected(shared.clone(), name.to_owned()));
        Self(shared)
    }
}

async fn keep_connected(shared: Arc<Shared>, name: String) {
    let mut failures = 0_u32;
    loop {
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, connect(&shared, &name)).await;
        let session =
            match connected.map_err(|_| "timeout".to_owned()).and_then(|result| result.map_err(|error| error.to_string())) {
                Ok(session) => session,
                Err(cause) => {
                    failures += 1;
                    tracing::warn!(cause, failures, "RabbitMQ cannot be reached; retrying");
                    wait_before_reconnect(failures).await;
                    continue;
                }
            };
        failures = 0;
        tracing::info!("connected to RabbitMQ");
        run_session(&shared, session).await;
        shared.session.send_replace(None);
        metrics::counter!("capsule_broker_disconnections_total").increment(1);
        tracing::warn!("the connection to RabbitMQ was lost");
    }
}

/// Exponential back-off: 0.1 s, doubling up to 10 s, times a random factor from 0.5 to 1.5.
async fn wait_before_reconnect(failures: u32) {
    let delay = Duration::from_millis(100).saturating_mul(1 << failures.min(10)).min(MAX_RECONNECT_DELAY);
    let jittered = delay.mul_f64(rand::rng().random_range(0.5..1.5));
    tokio::time::sleep(jittered).await;
}

async fn connect(shared: &Arc<Shared>, name: &str) -> lapin::Result<Session> {
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let connection = Connection::connect(&shared.url, properties).await?;
    let (requests, events) = (connection.create_channel().await?, connection.create_channel().await?);
    requests.confirm_select(ConfirmSelectOptions::default()).await?;
    events.confirm_select(ConfirmSelectOptions::default()).await?;
    topology::declare_exchanges(&events).await?;
    let broken = CancellationToken::new();
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut replies = requests.basic_consume("amq.rabbitmq.reply-to".into(), "".into(), options, FieldTable::default()).await?;
    let (reply_shared, failed) = (shared.clone(), broken.clone());
    tokio::spawn(async move {
        while let Some(Ok(reply)) = replies.next().await {
            let id = reply.properties.correlation_id().as_ref().map(ShortString::to_string);
            let sender = id.and_then(|id| reply_shared.pending_replies().remove(&id));
            if let Some(sender) = sender {
                let _ = sender.send(reply.data);
            }
        }
        failed.cancel();
    });
    Ok(Session { connection: Arc::new(connection), requests, events, consumers_ready: Arc::default(), broken, services: 0 })
}

/// Starts the consumers of all services over a connection. Returns when the connection is lost.
async fn run_session(shared: &Arc<Shared>, mut session: Session) {
    loop {
        let new_services: Vec<ServiceEndpoint> = shared.services().iter().skip(session.services).cloned().collect();
        for service in new_services {
            let outcome = tokio::time::timeout(CONNECT_TIMEOUT, serve(shared, &session, service)).await;
            match outcome {
                Ok(Ok(())) => session.services += 1,
                Ok(Err(error)) => return tracing::warn!(%error, "a service's queues cannot be declared; reconnecting"),
                Err(_) => return,
            }
        }
        shared.session.send_replace(Some(session.clone()));
        tokio::select! {
            () = session.broken.cancelled() => return,
            () = shared.service_added.notified() => {}
            () = tokio::time::sleep(Duration::from_secs(1)) => if !session.connection.status().connected() { return },
        }
    }
}

/// Declares a service's queues and starts their consumers.
async fn serve(shared: &Arc<Shared>, session: &Session, service: ServiceEndpoint) -> lapin::Result<()> {
    topology::declare_queues(&session.events, &service).await?;
    for kind in QueueKind::ALL {
        let channel = session.connection.create_channel().await?;
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let options = BasicConsumeOptions::default();
        let consumer = channel.basic_consume(kind.queue(service.name).into(), "".into(), options, FieldTable::default()).await?;
        tokio::spawn(deliver(shared.clone(), session.broken.clone(), channel, consumer, service.clone(), kind));
    }
    Ok(())
}

/// Delivers the messages of one queue to the service, concurrently.
async fn deliver(
    shared: Arc<Shared>,
    broken: CancellationToken,
    channel: Channel,
    mut consumer: Consumer,
    service: ServiceEndpoint,
    kind: QueueKind,
) {
    let ended = loop {
        let delivery = tokio::select! {
            delivery = consumer.next() => delivery,
            () = shared.draining.cancelled() => {
                // Deliveries that were not started are requeued when the channel closes.
                let _ = channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await;
                return;
            }
        };
        let Some(Ok(delivery)) = delivery else { break delivery };
        let (channel, service, broken) = (channel.clone(), service.clone(), broken.clone());
        shared.in_flight.spawn(async move {
            let settled = match kind {
                QueueKind::Commands => handle_command(&channel, &service, &delivery).await,
                QueueKind::Events => handle_event(&channel, &service, &delivery).await,
                QueueKind::DeadLetters => handle_dead_letter(&service, &delivery).await,
            };
            if let Err(error) = settled {
                tracing::warn!(service = service.name, %error, "a delivery cannot be acknowledged; it will be redelivered");
                broken.cancel();
            }
        });
    };
    if let Some(Err(error)) = ended {
        tracing::warn!(service = service.name, %error, "a consumer ended; reconnecting");
    }
    broken.cancel();
}

async fn handle_command(channel: &Channel, service: &ServiceEndpoint, delivery: &Delivery) -> lapin::Result<()> {
    let reply = (service.handle_request)(delivery.data.clone()).await;
    if let Some(to) = delivery.properties.reply_to() {
        let mut properties = BasicProperties::default();
        if let Some(id) = delivery.properties.correlation_id() {
            properties = properties.with_correlation_id(id.clone());
        }
        // Not confirmed: the requesting process may have ended.
        drop(channel.basic_publish("".into(), to.clone(), BasicPublishOptions::default(), &reply, properties).await?);
    }
    delivery.ack(BasicAckOptions::default()).await.map(|_| ())
}

async fn handle_event(channel: &Channel, service: &ServiceEndpoint, delivery: &Delivery) -> lapin::Result<()> {
    let signature = header(delivery, SIGNATURE).and_then(|value| value.as_long_string().map(ToString::to_string));
    match (service.handle_event)(delivery.data.clone(), signature.unwrap_or_default()).await {
        Ok(()) => delivery.ack(BasicAckOptions::default()).await.map(|_| ()),
        Err(Rejection::Permanent(problem)) => {
            tracing::error!(service = service.name, %problem, "an event was rejected permanently; it is a dead letter");
            delivery.nack(BasicNackOptions { requeue: false, ..BasicNackOptions::default() }).await.map(|_| ())
        }
        Err(Rejection::Temporary(problem)) => {
            let attempt = header(delivery, ATTEMPT).and_then(AMQPValue::as_long_int).unwrap_or_default();
            tracing::warn!(service = service.name, %problem, attempt, "an event was rejected; it will be retried");
            let mut headers = delivery.properties.headers().clone().unwrap_or_default();
            headers.insert(ATTEMPT.into(), AMQPValue::LongInt(attempt.saturating_add(1)));
            let properties = delivery.properties.clone().with_headers(headers);
            let queue = topology::retry_queue(service.name, attempt);
            let options = BasicPublishOptions::default();
            let confirmation = channel.basic_publish("".into(), queue.into(), options, &delivery.data, properties).await?.await?;
            if confirmation.is_ack() {
                delivery.ack(BasicAckOptions::default()).await.map(|_| ())
            } else {
                delivery.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await.map(|_| ())
            }
        }
    }
}

/// Stores a dead letter with its service, for operators.
async fn handle_dead_letter(service: &ServiceEndpoint, delivery: &Delivery) -> lapin::Result<()> {
    let cause = header(delivery, "x-first-death-reason").and_then(AMQPValue::as_long_string).map(ToString::to_string);
    let queue = header(delivery, "x-first-death-queue").and_then(AMQPValue::as_long_string).map(ToString::to_string);
    let (cause, queue) = (cause.unwrap_or_default(), queue.unwrap_or_default());
    // An expired request is dropped: its sender decides whether to send it again.
    if cause != "expired" {
        let body = match std::str::from_utf8(&delivery.data) {
            Ok(text) => text.as_bytes().to_vec(),
            Err(_) => format!("{} bytes, sealed", delivery.data.len()).into_bytes(),
        };
        let reason = format!("RabbitMQ made it a dead letter ({cause} in the queue {queue}).");
        if let Err(problem) = (service.store_dead_letter)(body, reason).await {
            tracing::warn!(service = service.name, %problem, "a dead letter cannot be stored; retrying");
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
    fn services(&self) -> MutexGuard<'_, Vec<ServiceEndpoint>> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pending_replies(&self) -> MutexGuard<'_, HashMap<String, oneshot::Sender<Vec<u8>>>> {
        self.pending_replies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session; waits for one until the timeout.
    async fn session(&self, timeout: Duration) -> Result<Session, Problem> {
        let mut sessions = self.session.subscribe();
        let session = tokio::time::timeout(timeout, sessions.wait_for(Option::is_some)).await;
        session.ok().and_then(Result::ok).and_then(|session| session.clone()).ok_or_else(unreachable)
    }

    async fn request(&self, request: OutgoingRequest) -> Result<Vec<u8>, Problem> {
        let deadline = Instant::now() + request.timeout;
        loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return Err(Problem::deadline(request.subject));
            }
            let session = self.session(remaining).await?;
            let id = self.next_request_id.fetch_add(1, Ordering::Relaxed).to_string();
            let (sender, reply) = oneshot::channel();
            self.pending_replies().insert(id.clone(), sender);
            let outcome = tokio::select! {
                outcome = self.attempt(&session, &request, &id, remaining, reply) => outcome,
                () = session.broken.cancelled() => None,
            };
            self.pending_replies().remove(&id);
            match outcome {
                Some(outcome) => return outcome,
                // The connection failed: send the request again over the next one.
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Sends a request once. Returns `None` if it must be sent again.
    async fn attempt(
        &self,
        session: &Session,
        request: &OutgoingRequest,
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
                    Some(Err(Problem::unavailable(format!("No running service handles {}.", request.subject))))
                }
                Confirmation::Nack(None) => None,
                // The request is in its queue: wait for the reply.
                Confirmation::Ack(None) | Confirmation::NotRequested => std::future::pending().await,
            }
        };
        tokio::select! {
            reply = reply => reply.ok().map(Ok),
            outcome = confirmed => outcome,
        }
    }

    async fn publish(&self, event: OutgoingEvent) -> Result<(), Problem> {
        let session = self.session(Duration::from_secs(5)).await?;
        let ready = session
            .consumers_ready
            .get_or_try_init(|| topology::check_event_queues(&session.connection, self.required_consumers));
        ready.await.map_err(|_| Problem::unavailable("Some services have not declared their queues for events yet."))?;
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
            let confirmation =
                sent.await.map_err(|error| publish_failed(&error))?.await.map_err(|error| publish_failed(&error))?;
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

fn publish_failed(error: &lapin::Error) -> Problem {
    tracing::warn!(%error, "an event cannot be published");
    unreachable()
}

impl Transport for RabbitMq {
    fn request(&self, request: OutgoingRequest) -> BoxFuture<'_, Result<Vec<u8>, Problem>> {
        Box::pin(self.0.request(request))
    }

    fn publish(&self, event: OutgoingEvent) -> BoxFuture<'_, Result<(), Problem>> {
        Box::pin(self.0.publish(event))
    }

    fn serve(&self, service: ServiceEndpoint) {
        self.0.services().push(service);
        self.0.service_added.notify_one();
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.0.draining.cancel();
            self.0.in_flight.close();
            self.0.in_flight.wait().await;
        })
    }

    fn is_ready(&self) -> bool {
        let services = self.0.services().len();
        self.0.session.borrow().as_ref().is_some_and(|session| session.services == services)
    }
}
