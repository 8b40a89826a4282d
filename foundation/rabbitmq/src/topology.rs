//! What is declared on the server, each time a connection is made.

use capsule_bus::transport::Served;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ExchangeKind};

pub const COMMANDS: &str = "capsule.commands";
pub const EVENTS: &str = "capsule.events";
const DEAD_LETTERS: &str = "capsule.dead-letters";

/// So long an event waits that cannot be taken, by how often it was put off already, in milliseconds.
/// Each delay has a queue of its own: in one queue, a short one would wait behind a long one.
const DELAYS: [u32; 4] = [500, 2_000, 10_000, 60_000];

/// A message delivered so often without being settled brings its service down each time: it is given up.
const DELIVERIES: i32 = 10;

/// The queues that a service is delivered from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Commands,
    Events,
    DeadLetters,
}

impl Kind {
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

/// Where an event waits that was put off so often already.
pub fn retry_queue(service: &str, attempt: i32) -> String {
    let at = usize::try_from(attempt).unwrap_or_default().min(DELAYS.len() - 1);
    delayed(service, DELAYS[at])
}

fn delayed(service: &str, delay: u32) -> String {
    format!("{}.retry-{delay}ms", Kind::Events.queue(service))
}

pub async fn exchanges(channel: &Channel) -> lapin::Result<()> {
    for (name, kind) in [(COMMANDS, ExchangeKind::Direct), (EVENTS, ExchangeKind::Topic), (DEAD_LETTERS, ExchangeKind::Direct)] {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await?;
    }
    Ok(())
}

/// Fails unless every one of these services has a queue for events.
pub async fn are_there(connection: &Connection, services: &[&str]) -> lapin::Result<()> {
    for service in services {
        // The server closes a channel on which one is missing.
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(Kind::Events.queue(service).into(), options, FieldTable::default()).await?;
        channel.close(200, "seen".into()).await?;
    }
    Ok(())
}

/// A service's queues and what leads to them.
pub async fn queues(channel: &Channel, service: &Served) -> lapin::Result<()> {
    let (commands, events) = (Kind::Commands.queue(service.name), Kind::Events.queue(service.name));
    let dead = Kind::DeadLetters.queue(service.name);
    quorum(channel, &dead, []).await?;
    bind(channel, &dead, DEAD_LETTERS, service.name).await?;
    for queue in [&commands, &events] {
        let limit = ("x-delivery-limit", AMQPValue::LongInt(DELIVERIES));
        quorum(channel, queue, to(DEAD_LETTERS, service.name).into_iter().chain([limit])).await?;
    }
    for subject in &service.subjects {
        bind(channel, &commands, COMMANDS, subject).await?;
    }
    for kind in &service.kinds {
        bind(channel, &events, EVENTS, kind).await?;
    }
    for delay in DELAYS {
        let delayed = delayed(service.name, delay);
        let ttl = ("x-message-ttl", AMQPValue::LongUInt(delay));
        quorum(channel, &delayed, to("", &events).into_iter().chain([ttl])).await?;
    }
    Ok(())
}

/// Where a queue's dead messages go; they are not gone before they are there.
fn to(exchange: &str, key: &str) -> [(&'static str, AMQPValue); 4] {
    [
        ("x-dead-letter-exchange", AMQPValue::LongString(exchange.into())),
        ("x-dead-letter-routing-key", AMQPValue::LongString(key.into())),
        ("x-dead-letter-strategy", AMQPValue::LongString("at-least-once".into())),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ]
}

async fn quorum(
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
