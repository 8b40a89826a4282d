//! Two tenants on one server are isolated, in the API and inside their applications.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use capsule_tests::{Server, eventually, probe, text};
use libtest_mimic::Trial;
use serde_json::json;

use crate::{archive_of_page, test, test_of_processes, test_with};

pub fn trials() -> Vec<Trial> {
    vec![
        test("a tenant cannot deploy the upload of another tenant", foreign_upload),
        test("two tenants can use the same names and get different addresses", same_names),
        test_of_processes("an application cannot see the host, the platform or other applications", confined),
        test_of_processes("a build cannot see the host, the platform or other applications", confined_builds),
        rootless("a server without root runs applications in user namespaces", runs_without_root),
    ]
}

/// A test of a server that does not run as root.
pub fn rootless(name: &str, work: impl FnOnce() + Send + 'static) -> Trial {
    let namespaces =
        Command::new("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups", "unshare", "-Urn", "true"]).output();
    let tun = std::fs::metadata("/dev/net/tun").is_ok_and(|tun| tun.permissions().mode() & 0o006 == 0o006);
    let missing = match (namespaces.is_ok_and(|tried| tried.status.success()), tun) {
        (true, true) => return test_with(name, &["python3", "slirp4netns"], work),
        (false, _) => "no user namespaces for users",
        (true, false) => "/dev/net/tun is not open to users",
    };
    test(&format!("{name} (skipped: {missing})"), || {}).with_ignored_flag(true)
}

fn upload(server: &Server, token: &str, service: &str, content: &str) -> String {
    let path = format!("/uploads?service_id={service}");
    text(&server.api_raw("POST", &path, Some(token), "application/x-tar", Some(archive_of_page(content))).ok(), "id")
}

fn foreign_upload() {
    let server = Server::default();
    let (ada, eve) = (server.register("ada@example.com"), server.register("eve@example.com"));
    let (hers, theirs) = (server.service(&ada, "a"), server.service(&eve, "e"));
    let secret = upload(&server, &ada, &hers, "ada's page");
    let stolen = server.api("POST", &format!("/services/{theirs}/deploy"), Some(&eve), Some(&json!({"upload_id": secret})));
    assert_eq!(stolen.status, 404, "{stolen:?}");
    let own = upload(&server, &eve, &theirs, "eve's page");
    let planted = server.api("POST", &format!("/services/{hers}/deploy"), Some(&eve), Some(&json!({"upload_id": own})));
    assert_eq!(planted.status, 404, "{planted:?}");
}

fn same_names() {
    let server = Server::default();
    let mut urls = Vec::new();
    for (who, content) in [("ada", "ada's page"), ("eve", "eve's page")] {
        let token = server.register(&format!("{who}@example.com"));
        let service = server.service(&token, "shop");
        let upload = upload(&server, &token, &service, content);
        let deployment =
            server.api("POST", &format!("/services/{service}/deploy"), Some(&token), Some(&json!({"upload_id": upload}))).ok();
        let running = eventually("it runs", || {
            let now = server.api("GET", &format!("/deployments/{}", text(&deployment, "id")), Some(&token), None).ok();
            (now["status"] == "running").then_some(now)
        });
        let host = text(&running, "url").trim_start_matches("http://").split(':').next().expect("a host").to_owned();
        assert_eq!(server.get(&host, "/").body, content);
        urls.push(host);
    }
    assert_ne!(urls[0], urls[1]);
    assert_eq!(server.get(&urls[0], "/").body, "ada's page");
}

