//! The same platform on PostgreSQL: one database for each service, the same migrations and queries.

use capsule_tests::{Postgres, Server, Shape, eventually, probe, with_shape};
use libtest_mimic::Trial;

use crate::attacks::quotas;
use crate::{access, commands, crashes, deployments, test, test_of_processes, with_failpoints};

fn on(name: &str, work: impl FnOnce() + Send + 'static) -> Trial {
    let name = format!("on PostgreSQL: {name}");
    if Postgres::programs().is_none() {
        return test(&format!("{name} (skipped: no PostgreSQL here)"), || {}).with_ignored_flag(true);
    }
    test_of_processes(&name, work)
}

pub fn trials() -> Vec<Trial> {
    let kills = crashes::KILLS.map(|(name, work)| with_failpoints(on(name, move || with_postgres(work))));
    let more = vec![
        on("every endpoint checks every role, non-members and unauthenticated requests", || with_postgres(access::all)),
        on("migrations are listed, validated and applied", || with_postgres(commands::migrations)),
        on("redeploys, restarts and rollbacks under load lose no request", || with_postgres(deployments::under_load)),
        on("quotas are enforced, and host names stay reserved for their organizations", || {
            with_postgres(quotas::bounded);
            with_postgres(quotas::hosts);
        }),
        on("an installation moves from SQLite to PostgreSQL without changes", || with_shape(&Shape::default(), moves_over)),
        on("an exhausted connection pool is reported and recovers", pool_is_used_up),
        on("applications keep running while the database is down, and Capsule recovers when it is back", database_dies),
    ];
    kills.into_iter().chain(more).collect()
}

fn with_postgres(work: impl FnOnce()) {
    let postgres = Postgres::start();
    with_shape(&Shape { settings: vec![format!("database.url={}", postgres.url())], ..Shape::default() }, work);
}

fn moves_over() {
    let postgres = Postgres::start();
    let mut server = Server::unstarted(&[]);
    let to = format!("database.url={}", postgres.url());
    let move_over = |server: &Server| server.capsule(&["migrate", "to-postgres", "--json", "--set", &to]);
    assert!(move_over(&server).refused().err.contains("no embedded databases"), "nothing to move is no success");
    server.start();
    let token = server.register("mover@example.com");
    let service = server.service(&token, "mine");
    let folder = probe("one");
    server.deploy(folder.path(), "app").ok();
    assert!(move_over(&server).refused().err.contains("already running"), "not while a server writes");
    server.stop();
    assert!(server.capsule(&["migrate", "to-postgres"]).refused().err.contains("Set database.url"));
    let moved = move_over(&server).ok().json();
    let rows = |moved: &serde_json::Value| {
        moved.as_array().expect("a list").iter().map(|row| row["rows"].as_u64().expect("a number")).sum::<u64>()
    };
    assert!(rows(&moved) > 20, "{moved}");
    assert_eq!(postgres.query("capsule_identity", "SELECT count(*) FROM users WHERE email = 'mover@example.com'"), ["1"]);
    // An interrupted copy is continued; a complete copy is only compared.
    let _ = postgres.query("postgres", "DROP DATABASE capsule_deploy");
    assert_eq!(move_over(&server).ok().json(), moved);
    assert_eq!(move_over(&server).ok().json(), moved);
    // Data from another source is not overwritten.
    let _ = postgres.query("capsule_identity", "UPDATE users SET name = 'other'");
    assert!(move_over(&server).refused().err.contains("not empty"));
    let _ = postgres.query("postgres", "DROP DATABASE capsule_identity");
    move_over(&server).ok();

    server.add_setting(&to);
    server.start();
    assert_eq!(server.get("app-production.localhost", "/").body, "version one");
    server.api("GET", &format!("/services/{service}"), Some(&token), None).ok();
    std::fs::write(folder.path().join("version"), "two").expect("written");
    server.deploy(folder.path(), "app").ok();
    assert_eq!(server.get("app-production.localhost", "/").body, "version two");
}

fn database_dies() {
    let mut postgres = Postgres::start();
    let server = Server::with(&[&format!("database.url={}", postgres.url())]);
    let folder = probe("one");
    server.deploy(folder.path(), "app").ok();
    let host = "app-production.localhost";
    postgres.kill();
    assert_eq!(server.get(host, "/").body, "version one");
    let status = server.capsule(&["status", folder.path().to_str().expect("a path")]).refused();
    assert!(!status.err.contains(postgres.password()), "{status:?}");
    postgres.resume();
    std::fs::write(folder.path().join("version"), "two").expect("written");
    eventually("it deploys again", || server.deploy(folder.path(), "app").success.then_some(()));
    assert_eq!(server.get(host, "/").body, "version two");
    assert!(!server.log_text().contains(postgres.password()), "the password is in the log");
    let checked = server.capsule(&["config", "check", "--set", &format!("database.url={}", postgres.url())]).ok();
    assert!(!checked.out.contains(postgres.password()), "{checked:?}");
}

fn pool_is_used_up() {
    let postgres = Postgres::start();
    let server = Server::with(&[&format!("database.url={}", postgres.url()), "database.connections=2"]);
    let token = server.register("early@example.com");
    let (exhausted, used) = ("capsule_database_exhausted_total", "capsule_database_connections_used{service=\"identity\"}");
    assert_eq!(server.metric(0, exhausted).unwrap_or_default(), 0.0);
    // While another session locks the table, every request waits with a connection of the pool.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            postgres.query("capsule_identity", "BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(25)")
        });
        std::thread::sleep(std::time::Duration::from_secs(1));
        let late: Vec<_> = (0..6)
            .map(|n| {
                let body = serde_json::json!({"email": format!("late{n}@example.com"), "password": "a long enough one 1"});
                let server = &server;
                scope.spawn(move || server.api("POST", "/auth/register", None, Some(&body)))
            })
            .collect();
        eventually("the exhausted pool is reported", || server.metric(0, exhausted).filter(|count| *count > 0.0));
        let ready = server.private("/health/ready");
        assert_eq!(ready.status, 503, "{ready:?}");
        assert!(ready.body.contains("\"identity database\":\"missing\""), "{ready:?}");
        assert_eq!(server.metric(0, used), Some(2.0));
        for answer in late {
            let answer = answer.join().expect("an answer");
            assert!([201, 200, 503, 504].contains(&answer.status), "{answer:?}");
        }
    });
    eventually("it is ready again", || (server.private("/health/ready").status == 200).then_some(()));
    server.api("GET", "/auth/me", Some(&token), None).ok();
}
