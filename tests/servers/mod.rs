//! Real servers for tests, in temporary folders on free ports. Dropping the value stops the server.

mod bucket;
mod collector;
mod docker;
mod kafka;
mod namespace;
mod postgres;
mod rabbitmq;
mod redis;

pub use bucket::Bucket;
pub use collector::{Collector, Span};
pub use docker::Docker;
pub use kafka::Kafka;
pub use namespace::Namespace;
pub use postgres::Postgres;
pub use rabbitmq::RabbitMq;
pub use redis::Redis;

use std::net::TcpStream;
use std::process::Child;
use std::time::{Duration, Instant};

/// Waits until a process listens on this port of the loopback address.
fn wait_for(name: &str, port: u16) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "{name} does not start");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Kills a server with SIGKILL and waits for its end.
fn kill_process(process: &mut Option<Child>) {
    if let Some(mut process) = process.take() {
        let _ = process.kill();
        let _ = process.wait();
    }
}