fn confined() {
    let server = Server::default();
    let (one, two) = (probe("one"), probe("two"));
    server.deploy(one.path(), "one").ok();
    server.deploy(two.path(), "two").ok();
    let ask = |path: &str| server.get("one-production.localhost", path);
    let identity = |host: &str| server.get(host, "/identity").json();
    let (own, other) = (identity("one-production.localhost"), identity("two-production.localhost"));
    assert_ne!(own["uid"], other["uid"]);
    assert_ne!(own["uid"], 0);

    let data = server.data().display().to_string();
    for path in [
        "/etc/shadow",
        "/etc/passwd-",
        "/root/.ssh",
        "/proc/1/environ",
        &format!("{data}/keys/master.key"),
        &format!("{data}/local-token"),
    ] {
        let answer = ask(&format!("/read?path={path}"));
        assert_eq!(answer.status, 403, "{path} can be read: {answer:?}");
    }
    assert_eq!(ask(&format!("/list?path={data}")).status, 403);
    let processes = ask("/list?path=/proc").body;
    let pids: Vec<u32> = processes.lines().filter_map(|name| name.parse().ok()).collect();
    assert!(pids.len() < 8, "it sees other processes: {pids:?}");
    for path in ["/usr/bin/planted", "/etc/planted", "/planted", "/proc/sys/kernel/hostname", "/sys/planted"] {
        let answer = ask(&format!("/write?path={path}"));
        assert_eq!(answer.status, 403, "{path} can be written: {answer:?}");
    }
    for path in ["/app/own", "/tmp/own", "/home/app/own"] {
        assert_eq!(ask(&format!("/write?path={path}")).status, 200, "{path}");
    }
    // The port of another application at its address, the ingress on the host, and another loopback address.
    let port = server.get("two-production.localhost", "/env").json()["PORT"].as_str().expect("a port").to_owned();
    let neighbour = text(&other, "address");
    let gateway = {
        let mut parts: Vec<String> = text(&own, "address").split('.').map(str::to_owned).collect();
        parts[3] = (parts[3].parse::<u8>().expect("a byte") - 1).to_string();
        parts.join(".")
    };
    for (host, port) in [
        (neighbour.as_str(), port.as_str()),
        (&gateway, &server.port().to_string()),
        ("127.0.0.1", &server.port().to_string()),
        ("169.254.169.254", "80"),
    ] {
        let answer = ask(&format!("/connect?host={host}&port={port}"));
        assert_eq!(answer.status, 403, "{host}:{port} can be reached: {answer:?}");
    }
}

fn runs_without_root() {
    let mut server = Server::unprivileged(&[]);
    let folder = probe("one");
    // The fixture belongs to root; the unprivileged user must be able to write capsule.toml into it.
    for path in [folder.path().to_path_buf(), folder.path().join("capsule.toml")] {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).expect("it takes root");
    }
    server.deploy(folder.path(), "one").ok();
    let ask = |server: &Server, path: &str| server.get("one-production.localhost", path);
    assert_eq!(ask(&server, "/").body, "version one");
    // Its uplink gives outbound network, but no access to the host's loopback or files.
    assert_eq!(ask(&server, "/identity").json()["address"], "10.0.2.100");
    for path in ["/connect?host=10.0.2.2&port=", "/connect?host=127.0.0.1&port="] {
        let answer = ask(&server, &format!("{path}{}", server.port()));
        assert_eq!(answer.status, 403, "{answer:?}");
    }
    assert_eq!(ask(&server, &format!("/list?path={}", server.data().display())).status, 403);
    assert_eq!(ask(&server, "/read?path=/etc/shadow").status, 403);
    let before = server.instances(folder.path());
    server.kill();
    server.start();
    let after = server.instances(folder.path());
    assert_eq!(before[0]["pid"], after[0]["pid"]);
}

fn confined_builds() {
    let server = Server::default();
    let folder = probe("one");
    let data = server.data().display().to_string();
    let script = format!(
        "import os, sys\n\
         for path in ['/etc/shadow', '{data}/local-token', '{data}/keys/master.key', '/proc/1/environ']:\n    \
             try:\n        open(path).read(); print('CAN READ', path)\n    \
             except OSError: pass\n\
         if os.getuid() == 0: print('IS ROOT')\n\
         if os.environ.get('CAPSULE_DATA'): print('HAS THE ENVIRONMENT')\n\
         print('looked around')\n"
    );
    std::fs::write(folder.path().join("look.py"), script).expect("written");
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there");
    std::fs::write(folder.path().join("capsule.toml"), format!("{declared}\n[build]\nbuild = \"python3 look.py\"\n"))
        .expect("written");
    let built = server.deploy(folder.path(), "one").ok();
    assert!(built.err.contains("looked around"), "{built:?}");
    for bad in ["CAN READ", "IS ROOT", "HAS THE ENVIRONMENT"] {
        assert!(!built.err.contains(bad), "{built:?}");
    }
    // Shell metacharacters in names and values have no effect.
    let hostile = "'; touch /tmp/injected; echo '$(touch /tmp/injected)`touch /tmp/injected`";
    let at = folder.path().to_str().expect("a path");
    server.capsule(&["env", "set", &format!("HOSTILE={hostile}"), "-C", at]).ok();
    server.deploy(folder.path(), "one").ok();
    assert_eq!(server.get("one-production.localhost", "/env").json()["HOSTILE"], hostile);
    assert!(!std::path::Path::new("/tmp/injected").exists());
}
