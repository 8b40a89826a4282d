//! The command line, mostly with wrong input.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use capsule_tests::{Server, corpus, eventually, example, text};
use libtest_mimic::Trial;

use crate::test;

pub fn trials() -> Vec<Trial> {
    vec![
        test("without a server, or in an empty folder, commands suggest what to do", helpless),
        test("commands sign in to a local server automatically, and only the owner can read the session", signs_in),
        test("plan shows each finding with file and line, and as JSON", plan),
        test("the plan of an archive or a commit is the same as of the folder", sources),
        test("plan --since lists the members of a monorepo that a change affects", since),
        test("an error in capsule.toml is reported with its line", malformed),
        test("login, whoami and logout work with an account", account),
        test("config check reports mistakes with file and line", configuration),
        test("migrations are listed, validated and applied", migrations),
        test("migrate info and validate change nothing", untouched),
        test("only one server at a time can use a data directory", claimed),
        test("only the owner can read the data directory", private),
        test("server --only requires a broker and a database server", parts),
        test("server health reports whether a process is healthy", health),
        test("doctor and completions work", doctor),
        test("a static site is deployed, opened and destroyed", site),
        test("control sequences in build output do not reach the terminal", escapes),
    ]
}

fn helpless() {
    let mut server = Server::default();
    server.capsule(&["server", "down"]).ok();
    server.wait_for_end();
    let result = server.capsule(&["whoami"]).refused();
    assert!(result.err.contains("capsule server") && result.err.contains("capsule login"), "{result:?}");
    let result = server.capsule(&["whoami", "--server", "http://127.0.0.1:9"]).refused();
    assert!(result.err.contains("http://127.0.0.1:9"), "{result:?}");
    let result = server.capsule(&["whoami", "--server", "ftp://example.com/x"]).refused();
    assert!(result.err.contains("Invalid server URL"), "{result:?}");
    server.start();
    let empty = tempfile::tempdir().expect("a folder");
    let at = empty.path().to_str().expect("a path");
    let result = server.capsule(&["deploy", at, "--yes"]).refused();
    assert!(result.err.contains("[processes]"), "{result:?}");
    assert!(!empty.path().join("capsule.toml").exists());
    let result = server.capsule(&["status", at]).refused();
    assert!(result.err.contains("--project"), "{result:?}");
    let result = server.capsule(&["deploy", "/nowhere/at/all"]).refused();
    assert!(result.err.contains("/nowhere/at/all"), "{result:?}");
    let result = server.capsule(&["status", at, "-p", "nothing", "-s", "nothing"]).refused();
    assert!(result.err.contains("no project nothing"), "{result:?}");
    let result =
        server.capsule(&["deploy", example("static").path().to_str().expect("a path"), "-p", "Not A Name", "-s", "x"]).refused();
    assert!(result.err.contains("Try not-a-name"), "{result:?}");
}

fn signs_in() {
    let server = Server::default();
    let who = server.capsule(&["whoami", "--json"]).ok().json();
    assert_eq!(who["user"]["platform_admin"], true);
    let kept = server.capsule_with(&["whoami"], "", &[]).ok();
    assert!(kept.out.contains("administrator"), "{kept:?}");
    server.capsule(&["logout"]).ok();
    server.capsule(&["whoami"]).ok();
}

fn plan() {
    let server = Server::default();
    let folder = example("express");
    let at = folder.path().to_str().expect("a path");
    let text = server.capsule(&["plan", at]).ok().out;
    for part in ["javascript, express", "npm ci", "node server.js", "package.json:7"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    let plan = server.capsule(&["plan", at, "--json"]).ok().json();
    for member in [
        "kind",
        "detection",
        "build",
        "processes",
        "resources",
        "scaling",
        "networking",
        "needs",
        "system_packages",
        "members",
        "evidence",
        "questions",
    ] {
        assert!(!plan[member].is_null(), "no {member} in {plan}");
    }
    assert_eq!(plan["kind"], "web");
    assert_eq!(plan["detection"]["package_manager"], "npm");
    assert!(plan["evidence"].as_array().expect("a list").iter().all(|one| one["file"].is_string() && one["reason"].is_string()));
}

/// Commits all files of a folder.
fn commit(folder: &Path) {
    let who = ["-c", "user.name=Ada", "-c", "user.email=ada@example.com"];
    for words in
        [&["init", "--quiet"][..], &["add", "--all", "--force"], &["commit", "--quiet", "--allow-empty", "--message", "x"]]
    {
        let done = Command::new("git").arg("-C").arg(folder).args(who).args(words).output().expect("git runs");
        assert!(done.status.success(), "{done:?}");
    }
}

/// Adds the files of a folder to an archive.
fn archived(folder: &Path, at: &Path, add: &mut dyn FnMut(&str, &[u8])) {
    for entry in std::fs::read_dir(at).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            archived(folder, &path, add);
        } else {
            let name = path.strip_prefix(folder).expect("inside").to_str().expect("text");
            add(name, &std::fs::read(&path).expect("read"));
        }
    }
}

