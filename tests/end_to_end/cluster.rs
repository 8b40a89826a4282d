//! Capsule as a cluster: one process per service, with a broker and PostgreSQL.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use capsule_bus::transport::{OutgoingEvent, OutgoingRequest, Rejection, ServiceEndpoint, Transport};
use capsule_contracts::Problem;
use capsule_tests::{Collector, Kafka, Postgres, RabbitMq, Redis, Server, Shape, Span, eventually, probe, text, with_shape};
use libtest_mimic::Trial;

use crate::{access, crashes, deployments, test, test_of_processes, with_failpoints};

/// One RabbitMQ for all tests, each with its own virtual host. It stops after the last test.
type Shared = Arc<OnceLock<RabbitMq>>;

/// The tests that run on every kind of cluster.
const JOURNEYS: [(&str, fn()); 2] = [
    ("every endpoint checks every role, non-members and unauthenticated requests", access::all),
    ("redeploys, restarts and rollbacks under load lose no request", deployments::under_load),
];

pub fn trials() -> Vec<Trial> {
    let broker = Shared::default();
    let on_rabbitmq = |(name, work): (&'static str, fn())| {
        let broker = broker.clone();
        trial("RabbitMQ", RabbitMq::is_installed(), name, move || in_cluster(&broker.get_or_init(RabbitMq::start).url(), work))
    };
    let on_kafka = |(name, work): (&'static str, fn())| {
        trial("Kafka", Kafka::is_installed(), name, move || {
            let broker = Kafka::start();
            in_cluster(&broker.url(), work);
        })
    };
    let on_broker = |name: &str, work: fn(&str)| {
        let broker = broker.clone();
        trial("RabbitMQ", RabbitMq::is_installed(), name, move || work(&broker.get_or_init(RabbitMq::start).url()))
    };
    let forged_name = "an event with a forged signature becomes a dead letter and changes nothing";
    let held_up_name = "events that cannot be processed yet block no request, and none is lost";
    let more = [
        on_broker("one trace spans HTTP, the broker and the database", traced),
        on_broker("gateways share rate limits and sessions, and work without Redis", shared_cache),
        on_broker(forged_name, |url| {
            forged(url, &connect(|| Arc::new(capsule_rabbitmq::RabbitMq::connect(url, "outsider", &[]))));
        }),
        trial("Kafka", Kafka::is_installed(), forged_name, || {
            let broker = Kafka::start();
            let url = broker.url();
            forged(&url, &connect(|| Arc::new(capsule_kafka::Kafka::connect(&url, "outsider").expect("a client"))));
        }),
        on_broker(held_up_name, |url| held_up(&|| Arc::new(capsule_rabbitmq::RabbitMq::connect(url, "bench", &[])))),
        trial("Kafka", Kafka::is_installed(), held_up_name, || {
            let broker = Kafka::start();
            held_up(&|| Arc::new(capsule_kafka::Kafka::connect(&broker.url(), "bench").expect("a client")));
        }),
    ];
    let journeys = JOURNEYS.into_iter().flat_map(|journey| [on_rabbitmq(journey), on_kafka(journey)]);
    let kills = crashes::KILLS.into_iter().flat_map(|kill| [on_rabbitmq(kill), on_kafka(kill)]).map(with_failpoints);
    journeys.chain(kills).chain(more).collect()
}

fn trial(broker: &str, installed: bool, name: &str, work: impl FnOnce() + Send + 'static) -> Trial {
    let name = format!("one process per service on {broker}: {name}");
    if Postgres::programs().is_none() || !Redis::is_installed() || !installed {
        return test(&format!("{name} (skipped: no PostgreSQL, Redis or {broker} here)"), || {}).with_ignored_flag(true);
    }
    test_of_processes(&name, work)
}

fn in_cluster(broker: &str, work: impl FnOnce()) {
    let (postgres, redis) = (Postgres::start(), Redis::start());
    with_shape(&Shape::split(settings(&postgres, broker, &redis)), work);
}

fn settings(postgres: &Postgres, broker: &str, redis: &Redis) -> Vec<String> {
    let (database, redis) = (format!("database.url={}", postgres.url()), format!("redis.url={}", redis.url()));
    vec![database, format!("broker.url={broker}"), redis]
}

