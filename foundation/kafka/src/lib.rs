//! The bus over Kafka or a compatible broker (Redpanda).
//!
//! Events are records of the topic `capsule.events`, keyed by organization: the events of one organization are
//! delivered in order. Each service is a consumer group. Requests are records of
//! `capsule.commands.<first word of the subject>`; replies go to the partition of `capsule.replies` that the
//! requesting process reads. Events that a service rejects temporarily go to its retry topics, one for each delay.
//! Events that it rejects permanently go to its dead-letter topic, from which the service stores them for operators.
//!
//! Offsets are committed only up to the oldest record that is not done, so that after a crash another process
//! resumes there. Redelivered messages are recognized by their ids.

mod offsets;
mod topics;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use capsule_bus::transport::{OutgoingEvent, OutgoingRequest, Rejection, ServiceEndpoint, Transport};
use capsule_contracts::Problem;
use futures_util::future::BoxFuture;
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance, StreamConsumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Header, Headers, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{Message, Offset, TopicPartitionList};
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use offsets::Offsets;
use topics::{EVENTS, PARTITIONS, REPLIES, RETRY_DELAYS_MS};

/// How many records of a consumer are handled concurrently.
const MAX_CONCURRENT_RECORDS: usize = 128;
/// How often the connection to the broker is checked.
const BROKER_CHECK_PERIOD: Duration = Duration::from_secs(2);
/// The delay before a failed operation is retried.
const RETRY_DELAY: Duration = Duration::from_millis(500);

const SIGNATURE: &str = "capsule-signature";
const KIND: &str = "capsule-kind";
const REPLY_TO: &str = "capsule-reply-partition";
const REQUEST: &str = "capsule-request";
const ATTEMPT: &str = "capsule-attempt";
const DUE: &str = "capsule-due";
const REASON: &str = "capsule-why";

/// A Kafka cluster.
#[derive(Clone)]
pub struct Kafka(Arc<Shared>);

struct Shared {
    settings: HashMap<String, String>,
    producer: FutureProducer<Context>,
    /// A random id of this process: several processes read the same partition of replies.
    process_id: String,
    reply_partition: i32,
    next_request_id: AtomicU64,
    /// Senders for the replies to requests in flight, by the requests' ids.
    pending_replies: Mutex<HashMap<String, oneshot::Sender<Vec<u8>>>>,
    broker_reachable: AtomicBool,
    /// The number of consumers, and of those that have partitions assigned.
    consumers: AtomicUsize,
    assigned: Arc<AtomicUsize>,
    draining: CancellationToken,
    in_flight: TaskTracker,
}

impl std::fmt::Debug for Kafka {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kafka")
    }
}

/// Logs the client's messages, and counts a consumer once partitions are assigned to it.
#[derive(Clone, Default)]
struct Context {
    /// The counter, and whether this consumer is counted.
    assigned: Option<(Arc<AtomicUsize>, Arc<AtomicBool>)>,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, _: &str, message: &str) {
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error => {
                tracing::warn!(message, "Kafka");
            }
            _ => tracing::debug!(message, "Kafka"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::warn!(%error, reason, "Kafka");
    }
}

