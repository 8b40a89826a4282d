//! The exchanges, queues and bindings, which are declared on every new connection.

use capsule_bus::transport::ServiceEndpoint;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ExchangeKind};

pub const COMMANDS: &str = "capsule.commands";
pub const EVENTS: &str = "capsule.events";
const DEAD_LETTERS: &str = "capsule.dead-letters";

/// How long an event that was rejected waits, by the number of earlier attempts, in milliseconds. Each delay has a
/// queue of its own: in a common queue, a short delay would wait behind a long one.
const RETRY_DELAYS_MS: [u32; 4] = [500, 2_000, 10_000, 60_000];

/// A message becomes a dead letter after this many deliveries without an acknowledgement: it probably crashes the service.
const DELIVERY_LIMIT: i32 = 10;

/// The kinds of queue that a service consumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueKind {
    Commands,
    Events,
    DeadLetters,
}

impl QueueKind {
    pub const ALL: [Self; 3] = [Self::Commands, Self::Events, Self::DeadLetters];

    pub fn queue(self, service: &str) -> String {
        let kind = match self {
            Self::Commands => COMMANDS,
            Self::Events => EVENTS,
            Self::DeadLetters => DEAD_LETTERS,
        };
        format!("{kind}.{service}")
    }
}

/// The queue of an event that waits for its next attempt. `attempt` is the number of earlier ones.
pub fn retry_queue(service: &str, attempt: i32) -> String {
    let index = usize::try_from(attempt).unwrap_or_default().min(RETRY_DELAYS_MS.len() - 1);
    retry_queue_name(service, RETRY_DELAYS_MS[index])
}

fn retry_queue_name(service: &str, delay_ms: u32) -> String {
    format!("{}.retry-{delay_ms}ms", QueueKind::Events.queue(service))
}

pub async fn declare_exchanges(channel: &Channel) -> lapin::Result<()> {
    for (name, kind) in [(COMMANDS, ExchangeKind::Direct), (EVENTS, ExchangeKind::Topic), (DEAD_LETTERS, ExchangeKind::Direct)] {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await?;
    }
    Ok(())
}

/// Checks that every one of these services has declared its queue for events.
///
/// # Errors
/// When a queue is missing.
pub async fn check_event_queues(connection: &Connection, services: &[&str]) -> lapin::Result<()> {
    for service in services {
        // The server closes the channel if the queue is missing.
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(QueueKind::Events.queue(service).into(), options, FieldTable::default()).await?;
        channel.close(200, "done".into()).await?;
    }
    Ok(())
}

/// Declares a service's queues and their bindings.
pub async fn declare_queues(channel: &Channel, service: &ServiceEndpoint) -> lapin::Result<()> {
    let (commands, events) = (QueueKind::Commands.queue(service.name), QueueKind::Events.queue(service.name));
    let dead = QueueKind::DeadLetters.queue(service.name);
    declare_quorum_queue(channel, &dead, []).await?;
    bind(channel, &dead, DEAD_LETTERS, service.name).await?;
    for queue in [&commands, &events] {
        let limit = ("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT));
        declare_quorum_queue(channel, queue, dead_letter_arguments(DEAD_LETTERS, service.name).into_iter().chain([limit]))
            .await?;
    }
    for subject in &service.subjects {
        bind(channel, &commands, COMMANDS, subject).await?;
    }
    for kind in &service.kinds {
        bind(channel, &events, EVENTS, kind).await?;
    }
    for delay in RETRY_DELAYS_MS {
        let retry_queue = retry_queue_name(service.name, delay);
        let ttl = ("x-message-ttl", AMQPValue::LongUInt(delay));
        declare_quorum_queue(channel, &retry_queue, dead_letter_arguments("", &events).into_iter().chain([ttl])).await?;
    }
    Ok(())
}

/// The arguments of a queue whose dead letters go to `exchange`. At-least-once: a message stays in the queue until its
/// new queue has confirmed it.
fn dead_letter_arguments(exchange: &str, key: &str) -> [(&'static str, AMQPValue); 4] {
    [
        ("x-dead-letter-exchange", AMQPValue::LongString(exchange.into())),
        ("x-dead-letter-routing-key", AMQPValue::LongString(key.into())),
        ("x-dead-letter-strategy", AMQPValue::LongString("at-least-once".into())),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ]
}

async fn declare_quorum_queue(
    channel: &Channel,
    name: &str,
    arguments: impl IntoIterator<Item = (&'static str, AMQPValue)>,
) -> lapin::Result<()> {
    let mut table = FieldTable::default();
    table.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    for (name, value) in arguments {
        table.insert(name.into(), value);
    }
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(name.into(), options, table).await.map(|_| ())
}

async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> lapin::Result<()> {
    channel.queue_bind(queue.into(), exchange.into(), key.into(), QueueBindOptions::default(), FieldTable::default()).await
}
