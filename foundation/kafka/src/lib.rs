//! The bus over Kafka, or whatever speaks its protocol (Redpanda).
//!
//! Events are records of the topic `capsule.events`, keyed by organization: what happened in one is
//! delivered in its order. Each service is a consumer group. Requests are records of
//! `capsule.commands.<first word of the subject>`; replies come back on the partition of
//! `capsule.replies` that the asking process reads. What a service cannot take now goes through its retry
//! topics, one for each delay; what it never can, through its dead-letter topic, from where the service
//! keeps it for people to look at.
//!
//! Offsets are committed only up to the oldest record that is not done with: a process that dies is
//! followed by another that begins there. Whatever then comes a second time is known by its id.

mod offsets;
mod topics;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use capsule_bus::transport::{Outgoing, Published, Refusal, Served, Transport};
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
use topics::{DELAYS, EVENTS, PARTITIONS, REPLIES};

/// Requests, or events that wait, that a process has in its hands at a time.
const AT_A_TIME: usize = 128;
/// The broker is asked whether it is there this often.
const LOOK: Duration = Duration::from_secs(2);
/// Something failed that may work again in a moment.
const PAUSE: Duration = Duration::from_millis(500);

const SIGNATURE: &str = "capsule-signature";
const KIND: &str = "capsule-kind";
const REPLY_TO: &str = "capsule-reply-partition";
const REQUEST: &str = "capsule-request";
const ATTEMPT: &str = "capsule-attempt";
const DUE: &str = "capsule-due";
const WHY: &str = "capsule-why";

/// A Kafka cluster.
#[derive(Clone)]
pub struct Kafka(Arc<Shared>);

struct Shared {
    settings: HashMap<String, String>,
    producer: FutureProducer<Context>,
    /// Names this process among those that read the same partition of replies.
    process: String,
    partition: i32,
    next: AtomicU64,
    /// Requests that wait for their replies.
    waiting: Mutex<HashMap<String, oneshot::Sender<Vec<u8>>>>,
    /// The broker answers.
    answers: AtomicBool,
    /// Consumers that were begun, and those that have their place in their groups.
    consumers: AtomicUsize,
    placed: Arc<AtomicUsize>,
    draining: CancellationToken,
    under_way: TaskTracker,
}

impl std::fmt::Debug for Kafka {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kafka")
    }
}

/// Says what the client has to say, and notices when a consumer has its place.
#[derive(Clone, Default)]
struct Context {
    placed: Option<(Arc<AtomicUsize>, Arc<AtomicBool>)>,
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
        if let (Rebalance::Assign(_), Some((placed, done))) = (rebalance, &self.placed)
            && !done.swap(true, Ordering::Relaxed)
        {
            placed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Kafka {
    /// Makes the clients of a cluster at `url` (`kafka://host:port,host:port?setting=value`; settings as
    /// librdkafka names them), and begins to read the replies to this process.
    ///
    /// # Errors
    /// When a setting is not known.
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
            let (name, value) = setting.split_once('=').ok_or_else(|| format!("`{setting}` is not a setting and its value"))?;
            all.insert(name.into(), value.into());
        }
        let mut random = [0_u8; 8];
        getrandom::fill(&mut random).map_err(|error| error.to_string())?;
        // Small buffers, few of them: what is large does not go over the bus.
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
            process: hex::encode(random),
            partition: i32::from(random[0]) % PARTITIONS,
            next: AtomicU64::default(),
            waiting: Mutex::default(),
            answers: AtomicBool::default(),
            consumers: AtomicUsize::new(1),
            placed: Arc::default(),
            draining: CancellationToken::new(),
            under_way: TaskTracker::new(),
        });
        tokio::spawn(look(shared.clone()));
        tokio::spawn(replies(shared.clone()));
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