impl ConsumerContext for Context {
    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let (Rebalance::Assign(_), Some((assigned, counted))) = (rebalance, &self.assigned)
            && !counted.swap(true, Ordering::Relaxed)
        {
            assigned.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Kafka {
    /// Creates a client of the cluster at `url` (`kafka://host:port,host:port?setting=value`, with the settings of
    /// librdkafka), and starts to read the replies to this process. `name` is the client id.
    ///
    /// # Errors
    /// When a setting is unknown or invalid.
    pub fn connect(url: &str, name: &str) -> Result<Self, String> {
        let (servers, settings) =
            url.trim_start_matches("kafka://").split_once('?').unwrap_or((url.trim_start_matches("kafka://"), ""));
        let mut all = HashMap::from([
            ("bootstrap.servers".to_owned(), servers.trim_end_matches('/').to_owned()),
            ("client.id".to_owned(), name.to_owned()),
            ("reconnect.backoff.max.ms".to_owned(), "5000".to_owned()),
            ("topic.metadata.refresh.interval.ms".to_owned(), "10000".to_owned()),
            ("allow.auto.create.topics".to_owned(), "false".to_owned()),
        ]);
        for setting in settings.split('&').filter(|setting| !setting.is_empty()) {
            let (name, value) = setting.split_once('=').ok_or_else(|| format!("`{setting}` is not of the form setting=value"))?;
            all.insert(name.into(), value.into());
        }
        let mut random = [0_u8; 8];
        getrandom::fill(&mut random).map_err(|error| error.to_string())?;
        // Small buffers: the bus does not carry large messages.
        let producer = client(&all)
            .set("enable.idempotence", "true")
            .set("linger.ms", "0")
            .set("queue.buffering.max.kbytes", "16384")
            .set("message.timeout.ms", "30000")
            .create_with_context::<_, FutureProducer<Context>>(Context::default())
            .map_err(|error| error.to_string())?;
        let shared = Arc::new(Shared {
            settings: all,
            producer,
            process_id: hex::encode(random),
            reply_partition: i32::from(random[0]) % PARTITIONS,
            next_request_id: AtomicU64::default(),
            pending_replies: Mutex::default(),
            broker_reachable: AtomicBool::default(),
            consumers: AtomicUsize::new(1),
            assigned: Arc::default(),
            draining: CancellationToken::new(),
            in_flight: TaskTracker::new(),
        });
        tokio::spawn(watch_broker(shared.clone()));
        tokio::spawn(read_replies(shared.clone()));
        Ok(Self(shared))
    }
}

fn client(settings: &HashMap<String, String>) -> ClientConfig {
    let mut config = ClientConfig::new();
    for (name, value) in settings {
        config.set(name, value);
    }
    config
}

/// Checks the connection to the broker periodically.
async fn watch_broker(shared: Arc<Shared>) {
    loop {
        let producer = shared.producer.clone();
        let fetch = move || producer.client().fetch_metadata(Some(REPLIES), Duration::from_secs(3)).is_ok();
        let reachable = tokio::task::spawn_blocking(fetch).await.unwrap_or_default();
        if shared.broker_reachable.swap(reachable, Ordering::Relaxed) != reachable {
            if reachable {
                tracing::info!("connected to Kafka");
            } else {
                tracing::warn!("Kafka cannot be reached");
                metrics::counter!("capsule_broker_disconnections_total").increment(1);
            }
        }
        tokio::time::sleep(BROKER_CHECK_PERIOD).await;
    }
}

/// Reads the replies to this process, starting with the next.
async fn read_replies(shared: Arc<Shared>) {
    let consumer = loop {
        match reply_consumer(&shared).await {
            Ok(consumer) => break consumer,
            Err(error) => tracing::warn!(error, "replies cannot be read; retrying"),
        }
        tokio::time::sleep(RETRY_DELAY).await;
    };
    shared.assigned.fetch_add(1, Ordering::Relaxed);
    loop {
        match consumer.recv().await {
            Ok(reply) => {
                let sender = header(&reply, REQUEST).and_then(|id| shared.pending_replies().remove(&id));
                if let Some(sender) = sender {
                    let _ = sender.send(reply.payload().unwrap_or_default().to_vec());
                }
            }
            Err(error) => log_and_wait(&error).await,
        }
    }
}

async fn reply_consumer(shared: &Arc<Shared>) -> Result<StreamConsumer<Context>, String> {
    topics::ensure(&client(&shared.settings), &[(REPLIES.to_owned(), PARTITIONS)]).await?;
    let consumer: StreamConsumer<Context> = consumer(&shared.settings)
        .set("group.id", format!("capsule.replies.{}", shared.process_id))
        .set("fetch.wait.max.ms", "100")
        .create_with_context(Context::default())
        .map_err(|error| error.to_string())?;
    let (consumer, partition) = (Arc::new(consumer), shared.reply_partition);
    let blocking_consumer = consumer.clone();
    let end =
        tokio::task::spawn_blocking(move || blocking_consumer.fetch_watermarks(REPLIES, partition, Duration::from_secs(10)))
            .await;
    let (_, end) = end.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
    let mut assignment = TopicPartitionList::new();
    let added = assignment.add_partition_offset(REPLIES, partition, Offset::Offset(end));
    added.and_then(|()| consumer.assign(&assignment)).map_err(|error| error.to_string())?;
    Arc::into_inner(consumer).ok_or_else(|| "the consumer is in use".into())
}

/// The settings of a consumer with at-least-once delivery: a record's offset is stored only when it is done.
fn consumer(settings: &HashMap<String, String>) -> ClientConfig {
    let mut config = client(settings);
    config
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "500")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", "6000")
        .set("heartbeat.interval.ms", "2000")
        .set("queued.max.messages.kbytes", "2048")
        .set("fetch.wait.max.ms", "250")
        .set("fetch.message.max.bytes", "1048576");
    config
}

async fn log_and_wait(error: &KafkaError) {
    tracing::warn!(%error, "records cannot be read from Kafka; retrying");
    tokio::time::sleep(RETRY_DELAY).await;
}

/// Creates a service's topics and starts its consumers.
async fn serve(shared: Arc<Shared>, service: ServiceEndpoint) {
    let (requests, rejected) = (topics::request_topics(&service), topics::rejected_event_topics(&service));
    let partitioned = requests.iter().cloned().chain([EVENTS.to_owned()]).map(|topic| (topic, PARTITIONS));
    let all: Vec<_> = partitioned.chain(rejected.iter().map(|topic| (topic.clone(), 1))).collect();
    while let Err(error) = topics::ensure(&client(&shared.settings), &all).await {
        tracing::warn!(service = service.name, error, "topics cannot be created; retrying");
        tokio::time::sleep(RETRY_DELAY).await;
    }
    // Separate consumers, so that waiting events do not delay requests.
    tokio::spawn(consume_concurrently(shared.clone(), service.clone(), "requests", requests));
    tokio::spawn(consume_concurrently(shared.clone(), service.clone(), "refused", rejected));
    tokio::spawn(consume_in_order(shared, service));
}

/// Creates a consumer of these topics in a consumer group.
fn join(shared: &Shared, group: &str, topics: &[String]) -> Result<StreamConsumer<Context>, KafkaError> {
    let assigned = (shared.assigned.clone(), Arc::default());
    let consumer: StreamConsumer<Context> =
        consumer(&shared.settings).set("group.id", group).create_with_context(Context { assigned: Some(assigned) })?;
    consumer.subscribe(&topics.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok(consumer)
}

/// Delivers events to the service's inbox one after the other, which keeps the order within an organization.
async fn consume_in_order(shared: Arc<Shared>, service: ServiceEndpoint) {
    let group = format!("capsule.{}.events", service.name);
    let consumer = match join(&shared, &group, &[EVENTS.to_owned()]) {
        Ok(consumer) => consumer,
        Err(error) => return tracing::error!(service = service.name, %error, "the consumer of events cannot be created"),
    };
    loop {
        let event = tokio::select! {
            event = consumer.recv() => event,
            () = shared.draining.cancelled() => return,
        };
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                log_and_wait(&error).await;
                continue;
            }
        };
        if header(&event, KIND).is_some_and(|kind| service.kinds.contains(&kind.as_str())) {
            deliver_event(&shared, &service, event.detach(), 0).await;
        }
        if let Err(error) = consumer.store_offset_from_message(&event) {
            tracing::debug!(%error, "an offset cannot be stored: the partition was revoked");
        }
    }
}

