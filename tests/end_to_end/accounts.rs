//! Accounts, sessions, and members.

use std::time::{Duration, Instant};

use capsule_tests::{Server, text};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::test;

pub fn trials() -> Vec<Trial> {
    vec![
        test("the first user needs the set-up token and becomes administrator", first_user),
        test("errors for wrong credentials and invalid input do not reveal which accounts exist", wrong_input),
        test("a refresh token works once, and its reuse ends the session", refresh_reuse),
        test("after logout neither token is valid", logout),
        test("a forged access token is rejected, and the public keys are published", forged_tokens),
        test("a new member gets access at once, and a removed member loses it within a second", members),
        test("the last owner cannot leave", last_owner),
        test("every error is a problem document with a correlation id", problems),
        test("a command that is repeated with the same idempotency key is carried out once", idempotency),
        test("too many sign-in attempts get 429 with Retry-After", sign_in_limit),
        test("responses have security headers", headers),
    ]
}

fn idempotency() {
    let server = Server::default();
    let (one, other) = (server.register("one@example.com"), server.register("other@example.com"));
    let make = |token: &str, key: &str, name: &str| {
        server.api_with_header("POST", "/organizations", token, ("idempotency-key", key), Some(&json!({"name": name})))
    };
    let first = make(&one, "key-1", "Once").ok();
    assert_eq!(make(&one, "key-1", "Once").ok(), first, "the same reply");
    let changed = make(&one, "key-1", "Else");
    assert!(changed.status == 409 && changed.body.contains("idempotency key"), "{changed:?}");
    assert_ne!(make(&one, "key-2", "Once").ok()["id"], first["id"], "another key");
    assert_ne!(make(&other, "key-1", "Once").ok()["id"], first["id"], "another's key");
    // A refusal is not stored: the command may be allowed later.
    let refused = make(&one, "key-3", "");
    assert_eq!(refused.status, 422, "{refused:?}");
    make(&one, "key-3", "Right").ok();
    assert_eq!(make(&one, "", "Empty").status, 400);
    // A user who has lost the permission does not get the stored reply.
    let path = format!("/organizations/{}", first["id"].as_str().expect("an id"));
    let rename =
        |token: &str| server.api_with_header("PUT", &path, token, ("idempotency-key", "key-4"), Some(&json!({"name": "New"})));
    rename(&one).ok();
    server.api("DELETE", &path, Some(&one), Some(&json!({"password": "a long enough one 1"}))).ok();
    assert_eq!(rename(&one).status, 404);
}

fn sign_in_limit() {
    let server = Server::with(&["limits.sign_ins_per_minute=5"]);
    let body = json!({"email": "nobody@example.com", "password": "wrong wrong wrong 1"});
    let login = || server.api("POST", "/auth/login", None, Some(&body));
    let first = login();
    assert_eq!((first.status, first.headers["ratelimit-limit"].as_str()), (401, "5"));
    let refused = (0..12).map(|_| login()).find(|reply| reply.status == 429).expect("refused in the end");
    let wait: u64 = refused.headers["retry-after"].parse().expect("a number");
    assert!((1..=60).contains(&wait) && refused.body.contains("Try again in"), "{refused:?}");
    // Signed-in users are not affected, and see their own limit.
    let me = server.api("GET", "/auth/me", Some(&server.admin()), None);
    me.ok();
    assert_eq!(me.headers["ratelimit-limit"], "3000");
}

fn first_user() {
    let server = Server::default();
    let body = json!({"email": "ada@example.com", "password": "correct horse battery"});
    let refused = server.api("POST", "/auth/register", None, Some(&body));
    assert_eq!(refused.status, 422, "{refused:?}");
    assert!(refused.body.contains("local-token"), "{refused:?}");
    let mut with = body.clone();
    with["setup_token"] = json!(server.local_token());
    let session = server.api("POST", "/auth/register", None, Some(&with)).ok();
    assert_eq!(session["user"]["platform_admin"], true);
    let other = json!({"email": "bob@example.com", "password": "correct horse battery"});
    let session = server.api("POST", "/auth/register", None, Some(&other)).ok();
    assert_eq!(session["user"]["platform_admin"], false);
    let again = server.api("POST", "/auth/register", None, Some(&other));
    assert_eq!(again.status, 409, "{again:?}");
}

