//! Ambiguous requests, and visitors that forge forwarding headers.

use std::io::Write;
use std::time::Duration;

use crate::world::{World, echo_head, get, read_head};

fn world() -> World {
    let mut world = World::new(1000, Duration::from_secs(5));
    world.app("a", echo_head);
    world.app("b", echo_head);
    world
}

/// The values of this header that the application received.
fn received(answer: &str, name: &str) -> Vec<String> {
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let lines = body.lines().filter_map(|line| line.split_once(": "));
    lines.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).collect()
}

#[test]
fn an_ambiguous_request_is_rejected() {
    let world = world();
    for request in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost:\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test, b.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: user@a.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test b.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a..test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test:x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : a.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\n b.test\r\n\r\n",
        "GET http://b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "GET http://a.test@b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "GET gopher://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "GET a.test HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "CONNECT a.test:80 HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: host\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close, X-Forwarded-For\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Authorization\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nConnection: Content-Length\r\nContent-Length: 1\r\n\r\nx",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: +1\r\n\r\nx",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1, 2\r\n\r\nx",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.0\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        // Bytes after a rejected request are not read as a request.
        let answer = world.send(format!("{request}GET /second HTTP/1.1\r\nHost: b.test\r\n\r\n"));
        assert!(answer.starts_with("HTTP/1.1 400 "), "{request}: {answer}");
        assert!(!answer.contains("/second"), "{request}: {answer}");
    }
    for request in [
        format!("GET / HTTP/1.1\r\nHost: a.test\r\n{}\r\n", "x: y\r\n".repeat(1000)),
        format!("GET / HTTP/1.1\r\nHost: a.test\r\nx: {}\r\n\r\n", "y".repeat(100_000)),
    ] {
        assert!(world.send(request).starts_with("HTTP/1.1 431 "));
    }
}

#[test]
fn an_app_receives_one_host_which_is_that_of_its_route() {
    let world = world();
    for (request, host) in [
        (get("A.Test.", "/", ""), "a.test"),
        (get("a.test:8080", "/", ""), "a.test:8080"),
        (get("a.test", "//b.test/", ""), "a.test"),
        ("GET http://a.test/ HTTP/1.1\r\nHost: A.test:80\r\nConnection: close\r\n\r\n".into(), "a.test"),
        ("GET http://a.test/ HTTP/1.0\r\n\r\n".into(), "a.test"),
        (
            get("a.test", "/", "Host_: b.test\r\nX-Host: b.test\r\nX-Forwarded-Host: b.test\r\nX_Forwarded_Host: b.test\r\n"),
            "a.test",
        ),
    ] {
        let answer = world.send(&request);
        assert_eq!(received(&answer, "host"), [host], "{request}: {answer}");
        assert_eq!(received(&answer, "x-forwarded-host"), [host], "{request}");
        assert!(received(&answer, "x_forwarded_host").is_empty() && received(&answer, "x-host").is_empty());
    }
    // Each request of a connection is checked.
    let answer = world.send(format!(
        "GET /1 HTTP/1.1\r\nHost: a.test\r\n\r\nGET /2 HTTP/1.1\r\nHost: b.test\r\n\r\n{}",
        "POST /3 HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ));
    let statuses: Vec<_> = answer.match_indices("HTTP/1.1 ").map(|(at, _)| &answer[at + 9..at + 12]).collect();
    assert_eq!(statuses.iter().filter(|status| **status == "200").count(), 2, "{answer}");
    assert!(answer.contains("400 Bad Request"), "{answer}");
    // Also after a request with a body that ends within the same read.
    const BOTH: &str = "POST /3 HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    let answer = world.send(format!("POST /1 HTTP/1.1\r\nHost: a.test\r\nContent-Length: 2\r\n\r\nhi{BOTH}"));
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("400 Bad Request"), "{answer}");
    let chunked = "POST /1 HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n";
    let answer = world.send(format!("{chunked}{BOTH}"));
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.matches("HTTP/1.1 ").count() == 1, "{answer}");
    assert!(answer.to_lowercase().contains("connection: close\r\n"), "{answer}");
}

#[test]
fn only_websocket_upgrades_are_forwarded() {
    let world = world();
    let answer = world.send(get("a.test", "/", "Upgrade: h2c\r\nConnection: upgrade, http2-settings\r\nHTTP2-Settings: x\r\n"));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(received(&answer, "upgrade").is_empty() && received(&answer, "http2-settings").is_empty(), "{answer}");
    let websocket = "GET / HTTP/1.1\r\nHost: a.test\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\r\n";
    let mut visitor = world.connect();
    visitor.write_all(websocket.as_bytes()).expect("sent");
    assert!(read_head(&mut visitor).expect("an answer").starts_with("HTTP/1.1 200"));
    let seen = read_head(&mut visitor).expect("a body").to_lowercase();
    assert!(seen.contains("upgrade: websocket\r\n") && seen.contains("connection: upgrade\r\n"), "{seen}");
}

#[test]
fn forwarding_headers_are_taken_from_trusted_proxies_only() {
    let mut world = world();
    let claims = "X-Forwarded-For: 192.0.2.1\r\nX_Forwarded_For: 192.0.2.2\r\nX-Forwarded-Proto: https\r\nX-Real-IP: 192.0.2.3\r\n\
                  Forwarded: for=192.0.2.4;proto=https\r\nTrue-Client-IP: 192.0.2.5\r\nX.Forwarded.For: 192.0.2.6\r\n\
                  X-Forwarded-Prefix: /x\r\n";
    let seen = |world: &World| {
        let answer = world.send(get("a.test", "/", claims));
        let names = ["x-forwarded-for", "x-real-ip", "x-forwarded-proto", "forwarded", "true-client-ip"];
        for name in ["x_forwarded_for", "x.forwarded.for"] {
            assert!(received(&answer, name).is_empty(), "{answer}");
        }
        names.map(|name| received(&answer, name).join(" and "))
    };
    assert_eq!(seen(&world), ["127.0.0.1", "127.0.0.1", "http", "for=127.0.0.1;host=\"a.test\";proto=http", ""]);
    world.trust(&["10.0.0.0/8"]);
    assert_eq!(seen(&world)[0], "127.0.0.1");
    world.trust(&["10.0.0.0/8", "127.0.0.0/8", "::1/128"]);
    assert_eq!(
        seen(&world),
        ["192.0.2.1, 127.0.0.1", "192.0.2.1", "https", "for=192.0.2.1;host=\"a.test\";proto=https, for=127.0.0.1", "192.0.2.5"]
    );
}