/// Delivers an event to the service. If the service rejects it, moves it to a retry topic or the dead-letter topic.
/// Returns once one of them has it.
async fn deliver_event(shared: &Shared, service: &ServiceEndpoint, event: OwnedMessage, attempt: usize) {
    let (body, key) = (event.payload().unwrap_or_default(), event.key().unwrap_or_default());
    let rejection = match (service.handle_event)(body.to_vec(), header(&event, SIGNATURE).unwrap_or_default()).await {
        Ok(()) => return,
        Err(rejection) => rejection,
    };
    let mut headers = without_headers(&event, &[ATTEMPT, DUE]);
    let topic = match &rejection {
        Rejection::Temporary(problem) => {
            tracing::warn!(service = service.name, %problem, attempt, "an event was rejected; it will be retried");
            let delay = RETRY_DELAYS_MS[attempt.min(RETRY_DELAYS_MS.len() - 1)];
            headers = with_header(with_header(headers, ATTEMPT, &(attempt + 1).to_string()), DUE, &(now() + delay).to_string());
            topics::retry_topic(service.name, delay)
        }
        Rejection::Permanent(problem) => {
            tracing::error!(service = service.name, %problem, "an event was rejected permanently; it is a dead letter");
            headers = with_header(headers, REASON, &problem.to_string());
            topics::dead_letter_topic(service.name)
        }
    };
    loop {
        let record = FutureRecord::to(&topic).key(key).payload(body).headers(headers.clone());
        let Err((error, _)) = shared.producer.send(record, Duration::ZERO).await else { return };
        tracing::warn!(service = service.name, %error, "a rejected event cannot be moved to its next topic; retrying");
        tokio::time::sleep(RETRY_DELAY).await;
    }
}

