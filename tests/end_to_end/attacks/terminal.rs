//! The command line with wrong targets, misspelt names and hostile output.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use capsule_tests::{CommandOutput, Server, Signal, eventually, example, free_port, signal, text};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{test, test_of_processes};

pub fn trials() -> Vec<Trial> {
    vec![
        test("a command never uses another server than the one that was named", targets),
        test("a misspelt environment is an error, and destroy deletes only its target", environments),
        test("a deploy without permission creates nothing, and uses only the personal or the named organization", permissions),
        test("replies of a hostile server cannot control the terminal or redirect a password", hostile_server),
        test_of_processes("an interrupted deploy continues, says so, and can be cancelled by its number", interrupted),
        test("an outdated ingress is reported and can be replaced", outdated_ingress),
        test("server health, server down and a second start report the right server and what to do", instances),
    ]
}

fn at(folder: &tempfile::TempDir) -> &str {
    folder.path().to_str().expect("a path")
}

/// The error of `--json`: the last line of standard error.
fn error(ran: &CommandOutput) -> Value {
    let last = ran.err.lines().last().unwrap_or_default();
    let error: Value = serde_json::from_str(last).unwrap_or_else(|why| panic!("{why}: {ran:?}"));
    for member in ["code", "message", "exit_status"] {
        assert!(!error[member].is_null(), "no {member} in {error}");
    }
    error
}

fn assert_clean(ran: &CommandOutput) {
    for text in [&ran.out, &ran.err] {
        let bad = text.chars().find(|c| (c.is_control() && !matches!(c, '\n' | '\t')) || ('\u{202a}'..='\u{202e}').contains(c));
        assert_eq!(bad, None, "{ran:?}");
    }
}

fn targets() {
    let server = Server::default();
    let folder = example("static");
    // A session that a fallback would use.
    server.capsule(&["whoami"]).ok();
    let other = tempfile::tempdir().expect("a folder");
    let data = other.path().to_str().expect("a path");
    let commands: [&[&str]; 4] = [
        &["whoami"],
        &["deploy", at(&folder), "-p", "x", "-s", "x", "--yes"],
        &["destroy", at(&folder), "-p", "x", "-s", "x", "--all-environments", "--yes"],
        &["env", "set", "A=1", "-p", "x", "-s", "x"],
    ];
    for command in commands {
        for (flags, variables) in [(vec!["--data", data], vec![]), (vec![], vec![("CAPSULE_DATA", data)])] {
            let refused = server.capsule_with(&[command, &flags].concat(), "", &variables).refused();
            assert!(refused.err.contains(data) && refused.err.contains("capsule server --data"), "{refused:?}");
        }
        let nowhere = format!("http://127.0.0.1:{}", free_port());
        for (flags, variables) in
            [(vec!["--server", nowhere.as_str()], vec![]), (vec![], vec![("CAPSULE_SERVER", nowhere.as_str())])]
        {
            let refused = server.capsule_with(&[command, &flags].concat(), "", &variables).refused();
            assert!(refused.err.contains(&nowhere), "{refused:?}");
        }
    }
    let result = error(&server.capsule(&["--json", "whoami", "--data", data]).refused());
    assert_eq!((&result["code"], &result["exit_status"]), (&json!("server_not_running"), &json!(1)), "{result}");
    assert!(result["hint"].as_str().is_some_and(|hint| hint.contains("capsule server")), "{result}");
    let result = error(&server.capsule(&["--json", "dpeloy"]).refused());
    assert_eq!((&result["code"], &result["exit_status"]), (&json!("usage"), &json!(2)), "{result}");
    assert!(result["hint"].as_str().is_some_and(|hint| hint.contains("deploy") && !hint.contains("destroy")), "{result}");
    let result = error(&server.capsule(&["--json", "status", at(&folder), "-p", "nothing", "-s", "x"]).refused());
    assert_eq!(result["code"], "no_such_project");
    // The password would be sent in clear text.
    let result = server.capsule(&["login", "--server", "http://192.0.2.1:1", "--email", "a@example.com"]).refused();
    assert!(result.err.contains("in the clear") && result.err.contains("--insecure-http"), "{result:?}");
    let plan = server.capsule(&["init", at(&folder), "--json"]).ok();
    assert!(!plan.out.contains("0.8999") && !plan.out.contains("0.9499"), "{plan:?}");
}

