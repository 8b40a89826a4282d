//! Quotas of an organization, and the reservation of deleted host names.

use capsule_tests::{Server, eventually, probe, text};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{archive_of_page, test, test_of_processes};

pub fn trials() -> Vec<Trial> {
    vec![
        test_of_processes("quotas limit instances, builds and uploads, and allow rollouts", bounded),
        test("a deleted host name stays reserved for its organization", hosts),
        test_of_processes("many builds of one organization do not delay the builds of another", builds_take_turns),
    ]
}

/// Sets the quotas of a service's organization; all other quotas return to the installation's defaults.
fn set(server: &Server, organization: &str, quotas: Value) {
    let path = format!("/admin/organizations/{organization}/quotas");
    let set = server.api("PUT", &path, Some(&server.admin()), Some(&json!({"quotas": quotas}))).ok();
    assert_eq!(set["organization_id"], organization, "{set}");
}

pub fn bounded() {
    let server = Server::with(&["quotas.instances=4", "quotas.projects=9"]);
    let admin = server.admin();
    let deploy = |folder: &std::path::Path, name: &str| server.deploy(folder, name);

    // 25 process types need 25 instances: nothing is built or started.
    let many = probe("one");
    let procfile: String = (0..25).map(|n| format!("p{n}: python3 -m http.server 80{n:02}\n")).collect();
    std::fs::write(many.path().join("Procfile"), procfile).expect("written");
    std::fs::write(many.path().join("capsule.toml"), "").expect("written");
    let refused = deploy(many.path(), "many").refused();
    let said = format!("{}{}", refused.out, refused.err);
    assert!(said.contains("process types are too many") && said.contains("of 20 instances"), "{refused:?}");
    assert_eq!(server.entries("releases", ""), 0, "nothing was built");
    assert_eq!(server.entries("logs/instances", ""), 0, "nothing started");

    // At the limit, a rollout can replace the serving instances by the same number.
    let folder = probe("one");
    deploy(folder.path(), "app").ok();
    let status = server.status(folder.path());
    let organization = text(&status["service"], "organization_id");
    let instances = status["state"]["instances"].as_array().expect("a list").len();
    set(&server, &organization, json!({"instances": instances}));
    for version in ["two", "three"] {
        std::fs::write(folder.path().join("version"), version).expect("written");
        deploy(folder.path(), "app").ok();
        assert_eq!(server.get("app-production.localhost", "/").body, format!("version {version}"));
    }
    let full = server.capsule(&["status", folder.path().to_str().expect("a path")]).ok();
    assert!(full.out.contains(&format!("quota: {instances} of {instances} instances")), "{full:?}");

    // Parallel deployments cannot exceed the limit either.
    set(&server, &organization, json!({"instances": 2 * instances}));
    let others: Vec<_> = (0..3).map(|n| (format!("other-{n}"), probe("one"))).collect();
    let outcomes: Vec<bool> = std::thread::scope(|scope| {
        let all: Vec<_> =
            others.iter().map(|(name, folder)| scope.spawn(|| server.deploy(folder.path(), name).success)).collect();
        all.into_iter().map(|one| one.join().expect("it ends")).collect()
    });
    assert_eq!(outcomes.iter().filter(|succeeded| **succeeded).count(), 1, "{outcomes:?}");
    // Refused deployments leave nothing, and stopped services do not count.
    server.capsule(&["stop", folder.path().to_str().expect("a path")]).ok();
    let late = outcomes.iter().position(|succeeded| !succeeded).expect("two were refused");
    deploy(others[late].1.path(), &others[late].0).ok();
    let refused = server.capsule(&["start", folder.path().to_str().expect("a path")]).refused();
    assert!(refused.err.contains("quota instances"), "{refused:?}");

    // Builds of the last hour count, successful or not; bytes of uploads and plans count, too.
    set(&server, &organization, json!({"builds_per_hour": 1}));
    eventually("the quota applies", || {
        let refused = deploy(folder.path(), "app");
        (!refused.success && refused.err.contains("quota builds_per_hour")).then_some(())
    });
    let service = text(&status["service"], "id");
    let bytes = || Some(archive_of_page(&"x".repeat(700 << 10)));
    let plan = || server.api_raw("POST", &format!("/plan?service_id={service}"), Some(&admin), "application/x-tar", bytes());
    let used = server.api("GET", &format!("/organizations/{organization}/quotas"), Some(&admin), None).ok();
    let used = |name: &str| {
        let items = used["items"].as_array().expect("a list");
        items.iter().find(|quota| quota["name"] == name).and_then(|quota| quota["used"].as_i64()).expect("counted")
    };
    assert_eq!((used("projects"), used("services")), (5, 5));
    assert!(used("builds_per_day") >= 7 && used("memory_mib") >= 512);
    set(&server, &organization, json!({"upload_mib_per_day": used("upload_mib_per_day") + 2}));
    let refused = eventually("uploads are full", || {
        let planned = plan();
        (planned.status != 200).then_some(planned)
    });
    assert_eq!((refused.status, refused.json()["code"].clone()), (403, json!("quota_exceeded")), "{refused:?}");

    // The command line, as administrator and as member.
    let slug = text(&server.api("GET", "/organizations", Some(&admin), None).ok()["items"][0], "slug");
    let shown = server.capsule(&["admin", "quotas", "set", &slug, "projects=77", "upload_mib_per_day=default"]).ok();
    assert!(shown.out.contains("77") && shown.out.contains("this organization"), "{shown:?}");
    let shown = server.capsule(&["quotas", "--json"]).ok().json();
    let limit = |name: &str| {
        let items = shown["items"].as_array().expect("a list");
        items.iter().find(|quota| quota["name"] == name).map(|quota| quota["limit"].clone())
    };
    assert_eq!((limit("projects"), limit("upload_mib_per_day")), (Some(json!(77)), Some(json!(20480))));
    for wrong in ["nonsense=1", "projects=many", "projects"] {
        server.capsule(&["admin", "quotas", "set", &slug, wrong]).refused();
    }
}

