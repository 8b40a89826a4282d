//! What one organization can use of an installation, and the names that it gives up.

use capsule_tests::{Server, eventually, probe, text};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{archive_of_page, test, test_of_processes};

pub fn trials() -> Vec<Trial> {
    vec![
        test_of_processes(
            "instances, builds and uploads of an organization are bounded, and rollouts are not in the way",
            bounded,
        ),
        test("a host that was given up is kept for its organization", hosts),
    ]
}

/// Sets quotas of the organization of a service; what is not named has the installation's limit again.
fn set(server: &Server, organization: &str, quotas: Value) {
    let path = format!("/admin/organizations/{organization}/quotas");
    let set = server.api("PUT", &path, Some(&server.admin()), Some(&json!({"quotas": quotas}))).ok();
    assert_eq!(set["organization_id"], organization, "{set}");
}

fn bounded() {
    let server = Server::with(&["quotas.instances=4", "quotas.projects=9"]);
    let admin = server.admin();
    let deploy = |folder: &std::path::Path, name: &str| server.deploy(folder, name);

    // One instance for each of 25 process types: nothing is built, nothing starts.
    let many = probe("one");
    let procfile: String = (0..25).map(|n| format!("p{n}: python3 -m http.server 80{n:02}\n")).collect();
    std::fs::write(many.path().join("Procfile"), procfile).expect("written");
    std::fs::write(many.path().join("capsule.toml"), "").expect("written");
    let refused = deploy(many.path(), "many").refused();
    let said = format!("{}{}", refused.out, refused.err);
    assert!(said.contains("process types are too many") && said.contains("of 20 instances"), "{refused:?}");
    assert_eq!(server.entries("releases", ""), 0, "nothing was built");
    assert_eq!(server.entries("logs/instances", ""), 0, "nothing started");

    // At the very limit, a rollout replaces what serves by as much.
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

    // Several at a time find no more room together than one by one.
    set(&server, &organization, json!({"instances": 2 * instances}));
    let others: Vec<_> = (0..3).map(|n| (format!("other-{n}"), probe("one"))).collect();
    let outcomes: Vec<bool> = std::thread::scope(|scope| {
        let all: Vec<_> =
            others.iter().map(|(name, folder)| scope.spawn(|| server.deploy(folder.path(), name).success)).collect();
        all.into_iter().map(|one| one.join().expect("it ends")).collect()
    });
    assert_eq!(outcomes.iter().filter(|succeeded| **succeeded).count(), 1, "{outcomes:?}");
    // What was refused left nothing behind, and what is stopped makes room.
    server.capsule(&["stop", folder.path().to_str().expect("a path")]).ok();
    let late = outcomes.iter().position(|succeeded| !succeeded).expect("two were refused");
    deploy(others[late].1.path(), &others[late].0).ok();
    let refused = server.capsule(&["start", folder.path().to_str().expect("a path")]).refused();
    assert!(refused.err.contains("quota instances"), "{refused:?}");

    // Builds of the last hour count whatever became of them; so do the bytes of uploads, planned ones as well.
    set(&server, &organization, json!({"builds_per_hour": 1}));
    eventually("it is told of", || {
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

    // By the command line, for administrators and for members.
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

/// A site of this name, of whoever has the token: its service and its host.
fn site(server: &Server, token: &str, name: &str) -> (String, String) {
    let service = server.service(token, name);
    let path = format!("/uploads?service_id={service}");
    let upload = server.api_raw("POST", &path, Some(token), "application/x-tar", Some(archive_of_page("hi"))).ok();
    let body = json!({"upload_id": upload["id"]});
    let deployment = server.api("POST", &format!("/services/{service}/deploy"), Some(token), Some(&body)).ok();
    let url = text(&deployment, "url");
    let host = url.trim_start_matches("http://").split(':').next().expect("a host").to_owned();
    eventually("it runs", || {
        let now = server.api("GET", &format!("/deployments/{}", text(&deployment, "id")), Some(token), None).ok();
        (now["status"] == "running").then_some(())
    });
    (service, host)
}

fn hosts() {
    let server = Server::default();
    let (ada, eve) = (server.register("ada@example.com"), server.register("eve@example.com"));
    let gone = |host: &str| eventually("it is gone", || (server.get(host, "/").status == 404).then_some(()));
    let (service, host) = site(&server, &ada, "shop");
    assert_eq!((host.as_str(), server.get(&host, "/").body.as_str()), ("shop-production.localhost", "hi"));
    server.api("DELETE", &format!("/services/{service}"), Some(&ada), None).ok();
    gone(&host);
    // A stranger gets another, as if it were still there; who had it gets it again.
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

    // The same when whole projects go.
    for (token, host) in [(&ada, &host), (&eve, &strangers)] {
        delete_projects(token);
        gone(host);
    }
    assert_eq!(site(&server, &eve, "shop").1, strangers, "its own again, not the other's");
}
