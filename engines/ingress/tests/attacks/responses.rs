//! What applications and sites must not send to visitors.

use std::io::Write;
use std::time::Duration;

use crate::world::{World, get, read_head};

fn headers(answer: &str, name: &str) -> Vec<String> {
    let head = answer.split("\r\n\r\n").next().unwrap_or_default();
    let lines = head.lines().filter_map(|line| line.split_once(": "));
    lines.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).collect()
}

#[test]
fn an_app_sets_cookies_for_its_own_host_only() {
    let mut world = World::new(1000, Duration::from_secs(5));
    let head = "Set-Cookie: a=1; Domain=test; Path=/\r\nSet-Cookie: b=2; domain=.app.test\r\nSet-Cookie: __Host-c=3; Secure\r\n\
                X-Accel-Redirect: /secret\r\nKeep-Alive: timeout=1\r\n";
    let plain = format!("HTTP/1.1 200 OK\r\n{head}Content-Length: 2\r\n\r\nhi");
    let switching = format!("HTTP/1.1 101 Switching Protocols\r\n{head}Connection: Upgrade\r\nUpgrade: websocket\r\n\r\nhi");
    world.app("app", move |mut stream| {
        while let Some(request) = read_head(&mut stream) {
            let is_websocket = request.to_lowercase().contains("upgrade: websocket");
            if stream.write_all(if is_websocket { &switching } else { &plain }.as_bytes()).is_err() || is_websocket {
                return;
            }
        }
    });
    let websocket = "GET / HTTP/1.1\r\nHost: app.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
    for (request, status) in [(get("app.test", "/", ""), "200"), (websocket.to_owned(), "101")] {
        let answer = world.send(request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.ends_with("hi"), "{answer}");
        assert_eq!(headers(&answer, "set-cookie"), ["a=1; Path=/", "b=2; domain=.app.test", "__Host-c=3; Secure"]);
        assert!(headers(&answer, "x-accel-redirect").is_empty() && headers(&answer, "keep-alive").is_empty(), "{answer}");
    }
}

#[test]
fn a_response_has_one_length() {
    let mut world = World::new(1000, Duration::from_secs(5));
    world.app("both", |mut stream| {
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\nConnection: Content-Type, X-Own\r\n\
                      Content-Type: text/plain\r\nX-Own: 1\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
        while read_head(&mut stream).is_some() && stream.write_all(answer.as_bytes()).is_ok() {}
    });
    let answer = world.send(get("both.test", "/", ""));
    assert!(answer.contains("hello") && headers(&answer, "content-length").is_empty(), "{answer}");
    assert_eq!(headers(&answer, "content-type"), ["text/plain"]);
    assert!(headers(&answer, "x-own").is_empty(), "{answer}");
}

#[test]
fn a_site_serves_published_files_with_a_charset_and_redirects_to_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    for file in
        ["index.html", ".npmrc", ".ssh/id_rsa", "d/index.html", "id_rsa", "a.pem", "capsule.toml", "_redirects", ".git/config"]
    {
        let path = folder.path().join(file);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        std::fs::write(path, "the content").expect("written");
    }
    std::fs::create_dir_all(folder.path().join(".well-known")).expect("made");
    std::fs::write(folder.path().join(".well-known/security.txt"), "well known").expect("written");
    std::os::unix::fs::symlink(".git", folder.path().join("x")).expect("linked");
    let mut world = World::new(1000, Duration::from_secs(5));
    world.site("site", folder.path());
    for path in [
        "/.npmrc",
        "/%2enpmrc",
        "//.npmrc",
        "/.ssh/id_rsa",
        "/d/../.npmrc",
        "/d/%2e%2e/.npmrc",
        "/id_rsa",
        "/a.pem",
        "/capsule.toml",
        "/_redirects",
        "/.git/config",
        "/x/config",
    ] {
        let answer = world.send(get("site.test", path, ""));
        assert!(answer.starts_with("HTTP/1.1 404 ") && !answer.contains("the content"), "{path}: {answer}");
    }
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/d/", "text/html; charset=utf-8"),
        ("/.well-known/security.txt", "text/plain; charset=utf-8"),
    ] {
        let answer = world.send(get("site.test", path, ""));
        assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
        assert_eq!(headers(&answer, "content-type"), [kind], "{path}");
    }
    for path in ["/d", "//d", "///d", "/./d", "/%2f%2fd", "/\\d", "/%5cd", "/%09/d"] {
        let answer = world.send(get("site.test", path, ""));
        for location in headers(&answer, "location") {
            assert!(location.starts_with('/') && !location[1..].starts_with(['/', '\\']), "{path}: {location}");
        }
    }
    assert_eq!(headers(&world.send(get("site.test", "//d", "")), "location"), ["/d/"]);
}
