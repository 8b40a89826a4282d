//! Registration, membership, permissions of an environment, sessions that end, and erasure.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use capsule_tests::{Reply, Server, eventually, text};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{archive_of_page, test};

pub fn trials() -> Vec<Trial> {
    vec![
        test("registration requires an invitation, and a registration link works once for its address", invited_only),
        test("with registration = closed, every registration is refused", closed),
        test("administrators can be appointed and revoked, except the last one", administrators),
        test("an invited user has no access to an organization before accepting", acceptance),
        test("changing an environment requires its deploy permission", environments),
        test("an open stream ends when the membership, session, organization or account ends", streams),
        test("dangerous actions require the password, and a new password ends other sessions", passwords),
        test("erasing an account leaves no personal data", erasure),
    ]
}

const PASSWORD: &str = "a long enough one 1";

fn register(server: &Server, email: &str, more: &Value) -> Reply {
    let mut body = json!({"email": email, "password": PASSWORD});
    for (name, value) in more.as_object().into_iter().flatten() {
        body[name] = value.clone();
    }
    server.api("POST", "/auth/register", None, Some(&body))
}

/// Creates an organization of the user with this token.
fn organization(server: &Server, token: &str, name: &str) -> String {
    text(&server.api("POST", "/organizations", Some(token), Some(&json!({"name": name}))).ok(), "id")
}

fn add(server: &Server, token: &str, organization: &str, email: &str, role: &str) -> Reply {
    let body = json!({"email": email, "role": role});
    server.api("POST", &format!("/organizations/{organization}/members"), Some(token), Some(&body))
}

fn invitations(server: &Server, token: &str) -> Vec<Value> {
    server.api("GET", "/invitations", Some(token), None).ok()["items"].as_array().expect("a list").clone()
}

fn answer(server: &Server, token: &str, invitation: &Value, verb: &str) -> Reply {
    server.api("POST", &format!("/invitations/{}/{verb}", text(invitation, "id")), Some(token), Some(&json!({})))
}

fn invited_only() {
    let server = Server::with(&["registration=invited", "limits.sign_ins_per_minute=0"]);
    let local = server.admin();
    // The local administrator has signed in; the first account still requires the set-up token.
    let refused = register(&server, "eve@example.com", &json!({}));
    assert!(refused.status == 422 && refused.body.contains("setup_token"), "{refused:?}");
    assert_eq!(register(&server, "eve@example.com", &json!({"setup_token": "guessed"})).status, 422);
    let first = register(&server, "ada@example.com", &json!({"setup_token": server.local_token()})).ok();
    assert_eq!(first["user"]["platform_admin"], true);
    let ada = text(&first, "access_token");
    // Later registrations with that token, without a token, or with an invalid token are refused.
    for more in [json!({}), json!({"setup_token": server.local_token()})] {
        assert_eq!(register(&server, "eve@example.com", &more).status, 403);
    }
    assert_eq!(register(&server, "eve@example.com", &json!({"registration_token": "made-up"})).status, 422);

    let team = organization(&server, &ada, "Team");
    let added = add(&server, &ada, &team, "bob@example.com", "developer").ok();
    let token = added["registration_token"].clone();
    assert!(token.is_string() && added["pending"] == true, "{added}");
    // The token is in no reply and in no file.
    let members = server.api("GET", &format!("/organizations/{team}/members"), Some(&ada), None);
    assert!(!members.body.contains(token.as_str().expect("text")) && members.body.contains("bob@example.com"), "{members:?}");
    assert!(!in_data(&server, token.as_str().expect("text")), "the token is in the data directory");
    // The address without the token, and the token with another address, are refused.
    assert_eq!(register(&server, "bob@example.com", &json!({})).status, 403);
    assert_eq!(register(&server, "eve@example.com", &json!({"registration_token": token})).status, 422);
    // A second link invalidates the first.
    let again = add(&server, &ada, &team, "Bob@Example.com ", "developer").ok()["registration_token"].clone();
    assert_eq!(register(&server, "bob@example.com", &json!({"registration_token": token})).status, 422);
    let racing: Vec<u16> = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| register(&server, "bob@example.com", &json!({"registration_token": again})).status))
            .collect();
        tries.into_iter().map(|tried| tried.join().expect("answered")).collect()
    });
    assert_eq!(racing.iter().filter(|status| **status == 201).count(), 1, "{racing:?}");
    let login = json!({"email": "bob@example.com", "password": PASSWORD});
    let bob = text(&server.api("POST", "/auth/login", None, Some(&login)).ok(), "access_token");
    assert_eq!(server.api("GET", &format!("/organizations/{team}"), Some(&bob), None).status, 404, "not accepted yet");
    answer(&server, &bob, &invitations(&server, &bob)[0], "accept").ok();
    server.api("GET", &format!("/organizations/{team}"), Some(&bob), None).ok();

    // A removed invitation cannot be used.
    let added = add(&server, &ada, &team, "carl@example.com", "viewer").ok();
    let path = format!("/organizations/{team}/members/{}", text(&added, "user_id"));
    server.api("DELETE", &path, Some(&ada), None).ok();
    assert_eq!(register(&server, "carl@example.com", &json!({"registration_token": added["registration_token"]})).status, 422);

    // With the command line, the link goes through standard input and not through an argument.
    let home = organization(&server, &local, "Home");
    let slug = text(&server.api("GET", &format!("/organizations/{home}"), Some(&local), None).ok(), "slug");
    let shown = server.capsule(&["org", "add", &slug, "dora@example.com", "--json"]).ok().json();
    let link = text(&shown, "registration_link");
    assert!(link.contains("/register#"), "{shown}");
    assert_eq!(server.get("localhost", "/register").status, 200);
    let address = format!("http://127.0.0.1:{}", server.port());
    let elsewhere: &[(&str, &str)] = &[("CAPSULE_DATA", "/nowhere"), ("XDG_CONFIG_HOME", "/tmp/capsule-test-dora")];
    let run = |arguments: &[&str], input: &str| {
        let all: Vec<&str> = arguments.iter().chain(&["--server", &address]).copied().collect();
        server.capsule_with(&all, input, elsewhere)
    };
    let input = format!("{link}\n{PASSWORD}\n");
    run(&["register", "--email", "dora@example.com", "--token-stdin"], &input).ok();
    assert!(run(&["org", "list"], "").ok().out.contains("pending"));
    run(&["org", "accept", &slug], "").ok();
    assert!(!run(&["org", "list"], "").ok().out.contains("pending"));
    let _ = std::fs::remove_dir_all("/tmp/capsule-test-dora");
}

