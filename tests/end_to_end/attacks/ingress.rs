//! Hostile applications behind the ingress, ambiguous requests, forged headers, and files that a site must not publish.
//! Most attacks are in `engines/ingress/tests/attacks`; these need a whole server.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use capsule_tests::{Server, probe, processes};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::{test, test_of_processes};

pub fn trials() -> Vec<Trial> {
    vec![
        test_of_processes("an app that sends endless hints, or accepts no connections, does not slow other apps", hostile_app),
        test_of_processes("behind a trusted proxy, apps and rate limits see the client address and the scheme", behind_a_proxy),
        test("a site does not publish hidden files, keys or tool configuration, and its build log lists them", site),
    ]
}

/// An application that sends endless early hints for `/hints`, and accepts no connections after `/stop`.
const HOSTILE: &str = "
import os, socket, threading, time
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(('0.0.0.0', int(os.environ['PORT'])))
listener.listen(1)
accepting = True
def serve(connection):
    global accepting
    try:
        head = connection.recv(65536)
        if b'/hints' in head:
            while True:
                connection.sendall(b'HTTP/1.1 103 Early Hints\\r\\n\\r\\n' * 10000)
        if b'/stop' in head:
            accepting = False
        connection.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok')
    except OSError:
        pass
    connection.close()
while accepting:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
time.sleep(3600)
";

