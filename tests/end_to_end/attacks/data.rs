//! Races of commands, endless streams and uploads, file modes of a restored backup, and secrets in logs.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use capsule_tests::{Server, binary, eventually, probe, text};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{test, test_of_failpoints, test_of_processes};

const HOST: &str = "app-production.localhost";

pub fn trials() -> Vec<Trial> {
    vec![
        test_of_failpoints("a stop during a rollout cancels it and everything queued", stopped_during_a_rollout),
        test_of_processes("a service stays stopped when restarts run concurrently with the stop", stop_races_restart),
        test_of_failpoints("a deployment fails after the server has ended ten times in one phase", ends_the_server),
        test("a too slow upload is aborted without leftovers, and concurrent uploads per user are limited", dripping_upload),
        test_of_processes("slow readers of a long log use little server memory", slow_readers),
        test("a restored backup is readable by its owner only, and a running server is not replaced", restored_modes),
        test_of_processes(
            "secrets and paths of the host stay out of the log of a failed deployment",
            secrets_of_a_failed_deployment,
        ),
    ]
}

/// Deploys version one of a service; returns its id and an administrator's token.
fn deployed(settings: &[&str]) -> (Server, tempfile::TempDir, String, String) {
    let server = Server::with(settings);
    let folder = probe("one");
    server.deploy(folder.path(), "app").ok();
    let token = server.admin();
    let service = text(&server.status(folder.path())["state"], "service_id");
    (server, folder, service, token)
}

fn command(server: &Server, token: &str, service: &str, name: &str) -> Value {
    let body = json!({"environment": "production"});
    server.api("POST", &format!("/services/{service}/{name}"), Some(token), Some(&body)).ok()
}

fn deployments(server: &Server, token: &str, service: &str) -> Vec<Value> {
    let page = server.api("GET", &format!("/deployments?service_id={service}"), Some(token), None).ok();
    page["items"].as_array().expect("a list").clone()
}

fn state(server: &Server, folder: &Path) -> Value {
    server.status(folder)["state"].clone()
}

/// Waits until every deployment has ended; returns their status, newest first.
fn settled(server: &Server, token: &str, service: &str) -> Vec<String> {
    eventually("all are settled", || {
        let all = deployments(server, token, service);
        all.iter().all(|one| !one["finished_at"].is_null()).then(|| all.iter().map(|one| text(one, "status")).collect())
    })
}

fn stopped_during_a_rollout() {
    let (mut server, folder, service, token) = deployed(&[]);
    server.stop();
    let pause = folder.path().join("pause");
    server.start_with_failpoint(&format!("active:before={}", pause.display()));
    command(&server, &token, &service, "restart");
    eventually("the rollout is about to switch", || pause.with_extension("reached").exists().then_some(()));
    // A queued deployment.
    command(&server, &token, &service, "restart");
    let stopped = command(&server, &token, &service, "stop");
    assert_eq!(stopped["state"], "stopped");
    std::fs::write(&pause, "").expect("written");
    assert_eq!(settled(&server, &token, &service), ["cancelled", "cancelled", "running"]);
    eventually("nothing of it runs", || server.instances(folder.path()).is_empty().then_some(()));
    assert_eq!(state(&server, folder.path())["state"], "stopped");
    assert_ne!(server.get(HOST, "/").status, 200);
    command(&server, &token, &service, "start");
    // The instance is already starting.
    command(&server, &token, &service, "start");
    assert_eq!(settled(&server, &token, &service), ["running", "cancelled", "cancelled", "superseded"]);
    assert_eq!(server.get(HOST, "/").body, "version one");
}

fn stop_races_restart() {
    let (server, folder, service, token) = deployed(&["deploy.drain_seconds=1"]);
    // A fixed sequence of delays, so that a failure can be reproduced.
    let mut delay = 7;
    for _ in 0..5 {
        command(&server, &token, &service, "restart");
        delay = delay * 131 % 509;
        std::thread::sleep(Duration::from_millis(delay));
        command(&server, &token, &service, "stop");
        settled(&server, &token, &service);
        assert_eq!(state(&server, folder.path())["state"], "stopped");
        eventually("nothing of it runs", || server.instances(folder.path()).is_empty().then_some(()));
        assert_ne!(server.get(HOST, "/").status, 200);
    }
    command(&server, &token, &service, "start");
    settled(&server, &token, &service);
    assert_eq!(server.get(HOST, "/").body, "version one");
}

