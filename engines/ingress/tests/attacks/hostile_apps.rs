//! Applications that try to slow down other tenants.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::world::{TEST_TIMEOUT, World, connect, echo_head, get, read_head};

/// Sends `first`, then `repeated` without end, until the other end closes the connection.
fn endless(mut stream: TcpStream, first: &[u8], repeated: &[u8]) {
    if read_head(&mut stream).is_some() && stream.write_all(first).is_ok() {
        let block = repeated.repeat((1 << 20) / repeated.len());
        while stream.write_all(&block).is_ok() {}
    }
}

/// Sends `first`, then `repeated` without end, with pauses.
fn slow(mut stream: TcpStream, first: &[u8], repeated: &[u8]) {
    if read_head(&mut stream).is_some() && stream.write_all(first).is_ok() {
        while stream.write_all(repeated).is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Sends requests to an application, 8 at a time, until another application has answered 20 requests. Returns the
/// responses of the first one. An attack that blocks the ingress's threads leaves those 20 requests without a response.
fn attack_beside(world: &World, host: &str) -> Vec<String> {
    let answers = Mutex::new(Vec::new());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let answer = beginning_of_response(world.address, host);
                    answers.lock().expect("not poisoned").push(answer);
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        let answered = (0..20).all(|_| world.send(get("good.test", "/", "")).starts_with("HTTP/1.1 200"));
        over.store(true, Ordering::Relaxed);
        assert!(answered, "{host}: the other application did not respond meanwhile");
    });
    answers.into_inner().expect("not poisoned")
}

/// At most 64 KiB of an application's response.
fn beginning_of_response(address: SocketAddr, host: &str) -> String {
    let mut stream = connect(address);
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
    stream.write_all(get(host, "/", "").as_bytes()).expect("sent");
    let mut answer = Vec::new();
    let _ = stream.take(1 << 16).read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn a_response_head_without_end_is_a_bad_gateway_and_does_not_slow_others_down() {
    let mut world = World::new(1000, Duration::from_secs(3));
    world.app("good", echo_head);
    world.app("hints", |stream| endless(stream, b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"));
    world.app("continues", |stream| endless(stream, b"", b"HTTP/1.1 100 Continue\r\n\r\n"));
    world.app("long-hints", |stream| {
        let hint = format!("HTTP/1.1 103 Early Hints\r\nLink: <{}>\r\n\r\n", "x".repeat(30_000));
        endless(stream, b"", hint.as_bytes());
    });
    world.app("slow-hints", |stream| slow(stream, b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"));
    world.app("slow-head", |stream| slow(stream, b"HTTP/1.1 200 OK\r\nx: ", b"y"));
    world.app("long-head", |stream| endless(stream, b"HTTP/1.1 200 OK\r\nx: ", b"y"));
    world.app("many-headers", |stream| endless(stream, b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"));
    world.app("no-head", |stream| endless(stream, b"", b"\r\n"));
    world.app("rubbish", |stream| endless(stream, b"", b"\0"));
    world.app("silent", |stream| slow(stream, b"", b""));
    world.app("unasked", |stream| endless(stream, b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", b"x"));
    for host in [
        "hints.test",
        "continues.test",
        "long-hints.test",
        "slow-hints.test",
        "slow-head.test",
        "long-head.test",
        "many-headers.test",
        "no-head.test",
        "rubbish.test",
        "silent.test",
        "unasked.test",
    ] {
        for answer in attack_beside(&world, host) {
            assert!(answer.starts_with("HTTP/1.1 502 "), "{host}: {answer}");
        }
    }
}

#[test]
fn a_response_body_without_end_does_not_slow_others_down() {
    let mut world = World::new(1000, Duration::from_secs(5));
    world.app("good", echo_head);
    const CHUNKED: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    world.app("small-chunks", |stream| endless(stream, CHUNKED, b"1\r\nx\r\n"));
    world.app("zeros", |stream| endless(stream, CHUNKED, b"0"));
    world.app("extensions", |stream| endless(stream, &[CHUNKED, b"1;"].concat(), b"x"));
    world.app("trailers", |stream| endless(stream, &[CHUNKED, b"0\r\n"].concat(), b"x: y\r\n"));
    world.app("large", |stream| endless(stream, b"HTTP/1.1 200 OK\r\n\r\n", b"x"));
    for host in ["small-chunks.test", "zeros.test", "extensions.test", "trailers.test", "large.test"] {
        for answer in attack_beside(&world, host) {
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 200 ") || answer.starts_with("HTTP/1.1 502 "), "{host}");
        }
    }
}

#[test]
fn an_app_that_accepts_no_connections_takes_no_threads_and_its_visitors_get_a_503() {
    let mut world = World::new(100_000, TEST_TIMEOUT);
    world.app("good", echo_head);
    world.instance("stuck", 1, |_| {
        std::thread::sleep(Duration::from_millis(500));
        Err(std::io::ErrorKind::TimedOut.into())
    });
    let threads = || std::fs::read_dir("/proc/self/task").expect("listed").count();
    let before = threads();
    let request = get("stuck.test", "/", "");
    let mut visitors: Vec<TcpStream> = (0..400).map(|_| world.connect()).collect();
    for visitor in &mut visitors {
        visitor.write_all(request.as_bytes()).expect("sent");
    }
    let answer = world.send(get("good.test", "/", ""));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let during = threads();
    let mut responses = 0;
    for visitor in &mut visitors {
        let head = read_head(visitor).expect("an answer").to_lowercase();
        assert!(head.starts_with("http/1.1 503 ") && head.contains("\r\nretry-after: "), "{head}");
        responses += 1;
    }
    let most = world.max_connecting.load(Ordering::SeqCst);
    assert!(responses == 400 && most <= 16, "{most} simultaneous connection attempts");
    // The shim is in this process, too, and other tests run beside this one.
    assert!(during < before + 100, "{before} threads became {during}");
}

#[test]
fn the_requests_in_flight_to_an_app_that_does_not_respond_are_limited() {
    let mut world = World::new(10, TEST_TIMEOUT);
    world.app("good", echo_head);
    world.app("silent", |stream| slow(stream, b"", b""));
    let mut visitors: Vec<TcpStream> = (0..10).map(|_| world.connect()).collect();
    for visitor in &mut visitors {
        visitor.write_all(get("silent.test", "/", "").as_bytes()).expect("sent");
    }
    // Once the ten requests are in flight, further ones are rejected.
    let deadline = Instant::now() + TEST_TIMEOUT;
    loop {
        let mut visitor = world.connect();
        visitor.set_read_timeout(Some(Duration::from_millis(200))).expect("set");
        visitor.write_all(get("silent.test", "/", "").as_bytes()).expect("sent");
        if let Some(head) = read_head(&mut visitor) {
            assert!(head.starts_with("HTTP/1.1 503 ") && head.to_lowercase().contains("retry-after: "), "{head}");
            break;
        }
        assert!(Instant::now() < deadline, "no request was rejected");
    }
    assert!(world.send(get("good.test", "/", "")).starts_with("HTTP/1.1 200"));
    // A visitor that leaves frees its place.
    drop(visitors);
    let deadline = Instant::now() + TEST_TIMEOUT;
    loop {
        let mut visitor = world.connect();
        visitor.set_read_timeout(Some(Duration::from_millis(500))).expect("set");
        visitor.write_all(get("silent.test", "/", "").as_bytes()).expect("sent");
        if read_head(&mut visitor).is_none() {
            break;
        }
        assert!(Instant::now() < deadline, "no request is accepted again");
    }
}
