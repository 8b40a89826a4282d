//! The time from `capsule deploy` to a URL that serves the new version. Targets: a static site in 1 s, a redeployment of
//! Express with unchanged dependencies in 3 s, acceptance of a deployment by the API in 100 ms at the 95th percentile.

use std::time::Instant;

use capsule_tests::{Server, example, text};
use serde_json::json;

use crate::sample::Sample;

pub fn measure() -> Vec<String> {
    let server = Server::default();
    let mut lines = Vec::new();

    let site = example("static");
    let times: Vec<_> = (0..11)
        .map(|run| {
            std::fs::write(site.path().join("run.txt"), run.to_string()).expect("written");
            let began = Instant::now();
            server.deploy(site.path(), "site").ok();
            assert_eq!(server.get("site-production.localhost", "/run.txt").body, run.to_string());
            began.elapsed()
        })
        .collect();
    lines.push(format!("folder to URL, static site      {}", Sample::times(times).text("ms")));

    let express = example("express");
    let source = std::fs::read_to_string(express.path().join("server.js")).expect("there");
    let began = Instant::now();
    server.deploy(express.path(), "express").ok();
    lines.push(format!("folder to URL, Express, first   {:.0} ms", began.elapsed().as_secs_f64() * 1000.0));
    let times: Vec<_> = (0..7)
        .map(|run| {
            std::fs::write(express.path().join("server.js"), source.replace("Hello from Express", &format!("Run {run}")))
                .expect("written");
            let began = Instant::now();
            server.deploy(express.path(), "express").ok();
            assert!(server.get("express-production.localhost", "/").body.contains(&format!("Run {run}")));
            began.elapsed()
        })
        .collect();
    lines.push(format!("folder to URL, Express, again   {}", Sample::times(times).text("ms")));
    lines.push(initiation(&server));
    lines
}

/// Measures the time until the API has accepted a deployment.
fn initiation(server: &Server) -> String {
    let token = server.admin();
    let get = |path: &str| server.api("GET", path, Some(&token), None).ok();
    let organization = text(&get("/organizations")["items"][0], "id");
    let projects = get(&format!("/projects?organization_id={organization}"));
    let project =
        projects["items"].as_array().expect("a list").iter().find(|one| one["slug"] == "site").expect("it is there").clone();
    let service = text(&get(&format!("/services?project_id={}", text(&project, "id")))["items"][0], "id");
    let site = example("static");
    let archive = {
        let packed =
            std::process::Command::new("tar").arg("-czf-").arg("-C").arg(site.path()).arg(".").output().expect("tar runs");
        packed.stdout
    };
    let upload =
        server.api_raw("POST", &format!("/uploads?service_id={service}"), Some(&token), "application/gzip", Some(archive)).ok();
    let body = json!({"upload_id": upload["id"]});
    let times: Vec<_> = (0..60)
        .map(|_| {
            let began = Instant::now();
            server.api("POST", &format!("/services/{service}/deploy"), Some(&token), Some(&body)).ok();
            let took = began.elapsed();
            std::thread::sleep(std::time::Duration::from_millis(20));
            took
        })
        .collect();
    let sample = Sample::times(times);
    format!("initiation of a deployment      p95 {:.2} ms, {}", sample.percentile(95), sample.text("ms"))
}