fn environments() {
    let server = Server::default();
    let folder = example("static");
    let root = at(&folder);
    std::fs::create_dir(folder.path().join("src")).expect("made");
    std::fs::write(folder.path().join("src/page.html"), "inner").expect("written");
    let projects = || {
        let token = server.admin();
        let own = text(&server.api("GET", "/organizations", Some(&token), None).ok()["items"][0], "id");
        let all = server.api("GET", &format!("/projects?organization_id={own}"), Some(&token), None).ok();
        all["items"].as_array().expect("a list").iter().map(|project| text(project, "slug")).collect::<Vec<_>>()
    };
    // Without a terminal to confirm, nothing is created.
    let refused = server.capsule_in(&folder.path().join("src"), &["deploy"]).refused();
    assert!(refused.err.contains("--yes") && refused.err.contains("--project"), "{refused:?}");
    let refused = server.capsule(&["deploy", root, "-p", "pages", "-s", "front"]).refused();
    assert!(refused.err.contains("--yes"), "{refused:?}");
    let refused = server.capsule(&["deploy", root, "-p", "pages", "-s", "front", "--yes", "-e", "staging"]).refused();
    assert!(refused.err.contains("--create"), "{refused:?}");
    assert!(projects().is_empty(), "{:?}", projects());
    let deployed = server.capsule(&["deploy", root, "-p", "pages", "-s", "front", "--yes"]).ok();
    for part in ["organization ", "project pages", "service front", "environment production", "Server http://"] {
        assert!(deployed.err.lines().any(|line| line.starts_with("Server ") && line.contains(part)), "no {part} in {deployed:?}");
    }
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("written");
    assert!(declared.contains("organization = "), "{declared}");

    for command in
        [&["deploy", root, "--yes"][..], &["status", root], &["logs", root], &["env", "list", "-C", root], &["stop", root]]
    {
        let refused = server.capsule(&[command, &["-e", "prdouction"]].concat()).refused();
        assert!(refused.err.contains("no environment prdouction. Did you mean production?"), "{command:?}: {refused:?}");
    }
    let deployed = server.capsule_in(&folder.path().join("src"), &["deploy", "-e", "staging", "--create"]).ok();
    assert!(deployed.err.contains("which has the capsule.toml"), "{deployed:?}");
    assert_eq!(projects(), ["pages"]);
    let [production, staging] = ["front-production.localhost", "front-staging.localhost"];
    assert_eq!(server.get(staging, "/src/page.html").body, "inner", "the application was deployed, not the folder in it");

    let refused = server.capsule(&["destroy", root, "--yes"]).refused();
    for part in ["production", "staging", "front-staging.localhost", "--all-environments"] {
        assert!(refused.err.contains(part), "no {part} in {refused:?}");
    }
    server.capsule(&["destroy", root, "-e", "nothing", "--yes"]).refused();
    server.capsule(&["destroy", root, "-e", "staging"]).refused();
    assert_eq!(server.get(staging, "/").status, 200);
    let left = server.capsule(&["destroy", root, "-e", "staging", "--yes"]).ok();
    assert!(left.out.contains("staging") && left.err.contains("environment staging"), "{left:?}");
    eventually("staging is gone", || (server.get(staging, "/").status == 404).then_some(()));
    assert_eq!(server.get(production, "/").status, 200, "production serves on");
    let again = server.capsule(&["destroy", root, "-e", "staging", "--yes", "--json"]).refused();
    assert_eq!(error(&again)["code"], "not_deployed");
    // It can be created again with the same name once its files are removed.
    eventually("staging is deployed again", || server.capsule(&["deploy", root, "-e", "staging"]).success.then_some(()));
    assert_eq!(server.get(staging, "/").status, 200);
    server.capsule(&["destroy", root, "--all-environments", "--yes"]).ok();
    eventually("all of it is gone", || {
        [production, staging].iter().all(|host| server.get(host, "/").status == 404).then_some(())
    });
}