/// Handles requests, retries and dead letters concurrently. `purpose` is the last part of the consumer group's name.
async fn consume_concurrently(shared: Arc<Shared>, service: ServiceEndpoint, purpose: &str, topics: Vec<String>) {
    let consumer = match join(&shared, &format!("capsule.{}.{purpose}", service.name), &topics) {
        Ok(consumer) => Arc::new(consumer),
        Err(error) => return tracing::error!(service = service.name, %error, purpose, "a consumer cannot be created"),
    };
    let (offsets, permits) = (Arc::new(Offsets::default()), Arc::new(Semaphore::new(MAX_CONCURRENT_RECORDS)));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let record = tokio::select! {
            record = consumer.recv() => record,
            () = shared.draining.cancelled() => return,
        };
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                log_and_wait(&error).await;
                continue;
            }
        };
        let (topic, partition, offset) = (record.topic().to_owned(), record.partition(), record.offset());
        offsets.begin(&topic, partition, offset);
        let handling = handle_record(shared.clone(), service.clone(), &record);
        let (consumer, offsets) = (consumer.clone(), offsets.clone());
        shared.in_flight.spawn(async move {
            handling.await;
            if let Some(done) = offsets.done(&topic, partition, offset) {
                // Fails if the partition was revoked; its next consumer starts at the oldest record that is not done.
                let _ = consumer.store_offset(&topic, partition, done);
            }
            drop(permit);
        });
    }
}