fn sources() {
    let (server, corpus, archives) = (Server::unstarted(&[]), corpus(), tempfile::tempdir().expect("a folder"));
    let mut folders: Vec<_> = std::fs::read_dir(corpus.path()).expect("there").flatten().map(|entry| entry.path()).collect();
    folders.sort();
    for folder in folders.iter().step_by(12) {
        let [tar, gz, zip] = ["x.tar", "x.tar.gz", "x.zip"].map(|name| archives.path().join(name));
        let mut tarred = tar::Builder::new(Vec::new());
        let mut zipped = zip::ZipWriter::new(std::fs::File::create(&zip).expect("made"));
        archived(folder, folder, &mut |name, content| {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tarred.append_data(&mut header, format!("./{name}"), content).expect("appended");
            zipped.start_file(name, zip::write::SimpleFileOptions::default()).expect("begun");
            zipped.write_all(content).expect("written");
        });
        zipped.finish().expect("finished");
        let content = tarred.into_inner().expect("finished");
        let mut compressed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        compressed.write_all(&content).expect("written");
        std::fs::write(&gz, compressed.finish().expect("finished")).expect("written");
        std::fs::write(&tar, content).expect("written");
        let (at, plan) = (folder.to_str().expect("a path"), |words: &[&str]| {
            let ran = server.capsule(&[&["plan", "--json"], words].concat());
            if ran.success { ran.out } else { ran.err.rsplit('/').next().unwrap_or_default().to_owned() }
        });
        let expected = plan(&[at]);
        // A folder without files cannot be archived or committed.
        if content_of(folder) == 0 {
            continue;
        }
        for archive in [&tar, &gz, &zip] {
            assert_eq!(plan(&[archive.to_str().expect("a path")]), expected, "{}", archive.display());
        }
        commit(folder);
        for entry in std::fs::read_dir(folder).expect("there").flatten().filter(|entry| entry.file_name() != ".git") {
            let remove = if entry.path().is_dir() { std::fs::remove_dir_all } else { std::fs::remove_file };
            remove(entry.path()).expect("removed");
        }
        assert_eq!(plan(&[at, "--commit", "HEAD"]), expected, "the commit of {at}");
    }
    let broken = archives.path().join("broken.zip");
    std::fs::write(&broken, b"PK\x03\x04 and no more").expect("written");
    let result = server.capsule(&["plan", broken.to_str().expect("a path")]).refused();
    assert!(result.err.contains("broken.zip: the archive is damaged"), "{result:?}");
    std::fs::write(&broken, "a letter").expect("written");
    let result = server.capsule(&["plan", broken.to_str().expect("a path")]).refused();
    assert!(result.err.contains("unknown archive format"), "{result:?}");
    let at = folders[0].to_str().expect("a path");
    for revision in ["nothing", "--output=/tmp/escaped", "HEAD:x", "HEAD\nHEAD"] {
        let result = server.capsule(&["plan", at, &format!("--commit={revision}")]).refused();
        assert!(result.err.contains("git: "), "{result:?}");
    }
}

fn content_of(folder: &Path) -> usize {
    std::fs::read_dir(folder).expect("there").count()
}

