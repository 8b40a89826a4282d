//! The cost of splitting the server into several processes: requests over each broker, the relay of events, and the
//! gateway in each shape, compared with one process on embedded defaults.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use capsule_bus::{Bus, Call, Context, Router, Service};
use capsule_contracts::identity::RefreshToken;
use capsule_contracts::project::Location;
use capsule_contracts::{Problem, Target};
use capsule_store::{Databases, Keyring, Store};
use capsule_tests::{Kafka, Postgres, RabbitMq, Redis, Server, Shape, eventually, text, with_shape};
use serde_json::json;

/// The duration of one measurement.
const DURATION: Duration = Duration::from_secs(3);
/// The number of concurrent requests in measurements of throughput.
const CONCURRENCY: usize = 16;
/// The number of runs of each measurement; the median is printed.
const RUNS: usize = 3;

/// A service that replies with the content of the request.
struct Echo {
    store: Arc<Store>,
    bus: Bus,
}

impl Service for Echo {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }
    fn bus(&self) -> &Bus {
        &self.bus
    }
    async fn locate(&self, _: &Target) -> Result<Option<Location>, Problem> {
        Ok(None)
    }
}

/// Measures request and reply on the bus, with a few hundred bytes each: in one process, and over each broker.
pub fn bus() -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let inside = runtime.enter();
    let folder = tempfile::tempdir().expect("a folder");
    let keyring = Keyring::open(&folder.path().join("key")).expect("a key");
    let (rabbitmq, kafka) = (RabbitMq::start(), Kafka::start());

    let within = Bus::new();
    let url = rabbitmq.url();
    let over_rabbitmq =
        || Arc::new(capsule_rabbitmq::RabbitMq::connect(&url, "bench", &[])) as Arc<dyn capsule_bus::transport::Transport>;
    let over_kafka = || {
        let client = capsule_kafka::Kafka::connect(&kafka.url(), "bench").expect("a client");
        Arc::new(client) as Arc<dyn capsule_bus::transport::Transport>
    };
    let bus = |transport| Bus::with_transport(transport, &keyring, String::new());
    let shapes = [
        ("in process", within.clone(), within),
        ("RabbitMQ", bus(over_rabbitmq()), bus(over_rabbitmq())),
        ("Kafka", bus(over_kafka()), bus(over_kafka())),
    ];
    let mut peer = None;
    let lines = shapes
        .into_iter()
        .enumerate()
        .map(|(at, (name, client, server))| {
            let databases = Databases::Embedded(folder.path().join(at.to_string()));
            std::fs::create_dir_all(folder.path().join(at.to_string())).expect("made");
            let open = Store::open(&databases, "identity", keyring.clone(), &[("bus", capsule_bus::MIGRATIONS)]);
            let store = Arc::new(runtime.block_on(open).expect("opens"));
            let echo = Arc::new(Echo { store, bus: server.clone() });
            Router::new(echo).handle(|_, call: Call<RefreshToken>| async move { Err(Problem::conflict(call.message.refresh_token)) }).start();
            server.start_event_delivery();
            let (alone, together) = runtime.block_on(request_reply(&client));
            let (alone_peer, together_peer) = *peer.get_or_insert((alone[alone.len() / 2], together));
            let p50 = alone[alone.len() / 2];
            format!(
                "{name:<10} request/reply p50 {:>7.3} ms ({:.1}x), p95 {:>7.3} ms; {together:>7.0}/s with {CONCURRENCY} at a time ({:.3}x)",
                milliseconds(p50),
                p50.as_secs_f64() / alone_peer.as_secs_f64(),
                milliseconds(alone[alone.len() * 95 / 100]),
                together / together_peer,
            )
        })
        .collect();
    drop(inside);
    // Does not wait for the brokers' clients, whose brokers are about to stop.
    runtime.shutdown_background();
    lines
}

