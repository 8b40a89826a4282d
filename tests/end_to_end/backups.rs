//! Backups of the installation. The drill restores everything elsewhere and compares it.

use std::collections::BTreeMap;
use std::path::Path;

use capsule_tests::{Bucket, Postgres, Server, Shape, eventually, probe, text, with_shape};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{test, test_of_processes};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        test_of_processes("drill: a running server is backed up, and restored elsewhere with one command", || drill("")),
        test("a damaged backup, or one opened with another key, fails verification", damage),
        test("the server makes scheduled backups", schedule),
        test("backups to S3 can be listed, verified and restored", bucket),
    ];
    let name = "drill: a backup from PostgreSQL is restored to SQLite";
    trials.push(if Postgres::programs().is_some() {
        test_of_processes(name, || {
            let postgres = Postgres::start();
            drill(&format!("database.url={}", postgres.url()));
        })
    } else {
        test(&format!("{name} (skipped: no PostgreSQL here)"), || {}).with_ignored_flag(true)
    });
    trials
}

/// API replies that must be equal before the backup and after the restore.
fn seen(server: &Server, token: &str) -> BTreeMap<&'static str, Value> {
    ["/auth/me", "/organizations", "/services", "/deployments"]
        .map(|path| {
            let query = match path {
                "/services" | "/deployments" => format!("{path}?{}", first(server, token, path)),
                path => path.to_owned(),
            };
            (path, server.api("GET", &query, Some(token), None).ok())
        })
        .into()
}

/// The query parameter that this list requires.
fn first(server: &Server, token: &str, path: &str) -> String {
    let id = |path: &str| text(&server.api("GET", path, Some(token), None).ok()["items"][0], "id");
    let organization = id("/organizations");
    let project = id(&format!("/projects?organization_id={organization}"));
    if path == "/services" {
        return format!("project_id={project}");
    }
    format!("service_id={}", id(&format!("/services?project_id={project}")))
}

fn drill(database: &str) {
    let shape = Shape {
        settings: Some(database).filter(|text| !text.is_empty()).map(str::to_owned).into_iter().collect(),
        ..Shape::default()
    };
    let place = tempfile::tempdir().expect("a folder");
    let at = place.path().to_str().expect("a path").to_owned();
    let server = with_shape(&shape, Server::default);
    let backup = |server: &Server, arguments: &[&str]| {
        server.capsule_with_settings(&[&["backup"], arguments, &["--at", &at, "--json"]].concat(), &[])
    };
    let token = server.admin();
    let folder = probe("one");
    server.deploy(folder.path(), "app").ok();
    let full = backup(&server, &["create"]).ok().json();
    assert!(text(&full, "id").ends_with("-full"), "there is nothing to go on from: {full}");
    std::fs::write(folder.path().join("version"), "two").expect("written");
    server.deploy(folder.path(), "app").ok();
    let environment = json!({"items": server.api("GET", "/organizations", Some(&token), None).ok()["items"]});
    let incremental = backup(&server, &["create"]).ok().json();
    assert!(text(&incremental, "id").ends_with("-incremental"));
    assert!(incremental["bytes"].as_u64() < full["bytes"].as_u64(), "only what is new: {incremental} after {full}");
    let listed = backup(&server, &["list"]).ok().json();
    assert_eq!(listed.as_array().map(Vec::len), Some(2), "{listed}");
    backup(&server, &["verify"]).ok();
    backup(&server, &["verify", &text(&full, "id")]).ok();
    let expected = seen(&server, &token);

    // The machine is lost; its backups and their key remain.
    let key = place.path().join("the.key");
    std::fs::copy(server.data().join("keys/backup.key"), &key).expect("copied");
    drop(server);
    let mut restored = Server::unstarted(&[]);
    let key = key.to_str().expect("a path");
    let restore =
        |server: &Server| server.capsule_with_settings(&["backup", "restore", "--at", &at, "--key-file", key, "--json"], &[]);
    let report = restore(&restored).ok().json();
    assert_eq!(text(&report, "id"), text(&incremental, "id"));
    assert!(restore(&restored).refused().err.contains("not empty"), "nothing is written over");
    restored.start();
    let token = restored.admin();
    let now = seen(&restored, &token);
    let addresses = |all: &BTreeMap<&str, Value>| {
        // The ingress has another port.
        let text = json!(all).to_string();
        let port = text.split("localhost:").nth(1).map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
        port.map_or(text.clone(), |port| text.replace(&port, "PORT"))
    };
    assert_eq!(addresses(&now), addresses(&expected));
    assert_eq!(json!({"items": now["/organizations"]["items"]}), environment);
    eventually("the application runs again", || {
        (restored.get("app-production.localhost", "/").body == "version two").then_some(())
    });
    std::fs::write(folder.path().join("version"), "three").expect("written");
    restored.deploy(folder.path(), "app").ok();
    assert_eq!(restored.get("app-production.localhost", "/").body, "version three");
}