/// An archive of a site whose build sleeps for this many seconds.
fn slow_site(seconds: u32) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let declared = format!("kind = \"static\"\n[build]\nbuild = \"sleep {seconds}\"\noutput = \".\"\n");
    for (name, content) in [("index.html", "hi"), ("capsule.toml", declared.as_str())] {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, content.as_bytes()).expect("appended");
    }
    archive.into_inner().expect("finished")
}

fn builds_take_turns() {
    let server = Server::with(&["build.concurrent=1"]);
    let (crowd, single) = (server.register("crowd@example.com"), server.register("single@example.com"));
    let begin = |token: &str, name: &str| {
        let service = server.service(token, name);
        let path = format!("/uploads?service_id={service}");
        let upload = server.api_raw("POST", &path, Some(token), "application/x-tar", Some(slow_site(1))).ok();
        let body = json!({"upload_id": upload["id"]});
        text(&server.api("POST", &format!("/services/{service}/deploy"), Some(token), Some(&body)).ok(), "id")
    };
    let crowded: Vec<String> = (0..5).map(|n| begin(&crowd, &format!("site-{n}"))).collect();
    let own = begin(&single, "own");
    let get = |token: &str, id: &str| server.api("GET", &format!("/deployments/{id}"), Some(token), None).ok();
    let finished = |token: &str, id: &str| !get(token, id)["finished_at"].is_null();
    eventually("the other organization's build is done", || (get(&single, &own)["status"] == "running").then_some(()));
    let late = crowded.iter().filter(|id| !finished(&crowd, id)).count();
    assert!(late >= 2, "it waited behind all but {late}");
    // A waiting build has not started, so cancelling or replacing it does not count.
    let waiting = crowded.iter().rev().find(|id| get(&crowd, id)["status"] == "pending").expect("one waits");
    server.api("POST", &format!("/deployments/{waiting}/cancel"), Some(&crowd), None).ok();
    eventually("it is cancelled", || (get(&crowd, waiting)["status"] == "cancelled").then_some(()));
    for id in crowded.iter().filter(|id| *id != waiting) {
        eventually("it runs", || (get(&crowd, id)["status"] == "running").then_some(()));
    }
}

/// Deploys a site with this name; returns its service and its host name.
fn site(server: &Server, token: &str, name: &str) -> (String, String) {
    site_of(server, token, server.service(token, name), "production")
}