fn closed() {
    let server = Server::with(&["registration=closed"]);
    let first = register(&server, "ada@example.com", &json!({"setup_token": server.local_token()})).ok();
    let ada = text(&first, "access_token");
    assert_eq!(register(&server, "eve@example.com", &json!({})).status, 403);
    let team = organization(&server, &ada, "Team");
    let refused = add(&server, &ada, &team, "bob@example.com", "viewer");
    assert!(refused.status == 422 && refused.body.contains("registration is closed"), "{refused:?}");
}

fn administrators() {
    let server = Server::with(&["limits.sign_ins_per_minute=0"]);
    let first = register(&server, "ada@example.com", &json!({"setup_token": server.local_token()})).ok();
    let ada = (text(&first, "access_token"), text(&first["user"], "id"));
    let second = register(&server, "bob@example.com", &json!({})).ok();
    let bob = (text(&second, "access_token"), text(&second["user"], "id"));
    let set = |by: &str, who: &str, admin: bool, password: &str| {
        let body = json!({"platform_admin": admin, "password": password});
        server.api("PATCH", &format!("/admin/users/{who}"), Some(by), Some(&body))
    };
    let last = set(&ada.0, &ada.1, false, PASSWORD);
    assert!(last.status == 409 && last.body.contains("last administrator"), "{last:?}");
    let unconfirmed = set(&ada.0, &bob.1, true, "");
    assert!(unconfirmed.status == 403 && unconfirmed.body.contains("reauthentication_required"), "{unconfirmed:?}");
    assert_eq!(set(&ada.0, &bob.1, true, "not the password").status, 403);
    set(&ada.0, &bob.1, true, PASSWORD).ok();
    // The grant applies to the existing session.
    eventually("the new administrator is one", || {
        (server.api("GET", "/admin/users", Some(&bob.0), None).status == 200).then_some(())
    });
    // Two administrators revoke each other at the same time: exactly one succeeds.
    let statuses = std::thread::scope(|scope| {
        let one = scope.spawn(|| set(&ada.0, &bob.1, false, PASSWORD).status);
        let other = scope.spawn(|| set(&bob.0, &ada.1, false, PASSWORD).status);
        [one.join().expect("answered"), other.join().expect("answered")]
    });
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
    let (winner, loser) = if statuses[0] == 200 { (&ada, &bob) } else { (&bob, &ada) };
    let users = server.api("GET", "/admin/users", Some(&winner.0), None).ok();
    let admins = users["items"].as_array().expect("a list").iter().filter(|user| user["platform_admin"] == true).count();
    assert_eq!(admins, 1, "{users}");
    eventually("the other's sessions have ended", || {
        (server.api("GET", "/auth/me", Some(&loser.0), None).status == 401).then_some(())
    });
    // With the command line, confirmed by the local token, which signs in only as the local administrator.
    let winner = if winner.1 == ada.1 { "ada@example.com" } else { "bob@example.com" };
    assert_eq!(register(&server, "admin@localhost", &json!({})).status, 422);
    server.capsule(&["admin", "users", "revoke", winner]).ok();
    assert!(server.capsule(&["admin", "users", "revoke", "admin@localhost"]).refused().err.contains("last administrator"));
    server.capsule(&["admin", "users", "grant", winner]).ok();
    server.capsule(&["admin", "users", "revoke", "admin@localhost"]).ok();
    assert_eq!(server.api("POST", "/auth/local", None, Some(&json!({"token": server.local_token()}))).status, 403);
}