/// Returns the sorted times of sequential requests, and the number of concurrent requests per second.
async fn request_reply(client: &Bus) -> (Vec<Duration>, f64) {
    let message = RefreshToken { refresh_token: "x".repeat(400) };
    let request = || async {
        let context = Context::background("bench");
        let problem = client.request(&context, &message).await.expect_err("an echo");
        assert_eq!(problem.detail, message.refresh_token, "the echo answers");
    };
    let end = Instant::now() + Duration::from_secs(30);
    while client.request(&Context::background("bench"), &message).await.is_err_and(|problem| problem.status != 409) {
        assert!(Instant::now() < end, "the broker is not ready");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut alone = Vec::new();
    let end = Instant::now() + DURATION;
    while Instant::now() < end {
        let began = Instant::now();
        request().await;
        alone.push(began.elapsed());
    }
    alone.sort_unstable();
    let (count, end) = (AtomicU64::new(0), Instant::now() + DURATION);
    let clients = (0..CONCURRENCY).map(|_| async {
        while Instant::now() < end {
            request().await;
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    futures_util::future::join_all(clients).await;
    (alone, count.into_inner() as f64 / DURATION.as_secs_f64())
}

/// Measures the rate at which the relay empties a full outbox.
pub fn relay() -> Vec<String> {
    const EVENTS: usize = 5000;
    each_shape(true, |name, server, postgres| {
        let insert = format!(
            "INSERT INTO outbox (id, kind, envelope) SELECT gen_random_uuid(), 'bench.event', json_build_object('specversion', '1.0', \
             'id', gen_random_uuid(), 'source', '/capsule/project', 'type', 'bench.event', 'subject', gen_random_uuid(), \
             'time', '2026-01-01T00:00:00Z', 'dataschema', '/s', 'correlationid', 'c', 'data', json_build_object('n', n)) \
             FROM generate_series(1, {EVENTS}) n"
        );
        let postgres = postgres.expect("on PostgreSQL");
        let _ = postgres.query("capsule_project", &insert);
        let began = Instant::now();
        eventually("all events are relayed", || {
            (postgres.query("capsule_project", "SELECT count(*) FROM outbox WHERE relayed_at IS NULL") == ["0"]).then_some(())
        });
        let _ = server;
        format!("{name:<34} {:>6.0} events/s", EVENTS as f64 / began.elapsed().as_secs_f64())
    })
}

/// Measures the gateway in each shape.
pub fn shapes() -> Vec<String> {
    let mut baseline: Option<(f64, f64)> = None;
    each_shape(false, |name, server, _| {
        let token = server.register("bench@example.com");
        let body = json!({"name": "Bench"});
        let organization = text(&server.api("POST", "/organizations", Some(&token), Some(&body)).ok(), "id");
        let path = format!("/organizations/{organization}");
        let before = processor_seconds(server);
        let began = Instant::now();
        let read = || server.api("GET", &path, Some(&token), None).ok();
        let write = || server.api("PATCH", "/auth/me", Some(&token), Some(&json!({"name": "Bench"}))).ok();
        let alone = median((0..RUNS).map(|_| milliseconds(alone(read))));
        let (reads, writes) = (median((0..RUNS).map(|_| together(read))), median((0..RUNS).map(|_| together(write))));
        let cores = (processor_seconds(server) - before) / began.elapsed().as_secs_f64();
        let (read_ratio, write_ratio) = baseline.map_or((1.0, 1.0), |(one, other)| (reads / one, writes / other));
        baseline.get_or_insert((reads, writes));
        format!(
            "{name:<34} read {reads:>5.0}/s ({read_ratio:.2}), alone {alone:.2} ms; write {writes:>5.0}/s ({write_ratio:.2}); {cores:.2} cores, {:.0} MB in {} process(es)",
            megabytes(server),
            server.size()
        )
    })
}

/// Calls `measure` with a server of each shape.
fn each_shape(on_postgres: bool, measure: impl FnMut(&str, &Server, Option<&Postgres>) -> String) -> Vec<String> {
    let mut measure = measure;
    let mut lines = Vec::new();
    let unlimited = "limits.requests_per_minute=0".to_owned();
    let postgres = on_postgres.then(Postgres::start);
    let mut settings = vec![unlimited.clone()];
    settings.extend(postgres.as_ref().map(|postgres| format!("database.url={}", postgres.url())));
    let server = with_shape(&Shape { settings, ..Shape::default() }, Server::default);
    let database = if on_postgres { "PostgreSQL" } else { "SQLite" };
    lines.push(measure(&format!("one process, {database}"), &server, postgres.as_ref()));
    drop((server, postgres));
    for kafka in [false, true] {
        let (postgres, redis) = (Postgres::start(), Redis::start());
        let brokers = if kafka { (None, Some(Kafka::start())) } else { (Some(RabbitMq::start()), None) };
        let broker = match &brokers {
            (Some(server), _) => server.url(),
            (_, Some(server)) => server.url(),
            _ => continue,
        };
        let urls = [("database", postgres.url()), ("redis", redis.url()), ("broker", broker)];
        let mut settings = urls.map(|(name, url)| format!("{name}.url={url}")).to_vec();
        settings.push(unlimited.clone());
        let server = with_shape(&Shape::split(settings), Server::default);
        let name = if kafka { "split, Kafka, PostgreSQL, Redis" } else { "split, RabbitMQ, PostgreSQL, Redis" };
        lines.push(measure(name, &server, Some(&postgres)));
    }
    lines
}

/// The median time of sequential requests.
fn alone<T>(request: impl Fn() -> T) -> Duration {
    let mut all = Vec::new();
    let end = Instant::now() + DURATION;
    while Instant::now() < end {
        let began = Instant::now();
        request();
        all.push(began.elapsed());
    }
    all.sort_unstable();
    all[all.len() / 2]
}

/// The number of concurrent requests per second.
fn together<T>(request: impl Fn() -> T + Sync) -> f64 {
    let count = AtomicU64::new(0);
    let end = Instant::now() + DURATION;
    std::thread::scope(|scope| {
        for _ in 0..CONCURRENCY {
            scope.spawn(|| {
                while Instant::now() < end {
                    request();
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    count.load(Ordering::Relaxed) as f64 / DURATION.as_secs_f64()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The CPU time that the server's processes have used, in seconds.
fn processor_seconds(server: &Server) -> f64 {
    let ticks = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after: Vec<u64> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().filter_map(|word| word.parse().ok()).collect();
        // utime and stime, the fields 14 and 15 of proc_pid_stat(5); the state before them is not a number.
        let at = |place: usize| after.get(place).copied().unwrap_or_default();
        at(10) + at(11)
    };
    (0..server.size()).map(|at| ticks(server.pid_of(at)) as f64 / 100.0).sum()
}

fn megabytes(server: &Server) -> f64 {
    let pss = |pid: u32| {
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let line = rollup.lines().find(|line| line.starts_with("Pss:")).unwrap_or_default().to_owned();
        line.split_whitespace().nth(1).and_then(|text| text.parse::<f64>().ok()).unwrap_or_default()
    };
    (0..server.size()).map(|at| pss(server.pid_of(at)) * 1024.0 / 1e6).sum()
}