/// Deploys a site to an environment of an existing service; returns the service and the host name.
fn site_of(server: &Server, token: &str, service: String, environment: &str) -> (String, String) {
    let path = format!("/uploads?service_id={service}");
    let upload = server.api_raw("POST", &path, Some(token), "application/x-tar", Some(archive_of_page("hi"))).ok();
    let body = json!({"upload_id": upload["id"], "environment": environment});
    let deployment = server.api("POST", &format!("/services/{service}/deploy"), Some(token), Some(&body)).ok();
    let url = text(&deployment, "url");
    let host = url.trim_start_matches("http://").split(':').next().expect("a host").to_owned();
    eventually("it runs", || {
        let now = server.api("GET", &format!("/deployments/{}", text(&deployment, "id")), Some(token), None).ok();
        (now["status"] == "running").then_some(())
    });
    (service, host)
}

pub fn hosts() {
    let server = Server::default();
    let (ada, eve) = (server.register("ada@example.com"), server.register("eve@example.com"));
    let gone = |host: &str| eventually("it is gone", || (server.get(host, "/").status == 404).then_some(()));
    let (service, host) = site(&server, &ada, "shop");
    assert_eq!((host.as_str(), server.get(&host, "/").body.as_str()), ("shop-production.localhost", "hi"));
    server.api("DELETE", &format!("/services/{service}"), Some(&ada), None).ok();
    gone(&host);
    // Another organization gets another name; the former owner gets the same name again.
    let (_, strangers) = site(&server, &eve, "shop");
    assert_eq!(strangers, "shop-production-2.localhost");
    let projects = |token: &str| {
        let organization = server.api("GET", "/organizations", Some(token), None).ok()["items"][0]["id"].clone();
        let path = format!("/projects?organization_id={}", organization.as_str().expect("an id"));
        server.api("GET", &path, Some(token), None).ok()["items"].as_array().expect("a list").clone()
    };
    let delete_projects = |token: &str| {
        for project in projects(token) {
            server.api("DELETE", &format!("/projects/{}", text(&project, "id")), Some(token), None).ok();
        }
    };
    delete_projects(&ada);
    let (_, again) = site(&server, &ada, "shop");
    assert_eq!(again, host);
    assert_eq!(server.get(&host, "/").body, "hi");
    eventually("the files of the removed one are gone", || (server.entries("releases", "") == 2).then_some(()));
    assert_eq!(server.get(&host, "/").body, "hi", "the files of the new one are not");

    // The same after deleting a project.
    for (token, host) in [(&ada, &host), (&eve, &strangers)] {
        delete_projects(token);
        gone(host);
    }
    assert_eq!(site(&server, &eve, "shop").1, strangers, "its own again, not the other's");

    // The same after deleting an environment or an organization.
    let post = |token: &str, path: &str, body: Value| server.api("POST", path, Some(token), Some(&body)).ok();
    let organization = text(&post(&ada, "/organizations", json!({"name": "Acme"})), "id");
    let project = text(&post(&ada, "/projects", json!({"organization_id": organization, "name": "p"})), "id");
    let staging = post(&ada, &format!("/projects/{project}/environments"), json!({"name": "staging", "kind": "staging"}));
    let service = text(&post(&ada, "/services", json!({"project_id": project, "name": "desk"})), "id");
    let (_, first) = site_of(&server, &ada, service.clone(), "staging");
    let (_, second) = site_of(&server, &ada, service, "production");
    assert_eq!((first.as_str(), second.as_str()), ("desk-staging.localhost", "desk-production.localhost"));
    server.api("DELETE", &format!("/environments/{}", text(&staging, "id")), Some(&ada), None).ok();
    gone(&first);
    let password = json!({"password": "a long enough one 1"});
    server.api("DELETE", &format!("/organizations/{organization}"), Some(&ada), Some(&password)).ok();
    gone(&second);
    let strangers = server.service(&eve, "desk");
    let project = text(&server.api("GET", &format!("/services/{strangers}"), Some(&eve), None).ok(), "project_id");
    post(&eve, &format!("/projects/{project}/environments"), json!({"name": "staging", "kind": "staging"}));
    assert_eq!(site_of(&server, &eve, strangers.clone(), "staging").1, "desk-staging-2.localhost");
    assert_eq!(site_of(&server, &eve, strangers, "production").1, "desk-production-2.localhost");
}