fn wrong_input() {
    let server = Server::default();
    let _ = server.register("ada@example.com");
    let login = |email: &str, password: &str| {
        let reply = server.api("POST", "/auth/login", None, Some(&json!({"email": email, "password": password})));
        let mut problem = reply.json();
        problem["correlation_id"] = Value::Null;
        (reply.status, problem)
    };
    let (wrong, unknown) = (login("ada@example.com", "wrong password"), login("eve@example.com", "wrong password"));
    assert_eq!(wrong.0, 401);
    assert_eq!(wrong, unknown, "the reply reveals which accounts exist");
    let bad = server.api("POST", "/auth/register", None, Some(&json!({"email": "nobody", "password": "short"})));
    assert_eq!(bad.status, 422);
    let fields: Vec<Value> =
        bad.json()["errors"].as_array().expect("a list").iter().map(|error| error["field"].clone()).collect();
    assert_eq!(fields, ["email", "password"]);
    let missing = server.api("POST", "/auth/login", None, Some(&json!({"email": "ada@example.com"})));
    assert_eq!((missing.status, missing.json()["errors"][0]["field"].clone()), (422, json!("password")));
    for (kind, body, status) in [
        ("application/json", b"{\"email\":".to_vec(), 400),
        ("application/json", b"[1]".to_vec(), 400),
        ("application/json", b"\xff\xfe".to_vec(), 400),
        ("text/plain", b"{}".to_vec(), 400),
        ("application/json", vec![b' '; 3 << 20], 413),
    ] {
        let reply = server.api_raw("POST", "/auth/login", None, kind, Some(body));
        assert_eq!(reply.status, status, "{reply:?}");
    }
}