fn acceptance() {
    let server = Server::default();
    let (owner, ada) = (server.register("owner@example.com"), server.register("ada@example.com"));
    let team = organization(&server, &owner, "Team");
    let added = add(&server, &owner, &team, "ada@example.com", "developer").ok();
    assert!(added["registration_token"].is_null() && added["pending"] == true, "{added}");
    let projects = || server.api("GET", &format!("/projects?organization_id={team}"), Some(&ada), None).status;
    let listed = |token: &str| server.api("GET", "/organizations", Some(token), None).body.contains(&team);
    assert_eq!(projects(), 404, "pending members have no rights");
    assert!(!listed(&ada), "it is no organization of theirs");
    // Only the invited user can accept or decline.
    let invitation = invitations(&server, &ada)[0].clone();
    assert_eq!(invitation["invited_by"], "owner@example.com");
    assert_eq!(answer(&server, &owner, &invitation, "accept").status, 404);
    answer(&server, &ada, &invitation, "reject").ok();
    assert_eq!(answer(&server, &ada, &invitation, "accept").status, 404, "it was answered");
    assert!(!server.api("GET", &format!("/organizations/{team}/members"), Some(&owner), None).body.contains("ada@"));
    // A pending member can get another role, and can be removed.
    add(&server, &owner, &team, "ada@example.com", "admin").ok();
    let user = text(&added, "user_id");
    let path = format!("/organizations/{team}/members/{user}");
    server.api("PATCH", &format!("{path}/role"), Some(&owner), Some(&json!({"role": "viewer"}))).ok();
    let invitation = invitations(&server, &ada)[0].clone();
    assert_eq!(invitation["role"], "viewer");
    server.api("DELETE", &path, Some(&owner), None).ok();
    assert_eq!(answer(&server, &ada, &invitation, "accept").status, 404, "it was withdrawn");
    // After acceptance, the user is a member with the invited role, and can leave.
    server.add_member(&owner, &team, "ada@example.com", "viewer", &ada);
    assert_eq!(projects(), 200);
    assert!(listed(&ada));
    let create = server.api("POST", "/projects", Some(&ada), Some(&json!({"organization_id": team, "name": "x"})));
    assert_eq!(create.status, 403, "{create:?}");
    server.api("POST", &format!("/organizations/{team}/leave"), Some(&ada), Some(&json!({}))).ok();
    assert!(!listed(&ada));
    let stays = server.api("POST", &format!("/organizations/{team}/leave"), Some(&owner), Some(&json!({})));
    assert_eq!(stays.status, 409, "{stays:?}");
}

