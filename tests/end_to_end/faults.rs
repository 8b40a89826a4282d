//! What a cluster survives: the death of any process, of the broker, of the database, at random moments
//! under load; a leader that was merely asleep.
//!
//! `CAPSULE_FAULT_SECONDS` says for how long (40), `CAPSULE_FAULT_SEED` which moments.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use capsule_tests::{
    Kafka, Namespace, Postgres, RabbitMq, Redis, Server, Shape, Signal, eventually, probe, signal, text, with_shape,
};
use libtest_mimic::Trial;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use crate::{test, test_of_processes};

pub fn trials() -> Vec<Trial> {
    let installed = Postgres::programs().is_some();
    vec![
        trial("RabbitMQ: no command is lost or carried out twice, whatever dies", installed && RabbitMq::is_installed(), || {
            whatever_dies(Broker::RabbitMq(RabbitMq::start()));
        }),
        trial("Kafka: no command is lost or carried out twice, whatever dies", installed && Kafka::is_installed(), || {
            whatever_dies(Broker::Kafka(Kafka::start()));
        }),
        trial(
            "a stopping process finishes its requests, and its successor handles the waiting ones",
            installed && RabbitMq::is_installed(),
            stopping_process,
        ),
        trial("a process recovers from a network partition", installed && RabbitMq::is_installed(), network_partition),
        trial(
            "a paused leader is replaced, and cannot write when it resumes",
            installed && RabbitMq::is_installed(),
            paused_leader,
        ),
    ]
}

fn trial(name: &str, installed: bool, work: fn()) -> Trial {
    if installed {
        return test_of_processes(name, work);
    }
    test(&format!("{name} (skipped: no PostgreSQL or broker here)"), || {}).with_ignored_flag(true)
}

/// Stops the load when dropped, also if the test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

enum Broker {
    RabbitMq(RabbitMq),
    Kafka(Kafka),
}

impl Broker {
    fn url(&self) -> String {
        match self {
            Self::RabbitMq(server) => server.url(),
            Self::Kafka(server) => server.url(),
        }
    }

