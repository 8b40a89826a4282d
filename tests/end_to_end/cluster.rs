//! The same platform as a cluster: a process for each part, over a broker and PostgreSQL.

use std::sync::{Arc, OnceLock};

use capsule_tests::{Kafka, Postgres, RabbitMq, Shape, everywhere};
use libtest_mimic::Trial;

use crate::{access, crashes, deployments, test, test_of_processes};

/// One RabbitMQ for all tests, each in a virtual host of its own; it ends with the last of them.
type Shared = Arc<OnceLock<RabbitMq>>;

/// What is shown of every kind of cluster.
const JOURNEYS: [(&str, fn()); 4] = [
    ("every endpoint, every role, a foreigner and nobody", access::all),
    ("redeploys, restarts and rollbacks under load lose no request", deployments::under_load),
    ("a server killed before building ends the deployment when it is back", || crashes::killed_in("building", "before")),
    ("a server killed after active ends the deployment when it is back", || crashes::killed_in("active", "after")),
];

pub fn trials() -> Vec<Trial> {
    let broker = Shared::default();
    let on_rabbitmq = JOURNEYS.into_iter().map(|(name, work)| {
        let broker = broker.clone();
        trial("RabbitMQ", RabbitMq::is_installed(), name, move || in_cluster(&broker.get_or_init(RabbitMq::start).url(), work))
    });
    let on_kafka = JOURNEYS.into_iter().map(|(name, work)| {
        trial("Kafka", Kafka::is_installed(), name, move || {
            let broker = Kafka::start();
            in_cluster(&broker.url(), work);
        })
    });
    on_rabbitmq.chain(on_kafka).collect()
}

fn trial(broker: &str, installed: bool, name: &str, work: impl FnOnce() + Send + 'static) -> Trial {
    let name = format!("one process per service on {broker}: {name}");
    if Postgres::programs().is_none() || !installed {
        return test(&format!("{name} (skipped: no PostgreSQL or {broker} here)"), || {}).with_ignored_flag(true);
    }
    test_of_processes(&name, work)
}

fn in_cluster(broker: &str, work: impl FnOnce()) {
    let postgres = Postgres::start();
    let settings = vec![format!("database.url={}", postgres.url()), format!("broker.url={broker}")];
    everywhere(&Shape::split(settings), work);
}