/// Finds out again and again whether the broker is there.
async fn look(shared: Arc<Shared>) {
    loop {
        let producer = shared.producer.clone();
        let asked = move || producer.client().fetch_metadata(Some(REPLIES), Duration::from_secs(3)).is_ok();
        let answers = tokio::task::spawn_blocking(asked).await.unwrap_or_default();
        if shared.answers.swap(answers, Ordering::Relaxed) != answers {
            if answers {
                tracing::info!("connected to Kafka");
            } else {
                tracing::warn!("Kafka does not answer");
                metrics::counter!("capsule_broker_disconnections_total").increment(1);
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Reads the replies to this process, from now on.
async fn replies(shared: Arc<Shared>) {
    let consumer = loop {
        match reply_consumer(&shared).await {
            Ok(consumer) => break consumer,
            Err(error) => tracing::warn!(error, "replies cannot be read yet; trying again"),
        }
        tokio::time::sleep(PAUSE).await;
    };
    shared.placed.fetch_add(1, Ordering::Relaxed);
    loop {
        match consumer.recv().await {
            Ok(reply) => {
                let waiting = header(&reply, REQUEST).and_then(|id| shared.waiting().remove(&id));
                if let Some(waiting) = waiting {
                    let _ = waiting.send(reply.payload().unwrap_or_default().to_vec());
                }
            }
            Err(error) => pause(&error).await,
        }
    }
}

async fn reply_consumer(shared: &Arc<Shared>) -> Result<StreamConsumer<Context>, String> {
    topics::ensure(&client(&shared.settings), &[(REPLIES.to_owned(), PARTITIONS)]).await?;
    let consumer: StreamConsumer<Context> = consumer(&shared.settings)
        .set("group.id", format!("capsule.replies.{}", shared.process))
        .set("fetch.wait.max.ms", "100")
        .create_with_context(Context::default())
        .map_err(|error| error.to_string())?;
    let (consumer, partition) = (Arc::new(consumer), shared.partition);
    let asking = consumer.clone();
    let end = tokio::task::spawn_blocking(move || asking.fetch_watermarks(REPLIES, partition, Duration::from_secs(10))).await;
    let (_, end) = end.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
    let mut assignment = TopicPartitionList::new();
    let begin = assignment.add_partition_offset(REPLIES, partition, Offset::Offset(end));
    begin.and_then(|()| consumer.assign(&assignment)).map_err(|error| error.to_string())?;
    Arc::into_inner(consumer).ok_or_else(|| "the consumer is in use".into())
}

/// A consumer that is told of no record twice while all is well, and of none too few when it is not.
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

async fn pause(error: &KafkaError) {
    tracing::warn!(%error, "nothing can be read from Kafka now");
    tokio::time::sleep(PAUSE).await;
}

/// Serves a service: its topics are made, then read by its group.
async fn serve(shared: Arc<Shared>, service: Served) {
    let (requests, refused) = (topics::of_requests(&service), topics::of_refused(&service));
    let shared_out = requests.iter().cloned().chain([EVENTS.to_owned()]).map(|topic| (topic, PARTITIONS));
    let made: Vec<_> = shared_out.chain(refused.iter().map(|topic| (topic.clone(), 1))).collect();
    while let Err(error) = topics::ensure(&client(&shared.settings), &made).await {
        tracing::warn!(service = service.name, error, "topics cannot be made yet; trying again");
        tokio::time::sleep(PAUSE).await;
    }
    // Apart: however many events wait, requests are answered.
    tokio::spawn(many(shared.clone(), service.clone(), "requests", requests));
    tokio::spawn(many(shared.clone(), service.clone(), "refused", refused));
    tokio::spawn(in_order(shared, service));
}

/// Joins a service's group for these topics.
fn join(shared: &Shared, group: &str, topics: &[String]) -> Result<StreamConsumer<Context>, KafkaError> {
    let placed = (shared.placed.clone(), Arc::default());
    let consumer: StreamConsumer<Context> =
        consumer(&shared.settings).set("group.id", group).create_with_context(Context { placed: Some(placed) })?;
    consumer.subscribe(&topics.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok(consumer)
}

/// Takes events into the service's inbox, one after the other: those of one organization in their order.
async fn in_order(shared: Arc<Shared>, service: Served) {
    let group = format!("capsule.{}.events", service.name);
    let consumer = match join(&shared, &group, &[EVENTS.to_owned()]) {
        Ok(consumer) => consumer,
        Err(error) => return tracing::error!(service = service.name, %error, "events cannot be read"),
    };
    loop {
        let event = tokio::select! {
            event = consumer.recv() => event,
            () = shared.draining.cancelled() => return,
        };
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                pause(&error).await;
                continue;
            }
        };
        if header(&event, KIND).is_some_and(|kind| service.kinds.contains(&kind.as_str())) {
            take(&shared, &service, event.detach(), 0).await;
        }
        if let Err(error) = consumer.store_offset_from_message(&event) {
            tracing::debug!(%error, "the partition has another reader by now");
        }
    }
}

/// Hands an event to the service, or on to where it waits. Does not return before one of both is done.
async fn take(shared: &Shared, service: &Served, event: OwnedMessage, attempt: usize) {
    let (body, key) = (event.payload().unwrap_or_default(), event.key().unwrap_or_default());
    let refusal = match (service.receive)(body.to_vec(), header(&event, SIGNATURE).unwrap_or_default()).await {
        Ok(()) => return,
        Err(refusal) => refusal,
    };
    let mut headers = without(&event, &[ATTEMPT, DUE]);
    let topic = match &refusal {
        Refusal::Later(problem) => {
            tracing::warn!(service = service.name, %problem, attempt, "an event cannot be taken now; it waits");
            let delay = DELAYS[attempt.min(DELAYS.len() - 1)];
            headers = with(with(headers, ATTEMPT, &(attempt + 1).to_string()), DUE, &(now() + delay).to_string());
            topics::retry(service.name, delay)
        }
        Refusal::Never(problem) => {
            tracing::error!(service = service.name, %problem, "an event that can never be taken is a dead letter");
            headers = with(headers, WHY, &problem.to_string());
            topics::dead(service.name)
        }
    };
    loop {
        let record = FutureRecord::to(&topic).key(key).payload(body).headers(headers.clone());
        let Err((error, _)) = shared.producer.send(record, Duration::ZERO).await else { return };
        tracing::warn!(service = service.name, %error, "an event cannot be put off; trying again");
        tokio::time::sleep(PAUSE).await;
    }
}

/// Answers requests, takes events whose time has come again, and keeps dead letters: many at a time.
async fn many(shared: Arc<Shared>, service: Served, what: &str, topics: Vec<String>) {
    let consumer = match join(&shared, &format!("capsule.{}.{what}", service.name), &topics) {
        Ok(consumer) => Arc::new(consumer),
        Err(error) => return tracing::error!(service = service.name, %error, what, "nothing can be read"),
    };
    let (offsets, places) = (Arc::new(Offsets::default()), Arc::new(Semaphore::new(AT_A_TIME)));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let record = tokio::select! {
            record = consumer.recv() => record,
            () = shared.draining.cancelled() => return,
        };
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                pause(&error).await;
                continue;
            }
        };
        let (topic, partition, offset) = (record.topic().to_owned(), record.partition(), record.offset());
        offsets.begin(&topic, partition, offset);
        let work = one(shared.clone(), service.clone(), &record);
        let (consumer, offsets) = (consumer.clone(), offsets.clone());
        shared.under_way.spawn(async move {
            work.await;
            if let Some(done) = offsets.done(&topic, partition, offset) {
                // Fails where the partition has another reader by now, who begins at the oldest not done with.
                let _ = consumer.store_offset(&topic, partition, done);
            }
            drop(place);
        });
    }
}

