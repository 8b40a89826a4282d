//! In which shape servers are started: one process, or many over real servers.

use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

use crate::{Docker, Kafka, Postgres, RabbitMq, Redis};

/// How servers are set up: as one process on embedded defaults, unless said otherwise.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// Settings beyond the defaults, as `name=value`.
    pub settings: Vec<String>,
    /// What runs in each process, as `--only` takes it; none is one process with everything.
    pub processes: Vec<&'static str>,
    /// The network namespace that the last of them runs in, if not the host's.
    pub namespace: Option<String>,
}

impl Shape {
    /// The usual cluster: a process for each part, and two that may lead the deployments.
    #[must_use]
    pub fn split(settings: Vec<String>) -> Self {
        let processes = vec!["identity", "organization", "project", "deploy", "deploy", "gateway"];
        Self { settings, processes, namespace: None }
    }

    /// As [`Shape::split`], with every part twice.
    #[must_use]
    pub fn doubled(settings: Vec<String>) -> Self {
        let processes = ["identity", "organization", "project", "deploy", "gateway"].repeat(2);
        Self { settings, processes, namespace: None }
    }
}

thread_local! {
    /// The shape of every server that this thread starts.
    static EVERYWHERE: RefCell<Option<Shape>> = RefCell::default();
}

/// What a server stands on, made for it: ends with it.
pub(crate) type Ground = Box<dyn std::any::Any + Send + Sync>;

/// The broker of all servers of `CAPSULE_SHAPE=rabbitmq`, each in a virtual host of its own.
static BROKER: Mutex<Option<RabbitMq>> = Mutex::new(None);

/// Ends what servers share.
pub fn end() {
    BROKER.lock().unwrap_or_else(PoisonError::into_inner).take();
    Docker::end();
}

/// `CAPSULE_SHAPE=rabbitmq` (or `kafka`) starts every server that no test sets up otherwise as a cluster.
pub(crate) fn shape(settings: &[&str]) -> (Shape, Option<Ground>) {
    let own = EVERYWHERE.with_borrow(Clone::clone);
    let wanted = std::env::var("CAPSULE_SHAPE").unwrap_or_default();
    let set_up = own.is_some() || settings.iter().any(|setting| setting.starts_with("database."));
    if wanted.is_empty() || set_up {
        return (own.unwrap_or_default(), None);
    }
    let (postgres, redis) = (Postgres::start(), Redis::start());
    let kafka = (wanted == "kafka").then(Kafka::start);
    let broker = match &kafka {
        Some(kafka) => kafka.url(),
        None => BROKER.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(RabbitMq::start).url(),
    };
    let settings = [("database", postgres.url()), ("redis", redis.url()), ("broker", broker)];
    let settings = settings.map(|(name, url)| format!("{name}.url={url}")).to_vec();
    (Shape::split(settings), Some(Box::new((postgres, redis, kafka))))
}

/// Runs something in which every server is started in this shape.
pub fn everywhere<T>(shape: &Shape, work: impl FnOnce() -> T) -> T {
    EVERYWHERE.set(Some(shape.clone()));
    let result = work();
    EVERYWHERE.take();
    result
}