    fn die_and_return(&mut self, away: Duration) {
        match self {
            Self::RabbitMq(server) => {
                server.kill();
                std::thread::sleep(away);
                server.resume();
            }
            Self::Kafka(server) => {
                server.kill();
                std::thread::sleep(away);
                server.resume();
            }
        }
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn whatever_dies(mut broker: Broker) {
    let seed = setting("CAPSULE_FAULT_SEED", rand::rng().random());
    let seconds = setting("CAPSULE_FAULT_SECONDS", 40);
    println!("CAPSULE_FAULT_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut postgres = Postgres::start();
    let mut redis = Redis::start();
    let settings = [("database", postgres.url()), ("broker", broker.url()), ("redis", redis.url()), ("limits", "0".into())];
    let settings = settings.map(|(name, value)| match name {
        "limits" => format!("limits.requests_per_minute={value}"),
        name => format!("{name}.url={value}"),
    });
    // No limit on organizations and builds.
    let quotas = ["limits.organizations_per_user=100000", "quotas.builds_per_hour=100000", "quotas.builds_per_day=100000"];
    let server = with_shape(&Shape::doubled(settings.to_vec()), || Server::with(&quotas));
    let token = server.register("faults@example.com");
    let folder = probe("zero");
    let service = server.service(&token, "app");
    let upload = upload(&server, &token, &service, folder.path());

    let server = RwLock::new(server);
    let (over, accepted) = (AtomicBool::new(false), Mutex::new(BTreeMap::new()));
    let deployments = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&over);
        for worker in 0..2 {
            let (server, over, accepted, token) = (&server, &over, &accepted, &token);
            scope.spawn(move || {
                for n in 0.. {
                    let name = format!("organization {worker}-{n}");
                    if let Some(id) = until_done(server, over, "/organizations", token, &name, &json!({"name": name})) {
                        accepted.lock().expect("alive").insert(name, id);
                    }
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        let (server, over, token, deployments) = (&server, &over, &token, &deployments);
        let (service, upload) = (&service, &upload);
        scope.spawn(move || {
            for n in 0.. {
                let path = format!("/services/{service}/deploy");
                let body = json!({"upload_id": upload, "environment": "production"});
                let key = format!("deployment {n}");
                if let Some(id) = until_done(server, over, &path, token, &key, &body) {
                    deployments.lock().expect("alive").push(id);
                }
                if over.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::sleep(Duration::from_secs(2));
            }
        });
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(random.random_range(500..3000)));
            let away = Duration::from_millis(random.random_range(0..2000));
            match random.random_range(0..11) {
                0 => {
                    println!("the broker dies");
                    broker.die_and_return(away);
                }
                1 => {
                    println!("the database dies");
                    postgres.kill();
                    std::thread::sleep(away);
                    postgres.resume();
                }
                2 => {
                    println!("the cache dies");
                    redis.kill();
                    std::thread::sleep(away);
                    redis.resume();
                }
                _ => {
                    let mut server = server.write().expect("alive");
                    let at = random.random_range(0..server.size());
                    println!("process {at} dies");
                    server.restart_process(at);
                }
            }
        }
        server.read().expect("alive").wait_until_ready();
    });

    let mut server = server.into_inner().expect("alive");
    server.start();
    let (accepted, deployments) = (accepted.into_inner().expect("alive"), deployments.into_inner().expect("alive"));
    println!("{} organizations and {} deployments were accepted", accepted.len(), deployments.len());
    assert!(accepted.len() > 3 && !deployments.is_empty(), "hardly anything was accepted");
    nothing_is_lost_or_done_twice(&server, &postgres, &token, &accepted);
    every_deployment_ends(&server, &token, &service, &deployments);
}

/// Repeats a command with one idempotency key until it gets a reply. Returns the created resource, if the reply has it.
fn until_done(
    server: &RwLock<Server>,
    over: &AtomicBool,
    path: &str,
    token: &str,
    key: &str,
    body: &serde_json::Value,
) -> Option<String> {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let reply = server.read().expect("alive").try_command(path, token, key, body);
        match reply {
            Ok(reply) if (200..300).contains(&reply.status) => return Some(text(&reply.json(), "id")),
            // The command was carried out, and its reply is lost.
            Ok(reply) if reply.status == 409 => return None,
            Ok(reply) => assert!(reply.status >= 500 || reply.status == 401, "{path}: {reply:?}"),
            Err(_) => {}
        }
        assert!(Instant::now() < deadline, "{path} {key}: no answer for two minutes");
        // A command that was never accepted may be missing.
        if over.load(Ordering::Relaxed) {
            return None;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn nothing_is_lost_or_done_twice(server: &Server, postgres: &Postgres, token: &str, accepted: &BTreeMap<String, String>) {
    let all = server.list("/organizations", token);
    let all: Vec<(String, String)> = all.iter().map(|item| (text(item, "name"), text(item, "id"))).collect();
    for (name, id) in accepted {
        let made: Vec<&String> = all.iter().filter(|(known, _)| known == name).map(|(_, id)| id).collect();
        assert_eq!(made, [id], "{name}");
    }
    let mut names: Vec<&String> = all.iter().map(|(name, _)| name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all.len(), "something was made twice: {all:?}");
    // Every event was published and consumed by every subscribed service.
    let published = |kind: &str| format!("SELECT id FROM outbox WHERE kind = '{kind}' ORDER BY id");
    let consumed = |kind: &str| format!("SELECT id FROM inbox WHERE kind = '{kind}' AND state = 'done' ORDER BY id");
    let memberships = postgres.query("capsule_organization", &published("organization.membership_changed"));
    assert!(memberships.len() >= accepted.len());
    for service in ["project", "deploy", "organization"] {
        let database = format!("capsule_{service}");
        eventually(&format!("{service} has consumed every membership event"), || {
            (postgres.query(&database, &consumed("organization.membership_changed")) == memberships).then_some(())
        });
    }
    for service in ["identity", "organization", "project", "deploy"] {
        let database = format!("capsule_{service}");
        let dead = postgres.query(&database, "SELECT kind || ': ' || coalesce(last_error, '') FROM inbox WHERE state = 'dead'");
        assert!(dead.is_empty(), "dead letters of {service}: {dead:?}");
    }
}

fn every_deployment_ends(server: &Server, token: &str, service: &str, accepted: &[String]) {
    let all = eventually("every deployment has ended", || {
        let page = server.api("GET", &format!("/deployments?service_id={service}&limit=100"), Some(token), None).ok();
        let all = page["items"].as_array().expect("a list").clone();
        let ended = |item: &serde_json::Value| !["pending", "building", "deploying"].contains(&text(item, "status").as_str());
        all.iter().all(ended).then_some(all)
    });
    for id in accepted {
        assert_eq!(all.iter().filter(|item| text(item, "id") == *id).count(), 1, "{id} in {all:?}");
    }
    let mut numbers: Vec<i64> = all.iter().filter_map(|item| item["number"].as_i64()).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), all.len(), "two deployments of one number");
}

/// The id of a complete upload of a folder.
fn upload(server: &Server, token: &str, service: &str, folder: &std::path::Path) -> String {
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_dir_all(".", folder).expect("appended");
    let archive = archive.into_inner().expect("finished");
    let path = format!("/uploads?service_id={service}");
    text(&server.api_raw("POST", &path, Some(token), "application/x-tar", Some(archive)).ok(), "id")
}

fn paused_leader() {
    let (postgres, broker) = (Postgres::start(), RabbitMq::start());
    let settings = vec![format!("database.url={}", postgres.url()), format!("broker.url={}", broker.url())];
    let server = with_shape(&Shape::split(settings), || Server::with(&[]));
    let folder = probe("one");
    server.deploy(folder.path(), "app").ok();
    let leads = |at: usize| server.metric(at, "capsule_leader{service=\"deploy\"}") == Some(1.0);
    // Indexes of the processes in the shape.
    let (leader, other) = if leads(3) { (3, 4) } else { (4, 3) };
    assert!(leads(leader) && !leads(other), "one of both leads");
    let term = || postgres.query("capsule_deploy", "SELECT token FROM leases")[0].parse::<i64>().expect("a number");
    let before = term();

    signal(server.pid_of(leader), Signal::STOP);
    let slept = Instant::now();
    eventually("the other one leads", || leads(other).then_some(()));
    assert!(slept.elapsed() < Duration::from_secs(30), "after {:?}", slept.elapsed());
    assert_eq!(term(), before + 1);
    std::fs::write(folder.path().join("version"), "two").expect("written");
    server.deploy(folder.path(), "app").ok();

    signal(server.pid_of(leader), Signal::CONT);
    // The former leader resumes in the middle of its work: its writes are rejected.
    std::fs::write(folder.path().join("version"), "three").expect("written");
    server.deploy(folder.path(), "app").ok();
    eventually("it knows that it leads no more", || (!leads(leader)).then_some(()));
    assert_eq!(server.get("app-production.localhost", "/").body, "version three");
    assert_eq!(term(), before + 1, "the leader changed exactly once");
    eventually("the old instances are gone", || (server.instances(folder.path()).len() == 1).then_some(()));
}

/// The gateway runs in its own network namespace, with one link to the other processes.
fn network_partition() {
    let (namespace, postgres, broker) = (Namespace::create(), Postgres::start(), RabbitMq::start_at(Namespace::HOST));
    let settings = vec![format!("database.url={}", postgres.url()), format!("broker.url={}", broker.url())];
    let shape = Shape { namespace: Some(namespace.name().to_owned()), ..Shape::split(settings) };
    let server = RwLock::new(with_shape(&shape, Server::default));
    let token = server.read().expect("alive").admin();
    let (over, mut accepted) = (AtomicBool::new(false), BTreeMap::new());
    let make = |name: String| {
        let id = until_done(&server, &over, "/organizations", &token, &name, &json!({"name": name}));
        id.map(|id| (name, id))
    };
    accepted.extend(make("before".into()));
    for round in 0..2 {
        std::thread::scope(|scope| {
            // In flight when the link is disconnected, and answered after it is reconnected.
            let begun: Vec<_> = (0..4).map(|n| scope.spawn(move || make(format!("round {round}, {n}")))).collect();
            std::thread::sleep(Duration::from_millis(30));
            namespace.disconnect();
            std::thread::sleep(Duration::from_secs(if round == 0 { 3 } else { 15 }));
            namespace.reconnect();
            accepted.extend(begun.into_iter().filter_map(|thread| thread.join().expect("it is answered")));
        });
        accepted.extend(make(format!("after {round}")));
    }
    assert!(accepted.len() >= 3, "{accepted:?}");
    let server = server.into_inner().expect("alive");
    server.wait_until_ready();
    nothing_is_lost_or_done_twice(&server, &postgres, &token, &accepted);
}

/// The clients repeat nothing: each command must get exactly one successful reply.
fn stopping_process() {
    let (postgres, broker) = (Postgres::start(), RabbitMq::start());
    let settings = vec![
        format!("database.url={}", postgres.url()),
        format!("broker.url={}", broker.url()),
        "limits.sign_ins_per_minute=0".into(),
    ];
    let server = with_shape(&Shape::split(settings), Server::default);
    server.register_first_account();
    let port = server.port();
    let server = Mutex::new(server);
    let over = AtomicBool::new(false);
    let registered = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3)
            .map(|worker| {
                let over = &over;
                scope.spawn(move || {
                    let mut count = 0;
                    while !over.load(Ordering::Relaxed) {
                        let body = json!({"email": format!("{worker}-{count}@example.com"), "password": "a long enough one 1"});
                        let reply = capsule_tests::post(port, "/auth/register", &body);
                        assert_eq!(reply.status, 201, "{reply:?}");
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        for _ in 0..3 {
            std::thread::sleep(Duration::from_secs(1));
            // The index of the only identity process in the shape.
            server.lock().expect("alive").replace_process(0);
        }
        server.lock().expect("alive").wait_until_ready();
        over.store(true, Ordering::Relaxed);
        workers.into_iter().map(|worker| worker.join().expect("no command failed")).sum::<usize>()
    });
    assert!(registered > 10, "{registered}");
    let known = postgres.query("capsule_identity", "SELECT count(*) FROM users WHERE email LIKE '%-%@example.com'");
    assert_eq!(known, [registered.to_string()]);
}
