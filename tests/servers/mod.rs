//! Real servers of one's own: in temporary folders, on free ports, stopped with the value.

mod kafka;
mod postgres;
mod rabbitmq;

pub use kafka::Kafka;
pub use postgres::Postgres;
pub use rabbitmq::RabbitMq;