fn environments() {
    let server = Server::default();
    let (owner, developer) = (server.register("owner@example.com"), server.register("developer@example.com"));
    let team = organization(&server, &owner, "Team");
    server.add_member(&owner, &team, "developer@example.com", "developer", &developer);
    let post = |path: &str, body: Value| server.api("POST", path, Some(&owner), Some(&body)).ok();
    let project = text(&post("/projects", json!({"organization_id": team, "name": "Shop"})), "id");
    let listed = server.api("GET", &format!("/projects/{project}/environments"), Some(&owner), None).ok();
    let production = text(&listed["items"][0], "id");
    let staging = json!({"name": "staging", "kind": "staging"});
    let staging = text(&post(&format!("/projects/{project}/environments"), staging), "id");
    let service = |name: &str, environment: &str| {
        let id = text(&post("/services", json!({"project_id": project, "name": name})), "id");
        let path = format!("/uploads?service_id={id}");
        let upload = server.api_raw("POST", &path, Some(&owner), "application/x-tar", Some(archive_of_page("hi"))).ok();
        let body = json!({"upload_id": upload["id"], "environment": environment});
        post(&format!("/services/{id}/deploy"), body);
        id
    };
    let (front, trial) = (service("front", "production"), service("trial", "staging"));
    let send = |method: &str, path: String, body: Option<Value>| {
        let reply = server.api(method, &path, Some(&developer), body.as_ref());
        (reply.status, reply.body)
    };
    for (environment, expected) in [(&production, 403), (&staging, 200)] {
        let path = format!("/environments/{environment}");
        let variables = json!({"variables": {"A": "1"}});
        for (method, path, body) in [
            ("PUT", format!("{path}/variables"), Some(variables.clone())),
            ("PATCH", format!("{path}/variables"), Some(variables)),
            ("PUT", format!("{path}/secrets/TOKEN"), Some(json!({"value": "1"}))),
        ] {
            let (status, answer) = send(method, path.clone(), body);
            assert_eq!(status, expected, "{method} {path}: {answer}");
        }
    }
    server.api("PUT", &format!("/environments/{production}/secrets/TOKEN"), Some(&owner), Some(&json!({"value": "1"}))).ok();
    for path in [
        format!("/environments/{production}/secrets/TOKEN"),
        format!("/environments/{production}"),
        format!("/services/{front}"),
        format!("/projects/{project}"),
    ] {
        assert_eq!(send("DELETE", path.clone(), None).0, 403, "{path}");
    }
    server.api("GET", &format!("/services/{front}"), Some(&owner), None).ok();
    // A developer can delete a service that runs only in staging, and the environment staging.
    for path in
        [format!("/environments/{staging}/secrets/TOKEN"), format!("/services/{trial}"), format!("/environments/{staging}")]
    {
        let (status, answer) = send("DELETE", path.clone(), None);
        assert_eq!(status, 200, "{path}: {answer}");
    }
}

/// An open log stream of a service (`follow=true`).
struct Stream(Child);

impl Stream {
    fn open(server: &Server, token: &str, service: &str) -> Self {
        let url = format!("http://127.0.0.1:{}/api/v1/services/{service}/logs?follow=true", server.port());
        let mut child = Command::new("curl");
        child.args(["-sN", "--max-time", "90", "-w", "%{http_code}", "-H", &format!("Authorization: Bearer {token}"), &url]);
        Self(child.stdout(Stdio::piped()).spawn().expect("curl runs"))
    }

    fn is_open(&mut self) -> bool {
        self.0.try_wait().expect("waited for").is_none()
    }