fn refresh_reuse() {
    let server = Server::default();
    let _ = server.register("ada@example.com");
    let login = json!({"email": "ada@example.com", "password": "a long enough one 1"});
    let first = server.api("POST", "/auth/login", None, Some(&login)).ok();
    let refresh = |token: &Value| server.api("POST", "/auth/refresh", None, Some(&json!({"refresh_token": token})));
    let second = refresh(&first["refresh_token"]).ok();
    let me = |session: &Value| server.api("GET", "/auth/me", Some(&text(session, "access_token")), None).status;
    assert_eq!(me(&second), 200);
    assert_eq!(refresh(&first["refresh_token"]).status, 401);
    // The second pair may be in the hands of a thief, so the whole session ends.
    assert_eq!(refresh(&second["refresh_token"]).status, 401);
    let began = Instant::now();
    while me(&second) != 401 {
        assert!(began.elapsed() < Duration::from_secs(5), "the access token still holds");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn logout() {
    let server = Server::default();
    let token = server.register("ada@example.com");
    let login = json!({"email": "ada@example.com", "password": "a long enough one 1"});
    let session = server.api("POST", "/auth/login", None, Some(&login)).ok();
    server.api("POST", "/auth/logout", Some(&text(&session, "access_token")), None).ok();
    let refreshed = server.api("POST", "/auth/refresh", None, Some(&json!({"refresh_token": session["refresh_token"]})));
    assert_eq!(refreshed.status, 401);
    capsule_tests::eventually("the access token is revoked", || {
        (server.api("GET", "/auth/me", Some(&text(&session, "access_token")), None).status == 401).then_some(())
    });
    assert_eq!(server.api("GET", "/auth/me", Some(&token), None).status, 200, "another session of theirs goes on");
}

fn forged_tokens() {
    let server = Server::default();
    let token = server.register("ada@example.com");
    let parts: Vec<&str> = token.split('.').collect();
    // {"alg":"none"}
    let unsigned = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{}.", parts[1]);
    let flipped: String = token
        .char_indices()
        .map(|(index, c)| if index == token.len() - 10 { if c == 'A' { 'B' } else { 'A' } } else { c })
        .collect();
    for forged in [unsigned, flipped, format!("{}.{}.", parts[0], parts[1]), String::new()] {
        assert_eq!(server.api("GET", "/auth/me", Some(&forged), None).status, 401, "{forged}");
    }
    let keys = server.try_get("localhost", "/.well-known/jwks.json").expect("answered").json();
    assert_eq!(keys["keys"][0]["kty"], "OKP");
    assert!(keys["keys"][0]["d"].is_null(), "the private key is published");
    let status = server.api("POST", "/auth/validate", None, Some(&json!({"token": token}))).ok();
    assert_eq!(status["active"], true);
}

fn members() {
    let server = Server::default();
    let (owner, member) = (server.register("owner@example.com"), server.register("member@example.com"));
    let organization = server.api("POST", "/organizations", Some(&owner), Some(&json!({"name": "Team"}))).ok();
    let id = text(&organization, "id");
    let projects = |token: &str| server.api("GET", &format!("/projects?organization_id={id}"), Some(token), None).status;
    assert_eq!(projects(&member), 404);
    let added = server.add_member(&owner, &id, "member@example.com", "viewer", &member);
    assert_eq!(projects(&member), 200, "a member just added is refused");
    let user = text(&added, "user_id");
    server.api("DELETE", &format!("/organizations/{id}/members/{user}"), Some(&owner), None).ok();
    let began = Instant::now();
    while projects(&member) != 404 {
        assert!(began.elapsed() < Duration::from_secs(5), "a removed member is still let in");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn last_owner() {
    let server = Server::default();
    let owner = server.register("owner@example.com");
    let id = text(&server.api("POST", "/organizations", Some(&owner), Some(&json!({"name": "Team"}))).ok(), "id");
    let user = text(&server.api("GET", "/auth/me", Some(&owner), None).ok(), "id");
    let path = format!("/organizations/{id}/members/{user}");
    let leaves = server.api("DELETE", &path, Some(&owner), None);
    assert_eq!(leaves.status, 409, "{leaves:?}");
    let steps_down = server.api("PATCH", &format!("{path}/role"), Some(&owner), Some(&json!({"role": "viewer"})));
    assert_eq!(steps_down.status, 409, "{steps_down:?}");
}

fn problems() {
    let server = Server::default();
    for (method, path, status) in [("GET", "/nowhere", 404), ("DELETE", "/auth/login", 405), ("GET", "/auth/me", 401)] {
        let reply = server.api(method, path, None, None);
        assert_eq!(reply.status, status, "{reply:?}");
        if status != 405 {
            let problem = reply.json();
            assert_eq!(problem["status"], status);
            assert!(
                problem["code"].is_string() && problem["detail"].is_string() && problem["correlation_id"].is_string(),
                "{problem}"
            );
        }
    }
}

fn headers() {
    let server = Server::default();
    for path in ["/", "/api/documentation/", "/api/v1/auth/me"] {
        let response = std::process::Command::new("curl")
            .args([
                "-s",
                "-D",
                "-",
                "-o",
                "/dev/null",
                "-H",
                "X-Correlation-ID: my-own-id",
                &format!("http://127.0.0.1:{}{path}", server.port()),
            ])
            .output()
            .expect("curl runs");
        let head = String::from_utf8_lossy(&response.stdout).to_lowercase();
        for header in [
            "content-security-policy:",
            "x-content-type-options: nosniff",
            "x-frame-options: deny",
            "referrer-policy: no-referrer",
        ] {
            assert!(head.contains(header), "{path} has no {header}:\n{head}");
        }
        assert!(!path.starts_with("/api/v1") || head.contains("x-correlation-id: my-own-id"), "{head}");
    }
    let document = server.try_get("localhost", "/api/documentation.json").expect("answered").json();
    assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.")));
}
