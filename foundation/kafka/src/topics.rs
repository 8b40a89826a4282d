//! The topics there are, made where they are missing.

use std::collections::BTreeSet;
use std::time::Duration;

use capsule_bus::transport::Served;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::metadata::MetadataTopic;
use rdkafka::types::RDKafkaErrorCode;

pub const EVENTS: &str = "capsule.events";
pub const REPLIES: &str = "capsule.replies";

/// So many processes of a service share its work at the most.
pub const PARTITIONS: i32 = 6;

/// So long an event waits that cannot be taken, by how often it was put off already, in milliseconds. Each
/// delay has a topic of its own, in which the first to come is the first to go.
pub const DELAYS: [u64; 3] = [1_000, 10_000, 60_000];

/// Where requests of a subject go.
pub fn commands(subject: &str) -> String {
    format!("capsule.commands.{}", subject.split('.').next().unwrap_or(subject))
}

/// Where a service's events wait.
pub fn retry(service: &str, delay: u64) -> String {
    format!("{EVENTS}.{service}.retry-{delay}ms")
}

/// Where a service's dead letters go.
pub fn dead(service: &str) -> String {
    format!("capsule.dead-letters.{service}")
}

/// Where a service's requests come from.
pub fn of_requests(service: &Served) -> Vec<String> {
    let topics: BTreeSet<String> = service.subjects.iter().map(|subject| commands(subject)).collect();
    topics.into_iter().collect()
}

/// Where a service's events are that could not be taken: for now, or ever.
pub fn of_refused(service: &Served) -> Vec<String> {
    DELAYS.iter().map(|delay| retry(service.name, *delay)).chain([dead(service.name)]).collect()
}

/// Makes topics where they are missing, as often copied as the brokers are set up to.
pub async fn ensure(client: &ClientConfig, topics: &[(String, i32)]) -> Result<(), String> {
    let admin: AdminClient<DefaultClientContext> = client.create().map_err(|error| error.to_string())?;
    let wanted: Vec<NewTopic<'_>> =
        topics.iter().map(|(name, partitions)| NewTopic::new(name, *partitions, TopicReplication::Fixed(-1))).collect();
    let options = AdminOptions::new().request_timeout(Some(Duration::from_secs(10)));
    let made = admin.create_topics(&wanted, &options).await.map_err(|error| error.to_string())?;
    for topic in made {
        match topic {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => return Err(format!("{name}: {code}")),
        }
    }
    // They are made before every broker knows of them; who joins a group too early is not told of them for long.
    let names: Vec<String> = topics.iter().map(|(name, _)| name.clone()).collect();
    tokio::task::spawn_blocking(move || names.iter().try_for_each(|name| is_led(&admin, name)))
        .await
        .map_err(|error| error.to_string())?
}

/// Waits until every partition of a topic has a leader.
fn is_led(admin: &AdminClient<DefaultClientContext>, name: &str) -> Result<(), String> {
    for _ in 0..100 {
        let metadata = admin.inner().fetch_metadata(Some(name), Duration::from_secs(5)).map_err(|error| error.to_string())?;
        let led = |topic: &MetadataTopic| {
            topic.error().is_none()
                && !topic.partitions().is_empty()
                && topic.partitions().iter().all(|partition| partition.error().is_none() && partition.leader() >= 0)
        };
        if metadata.topics().iter().all(led) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(format!("{name} has no leader"))
}