fn traced(broker: &str) {
    let (postgres, redis, collector) = (Postgres::start(), Redis::start(), Collector::start());
    let mut settings = settings(&postgres, broker, &redis);
    settings.push(format!("traces.endpoint={}", collector.url()));
    let server = with_shape(&Shape::split(settings), Server::default);
    let token = server.admin();
    let (trace, caller) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let header = format!("00-{trace}-{caller}-01");
    let body = serde_json::json!({"name": "Traced"});
    server.api_with_header("POST", "/organizations", &token, ("traceparent", &header), Some(&body)).ok();

    let spans = eventually("the statement has arrived", || {
        let spans = collector.trace(trace);
        let insert = |span: &&Span| span.service == "capsule-organization" && span.name == "sql";
        let arrived = spans.iter().any(|span| insert(&span)) && spans.iter().any(|span| span.name == "http");
        arrived.then_some(spans)
    });
    // From the statement upwards, every span is present and comes from the expected process.
    let statement = spans.iter().find(|span| span.service == "capsule-organization" && span.name == "sql").expect("there");
    let mut way = vec![(statement.service.clone(), statement.name.clone())];
    let mut at = statement.clone();
    while at.parent != caller {
        let parent = at.parent.clone();
        at = spans.iter().find(|span| span.id == parent).unwrap_or_else(|| panic!("no span {parent} in {spans:?}")).clone();
        way.push((at.service.clone(), at.name.clone()));
    }
    let subject = "organization.create_organization";
    let expected = [
        ("capsule-organization", "sql"),
        ("capsule-organization", subject),
        ("capsule-gateway", subject),
        ("capsule-gateway", "http"),
    ];
    assert_eq!(way, expected.map(|(service, name)| (service.to_owned(), name.to_owned())));
}

fn shared_cache(broker: &str) {
    let (postgres, mut redis) = (Postgres::start(), Redis::start());
    let mut settings = settings(&postgres, broker, &redis);
    settings.push("limits.requests_per_minute=200".into());
    let server = with_shape(&Shape::doubled(settings), Server::default);
    let token = server.register("one@example.com");
    let me = |token: &str| server.api("GET", "/auth/me", Some(token), None);
    me(&token).ok();
    // A gateway shares validated tokens, encrypted, and not under the token itself.
    eventually("the answer is shared", || (redis.run(&["KEYS", "capsule:token:*"]).lines().count() > 0).then_some(()));
    assert!(!redis.run(&["KEYS", "*"]).contains(&token[..20]));
    // An ended session is invalid on every gateway, although its token was shared.
    server.api("POST", "/auth/logout", Some(&token), None).ok();
    eventually("the token holds no more", || (me(&token).status == 401).then_some(()));
    std::thread::sleep(Duration::from_secs(1));
    for _ in 0..10 {
        assert_eq!(me(&token).status, 401);
    }

    // Requests to all gateways count together.
    let other = server.register("two@example.com");
    let allowed = |n: usize| (0..n).filter(|_| me(&other).status == 200).count();
    let limited = eventually("the limit is met", || Some(me(&other)).filter(|reply| reply.status == 429));
    assert_eq!(limited.headers["content-type"], "application/problem+json");
    let wait: u64 = limited.headers["retry-after"].parse().expect("a number");
    assert!((1..=60).contains(&wait), "{limited:?}");
    assert_eq!(allowed(10), 0);

    // Without Redis, every gateway counts for itself.
    redis.kill();
    let third = server.register("three@example.com");
    let reply = me(&third);
    reply.ok();
    assert_eq!(reply.headers["ratelimit-limit"], "200");
    server.api("POST", "/auth/logout", Some(&third), None).ok();
    eventually("the token holds no more", || (me(&third).status == 401).then_some(()));
    // Redis is back and empty: no entry is trusted until the list of revoked sessions is complete again.
    redis.resume();
    eventually("the list is whole", || (redis.run(&["EXISTS", "capsule:revocations-complete"]) == "1").then_some(()));
    assert_eq!((me(&token).status, me(&third).status), (401, 401));
    let fourth = server.register("four@example.com");
    me(&fourth).ok();
    let folder = probe("one");
    server.deploy(folder.path(), "app").ok();
    assert!(!text(&server.status(folder.path())["service"], "name").is_empty());
}

/// A client with access to the broker and without a key.
struct Outsider {
    runtime: tokio::runtime::Runtime,
    transport: Arc<dyn Transport>,
}

fn connect(transport: impl FnOnce() -> Arc<dyn Transport>) -> Outsider {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let transport = runtime.block_on(async { transport() });
    Outsider { runtime, transport }
}

