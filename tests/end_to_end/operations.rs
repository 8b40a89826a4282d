//! Operations for administrators of the installation: dead letters and sagas.

use capsule_tests::{Postgres, Server, eventually, probe, text};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{test, test_of_processes};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        test_of_processes("deleting an organization removes its services, also if the server is killed meanwhile", deletion),
        test_of_processes("erasing a user removes everything except what others own", erasure),
        test("the last owner and the last administrator cannot delete their accounts, and the error says why", last_ones),
    ];
    let name = "an event that cannot be handled is a dead letter: shown, tried again, given up";
    trials.push(if Postgres::programs().is_some() {
        test(name, dead_letters)
    } else {
        test(&format!("{name} (skipped: no PostgreSQL here)"), || {}).with_ignored_flag(true)
    });
    trials
}

fn dead_letters() {
    let postgres = Postgres::start();
    let server = Server::with(&[&format!("database.url={}", postgres.url())]);
    let capsule = |arguments: &[&str]| server.capsule(&[&["admin", "dead-letters"], arguments, &["--json"]].concat());
    assert_eq!(capsule(&["list"]).ok().json(), json!([]));
    let id = "0190a000-0000-7000-8000-000000000001";
    let organization = "0190a000-0000-7000-8000-000000000002";
    let envelope = |data: Value| {
        json!({"specversion": "1.0", "id": id, "source": "/capsule/project", "type": "project.services_removed", "subject": organization,
               "time": "2026-01-01T00:00:00Z", "dataschema": "/schemas/project.services_removed/v1", "correlationid": "c-1", "data": data})
        .to_string()
    };
    let broken = envelope(json!({"organization_id": 7}));
    let insert = format!("INSERT INTO outbox (id, kind, envelope) VALUES ('{id}', 'project.services_removed', '{broken}')");
    let _ = postgres.query("capsule_project", &insert);
    let letter = eventually("it is a dead letter", || capsule(&["list"]).ok().json().as_array()?.first().cloned());
    assert_eq!(
        (text(&letter, "id"), text(&letter, "service"), text(&letter, "kind")),
        (id.into(), "deploy".into(), "project.services_removed".into())
    );
    let shown = capsule(&["show", id]).ok().json();
    assert_eq!(shown["errors"].as_array().map(Vec::len), Some(1));
    assert!(text(&shown, "last_error").contains("organization_id"), "{shown}");
    assert_eq!(shown["envelope"]["data"], json!({"organization_id": 7}));
    let alerts = postgres.query("capsule_deploy", "SELECT kind FROM outbox WHERE kind = 'operations.dead_lettered'");
    assert_eq!(alerts.len(), 1, "one alert is published");
    eventually("it is counted", || (server.metric(0, "capsule_dead_letters{service=\"deploy\"}") == Some(1.0)).then_some(()));

    // The unchanged event fails again; the repaired event is handled.
    capsule(&["replay", id]).ok();
    eventually("it has failed again", || {
        let shown = capsule(&["show", id]);
        (shown.success && shown.json()["errors"].as_array().is_some_and(|errors| errors.len() == 2)).then_some(())
    });
    let mended = envelope(
        json!({"organization_id": organization, "project_id": organization, "service_id": null, "environment_id": null}),
    );
    let _ = postgres.query("capsule_deploy", &format!("UPDATE inbox SET envelope = '{mended}' WHERE id = '{id}'"));
    capsule(&["replay", id]).ok();
    eventually("it is handled", || {
        (postgres.query("capsule_deploy", &format!("SELECT state FROM inbox WHERE id = '{id}'")) == ["done"]).then_some(())
    });
    assert_eq!(capsule(&["list"]).ok().json(), json!([]));
    assert!(capsule(&["show", id]).refused().err.contains("Dead letter not found"));

    let other = id.replace("0001", "0003");
    let _ = postgres.query("capsule_project", &insert.replace(id, &other));
    eventually("another one is there", || capsule(&["show", &other]).success.then_some(()));
    capsule(&["discard", &other]).ok();
    assert_eq!(capsule(&["list"]).ok().json(), json!([]));
    // Only administrators may list them.
    let token = server.register("member@example.com");
    assert_eq!(server.api("GET", "/admin/dead-letters", Some(&token), None).status, 403);
}