fn since() {
    let (server, folder) = (Server::unstarted(&[]), tempfile::tempdir().expect("a folder"));
    let at = folder.path().to_str().expect("a path");
    let write = |path: &str, content: &str| {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        std::fs::write(path, content).expect("written");
    };
    write("package.json", r#"{"workspaces": ["apps/*", "packages/*"]}"#);
    for (member, uses) in
        [("apps/web", "ui"), ("apps/api", "db"), ("packages/ui", ""), ("packages/db", ""), ("packages/other", "")]
    {
        let name = member.rsplit('/').next().expect("a name");
        let uses = if uses.is_empty() { String::new() } else { format!(r#", "dependencies": {{"{uses}": "*"}}"#) };
        write(&format!("{member}/package.json"), &format!(r#"{{"name": "{name}", "scripts": {{"start": "node ."}}{uses}}}"#));
    }
    commit(folder.path());
    let touched = |words: &[&str]| server.capsule(&[&["plan", at], words].concat()).ok().out;
    assert_eq!(touched(&["--since", "HEAD"]).trim(), "No member is affected.");
    write("packages/ui/button.js", "// new, and git does not know it");
    write("apps/api/package.json", r#"{"name": "api", "scripts": {"start": "node ."}}"#);
    assert_eq!(touched(&["--since", "HEAD"]).lines().collect::<Vec<_>>(), ["apps/api", "apps/web", "packages/ui"]);
    commit(folder.path());
    assert_eq!(touched(&["--since", "HEAD~1"]).lines().count(), 3);
    assert_eq!(touched(&["--since", "HEAD", "--changed", "./packages/db/x.js"]).trim(), "packages/db");
    let result = server.capsule(&["plan", at, "--since=--output=/tmp/escaped"]).refused();
    assert!(result.err.contains("git: ") && !Path::new("/tmp/escaped").exists(), "{result:?}");
}

fn malformed() {
    let server = Server::default();
    let folder = example("static");
    let at = folder.path().to_str().expect("a path");
    for (content, expected) in [
        ("[build]\nbiuld = \"make\"\n", "capsule.toml:2: unknown field `biuld`"),
        ("[build\n", "capsule.toml:1"),
        ("[networking]\n\nhealth_check = \"health\"\n", "capsule.toml:3: health_check must be a path"),
        ("[processes]\nWEB = \"x\"\n", "capsule.toml:2: `WEB` is not a valid process type"),
    ] {
        std::fs::write(folder.path().join("capsule.toml"), content).expect("written");
        for command in ["plan", "deploy"] {
            let refused = server.capsule(&[command, at]).refused();
            assert!(refused.err.contains(expected), "{command}: {refused:?}");
        }
        assert_eq!(std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there"), content, "it was changed");
    }
}

fn account() {
    let server = Server::default();
    let url = format!("http://localhost:{}", server.port());
    server.register_first_account();
    // With another data directory, the server counts as remote.
    let elsewhere: &[(&str, &str)] = &[("CAPSULE_DATA", "/nowhere")];
    let address = format!("http://127.0.0.1:{}", server.port());
    let login = |arguments: &[&str], input: &str| {
        let all: Vec<&str> = ["login", "--server", &address].iter().chain(arguments).copied().collect();
        server.capsule_with(&all, input, elsewhere)
    };
    let result = login(&["--email", "ada@example.com"], "wrong password\n").refused();
    assert!(!result.err.contains("wrong password"), "{result:?}");
    let made = login(&["--email", "ada@example.com", "--register", "--name", "Ada"], "correct horse battery\n").ok();
    assert!(made.out.contains("Ada <ada@example.com>"), "{made:?} at {url}");
    let who = server.capsule_with(&["whoami", "--server", &address], "", elsewhere).ok();
    assert!(who.out.contains("ada@example.com") && !who.out.contains("administrator"), "{who:?}");
    server.capsule_with(&["logout", "--server", &address], "", elsewhere).ok();
    let result = server.capsule_with(&["whoami", "--server", &address], "", elsewhere).refused();
    assert!(result.err.contains("capsule login"), "{result:?}");
    login(&["--email", "ada@example.com"], "correct horse battery\n").ok();
    // On the server's host, the local administrator does not replace a session that has ended.
    server.capsule_with(&["login", "--email", "ada@example.com"], "correct horse battery\n", &[]).ok();
    let ada = serde_json::json!({"email": "ada@example.com", "password": "correct horse battery"});
    let token = text(&server.api("POST", "/auth/login", None, Some(&ada)).ok(), "access_token");
    server.api("DELETE", "/auth/sessions", Some(&token), None).ok();
    eventually("the session has ended", || (!server.capsule(&["whoami"]).success).then_some(()));
    for command in [&["account", "delete", "--yes"][..], &["whoami"]] {
        let refused = server.capsule(command).refused();
        assert!(refused.err.contains("has ended") && refused.err.contains("capsule login"), "{refused:?}");
    }
    let administrator = server.capsule(&["login"]).ok();
    assert!(administrator.out.contains("administrator of the installation"), "{administrator:?}");
}

fn configuration() {
    let server = Server::default();
    let good = server.capsule_with(&["config", "check"], "", &[("CAPSULE_BUILD_SECONDS", "77")]).ok();
    assert!(good.out.contains("77") && good.out.contains("CAPSULE_BUILD_SECONDS"), "{good:?}");
    std::fs::write(server.data().join("capsule.toml"), "listen = \"127.0.0.1:1\"\n\n[build]\nmemory_mib = \"much\"\n")
        .expect("written");
    let bad = server.capsule(&["config", "check"]).refused();
    assert!(bad.err.contains("capsule.toml:4: build.memory_mib"), "{bad:?}");
}

pub fn migrations() {
    let mut server = Server::default();
    let states = |server: &Server, command: &str| {
        let shown = server.migrate(command).ok().json();
        let shown = shown.as_array().expect("a list").clone();
        assert!(
            shown.iter().any(|step| step["file"] == "V001__create_outbox_and_inbox.sql" && step["database"] == "identity"),
            "{shown:?}"
        );
        shown.into_iter().map(|step| step["state"].as_str().expect("a state").to_owned()).collect::<BTreeSet<_>>()
    };
    assert_eq!(states(&server, "info"), BTreeSet::from(["applied".to_owned()]));
    server.migrate("validate").ok();
    let refused = server.migrate("run").refused();
    assert!(refused.err.contains("A server is already running with the data directory"), "{refused:?}");
    server.stop();
    assert_eq!(states(&server, "run"), BTreeSet::from(["applied".to_owned()]));
}

fn untouched() {
    let server = Server::default();
    let empty = tempfile::tempdir().expect("a folder");
    let at = empty.path().to_str().expect("a path");
    let info = server.capsule(&["migrate", "info", "--data", at]).ok();
    assert!(info.out.contains("pending") && !info.out.contains("applied"), "{info:?}");
    let invalid = server.capsule(&["migrate", "validate", "--data", at]).refused();
    assert!(invalid.err.contains("identity: V001__create_users_and_sessions.sql is pending"), "{invalid:?}");
    assert_eq!(std::fs::read_dir(empty.path()).expect("there").count(), 0, "looking made files");
    server.capsule(&["migrate", "run", "--data", at]).ok();
    server.capsule(&["migrate", "validate", "--data", at]).ok();
}

fn claimed() {
    let server = Server::default();
    let second = server.capsule(&["server", "--listen", "127.0.0.1:0", "--set", "private_listen=127.0.0.1:0"]).refused();
    assert!(
        second.err.contains(&format!(": process {}.", server.pid())) && second.err.contains("capsule server down"),
        "{second:?}"
    );
    // An address in use is an error, without waiting.
    let other = tempfile::tempdir().expect("a folder");
    let taken = format!("127.0.0.1:{}", server.port());
    let arguments =
        ["server", "--listen", &taken, "--set", "private_listen=127.0.0.1:0", "--data", other.path().to_str().expect("a path")];
    let taken = server.capsule(&arguments).refused();
    assert!(taken.err.contains("Cannot listen on"), "{taken:?}");
}

fn parts() {
    let server = Server::unstarted(&[]);
    let error_of = |arguments: &[&str]| server.capsule(&[&["server"], arguments].concat()).refused().err;
    assert!(error_of(&["--only", "identity"]).contains("broker.url"));
    assert!(error_of(&["--only", "identity", "--set", "broker.url=amqp://127.0.0.1:1"]).contains("database.url"));
    assert!(error_of(&["--only", "nothing"]).contains("possible values: gateway, identity"));
    let secret = error_of(&["--set", "broker.url=http://user:hunter2@example.com"]);
    assert!(secret.contains("broker.url must look like") && !secret.contains("hunter2"), "{secret}");
    let secret = error_of(&["--set", "redis.url=rediss//:hunter2@example.com"]);
    assert!(secret.contains("redis.url") && !secret.contains("hunter2"), "{secret}");
    assert!(error_of(&["--set", "traces.endpoint=localhost"]).contains("http://127.0.0.1:4318"));
}

fn health() {
    let mut server = Server::default();
    let private = server.announced()[0]["private"].as_str().expect("an address").to_owned();
    let result = server.capsule(&["server", "health", "--at", &private]).ok();
    assert!(result.out.contains("Healthy"), "{result:?}");
    server.stop();
    let result = server.capsule(&["server", "health", "--at", &private]).refused();
    assert!(result.err.contains(&private), "{result:?}");
}

fn private() {
    let server = Server::default();
    let mode = |path: &str| std::fs::metadata(server.data().join(path)).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode(""), 0o700);
    assert_eq!(mode("local-token"), 0o600);
    assert_eq!(mode("keys/master.key"), 0o600);
    let token = server.local_token();
    assert!(!server.log_text().contains(&token), "the token is in the log");
    let arguments = std::fs::read(format!("/proc/{}/cmdline", server.pid())).expect("it runs");
    assert!(!String::from_utf8_lossy(&arguments).contains(&token));
}

fn doctor() {
    let server = Server::default();
    let found = server.capsule(&["doctor", "--json"]).json();
    let state = |name: &str| {
        let all = found.as_array().expect("a list");
        all.iter().find(|finding| finding["name"] == name).unwrap_or_else(|| panic!("no {name} in {found}"))["state"].clone()
    };
    assert_eq!(state("server"), "ok", "{found}");
    assert_eq!(state("sandbox"), "ok", "{found}");
    for shell in ["bash", "zsh", "fish"] {
        assert!(server.capsule(&["completions", shell]).ok().out.contains("rollback"));
    }
}

fn site() {
    let server = Server::default();
    let folder = example("static");
    let at = folder.path().to_str().expect("a path");
    std::fs::write(folder.path().join(".capsuleignore"), "secret.html\n").expect("written");
    std::fs::write(folder.path().join("secret.html"), "no").expect("written");
    let deployed = server.capsule(&["deploy", at, "--yes", "-p", "pages", "-s", "front", "--json"]).ok().json();
    assert_eq!(deployed["status"], "running");
    let url = server.capsule(&["open", at]).ok().out;
    assert!(url.starts_with("http://front-production.localhost:"), "{url}");
    assert_eq!(server.get("front-production.localhost", "/").status, 200);
    assert_eq!(server.get("front-production.localhost", "/secret.html").status, 404);
    server.capsule(&["deploy", at, "-e", "staging", "--create"]).ok();
    assert_eq!(server.get("front-staging.localhost", "/").status, 200);
    server.capsule(&["destroy", at, "--all-environments", "--yes"]).ok();
    let gone = server.capsule(&["status", at]).refused();
    assert!(gone.err.contains("no service front"), "{gone:?}");
}

fn escapes() {
    let server = Server::default();
    let folder = tempfile::tempdir().expect("a folder");
    let declared = "[build]\nbuild = \"printf '\\\\033]0;taken\\\\007\\\\033[2Jover \\\\033[31mred\\\\033[0m\\\\n'\"\n[processes]\nworker = \"exec sleep 1000\"\n";
    std::fs::write(folder.path().join("capsule.toml"), declared).expect("written");
    let deployed = server.deploy(folder.path(), "loud").ok();
    assert!(deployed.err.contains("over") && deployed.err.contains("red"), "{deployed:?}");
    assert!(
        !deployed.err.contains("\u{1b}]") && !deployed.err.contains("\u{1b}[2J") && !deployed.err.contains('\u{7}'),
        "{deployed:?}"
    );
}
