//! Kills of the control plane, in every phase and at random moments: applications keep running.

use std::time::Duration;

use capsule_tests::{Server, eventually, kill, probe, processes};
use libtest_mimic::Trial;

use crate::load::Load;
use crate::{test_of_failpoints, test_of_processes as test};

const HOST: &str = "app-production.localhost";
const PHASES: [&str; 7] =
    ["pulling_source", "building", "copying_files", "creating_symlinks", "updating_routes", "health_check", "active"];

/// The tests with failpoints that also run on PostgreSQL and on every kind of cluster.
pub const KILLS: [(&str, fn()); 2] = [
    ("a server killed before building finishes the deployment after its restart", || killed_in("building", "before")),
    ("a server killed after active finishes the deployment after its restart", || killed_in("active", "after")),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        test("applications keep their process ids and lose no log line while the server is down", processes_outlive),
        test("no request is lost while the server is killed and restarted", ingress_outlives),
        test("a deployment under load succeeds although the server is killed at random moments", random_kills),
        test("a killed ingress is restarted with the same port and routing table", ingress_comes_back),
        test("applications start again after a restart of the host", everything_comes_back),
    ];
    for phase in PHASES {
        for moment in ["before", "after"] {
            trials.push(test_of_failpoints(
                &format!("a server killed {moment} {phase} finishes the deployment after its restart"),
                move || {
                    killed_in(phase, moment);
                },
            ));
        }
    }
    trials
}

fn deployed(version: &str) -> (Server, tempfile::TempDir) {
    let server = Server::with(&["deploy.drain_seconds=5"]);
    let folder = probe(version);
    server.deploy(folder.path(), "app").ok();
    (server, folder)
}

fn pids(server: &Server, folder: &tempfile::TempDir) -> Vec<u64> {
    server.instances(folder.path()).iter().filter_map(|instance| instance["pid"].as_u64()).collect()
}

fn processes_outlive() {
    let (mut server, folder) = deployed("one");
    let before = pids(&server, &folder);
    assert_eq!(server.get(HOST, "/count?lines=600").status, 200);
    std::thread::sleep(Duration::from_millis(300));
    server.kill();
    std::thread::sleep(Duration::from_millis(1500));
    server.start();
    assert_eq!(pids(&server, &folder), before);
    let at = folder.path().to_str().expect("a path").to_owned();
    let logs = eventually("all is counted", || {
        let logs = server.capsule(&["logs", &at]).ok();
        logs.out.contains("line 599").then_some(logs.out)
    });
    let numbers: Vec<u32> = logs.lines().filter_map(|line| line.rsplit_once("line ")?.1.parse().ok()).collect();
    assert_eq!(numbers, (0..600).collect::<Vec<_>>());
}

fn ingress_outlives() {
    let (mut server, folder) = deployed("one");
    let load = Load::start(&server, HOST);
    let before = pids(&server, &folder);
    for _ in 0..3 {
        server.kill();
        std::thread::sleep(Duration::from_millis(300));
        server.start();
    }
    server.stop();
    std::thread::sleep(Duration::from_millis(300));
    server.start();
    load.stop();
    assert_eq!(pids(&server, &folder), before);
}

/// Starts a deployment; the server dies at this point of it and is started again.
fn killed_in(phase: &str, moment: &str) {
    let (mut server, folder) = deployed("one");
    let before = pids(&server, &folder);
    server.stop();
    server.start_with_failpoint(&format!("{phase}:{moment}"));
    let load = Load::start(&server, HOST);
    std::fs::write(folder.path().join("version"), "two").expect("written");
    let at = folder.path().to_str().expect("a path");
    let ran = server.capsule(&["deploy", at, "--yes", "--detach"]);
    // With a broker, the server may die before it replies. An accepted deployment continues.
    assert!(ran.success || ran.err.contains("was not answered"), "{ran:?}");
    server.wait_for_end();
    let answer = server.get(HOST, "/").body;
    assert!(["version one", "version two"].contains(&answer.as_str()), "{answer}");
    // After the promotion the server drains the old instance, which may end before the server does.
    let drains = (phase, moment) == ("active", "after");
    let old_runs = before.iter().all(|pid| std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert!(drains || old_runs, "the old instance ended");
    server.start();
    settled(&server, &folder, "two");
    load.stop();
}

fn settled(server: &Server, folder: &tempfile::TempDir, version: &str) {
    eventually("the deployment is settled", || {
        let status = server.status(folder.path());
        let newest = &status["deployments"][0];
        assert_ne!(newest["status"], "failed", "{newest}");
        (newest["status"] == "running").then_some(())
    });
    assert_eq!(server.get(HOST, "/").body, format!("version {version}"));
    eventually("only the new instance is left", || (pids(server, folder).len() == 1).then_some(()));
    eventually("nothing is left lying about", || {
        (server.entries("work", "") == 0 && server.entries("run/i", ".sock") == 1).then_some(())
    });
}

fn random_kills() {
    let (mut server, folder) = deployed("0");
    let load = Load::start(&server, HOST);
    // A fixed sequence of delays, so that a failure can be reproduced.
    let mut delay: u64 = 7;
    for version in 1..=8 {
        std::fs::write(folder.path().join("version"), version.to_string()).expect("written");
        let at = folder.path().to_str().expect("a path");
        server.capsule(&["deploy", at, "--yes", "--detach"]).ok();
        delay = delay * 131 % 509;
        std::thread::sleep(Duration::from_millis(delay));
        server.kill();
        server.start();
        settled(&server, &folder, &version.to_string());
    }
    load.stop();
}

fn ingress_comes_back() {
    let (server, _folder) = deployed("one");
    let port = server.port();
    let found = processes(&format!("capsule ingress --data {}", server.data().canonicalize().expect("there").display()));
    assert_eq!(found.len(), 1);
    kill(found[0]);
    eventually("it answers again", || server.try_get(HOST, "/").ok().filter(|reply| reply.body == "version one"));
    assert_eq!(server.port(), port);
}

fn everything_comes_back() {
    let (mut server, folder) = deployed("one");
    server.capsule(&["server", "down"]).ok();
    server.wait_for_end();
    assert!(server.try_get(HOST, "/").is_err(), "the ingress still answers");
    server.start();
    eventually("it answers again", || server.try_get(HOST, "/").ok().filter(|reply| reply.body == "version one"));
    assert_eq!(pids(&server, &folder).len(), 1);
}