/// The work that a record asks for.
fn one(shared: Arc<Shared>, service: Served, record: &BorrowedMessage<'_>) -> BoxFuture<'static, ()> {
    let body = record.payload().unwrap_or_default().to_vec();
    if let (Some(partition), Some(id)) = (header(record, REPLY_TO).and_then(|text| text.parse().ok()), header(record, REQUEST)) {
        return Box::pin(async move {
            let reply = (service.answer)(body).await;
            let headers = with(OwnedHeaders::new(), REQUEST, &id);
            let record = FutureRecord::<[u8], _>::to(REPLIES).partition(partition).payload(&reply).headers(headers);
            if let Err((error, _)) = shared.producer.send(record, Duration::ZERO).await {
                tracing::warn!(service = service.name, %error, "a reply could not be sent");
            }
        });
    }
    if record.topic() == topics::dead(service.name) {
        let why = format!("It was refused: {}", header(record, WHY).unwrap_or_default());
        return Box::pin(async move {
            while let Err(problem) = (service.set_aside)(body.clone(), why.clone()).await {
                tracing::warn!(service = service.name, %problem, "a dead letter cannot be kept now; trying again");
                tokio::time::sleep(PAUSE * 2).await;
            }
        });
    }
    let due = header(record, DUE).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
    let attempt = header(record, ATTEMPT).and_then(|text| text.parse().ok()).unwrap_or(1);
    let event = record.detach();
    Box::pin(async move {
        tokio::time::sleep(Duration::from_millis(due.saturating_sub(now()))).await;
        take(&shared, &service, event, attempt).await;
    })
}

fn header<M: Message>(record: &M, name: &str) -> Option<String> {
    let found = record.headers()?.iter().find(|header| header.key == name)?;
    found.value.map(|value| String::from_utf8_lossy(value).into_owned())
}

fn with(headers: OwnedHeaders, name: &str, value: &str) -> OwnedHeaders {
    headers.insert(Header { key: name, value: Some(value) })
}

fn without(record: &OwnedMessage, names: &[&str]) -> OwnedHeaders {
    let kept = record.headers().into_iter().flat_map(Headers::iter).filter(|header| !names.contains(&header.key));
    kept.fold(OwnedHeaders::new(), |all, header| all.insert(Header { key: header.key, value: header.value }))
}

/// Milliseconds since the epoch.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, HashMap<String, oneshot::Sender<Vec<u8>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn request(&self, request: Outgoing) -> Result<Vec<u8>, Problem> {
        let id = format!("{}.{}", self.process, self.next.fetch_add(1, Ordering::Relaxed));
        let (sender, reply) = oneshot::channel();
        self.waiting().insert(id.clone(), sender);
        let outcome = tokio::time::timeout(request.patience, async {
            self.send(&request, &id).await?;
            reply.await.map_err(|_| unreachable())
        })
        .await;
        self.waiting().remove(&id);
        outcome.unwrap_or_else(|_| Err(Problem::deadline(request.subject)))
    }

    /// Sends a request; returns once the broker keeps it.
    async fn send(&self, request: &Outgoing, id: &str) -> Result<(), Problem> {
        let topic = topics::commands(request.subject);
        let headers = with(with(OwnedHeaders::new(), REPLY_TO, &self.partition.to_string()), REQUEST, id);
        loop {
            let record = FutureRecord::to(&topic).key(id).payload(&request.body).headers(headers.clone());
            match self.producer.send(record, Duration::ZERO).await {
                Ok(_) => return Ok(()),
                // The service may be about to make its topics; the request's own patience ends this.
                Err((error, _)) => {
                    tracing::debug!(%error, subject = request.subject, "a request could not be sent; trying again");
                    tokio::time::sleep(PAUSE / 5).await;
                }
            }
        }
    }

    async fn publish(&self, event: Published) -> Result<(), Problem> {
        let headers = with(with(OwnedHeaders::new(), SIGNATURE, &event.signature), KIND, &event.kind);
        let record = FutureRecord::to(EVENTS).key(&event.key).payload(&event.body).headers(headers);
        match self.producer.send(record, Duration::from_secs(5)).await {
            Ok(_) => Ok(()),
            Err((error, _)) => {
                tracing::warn!(%error, "an event could not be published");
                Err(unreachable())
            }
        }
    }
}

fn unreachable() -> Problem {
    Problem::unavailable("Kafka cannot be reached.")
}

impl Transport for Kafka {
    fn request(&self, request: Outgoing) -> BoxFuture<'_, Result<Vec<u8>, Problem>> {
        Box::pin(self.0.request(request))
    }

    fn publish(&self, event: Published) -> BoxFuture<'_, Result<(), Problem>> {
        Box::pin(self.0.publish(event))
    }

    fn serve(&self, service: Served) {
        self.0.consumers.fetch_add(3, Ordering::Relaxed);
        tokio::spawn(serve(self.0.clone(), service));
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.0.draining.cancel();
            self.0.under_way.close();
            self.0.under_way.wait().await;
        })
    }

    fn is_ready(&self) -> bool {
        let placed = self.0.placed.load(Ordering::Relaxed);
        self.0.answers.load(Ordering::Relaxed) && placed >= self.0.consumers.load(Ordering::Relaxed)
    }
}