fn permissions() {
    let server = Server::default();
    let owner = server.register("owner@example.com");
    let _ = server.register("developer@example.com");
    let acme = server.api("POST", "/organizations", Some(&owner), Some(&json!({"name": "Acme", "slug": "acme"}))).ok();
    let acme = text(&acme, "id");
    let member = json!({"email": "developer@example.com", "role": "developer"});
    server.api("POST", &format!("/organizations/{acme}/members"), Some(&owner), Some(&member)).ok();
    let address = format!("http://127.0.0.1:{}", server.port());
    let capsule = |arguments: &[&str], input: &str| {
        server.capsule_with(&[arguments, &["--server", &address]].concat(), input, &[("CAPSULE_DATA", "/nowhere")])
    };
    capsule(&["login", "--email", "developer@example.com"], "a long enough one 1\n").ok();
    let folder = example("static");
    let deploy =
        |more: &[&str]| capsule(&[&["deploy", at(&folder), "-p", "shop", "-s", "web", "--yes", "--detach"], more].concat(), "");
    let projects = |token: &str, organization: &str| {
        let all = server.api("GET", &format!("/projects?organization_id={organization}"), Some(token), None).ok();
        all["items"].as_array().map_or(0, Vec::len)
    };
    // An invited user is not a member, and the error has its own code.
    let refused = deploy(&["-o", "acme", "--json"]).refused();
    assert_eq!(error(&refused)["code"], "not_a_member");
    assert!(!folder.path().join("capsule.toml").exists());
    capsule(&["org", "accept", "acme"], "").ok();
    // A developer can create projects but not deploy to production: the attempt leaves nothing.
    let refused = deploy(&["-o", "acme", "--json"]).refused();
    let result = error(&refused);
    assert_eq!(result["code"], "forbidden");
    assert!(result["message"].as_str().is_some_and(|text| text.contains("deploy:production")), "{result}");
    assert_eq!(projects(&owner, &acme), 0);
    assert!(!folder.path().join("capsule.toml").exists());
    // An organization of someone else is never the default.
    let deployed = deploy(&[]).ok();
    assert!(deployed.err.contains("Using your personal organization"), "{deployed:?}");
    assert_eq!(projects(&owner, &acme), 0);
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("written");
    assert!(declared.contains("organization = ") && !declared.contains("acme"), "{declared}");
    // A named organization is not replaced by another.
    std::fs::write(folder.path().join("capsule.toml"), "organization = \"amce\"\nproject = \"shop\"\nservice = \"web\"\n")
        .expect("written");
    let refused = deploy(&[]).refused();
    assert!(
        refused.err.contains("not a member of the organization amce") && refused.err.contains("Did you mean acme?"),
        "{refused:?}"
    );
}

/// An HTTP server that returns a fixed body per path and counts requests.
struct Fake {
    port: u16,
    requests: Arc<AtomicUsize>,
}

impl Fake {
    fn with(answers: &[(&str, u16, String)], location: Option<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let answers: HashMap<String, (u16, String)> =
            answers.iter().map(|(path, status, body)| ((*path).to_owned(), (*status, body.clone()))).collect();
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                counted.fetch_add(1, Ordering::SeqCst);
                let _ = answer(stream, &answers, location.as_deref());
            }
        });
        Self { port, requests }
    }
}