fn damage() {
    let server = Server::default();
    let place = tempfile::tempdir().expect("a folder");
    let at = place.path().to_str().expect("a path");
    server.capsule_with_settings(&["backup", "create", "--at", at], &[]).ok();
    assert!(!contains(place.path(), b"admin@localhost"), "it is encrypted");
    let other = place.path().join("other.key");
    std::fs::write(&other, "00".repeat(32)).expect("written");
    let refused = server.capsule(&["backup", "verify", "--at", at, "--key-file", other.to_str().expect("a path")]).refused();
    assert!(refused.err.contains("not its key"), "{refused:?}");
    let pieces = std::fs::read_dir(place.path()).expect("there").flatten().map(|entry| entry.path().join("pieces"));
    let pieces = pieces.filter(|path| path.is_dir()).flat_map(|path| std::fs::read_dir(path).expect("there").flatten());
    let piece = pieces.map(|entry| entry.path()).min().expect("a piece");
    let whole = std::fs::read(&piece).expect("read");
    let mut bytes = whole.clone();
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(&piece, &bytes).expect("written");
    let refused = server.capsule(&["backup", "verify", "--at", at]).refused();
    assert!(refused.err.contains(piece.file_name().expect("a name").to_str().expect("text")), "{refused:?}");
    std::fs::remove_file(&piece).expect("removed");
    assert!(server.capsule(&["backup", "verify", "--at", at]).refused().err.contains("missing"));
    std::fs::write(&piece, &whole).expect("written");
    server.capsule(&["backup", "verify", "--at", at]).ok();
    assert!(server.capsule(&["backup", "list"]).refused().err.contains("backup.location"));
}

fn contains(folder: &Path, text: &[u8]) -> bool {
    std::fs::read_dir(folder).expect("there").flatten().any(|entry| {
        let path = entry.path();
        if path.is_dir() {
            contains(&path, text)
        } else {
            std::fs::read(path).expect("read").windows(text.len()).any(|window| window == text)
        }
    })
}

fn schedule() {
    let place = tempfile::tempdir().expect("a folder");
    let location = format!("backup.location={}", place.path().display());
    let mut server = Server::with(&[&location]);
    let manifests = || {
        let generations = std::fs::read_dir(place.path()).expect("there").flatten();
        let all = generations.filter_map(|entry| std::fs::read_dir(entry.path()).ok()).flat_map(Iterator::flatten);
        all.filter(|entry| entry.file_name().to_string_lossy().ends_with(".manifest")).count()
    };
    eventually("the first one is there", || (manifests() == 1).then_some(()));
    eventually("it is counted", || {
        let counted = |at: usize| server.metric(at, "capsule_backup_last_success_timestamp_seconds").is_some_and(|at| at > 0.0);
        (0..server.size()).any(counted).then_some(())
    });
    // A restart of the server does not trigger another backup before the interval has passed.
    server.stop();
    server.start();
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(manifests(), 1);
    server.capsule(&["backup", "verify", "--set", &location]).ok();
}

fn bucket() {
    let bucket = Bucket::start();
    let server = Server::default();
    let location = bucket.location("installation/one");
    let backup = |arguments: &[&str]| {
        server.capsule_with(&[&["backup"], arguments, &["--at", &location, "--json"]].concat(), "", &bucket.environment())
    };
    backup(&["create"]).ok();
    let report = backup(&["create"]).ok().json();
    backup(&["verify"]).ok();
    assert_eq!(backup(&["list"]).ok().json().as_array().map(Vec::len), Some(2));
    let mut restored = Server::unstarted(&[]);
    let key = server.data().join("keys/backup.key");
    let arguments = ["backup", "restore", &text(&report, "id"), "--at", &location, "--key-file", key.to_str().expect("a path")];
    restored.capsule_with_settings(&arguments, &bucket.environment()).ok();
    restored.start();
    let _ = restored.admin();
    // Wrong credentials are refused, and the error does not show them.
    let mut wrong_credentials = bucket.environment();
    wrong_credentials.iter_mut().filter(|(name, _)| *name == "AWS_SECRET_ACCESS_KEY").for_each(|(_, value)| *value = "wrong");
    let refused = server.capsule_with(&["backup", "list", "--at", &location], "", &wrong_credentials).refused();
    assert!(!refused.err.contains("wrong"), "{refused:?}");
}