/// Changes the deploy service's database of a stopped server.
fn change(server: &Server, sql: &str) {
    let program = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute(sys.argv[2]); c.commit(); c.close()";
    let database = server.data().join("deploy.db");
    let status = Command::new("python3").args(["-c", program]).arg(database).arg(sql).status().expect("python3 runs");
    assert!(status.success(), "{sql}");
}

fn ends_the_server() {
    let (mut server, folder, service, token) = deployed(&[]);
    server.stop();
    server.start_with_failpoint("building:before");
    let at = folder.path().to_str().expect("a path");
    server.capsule(&["deploy", at, "--yes", "--detach"]).ok();
    server.wait_for_end();
    // Eight more times, without delays.
    change(&server, "UPDATE deployment_attempts SET unfinished = 9 WHERE phase = 'building' AND unfinished = 1");
    change(&server, "UPDATE deployments SET next_attempt_at = 0");
    server.start_with_failpoint("building:before");
    server.wait_for_end();
    change(&server, "UPDATE deployments SET next_attempt_at = 0");
    server.start_with_failpoint("building:before");
    assert_eq!(settled(&server, &token, &service), ["failed", "running"]);
    let failed = &deployments(&server, &token, &service)[0];
    assert!(text(failed, "error").contains("ended 10 times in the phase `building`"), "{failed}");
    assert_eq!(server.get(HOST, "/").body, "version one");
}

/// Starts a request with a chunked body that is sent later.
fn begin(server: &Server, path: &str, token: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", server.port())).expect("it listens");
    let head = format!(
        "POST /api/v1{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\
         Content-Type: application/gzip\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
    );
    stream.write_all(head.as_bytes()).expect("sent");
    stream
}

fn dripping_upload() {
    let server = Server::with(&["uploads.max_seconds=3", "limits.concurrent_uploads=2"]);
    let token = server.admin();
    let service = server.service(&token, "site");
    let paths = [format!("/uploads?service_id={service}"), format!("/plan?service_id={service}")];
    let mut streams = paths.each_ref().map(|path| begin(&server, path, &token));
    let unfinished = || server.entries("blobs/unfinished", "");
    eventually("both are under way", || (unfinished() == 2).then_some(()));
    let third = server.api_raw("POST", &paths[0], Some(&token), "application/gzip", Some(vec![1; 10]));
    assert!(third.status == 429 && third.body.contains("2 open uploads"), "{third:?}");
    for stream in &mut streams {
        let mut answer = String::new();
        stream.set_read_timeout(Some(Duration::from_millis(100))).expect("set");
        eventually("the drip is ended", || {
            let _ = stream.write_all(b"1\r\nx\r\n");
            let mut bytes = [0; 4096];
            if let Ok(read) = stream.read(&mut bytes) {
                answer.push_str(&String::from_utf8_lossy(&bytes[..read]));
            }
            answer.contains("too_slow").then_some(())
        });
        assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    }
    eventually("nothing is left", || (unfinished() == 0 && server.blobs() == 0).then_some(()));
    // A client that disconnects leaves no upload either, and returns its permit.
    drop(begin(&server, &paths[0], &token));
    eventually("there is a place again", || {
        let reply = server.api_raw("POST", &paths[0], Some(&token), "application/gzip", Some(vec![1; 10]));
        (reply.status == 201 && unfinished() == 0).then_some(())
    });
}