/// An organization with a running service, and the host name of that service.
fn organization(server: &Server, token: &str, name: &str) -> (String, String) {
    let post = |path: &str, body: Value| server.api("POST", path, Some(token), Some(&body)).ok();
    let organization = text(&post("/organizations", json!({"name": name})), "id");
    let project = text(&post("/projects", json!({"organization_id": organization, "name": name})), "id");
    let service = text(&post("/services", json!({"project_id": project, "name": name})), "id");
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_dir_all(".", probe("one").path()).expect("appended");
    let archive = archive.into_inner().expect("finished");
    let upload =
        server.api_raw("POST", &format!("/uploads?service_id={service}"), Some(token), "application/x-tar", Some(archive));
    post(&format!("/services/{service}/deploy"), json!({"upload_id": text(&upload.ok(), "id")}));
    let host = format!("{name}-production.localhost");
    eventually("it runs", || server.get(&host, "/").body.contains("version one").then_some(()));
    (organization, host)
}

/// The password that confirms a dangerous action of a test user.
fn confirmed() -> Value {
    json!({"password": "a long enough one 1"})
}

fn saga(server: &Server, name: &str) -> Option<Value> {
    let all = server.capsule(&["admin", "sagas", "list", "--json"]).ok().json();
    all.as_array()?.iter().find(|saga| saga["name"] == name).cloned()
}

fn ended_well(server: &Server, name: &str) {
    let saga = eventually("the saga has ended", || saga(server, name).filter(|saga| saga["ended_at"].is_string()));
    assert_eq!(saga["state"], "done", "{saga}");
}

fn deletion() {
    let mut server = Server::default();
    let token = server.register("owner@example.com");
    let (id, host) = organization(&server, &token, "doomed");
    let path = format!("/organizations/{id}");
    assert_eq!(server.api("DELETE", &path, Some(&token), Some(&confirmed())).status, 202);
    // The organization is not found any more, even if its deletion is not complete.
    assert_eq!(server.api("GET", &path, Some(&token), None).status, 404);
    server.kill();
    server.start();
    ended_well(&server, "organization_deletion");
    assert_eq!(server.get(&host, "/").status, 404, "nothing of it runs");
    let projects = server.api("GET", &format!("/projects?organization_id={id}"), Some(&token), None);
    assert_eq!(projects.status, 404, "{projects:?}");
    let shown =
        server.capsule(&["admin", "sagas", "show", &text(&saga(&server, "organization_deletion").expect("there"), "id")]).ok();
    assert!(shown.out.contains("archive_projects: done") && shown.out.contains("wait_until_gone: done"), "{}", shown.out);
}

fn erasure() {
    let server = Server::default();
    let (token, friend) = (server.register("leaver@example.com"), server.register("friend@example.com"));
    let (alone, host) = organization(&server, &token, "alone");
    let shared = text(&server.api("POST", "/organizations", Some(&friend), Some(&json!({"name": "Shared"}))).ok(), "id");
    let members = format!("/organizations/{shared}/members");
    server.add_member(&friend, &shared, "leaver@example.com", "admin", &token);

    assert_eq!(server.api("DELETE", "/auth/me", Some(&token), Some(&confirmed())).status, 202);
    let login = json!({"email": "leaver@example.com", "password": "a long enough one 1"});
    assert_eq!(server.api("POST", "/auth/login", None, Some(&login)).status, 401);
    ended_well(&server, "user_erasure");
    assert_eq!(server.get(&host, "/").status, 404, "what was theirs alone is gone");
    let left = server.api("GET", &members, Some(&friend), None).ok();
    assert_eq!(left["items"].as_array().map(Vec::len), Some(1), "{left}");
    assert_eq!(server.api("GET", &format!("/organizations/{alone}"), Some(&friend), None).status, 404);
    assert_eq!(server.api("GET", "/auth/me", Some(&token), None).status, 401);
    // The address can be registered again, and gets a new account.
    let again = server.register("leaver@example.com");
    let organizations = eventually("a personal organization is there", || {
        let all = server.api("GET", "/organizations", Some(&again), None).ok();
        all["items"].as_array().filter(|items| !items.is_empty()).cloned()
    });
    assert_eq!(organizations.len(), 1);
}

fn last_ones() {
    let server = Server::default();
    let admin = server.admin();
    let refused = server.api("DELETE", "/auth/me", Some(&admin), Some(&json!({"password": server.local_token()})));
    assert!(refused.status == 409 && refused.body.contains("only administrator"), "{refused:?}");
    let (owner, member) = (server.register("owner@example.com"), server.register("member@example.com"));
    let id = text(&server.api("POST", "/organizations", Some(&owner), Some(&json!({"name": "Ours"}))).ok(), "id");
    server.add_member(&owner, &id, "member@example.com", "viewer", &member);
    let refused = server.api("DELETE", "/auth/me", Some(&owner), Some(&confirmed()));
    assert!(refused.status == 409 && refused.body.contains("only owner of Ours"), "{refused:?}");
    assert_eq!(server.api("GET", "/auth/me", Some(&owner), None).status, 200, "nothing has changed");
}