    /// Waits for the end of the stream, which must come long before the client's timeout.
    fn ends(&mut self, why: &str) {
        let began = Instant::now();
        while self.is_open() {
            assert!(began.elapsed() < Duration::from_secs(10), "{why}: the stream is open still");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn streams() {
    let server = Server::default();
    let people = ["owner", "removed", "gone", "erased"];
    let tokens: Vec<String> = people.iter().map(|name| server.register(&format!("{name}@example.com"))).collect();
    let (owner, removed, gone, erased) = (&tokens[0], &tokens[1], &tokens[2], &tokens[3]);
    let team = organization(&server, owner, "Team");
    let added = server.add_member(owner, &team, "removed@example.com", "viewer", removed);
    server.add_member(owner, &team, "gone@example.com", "viewer", gone);
    server.add_member(owner, &team, "erased@example.com", "viewer", erased);
    let project = server.api("POST", "/projects", Some(owner), Some(&json!({"organization_id": team, "name": "Shop"}))).ok();
    let body = json!({"project_id": project["id"], "name": "web"});
    let service = text(&server.api("POST", "/services", Some(owner), Some(&body)).ok(), "id");
    let mut open: Vec<Stream> = tokens.iter().map(|token| Stream::open(&server, token, &service)).collect();
    std::thread::sleep(Duration::from_secs(2));
    for (stream, name) in open.iter_mut().zip(people) {
        assert!(stream.is_open(), "the stream of {name} has ended by itself");
    }
    let path = format!("/organizations/{team}/members/{}", text(&added, "user_id"));
    server.api("DELETE", &path, Some(owner), None).ok();
    open[1].ends("removed from the organization");
    server.api("POST", "/auth/logout", Some(gone), Some(&json!({}))).ok();
    open[2].ends("signed out");
    let confirmed = json!({"password": PASSWORD});
    assert_eq!(server.api("DELETE", "/auth/me", Some(erased), Some(&confirmed)).status, 202);
    open[3].ends("erased");
    assert!(open[0].is_open(), "a stream with permission stays open");
    assert_eq!(server.api("DELETE", &format!("/organizations/{team}"), Some(owner), Some(&confirmed)).status, 202);
    open[0].ends("the organization was deleted");
}

fn passwords() {
    let server = Server::with(&["limits.sign_ins_per_minute=8"]);
    let token = server.register("ada@example.com");
    let login = |password: &str| {
        server.api("POST", "/auth/login", None, Some(&json!({"email": "ada@example.com", "password": password})))
    };
    let other = text(&login(PASSWORD).ok(), "access_token");
    let team = organization(&server, &token, "Team");
    // A session alone is not enough.
    for (method, path) in [("DELETE", "/auth/me".to_owned()), ("DELETE", format!("/organizations/{team}"))] {
        for body in [json!({}), json!({"password": "not the password"})] {
            let refused = server.api(method, &path, Some(&token), Some(&body));
            assert!(refused.status == 403 && refused.body.contains("reauthentication_required"), "{path}: {refused:?}");
        }
    }
    let change = |old: &str, new: &str| {
        let body = json!({"password": old, "new_password": new});
        server.api("POST", "/auth/password/change", Some(&token), Some(&body))
    };
    assert_eq!(change(PASSWORD, "short").status, 422);
    assert_eq!(change("not the password", "another long one 2").status, 403);
    change(PASSWORD, "another long one 2").ok();
    assert_eq!(server.api("GET", "/auth/me", Some(&token), None).status, 200, "this session goes on");
    eventually("the other has ended", || (server.api("GET", "/auth/me", Some(&other), None).status == 401).then_some(()));
    assert_eq!(login(PASSWORD).status, 401);
    login("another long one 2").ok();
    // Guesses count per account, from all addresses together.
    let limited = (0..20).map(|_| change("guess guess guess", "another long one 3").status).find(|status| *status == 429);
    assert!(limited.is_some(), "guesses are not limited");
    // The local administrator has no password and confirms with the local token.
    server.capsule_with(&["password"], "\nyet another one 4\n", &[]).ok();
    eventually("the local administrator can sign in", || {
        let body = json!({"email": "admin@localhost", "password": "yet another one 4"});
        (server.api("POST", "/auth/login", None, Some(&body)).status == 200).then_some(())
    });
}

/// Whether any file of the data directory contains this text.
fn in_data(server: &Server, text: &str) -> bool {
    let found = Command::new("grep").args(["-r", "-a", "-l", "-i", "-F", text]).arg(server.data()).output().expect("grep runs");
    !found.stdout.is_empty()
}

fn erasure() {
    let server = Server::default();
    let (name, email) = ("Xaviera Quillfeather", "quillfeather.x@example.com");
    let friend = server.register("friend@example.com");
    let session = register(&server, email, &json!({"name": name})).ok();
    let (token, user) = (text(&session, "access_token"), text(&session["user"], "id"));
    let personal = eventually("the personal organization is there", || {
        let all = server.api("GET", "/organizations", Some(&token), None).ok();
        all["items"].as_array().and_then(|items| items.first().cloned())
    });
    assert_eq!(personal["slug"], "quillfeather-x");
    // An organization with another owner stays.
    server.add_member(&token, &text(&personal, "id"), "friend@example.com", "owner", &friend);
    // Named after the user, with a stored reply, and refused once with its name in the error.
    let own = json!({"name": format!("{name} Ltd")});
    server.api_with_header("POST", "/organizations", &token, ("idempotency-key", "one"), Some(&own)).ok();
    server.api_with_header("PATCH", "/auth/me", &token, ("idempotency-key", "two"), Some(&json!({"name": name}))).ok();
    // A pending invitation.
    let team = organization(&server, &friend, "Team");
    add(&server, &friend, &team, email, "viewer").ok();
    assert!(in_data(&server, email) && in_data(&server, name), "the search finds nothing at all");

    assert_eq!(server.api("DELETE", "/auth/me", Some(&token), Some(&json!({"password": PASSWORD}))).status, 202);
    eventually("the erasure is over", || {
        let sagas = server.capsule(&["admin", "sagas", "list", "--json"]).ok().json();
        sagas.as_array()?.iter().find(|saga| saga["name"] == "user_erasure" && saga["state"] == "done").map(|_| ())
    });
    for text in [email, name, "quillfeather"] {
        eventually(&format!("{text} is nowhere"), || (!in_data(&server, text)).then_some(()));
    }
    let members = server.api("GET", &format!("/organizations/{team}/members"), Some(&friend), None);
    assert!(!members.body.contains(&user), "{members:?}");
    let kept = server.api("GET", &format!("/organizations/{}", text(&personal, "id")), Some(&friend), None).ok();
    assert!(!kept.to_string().to_lowercase().contains("quillfeather"), "{kept}");
}