/// The peak memory of the server, in KiB.
fn peak(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn slow_readers() {
    let (mut server, folder, service, token) = deployed(&[]);
    let instance = text(&server.instances(folder.path())[0], "id");
    server.stop();
    // In the format of the shim.
    let log = server.data().join("logs/instances").join(instance);
    let mut lines = 0;
    for segment in 2..10 {
        let mut content = String::new();
        while content.len() < 4 << 20 {
            content.push_str(&format!("{lines:016}\to\t{lines} {}\n", "x".repeat(if lines % 100 == 0 { 16_000 } else { 100 })));
            lines += 1;
        }
        std::fs::write(log.join(format!("{segment:08}.log")), content).expect("written");
    }
    server.start();
    let path = format!("/services/{service}/logs?environment=production");
    let _ = server.api("GET", &format!("{path}&tail=1"), Some(&token), None);
    let before = peak(&server);
    let readers: Vec<TcpStream> = (0..8)
        .map(|_| {
            let mut stream = TcpStream::connect(("127.0.0.1", server.port())).expect("it listens");
            let head = format!(
                "GET /api/v1{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).expect("sent");
            stream.read_exact(&mut [0; 100]).expect("it begins");
            stream
        })
        .collect();
    let reply = server.api("GET", &path, Some(&token), None);
    let grown = peak(&server).saturating_sub(before);
    assert!(grown < 48 << 10, "8 readers who do not read, and one who does, took {} MiB", grown >> 10);
    let read: Vec<usize> = reply
        .body
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok()?["text"].as_str()?.split(' ').next()?.parse().ok())
        .collect();
    assert!(read.len() == lines && read.into_iter().eq(0..lines), "every line once, in order");
    drop(readers);
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).map_or(0, |kind| kind.permissions().mode() & 0o777)
}

/// The files of a data directory that other users could read.
fn readable(data: &Path) -> Vec<PathBuf> {
    let files = |directory: &Path| std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let secret = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.contains(".db") || name == "local-token" || name == "keys"
    };
    let all = [data.to_owned()].into_iter().chain(files(data).filter(secret)).chain(files(&data.join("keys")));
    all.filter(|path| mode(path) & 0o077 != 0).collect()
}

fn restored_modes() {
    let mut server = Server::default();
    let _ = server.admin();
    assert_eq!(readable(server.data()), Vec::<PathBuf>::new());
    let place = tempfile::tempdir().expect("a folder");
    let at = place.path().join("backups");
    let at = at.to_str().expect("a path");
    server.capsule_with_settings(&["backup", "create", "--at", at], &[]).ok();
    let key = place.path().join("the.key");
    std::fs::copy(server.data().join("keys/backup.key"), &key).expect("copied");
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).expect("set");

    // Into a new directory, with umask 0, observed during the whole restore.
    let data = place.path().join("data");
    let script = "umask 000; exec \"$0\" backup restore --data \"$1\" --at \"$2\" --key-file \"$3\" --json";
    let mut restoring = Command::new("sh")
        .args(["-c", script])
        .arg(binary())
        .arg(&data)
        .arg(at)
        .arg(&key)
        .env("HOME", place.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("sh runs");
    let status = loop {
        for entry in std::fs::read_dir(place.path()).expect("there").flatten().map(|entry| entry.path()) {
            let is_data = entry.join("keys").exists() || entry.join("local-token").exists();
            assert!(!is_data || mode(&entry) & 0o077 == 0, "{} has mode {:o}", entry.display(), mode(&entry));
        }
        if let Some(status) = restoring.try_wait().expect("it is ours") {
            break status;
        }
    };
    assert!(status.success());
    assert_eq!(readable(&data), Vec::<PathBuf>::new());
    let names: Vec<_> = std::fs::read_dir(place.path()).expect("there").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names.len(), 3, "nothing is left beside: {names:?}");

    // Wrong modes from an earlier version or a copy are repaired and logged at the start.
    let restore = |server: &Server, replace: &[&str]| {
        let key = key.to_str().expect("a path");
        server.capsule_with_settings(&[&["backup", "restore", "--at", at, "--key-file", key], replace].concat(), &[])
    };
    assert!(restore(&server, &["--replace"]).refused().err.contains("A server is running"), "it runs");
    server.stop();
    for path in ["", "keys", "keys/master.key", "local-token", "identity.db"] {
        std::fs::set_permissions(server.data().join(path), PermissionsExt::from_mode(0o755)).expect("set");
    }
    assert!(restore(&server, &["--replace"]).refused().err.contains("still run"), "its ingress runs");
    server.start();
    assert_eq!(readable(server.data()), Vec::<PathBuf>::new());
    assert!(server.log_text().contains("its mode was corrected"), "{}", server.log_text());

    // Existing data is replaced only with --replace, and kept.
    std::fs::write(server.data().join("mark"), "old").expect("written");
    server.capsule(&["server", "down"]).ok();
    server.wait_for_end();
    assert!(restore(&server, &[]).refused().err.contains("not empty"));
    assert!(server.data().join("mark").exists());
    let restored = restore(&server, &["--replace"]).ok();
    let kept = restored
        .out
        .split("is now ")
        .nth(1)
        .and_then(|rest| rest.split(". Remove").next())
        .expect("the output names the old directory")
        .to_owned();
    assert!(Path::new(&kept).join("mark").exists() && !server.data().join("mark").exists(), "{restored:?}");
    std::fs::remove_dir_all(kept).expect("removed");
    server.start();
    let _ = server.admin();
}

