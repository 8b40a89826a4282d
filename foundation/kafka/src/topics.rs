//! The names of the topics, and their creation.

use std::collections::BTreeSet;
use std::time::Duration;

use capsule_bus::transport::ServiceEndpoint;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::metadata::MetadataTopic;
use rdkafka::types::RDKafkaErrorCode;

pub const EVENTS: &str = "capsule.events";
pub const REPLIES: &str = "capsule.replies";

/// The number of partitions of a topic: the most processes of a service that can share its work.
pub const PARTITIONS: i32 = 6;

/// How long an event that was rejected waits, by the number of earlier attempts, in milliseconds. Each delay has a
/// topic of its own, so that the records of a topic are due in their order.
pub const RETRY_DELAYS_MS: [u64; 3] = [1_000, 10_000, 60_000];

/// The topic for requests of a subject.
pub fn command_topic(subject: &str) -> String {
    format!("capsule.commands.{}", subject.split('.').next().unwrap_or(subject))
}

/// The topic of a service's events that wait for a retry.
pub fn retry_topic(service: &str, delay_ms: u64) -> String {
    format!("{EVENTS}.{service}.retry-{delay_ms}ms")
}

/// The topic of a service's dead letters.
pub fn dead_letter_topic(service: &str) -> String {
    format!("capsule.dead-letters.{service}")
}

/// The topics of a service's requests.
pub fn request_topics(service: &ServiceEndpoint) -> Vec<String> {
    let topics: BTreeSet<String> = service.subjects.iter().map(|subject| command_topic(subject)).collect();
    topics.into_iter().collect()
}

/// The topics of a service's rejected events: those that wait for a retry, and dead letters.
pub fn rejected_event_topics(service: &ServiceEndpoint) -> Vec<String> {
    RETRY_DELAYS_MS.iter().map(|delay| retry_topic(service.name, *delay)).chain([dead_letter_topic(service.name)]).collect()
}

/// Creates missing topics, with the brokers' default replication factor.
pub async fn ensure(client: &ClientConfig, topics: &[(String, i32)]) -> Result<(), String> {
    let admin: AdminClient<DefaultClientContext> = client.create().map_err(|error| error.to_string())?;
    let new_topics: Vec<NewTopic<'_>> =
        topics.iter().map(|(name, partitions)| NewTopic::new(name, *partitions, TopicReplication::Fixed(-1))).collect();
    let options = AdminOptions::new().request_timeout(Some(Duration::from_secs(10)));
    let results = admin.create_topics(&new_topics, &options).await.map_err(|error| error.to_string())?;
    for result in results {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => return Err(format!("{name}: {code}")),
        }
    }
    // Brokers learn of a new topic with a delay. A consumer that joins its group before gets no partitions until the
    // next metadata refresh.
    let names: Vec<String> = topics.iter().map(|(name, _)| name.clone()).collect();
    tokio::task::spawn_blocking(move || names.iter().try_for_each(|name| wait_for_leaders(&admin, name)))
        .await
        .map_err(|error| error.to_string())?
}

/// Waits until every partition of a topic has a leader.
fn wait_for_leaders(admin: &AdminClient<DefaultClientContext>, name: &str) -> Result<(), String> {
    for _ in 0..100 {
        let metadata = admin.inner().fetch_metadata(Some(name), Duration::from_secs(5)).map_err(|error| error.to_string())?;
        let has_leaders = |topic: &MetadataTopic| {
            topic.error().is_none()
                && !topic.partitions().is_empty()
                && topic.partitions().iter().all(|partition| partition.error().is_none() && partition.leader() >= 0)
        };
        if metadata.topics().iter().all(has_leaders) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(format!("a partition of {name} has no leader"))
}