/// Handles a request, a dead letter or a retry, depending on the record's headers and topic.
fn handle_record(shared: Arc<Shared>, service: ServiceEndpoint, record: &BorrowedMessage<'_>) -> BoxFuture<'static, ()> {
    let body = record.payload().unwrap_or_default().to_vec();
    if let (Some(partition), Some(id)) = (header(record, REPLY_TO).and_then(|text| text.parse().ok()), header(record, REQUEST)) {
        return Box::pin(async move {
            let reply = (service.handle_request)(body).await;
            let headers = with_header(OwnedHeaders::new(), REQUEST, &id);
            let record = FutureRecord::<[u8], _>::to(REPLIES).partition(partition).payload(&reply).headers(headers);
            if let Err((error, _)) = shared.producer.send(record, Duration::ZERO).await {
                tracing::warn!(service = service.name, %error, "a reply cannot be sent");
            }
        });
    }
    if record.topic() == topics::dead_letter_topic(service.name) {
        let reason = format!("The service rejected it: {}", header(record, REASON).unwrap_or_default());
        return Box::pin(async move {
            while let Err(problem) = (service.store_dead_letter)(body.clone(), reason.clone()).await {
                tracing::warn!(service = service.name, %problem, "a dead letter cannot be stored; retrying");
                tokio::time::sleep(RETRY_DELAY * 2).await;
            }
        });
    }
    let due = header(record, DUE).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
    let attempt = header(record, ATTEMPT).and_then(|text| text.parse().ok()).unwrap_or(1);
    let event = record.detach();
    Box::pin(async move {
        tokio::time::sleep(Duration::from_millis(due.saturating_sub(now()))).await;
        deliver_event(&shared, &service, event, attempt).await;
    })
}

fn header<M: Message>(record: &M, name: &str) -> Option<String> {
    let found = record.headers()?.iter().find(|header| header.key == name)?;
    found.value.map(|value| String::from_utf8_lossy(value).into_owned())
}

fn with_header(headers: OwnedHeaders, name: &str, value: &str) -> OwnedHeaders {
    headers.insert(Header { key: name, value: Some(value) })
}

fn without_headers(record: &OwnedMessage, names: &[&str]) -> OwnedHeaders {
    let kept = record.headers().into_iter().flat_map(Headers::iter).filter(|header| !names.contains(&header.key));
    kept.fold(OwnedHeaders::new(), |all, header| all.insert(Header { key: header.key, value: header.value }))
}

/// Milliseconds since the Unix epoch.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Shared {
    fn pending_replies(&self) -> MutexGuard<'_, HashMap<String, oneshot::Sender<Vec<u8>>>> {
        self.pending_replies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn request(&self, request: OutgoingRequest) -> Result<Vec<u8>, Problem> {
        let id = format!("{}.{}", self.process_id, self.next_request_id.fetch_add(1, Ordering::Relaxed));
        let (sender, reply) = oneshot::channel();
        self.pending_replies().insert(id.clone(), sender);
        let outcome = tokio::time::timeout(request.timeout, async {
            self.send(&request, &id).await?;
            reply.await.map_err(|_| unreachable())
        })
        .await;
        self.pending_replies().remove(&id);
        outcome.unwrap_or_else(|_| Err(Problem::deadline(request.subject)))
    }

    /// Sends a request; returns once the broker has confirmed it.
    async fn send(&self, request: &OutgoingRequest, id: &str) -> Result<(), Problem> {
        let topic = topics::command_topic(request.subject);
        let headers = with_header(with_header(OwnedHeaders::new(), REPLY_TO, &self.reply_partition.to_string()), REQUEST, id);
        loop {
            let record = FutureRecord::to(&topic).key(id).payload(&request.body).headers(headers.clone());
            match self.producer.send(record, Duration::ZERO).await {
                Ok(_) => return Ok(()),
                // The service may not have created its topics yet. The request's timeout ends the loop.
                Err((error, _)) => {
                    tracing::debug!(%error, subject = request.subject, "a request cannot be sent; retrying");
                    tokio::time::sleep(RETRY_DELAY / 5).await;
                }
            }
        }
    }

    async fn publish(&self, event: OutgoingEvent) -> Result<(), Problem> {
        let headers = with_header(with_header(OwnedHeaders::new(), SIGNATURE, &event.signature), KIND, &event.kind);
        let record = FutureRecord::to(EVENTS).key(&event.key).payload(&event.body).headers(headers);
        match self.producer.send(record, Duration::from_secs(5)).await {
            Ok(_) => Ok(()),
            Err((error, _)) => {
                tracing::warn!(%error, "an event cannot be published");
                Err(unreachable())
            }
        }
    }
}

fn unreachable() -> Problem {
    Problem::unavailable("Kafka cannot be reached.")
}

impl Transport for Kafka {
    fn request(&self, request: OutgoingRequest) -> BoxFuture<'_, Result<Vec<u8>, Problem>> {
        Box::pin(self.0.request(request))
    }

    fn publish(&self, event: OutgoingEvent) -> BoxFuture<'_, Result<(), Problem>> {
        Box::pin(self.0.publish(event))
    }

    fn serve(&self, service: ServiceEndpoint) {
        self.0.consumers.fetch_add(3, Ordering::Relaxed);
        tokio::spawn(serve(self.0.clone(), service));
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.0.draining.cancel();
            self.0.in_flight.close();
            self.0.in_flight.wait().await;
        })
    }

    fn is_ready(&self) -> bool {
        let assigned = self.0.assigned.load(Ordering::Relaxed);
        self.0.broker_reachable.load(Ordering::Relaxed) && assigned >= self.0.consumers.load(Ordering::Relaxed)
    }
}
