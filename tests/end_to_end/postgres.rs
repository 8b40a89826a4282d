//! The same platform on PostgreSQL: one database for each service, the same migrations and queries.

use capsule_tests::{Postgres, Server, Shape, eventually, everywhere, probe};
use libtest_mimic::Trial;

use crate::{access, commands, crashes, deployments, test, test_of_processes};

pub fn trials() -> Vec<Trial> {
    let on = |name: &str, work: fn()| {
        let name = format!("on PostgreSQL: {name}");
        if Postgres::programs().is_none() {
            return test(&format!("{name} (skipped: no PostgreSQL here)"), || {}).with_ignored_flag(true);
        }
        test_of_processes(&name, work)
    };
    vec![
        on("every endpoint, every role, a foreigner and nobody", || with_postgres(access::all)),
        on("migrations are shown, checked and applied", || with_postgres(commands::migrations)),
        on("redeploys, restarts and rollbacks under load lose no request", || with_postgres(deployments::under_load)),
        on("a server killed before building ends the deployment when it is back", || {
            with_postgres(|| crashes::killed_in("building", "before"));
        }),
        on("a server killed after active ends the deployment when it is back", || {
            with_postgres(|| crashes::killed_in("active", "after"));
        }),
        on("applications go on while the database is dead, and Capsule goes on when it is back", database_dies),
    ]
}

fn with_postgres(work: impl FnOnce()) {
    let postgres = Postgres::start();
    everywhere(&Shape { settings: vec![format!("database.url={}", postgres.url())], ..Shape::default() }, work);
}

fn database_dies() {
    let mut postgres = Postgres::start();
    let server = Server::with(&[&format!("database.url={}", postgres.url())]);
    let folder = probe("one");
    server.deploy(folder.path(), "app").ok();
    let host = "app-production.localhost";
    postgres.kill();
    assert_eq!(server.get(host, "/").body, "version one");
    let told = server.capsule(&["status", folder.path().to_str().expect("a path")]).refused();
    assert!(!told.err.contains(postgres.password()), "{told:?}");
    postgres.resume();
    std::fs::write(folder.path().join("version"), "two").expect("written");
    eventually("it deploys again", || server.deploy(folder.path(), "app").success.then_some(()));
    assert_eq!(server.get(host, "/").body, "version two");
    assert!(!server.log_text().contains(postgres.password()), "the password is in the log");
    let checked = server.capsule(&["config", "check", "--set", &format!("database.url={}", postgres.url())]).ok();
    assert!(!checked.out.contains(postgres.password()), "{checked:?}");
}