fn answer(stream: TcpStream, answers: &HashMap<String, (u16, String)>, location: Option<&str>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let (mut path, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim_end();
        if path.is_empty() {
            path = line.split(' ').nth(1).unwrap_or_default().trim_start_matches("/api/v1").to_owned();
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().unwrap_or(0);
        }
        if line.is_empty() {
            break;
        }
    }
    std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink())?;
    let (status, body) = answers.get(path.split('?').next().unwrap_or_default()).cloned().unwrap_or((404, "{}".into()));
    let location = location.map_or_else(String::new, |to| format!("location: {to}{path}\r\n"));
    let mut stream = reader.into_inner();
    write!(
        stream,
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{location}content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn hostile_server() {
    const EVIL: &str = "\u{1b}]0;owned\u{7}\u{1b}[2J\u{9b}31m\u{202e}\u{7f}\r\u{8}";
    let id = "0190a000-0000-7000-8000-000000000000";
    let tokens = json!({"access_token": "a", "refresh_token": "b", "token_type": "Bearer", "expires_in": 900}).to_string();
    let user = json!({"id": id, "email": format!("a{EVIL}@x"), "name": format!("A{EVIL}da"), "platform_admin": false, "created_at": "1970-01-01T00:00:00Z"});
    let organization = json!({"id": id, "name": EVIL, "slug": format!("ada{EVIL}"), "personal": true, "created_at": "1970-01-01T00:00:00Z", "role": "owner"});
    let problem = json!({
        "code": format!("x{EVIL}"), "status": 403, "title": EVIL, "detail": format!("no{EVIL}pe"), "hint": format!("run{EVIL} this"),
    });
    let project = json!({
        "id": id, "organization_id": id, "name": EVIL, "slug": "shop", "archived": false, "created_at": "1970-01-01T00:00:00Z",
    });
    let service = json!({"id": id, "organization_id": id, "project_id": id, "name": "web", "created_at": "1970-01-01T00:00:00Z"});
    let environment =
        json!({"id": id, "project_id": id, "name": "production", "kind": "production", "created_at": "1970-01-01T00:00:00Z"});
    let state = json!({
        "service_id": id, "environment_name": "production", "url": format!("file:///etc/passwd{EVIL}"),
        "state": format!("running{EVIL}"), "active": null,
        "instances": [{"id": EVIL, "deployment_id": id, "process": format!("web{EVIL}"), "state": EVIL, "pid": 1, "restarts": 0,
            "started_at": "1970-01-01T00:00:00Z", "memory_bytes": 1, "warnings": [format!("be{EVIL}ware")]}],
    });
    let page = |item: &Value| json!({"items": [item], "next_cursor": null}).to_string();
    let variables = json!({"variables": {format!("A{EVIL}"): format!("1{EVIL}2")}, "secrets": [format!("S{EVIL}")]});
    let fake = Fake::with(
        &[
            ("/auth/login", 200, tokens),
            ("/auth/me", 200, user.to_string()),
            ("/organizations", 200, page(&organization)),
            ("/projects", 200, page(&project)),
            ("/services", 200, page(&service)),
            (&format!("/projects/{id}/environments"), 200, page(&environment)),
            (&format!("/services/{id}/state"), 200, state.to_string()),
            ("/deployments", 200, json!({"items": []}).to_string()),
            (&format!("/environments/{id}/variables"), 200, variables.to_string()),
            ("/admin/dead-letters", 403, problem.to_string()),
        ],
        None,
    );
    let server = Server::unstarted(&[]);
    let address = format!("http://127.0.0.1:{}", fake.port);
    let capsule = |arguments: &[&str]| {
        server.capsule_with(
            &[arguments, &["--server", &address]].concat(),
            "password\n",
            &[("DISPLAY", ":1"), ("PATH", "/nowhere")],
        )
    };
    let at = ["-p", "shop", "-s", "web"];
    let signed_in = capsule(&["login", "--email", "a@example.com"]).ok();
    assert!(signed_in.out.contains("]0;owned"), "what it says is shown, as text: {signed_in:?}");
    assert_clean(&signed_in);
    for command in ["status", "open", "destroy", "stop"] {
        for json in [&[][..], &["--json"]] {
            assert_clean(&capsule(&[&[command], &at[..], json].concat()));
        }
    }
    let shown = capsule(&[&["status"], &at[..]].concat()).ok();
    assert!(shown.out.contains("web in production: running]0;owned") && shown.out.contains("warning: be]0;owned"), "{shown:?}");
    let opened = capsule(&[&["open"], &at[..]].concat()).refused();
    assert!(opened.err.contains("was not opened"), "{opened:?}");
    let listed = capsule(&[&["env", "list"], &at[..]].concat()).ok();
    assert!(listed.out.contains("1]0;owned"), "{listed:?}");
    assert_clean(&listed);
    for json in [&[][..], &["--json"]] {
        let refused = capsule(&[&["admin", "dead-letters", "list"], json].concat()).refused();
        assert!(refused.err.contains("no]0;owned") || refused.err.contains("owned"), "{refused:?}");
        assert_clean(&refused);
    }
    // Errors quote arguments, file names and file contents.
    assert_clean(&server.capsule(&["deploy\u{1b}[2J"]).refused());
    let folder = tempfile::tempdir().expect("a folder");
    let named = folder.path().join("a\u{1b}[2Jb");
    std::fs::create_dir(&named).expect("made");
    std::fs::write(named.join("capsule.toml"), "kind = \"web\"\n[processes]\nweb = \"echo '\\u001b]0;x\\u0007'\"\n")
        .expect("written");
    assert_clean(&server.capsule(&["plan", named.to_str().expect("text")]).ok());
    assert_clean(&server.capsule(&["plan", named.to_str().expect("text"), "--json"]).ok());
    std::fs::write(named.join("capsule.toml"), "\u{202e} = [").expect("written");
    assert_clean(&server.capsule(&["plan", named.to_str().expect("text")]).refused());

    // A redirect does not receive a password or a session.
    let elsewhere = Fake::with(&[], None);
    let to = format!("http://127.0.0.1:{}/api/v1", elsewhere.port);
    let answers: Vec<_> = ["/auth/login", "/auth/me"].map(|path| (path, 307, String::new())).into();
    let redirecting = Fake::with(&answers, Some(to.clone()));
    let address = format!("http://127.0.0.1:{}", redirecting.port);
    let refused = server.capsule_with(&["login", "--server", &address, "--email", "a@example.com"], "password\n", &[]).refused();
    assert!(refused.err.contains("redirects to") && refused.err.contains(&to), "{refused:?}");
    assert_eq!(elsewhere.requests.load(Ordering::SeqCst), 0);
}

fn interrupted() {
    let server = Server::default();
    let folder = tempfile::tempdir().expect("a folder");
    let declared = "[build]\nbuild = \"echo begun; exec sleep 1000\"\n[processes]\nworker = \"exec sleep 1000\"\n";
    std::fs::write(folder.path().join("capsule.toml"), declared).expect("written");
    let mut deploying = server.spawn_with_stderr(&["deploy", at(&folder), "--yes", "-p", "slow", "-s", "slow"]);
    let mut lines = BufReader::new(deploying.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
    assert!(lines.by_ref().any(|line| line.trim() == "begun"), "the build does not begin");
    signal(deploying.id(), Signal::INT);
    let result = lines.collect::<Vec<_>>().join("\n");
    let status = deploying.wait().expect("it ends");
    assert_eq!(status.code(), Some(130), "{result}");
    assert!(result.contains("Still building. `capsule cancel 1 -e production` cancels it."), "{result}");
    let state = || server.capsule(&["status", at(&folder), "--json"]).ok().json()["deployments"][0]["status"].clone();
    assert_eq!(state(), "building");
    let cancelled = server.capsule(&["cancel", "1", "-C", at(&folder)]).ok();
    assert!(cancelled.out.contains("Cancelled deployment 1"), "{cancelled:?}");
    assert_eq!(state(), "cancelled");
    let nothing = server.capsule(&["cancel", "-C", at(&folder), "--json"]).refused();
    assert_eq!(error(&nothing)["code"], "nothing_under_way");
}

fn outdated_ingress() {
    let [first, second] = [free_port(), free_port()];
    let mut server = Server::unprivileged(&[&format!("listen=127.0.0.1:{first}")]);
    assert!(!server.log_text().contains("replace-ingress"), "{}", server.log_text());
    server.stop();
    server.upgrade();
    server.add_setting(&format!("listen=127.0.0.1:{second}"));
    server.start();
    let replace = format!("capsule server replace-ingress --data {}", server.data().display());
    let log = server.log_text();
    for part in [replace.as_str(), "a different build", &format!("127.0.0.1:{first}"), &format!("127.0.0.1:{second}")] {
        assert!(log.contains(part), "no {part} in {log}");
    }
    let found = server.capsule(&["doctor", "--json"]).json();
    let ingress =
        found.as_array().expect("a list").iter().find(|finding| finding["name"] == "ingress").expect("the finding is there");
    assert!(ingress["text"].as_str().is_some_and(|text| text.contains(&replace)), "{found}");
    assert!(TcpStream::connect(("127.0.0.1", first)).is_ok() && TcpStream::connect(("127.0.0.1", second)).is_err());
    let replaced = server.capsule(&["server", "replace-ingress"]).ok();
    assert!(replaced.out.contains(&format!("127.0.0.1:{second}")) && replaced.err.contains("connections"), "{replaced:?}");
    assert!(TcpStream::connect(("127.0.0.1", second)).is_ok());
    // The CLI finds the server at its new address.
    eventually("the new address is announced", || server.capsule(&["whoami"]).success.then_some(()));
    let found = server.capsule(&["doctor", "--json"]).json();
    assert!(!found.as_array().expect("a list").iter().any(|finding| finding["name"] == "ingress"), "{found}");
}

fn instances() {
    let (server, mut other) = (Server::default(), Server::default());
    let private = server.announced()[0]["private"].as_str().expect("an address").to_owned();
    server.capsule(&["server", "health"]).ok();
    other.stop();
    // The health of another server is not reported, whatever the environment contains.
    let result = other.capsule_with(&["server", "health"], "", &[("CAPSULE_PRIVATE_LISTEN", private.as_str())]).refused();
    assert!(
        result.err.contains(&other.data().display().to_string()) && result.err.contains("capsule server --data"),
        "{result:?}"
    );
    // An address in use is reported with its setting, the source of the setting, and the process that uses it.
    let refused = |flags: &[&str], variables: &[(&str, &str)]| {
        other.capsule_with(&[&["server"], flags].concat(), "", variables).refused().err
    };
    let result = refused(&["--listen", "127.0.0.1:0"], &[("CAPSULE_PRIVATE_LISTEN", private.as_str())]);
    for part in
        ["`private_listen`", "CAPSULE_PRIVATE_LISTEN", &private, &format!("Process {}", server.pid()), "--set private_listen="]
    {
        assert!(result.contains(part), "no {part} in {result}");
    }
    // The ingress of this server has ended and would be started again.
    other.capsule(&["server", "down"]).ok();
    let taken = format!("127.0.0.1:{}", server.port());
    let result = refused(&["--listen", &taken, "--set", "private_listen=127.0.0.1:0"], &[]);
    let data = server.data().display().to_string();
    for part in ["`listen`", "the command line", &taken, "Process ", &data, "--listen ADDRESS:PORT"] {
        assert!(result.contains(part), "no {part} in {result}");
    }
    // Another user gets an error that says who may do it.
    assert!(Path::new("/usr/bin/setpriv").exists() || Path::new("/bin/setpriv").exists());
    for command in [&["server", "down"][..], &["server", "health"], &["server", "--listen", "127.0.0.1:0"], &["whoami"]] {
        let result = server.capsule_as_nobody(command).refused();
        for part in [data.as_str(), "belongs to root", "sudo capsule"] {
            assert!(result.err.contains(part), "no {part} in {command:?}: {result:?}");
        }
    }
    assert_eq!(server.private("/health/live").status, 200, "it runs on");
}