fn forged(broker: &str, outsider: &Outsider) {
    let (postgres, redis) = (Postgres::start(), Redis::start());
    let server = with_shape(&Shape::split(settings(&postgres, broker, &redis)), Server::default);
    let token = server.register("victim@example.com");
    let service = server.service(&token, "mine");
    let organization = text(&server.api("GET", "/organizations", Some(&token), None).ok()["items"][0], "id");
    let id = "0190a000-0000-7000-8000-000000000009";
    let envelope = serde_json::json!({
        "specversion": "1.0", "id": id, "source": "/capsule/organization", "type": "organization.organization_deleted",
        "subject": organization, "time": "2026-01-01T00:00:00Z", "dataschema": "/s", "correlationid": "c",
        "data": {"organization_id": organization}
    });
    let published = |signature: &str| OutgoingEvent {
        kind: "organization.organization_deleted".into(),
        key: organization.clone(),
        body: envelope.to_string().into_bytes(),
        signature: signature.into(),
    };
    for signature in ["", &"00".repeat(32)] {
        outsider.runtime.block_on(outsider.transport.publish(published(signature))).expect("the broker takes it");
    }
    // The reply to a request that cannot be decrypted is empty.
    let request = OutgoingRequest { subject: "project.count_projects", body: b"{}".to_vec(), timeout: Duration::from_secs(10) };
    let reply = outsider.runtime.block_on(outsider.transport.request(request)).expect("an answer");
    assert!(reply.is_empty(), "{reply:?}");

    let letters = eventually("identity, project and deploy have dead-lettered both events", || {
        let all = server.capsule(&["admin", "dead-letters", "list", "--json"]).ok().json();
        all.as_array().filter(|all| all.len() == 6).cloned()
    });
    assert!(letters.iter().all(|letter| letter["kind"] == "unreadable"), "{letters:?}");
    server.api("GET", &format!("/services/{service}"), Some(&token), None).ok();
    let first = text(&letters[0], "id");
    assert!(server.capsule(&["admin", "dead-letters", "replay", &first]).refused().err.contains("Discard it"));
    for letter in &letters {
        server.capsule(&["admin", "dead-letters", "discard", &text(letter, "id")]).ok();
    }
    assert_eq!(server.capsule(&["admin", "dead-letters", "list", "--json"]).ok().json(), serde_json::json!([]));
}

/// More events than a client prefetches.
const EVENTS: usize = 300;

fn held_up(client: &dyn Fn() -> Arc<dyn Transport>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let _inside = runtime.enter();
    let (server, asker) = (client(), client());
    let (open, taken) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeSet::new())));
    let (door, heard) = (open.clone(), taken.clone());
    server.serve(ServiceEndpoint {
        name: "slow",
        subjects: vec!["slow.ask"],
        kinds: vec!["slow.event"],
        handle_request: Arc::new(|body| Box::pin(std::future::ready(body))),
        handle_event: Arc::new(move |body, _| {
            let outcome = if door.load(Ordering::Relaxed) {
                heard.lock().unwrap_or_else(PoisonError::into_inner).insert(body);
                Ok(())
            } else {
                Err(Rejection::Temporary(Problem::unavailable("Not now.")))
            };
            Box::pin(std::future::ready(outcome))
        }),
        store_dead_letter: Arc::new(|_, why| panic!("nothing is given up: {why}")),
    });
    eventually("the broker is ready", || (server.is_ready() && asker.is_ready()).then_some(()));
    let ask = || {
        let request = OutgoingRequest { subject: "slow.ask", body: b"there?".to_vec(), timeout: Duration::from_secs(10) };
        runtime.block_on(asker.request(request))
    };
    eventually("it is served", || ask().ok());
    for n in 0..EVENTS {
        let event = OutgoingEvent {
            kind: "slow.event".into(),
            key: format!("key {}", n % 7),
            body: format!("event {n}").into_bytes(),
            signature: String::new(),
        };
        runtime.block_on(asker.publish(event)).expect("confirmed");
    }
    for _ in 0..50 {
        assert_eq!(ask().expect("an answer while events wait"), b"there?");
    }
    open.store(true, Ordering::Relaxed);
    eventually("every event is taken", || {
        let count = taken.lock().unwrap_or_else(PoisonError::into_inner).len();
        (count == EVENTS).then_some(())
    });
    runtime.block_on(async { tokio::join!(server.drain(), asker.drain()) });
}
