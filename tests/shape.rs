//! The shape in which test servers start: one process, or one process per service with real backing servers.

use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

use crate::{Docker, Kafka, Postgres, RabbitMq, Redis};

/// How a server is set up. The default is one process with SQLite and no other servers.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// Settings beyond the defaults, as `name=value`.
    pub settings: Vec<String>,
    /// The parts of each process, as in `--only`. Empty: one process with all parts.
    pub processes: Vec<&'static str>,
    /// The network namespace of the last process; the host's if `None`.
    pub namespace: Option<String>,
}

impl Shape {
    /// The usual cluster: one process per part, and two for `deploy`.
    #[must_use]
    pub fn split(settings: Vec<String>) -> Self {
        let processes = vec!["identity", "organization", "project", "deploy", "deploy", "gateway"];
        Self { settings, processes, namespace: None }
    }

    /// Like [`Shape::split`], with two processes per part.
    #[must_use]
    pub fn doubled(settings: Vec<String>) -> Self {
        let processes = ["identity", "organization", "project", "deploy", "gateway"].repeat(2);
        Self { settings, processes, namespace: None }
    }
}

thread_local! {
    /// The shape of every server that this thread starts.
    static THREAD_SHAPE: RefCell<Option<Shape>> = RefCell::default();
}

/// The backing servers of one Capsule server; dropping them stops them.
pub(crate) type Dependencies = Box<dyn std::any::Any + Send + Sync>;

/// The broker that all servers share under `CAPSULE_SHAPE=rabbitmq`; each uses its own virtual host.
static BROKER: Mutex<Option<RabbitMq>> = Mutex::new(None);

/// Stops the servers that tests share.
pub fn stop_shared_servers() {
    BROKER.lock().unwrap_or_else(PoisonError::into_inner).take();
    Docker::stop_shared();
}

/// The shape of a new server: the one set by [`with_shape`], or with `CAPSULE_SHAPE=rabbitmq` (or `kafka`) a cluster.
pub(crate) fn shape(settings: &[&str]) -> (Shape, Option<Dependencies>) {
    let own = THREAD_SHAPE.with_borrow(Clone::clone);
    let name = std::env::var("CAPSULE_SHAPE").unwrap_or_default();
    let set_up = own.is_some() || settings.iter().any(|setting| setting.starts_with("database."));
    if name.is_empty() || set_up {
        return (own.unwrap_or_default(), None);
    }
    let (postgres, redis) = (Postgres::start(), Redis::start());
    let kafka = (name == "kafka").then(Kafka::start);
    let broker = match &kafka {
        Some(kafka) => kafka.url(),
        None => BROKER.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(RabbitMq::start).url(),
    };
    let settings = [("database", postgres.url()), ("redis", redis.url()), ("broker", broker)];
    let settings = settings.map(|(name, url)| format!("{name}.url={url}")).to_vec();
    (Shape::split(settings), Some(Box::new((postgres, redis, kafka))))
}

/// Runs `work`; every server that it starts on this thread has this shape.
pub fn with_shape<T>(shape: &Shape, work: impl FnOnce() -> T) -> T {
    THREAD_SHAPE.set(Some(shape.clone()));
    let result = work();
    THREAD_SHAPE.take();
    result
}
