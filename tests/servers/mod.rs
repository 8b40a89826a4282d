//! Real servers of one's own: in temporary folders, on free ports, stopped with the value.

mod bucket;
mod collector;
mod kafka;
mod namespace;
mod postgres;
mod rabbitmq;
mod redis;

pub use bucket::Bucket;
pub use collector::{Collector, Span};
pub use kafka::Kafka;
pub use namespace::Namespace;
pub use postgres::Postgres;
pub use rabbitmq::RabbitMq;
pub use redis::Redis;