/// Sends a request over a new connection and returns the response.
fn send(server: &Server, request: &str) -> String {
    let mut stream = begin(server, request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn begin(server: &Server, request: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", server.port())).expect("connected");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    stream.write_all(request.as_bytes()).expect("sent");
    stream
}

fn get(host: &str, path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n")
}

fn hostile_app() {
    let server = Server::default();
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("hostile"), HOSTILE).expect("written");
    std::fs::write(folder.path().join("capsule.toml"), "[processes]\nweb = \"python3 hostile\"\n").expect("written");
    server.deploy(folder.path(), "hostile").ok();
    server.deploy(probe("one").path(), "good").ok();
    // An ingress with blocked threads does not respond at all.
    let good = || assert_eq!(server.get("good-production.localhost", "/").status, 200);
    let hints: Vec<TcpStream> = (0..8).map(|_| begin(&server, &get("hostile-production.localhost", "/hints", ""))).collect();
    (0..20).for_each(|_| good());
    for mut stream in hints {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    }

    let ingress = processes(&format!("ingress --data {}", server.data().display()));
    let threads = || std::fs::read_dir(format!("/proc/{}/task", ingress[0])).expect("it runs").count();
    assert!(send(&server, &get("hostile-production.localhost", "/stop", "")).starts_with("HTTP/1.1 200 "));
    // The `accept` call that was waiting at the stop takes one more connection, if it has not taken one of the health check.
    let _last = begin(&server, &get("hostile-production.localhost", "/", ""));
    let before = threads();
    let mut stuck: Vec<TcpStream> = (0..300).map(|_| begin(&server, &get("hostile-production.localhost", "/", ""))).collect();
    good();
    let during = threads();
    assert!(during <= before + 4, "{before} threads became {during}");
    let mut rejected = 0;
    for stream in stuck.iter_mut().rev() {
        // A few connections are in the backlog of the socket.
        stream.set_read_timeout(Some(Duration::from_secs(if rejected == 0 { 20 } else { 1 }))).expect("set");
        let mut head = [0; 2048];
        if let Ok(length) = stream.read(&mut head) {
            let head = String::from_utf8_lossy(&head[..length]).to_lowercase();
            assert!(head.starts_with("http/1.1 503 ") && head.contains("retry-after: "), "{head}");
            rejected += 1;
        }
        if rejected > 200 {
            break;
        }
    }
    assert!(rejected > 200, "only {rejected} of 300 got 503 with Retry-After");
}

fn behind_a_proxy() {
    let server = Server::with(&[
        "trusted_proxies=127.0.0.1",
        "public_url=https://localhost:8443",
        "limits.sign_ins_per_minute=6",
        "limits.sign_ins_per_account_and_hour=8",
    ]);
    server.deploy(probe("one").path(), "app").ok();
    const HOST: &str = "app-production.localhost";
    let body = |answer: &str| -> Value {
        serde_json::from_str(answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)).expect("JSON")
    };
    let environment = body(&send(&server, &get(HOST, "/env", "")));
    assert_eq!(environment["CAPSULE_URL"], format!("https://{HOST}:8443"));
    let from = "X-Forwarded-For: 192.0.2.1, 203.0.113.7\r\nX-Forwarded-Proto: https\r\nX_Forwarded_For: 192.0.2.9\r\n";
    let headers = send(&server, &get(HOST, "/headers", from)).to_lowercase();
    for seen in ["\"203.0.113.7, 127.0.0.1\"", "\"x-forwarded-proto\": \"https\"", "\"x-real-ip\": \"203.0.113.7\""] {
        assert!(headers.contains(seen), "{seen}: {headers}");
    }
    assert!(!headers.contains("192.0.2"), "{headers}");

    let _ = server.register("owner@example.com");
    let login = |client: &str, password: &str| {
        let body = format!("{{\"email\": \"owner@example.com\", \"password\": \"{password}\"}}");
        let forwarded = if client.is_empty() { String::new() } else { format!("X-Forwarded-For: {client}\r\n") };
        let answer = send(
            &server,
            &format!(
                "POST /api/v1/auth/login HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{forwarded}\
                 Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            ),
        );
        answer.get(9..12).unwrap_or_default().to_owned()
    };
    // All addresses of a network share a limit; other networks have their own.
    assert!((0..20).any(|n| login(&format!("2001:db8:1:2::{n}"), "wrong wrong 1") == "429"));
    // One network can use only a small part of an account's attempts.
    assert_eq!([0, 1].map(|_| login("192.0.2.50", "wrong wrong 1")), ["401", "429"]);
    // Many networks together cannot exceed the limit of an account,
    assert!((0..20).any(|n| login(&format!("198.51.100.{n}"), "wrong wrong 1") == "429"));
    assert_eq!(login("198.51.100.99", "a long enough one 1"), "429");
    // and its owner can still sign in from a known network.
    assert_eq!(login("", "a long enough one 1"), "200");
}

fn site() {
    let server = Server::default();
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).expect("made");
        std::fs::write(path, "the content").expect("written");
    };
    let hidden =
        [".npmrc", ".htpasswd", ".ssh/id_rsa", ".aws/credentials", "keys/tls.pem", "id_ed25519", "_redirects", "_headers"];
    hidden.iter().chain(&["index.html", "sub/page.html", ".well-known/security.txt"]).for_each(|name| write(name));
    std::os::unix::fs::symlink(".ssh", folder.path().join("x")).expect("linked");
    let deployed = server.deploy(folder.path(), "site").ok();
    let log = format!("{}{}", deployed.out, deployed.err);
    for name in hidden {
        let top = name.split('/').next().unwrap_or_default();
        let named = if top == "keys" { name } else { top };
        assert!(log.contains(named), "{name} is not named: {log}");
    }
    const HOST: &str = "site-production.localhost";
    for path in hidden.iter().copied().chain(["x/id_rsa", "capsule.toml"]) {
        let reply = server.get(HOST, &format!("/{path}"));
        assert!(reply.status == 404 && !reply.body.contains("the content"), "{path}: {reply:?}");
    }
    for path in ["/", "/sub/page.html", "/.well-known/security.txt"] {
        let reply = server.get(HOST, path);
        assert!(reply.status == 200 && reply.headers["content-type"].ends_with("charset=utf-8"), "{path}: {reply:?}");
    }
    let answer = send(&server, &get(HOST, "//sub", "")).to_lowercase();
    assert!(answer.contains("location: /sub/\r\n"), "{answer}");
}
