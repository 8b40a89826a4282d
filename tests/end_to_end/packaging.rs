//! The container image and the compose file, started with Docker Engine.

use std::sync::Arc;

use capsule_tests::{CommandOutput, Docker, binary, eventually, free_port, root};
use libtest_mimic::Trial;

use crate::test_of_containers;

pub fn trials() -> Vec<Trial> {
    vec![test_of_containers("the compose file starts a cluster that deploys and survives a restart", compose)]
}

/// A running compose project. Dropping the value stops it.
struct Project {
    engine: Arc<Docker>,
    port: u16,
}

impl Project {
    fn compose(&self, arguments: &[&str]) -> CommandOutput {
        let file = root().join("packaging/compose.yaml");
        let all: Vec<&str> =
            ["-p", "capsule-test", "-f", file.to_str().expect("a path")].into_iter().chain(arguments.iter().copied()).collect();
        let environment = [
            ("CAPSULE_SECRET", "the-secret-of-the-test"),
            ("CAPSULE_IMAGE", "capsule-test"),
            ("CAPSULE_PORT", &self.port.to_string()),
            ("POSTGRES_IMAGE", "capsule-test-servers"),
            ("RABBITMQ_IMAGE", "capsule-test-servers"),
            ("REDIS_IMAGE", "capsule-test-servers"),
        ];
        self.engine.run("docker-compose", &all, &environment)
    }

    /// Sends a request to the application from outside.
    fn page(&self) -> Option<String> {
        let url = format!("http://127.0.0.1:{}/", self.port);
        let mut answer = ureq::get(url).header("host", "site-production.localhost").call().ok()?;
        answer.body_mut().read_to_string().ok()
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.compose(&["logs", "--tail", "40"]).out);
        }
        let _ = self.compose(&["down", "--volumes", "--timeout", "5"]);
    }
}

/// The image of Capsule with the binary under test. With `CAPSULE_IMAGE_FROM_SOURCE`, it is built from source, which takes
/// many minutes.
fn image(engine: &Docker) {
    let file = root().join("packaging/Dockerfile");
    let base = format!("BASE={}", Docker::BASE);
    let mut arguments = vec!["--file", file.to_str().expect("a path"), "--build-arg", &base];
    if std::env::var_os("CAPSULE_IMAGE_FROM_SOURCE").is_none() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::copy(binary(), folder.path().join("capsule")).expect("copied");
        std::fs::write(folder.path().join("Dockerfile"), "FROM scratch\nCOPY capsule /out/capsule\n").expect("written");
        engine.build(folder.path(), "capsule-test-binary", &[]);
        arguments.extend(["--build-arg", "BINARY=capsule-test-binary"]);
    }
    engine.build(&root(), "capsule-test", &arguments);
}

fn compose() {
    let engine = Docker::engine();
    let base = format!("BASE={}", Docker::BASE);
    engine.build(&root().join("tests/servers/image"), "capsule-test-servers", &["--build-arg", &base]);
    image(&engine);

    let project = Project { engine, port: free_port() };
    let _ = project.compose(&["up", "--detach", "--no-build"]).ok();
    let healthy = || {
        let all = project.compose(&["ps"]).out.matches("(healthy)").count();
        (all == 8).then_some(())
    };
    eventually("every container is healthy", healthy);

    let on_deploy = |command: &[&str]| project.compose(&[&["exec", "-T", "deploy"], command].concat());
    let doctor = on_deploy(&["capsule", "doctor"]);
    for found in ["✓ sandbox", "✓ limits", "✓ network"] {
        assert!(doctor.out.contains(found), "{doctor:?}");
    }
    let _ = on_deploy(&["sh", "-c", "mkdir /site && echo hello from the cluster >/site/index.html"]).ok();
    let _ = on_deploy(&["capsule", "deploy", "/site", "--project", "site", "--service", "site", "--yes"]).ok();
    assert_eq!(project.page().as_deref(), Some("hello from the cluster\n"));

    // Like after a restart of the host: all containers are new, their volumes remain.
    let _ = project.compose(&["kill"]).ok();
    let _ = project.compose(&["up", "--detach", "--no-build", "--force-recreate"]).ok();
    eventually("the application is back", || project.page().filter(|page| page == "hello from the cluster\n"));
}