fn secrets_of_a_failed_deployment() {
    let (server, folder, service, token) = deployed(&["deploy.health_seconds=5"]);
    let at = folder.path().to_str().expect("a path").to_owned();
    let secret = "correct-horse-battery";
    server.capsule_with(&["env", "set", "--secret", "TOKEN", "-C", &at], &format!("{secret}\n"), &[]).ok();
    // A secret across two pieces of a long line, in base64, and in clear text in a command; printed by the build, and by
    // the process that then fails.
    let print = "import os; t = os.environ['TOKEN']; print('x' * (16384 - 10) + t + 'y' * 100, flush=True); \
                 import base64; print(base64.b64encode(('user:' + t).encode()).decode(), flush=True); \
                 print('no', open('/nonexistent').read() if 0 else t, flush=True)";
    std::fs::write(folder.path().join("print.py"), print).expect("written");
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there");
    let declared: String = declared.lines().filter(|line| !line.starts_with("web") && *line != "[processes]").fold(
        String::new(),
        |mut text, line| {
            text.push_str(line);
            text.push('\n');
            text
        },
    );
    let toml = format!(
        "{declared}\n[build]\nbuild = \"python3 print.py; echo {secret}\"\n[processes]\nweb = \"python3 print.py; exit 1\"\n"
    );
    std::fs::write(folder.path().join("capsule.toml"), toml).expect("written");
    let failed = server.deploy(folder.path(), "app").refused();
    let deployment = deployments(&server, &token, &service).remove(0);
    assert_eq!(deployment["status"], "failed", "{deployment}");
    let log = server.api("GET", &format!("/deployments/{}/logs", text(&deployment, "id")), Some(&token), None).body;
    let events = server.api("GET", &format!("/deployments/{}/events", text(&deployment, "id")), Some(&token), None).body;
    // base64 of `correct-horse` at each of the three alignments.
    let parts = ["correct-", "battery", "Y29ycmVjdC1ob3Jz", "vcnJlY3QtaG9yc", "Jyb3JyZWN0LWhvcnN", "jb3JyZWN0LWhvcnN"];
    let data = server.data().canonicalize().expect("there");
    for (name, content) in [("log", &log), ("events", &events), ("error", &deployment.to_string()), ("answer", &failed.err)] {
        for part in parts {
            assert!(!content.contains(part), "{part} is in the {name}: {}", cut_around(content, part));
        }
        assert!(!content.contains(data.to_str().expect("a path")), "the {name} shows a path of the data directory: {content}");
    }
    assert!(log.matches("***").count() >= 6, "{log}");
    assert!(log.contains("yyyyyyyyyy"), "what is no secret is shown");
}

fn cut_around<'a>(text: &'a str, part: &'a str) -> &'a str {
    let at = text.find(part).unwrap_or_default();
    text.get(at.saturating_sub(60)..(at + 60).min(text.len())).unwrap_or(part)
}
