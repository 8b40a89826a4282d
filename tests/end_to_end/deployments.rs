//! Deployments of one application: new versions, failed versions, rollbacks, and all of it under load.

use capsule_tests::{Server, eventually, probe, processes};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::load::Load;
use crate::{test_of_processes as test, test_with};

const HOST: &str = "app-production.localhost";

pub fn trials() -> Vec<Trial> {
    vec![
        test("redeploys, restarts and rollbacks under load lose no request", under_load),
        test("requests in flight are finished by the version that received them", in_flight),
        test("a failed build shows its log, and the old version keeps serving", broken_build),
        test("if a new version does not start or is unhealthy, the old version keeps serving", broken_start),
        test("a rollback restores the code and configuration of the earlier deployment", rollback_restores_configuration),
        test("a deployment can be cancelled while it builds", cancelled),
        test("a crashed application is restarted, and its page says so until then", crashed),
        test("a stopped application shows a page that says so, and can be started", stopped),
        test("destroy leaves no processes and no files", destroyed),
        test("unknown hosts and processes without a web address get an error page", pages),
        test("before its first deployment has finished, an application shows a page that says it is starting", starting),
        test("logs -f prints new lines as they appear", followed),
        test("builds get the variables of build.environment", operator_settings),
        test("a build has limits on time, memory and disk, and its processes end with it", limits),
        test("the build log shows variables and masks secrets", masked),
        test_with("the build cache is available to the next build and not in the release", &["npm"], kept),
        test("very deeply nested folders are removed without an overflow", bottomless),
        test("Capsule does not follow links that a build leaves in its cache", planted),
        test("an application that closes idle connections without notice loses no request", abrupt),
        test("the application gets its URL, its port and the client address", forwarded),
    ]
}

fn deployed(version: &str) -> (Server, tempfile::TempDir) {
    let server = Server::with(&["deploy.drain_seconds=20"]);
    let folder = probe(version);
    server.deploy(folder.path(), "app").ok();
    assert_eq!(server.get(HOST, "/").body, format!("version {version}"));
    (server, folder)
}

fn write(folder: &tempfile::TempDir, name: &str, text: &str) {
    std::fs::write(folder.path().join(name), text).expect("written");
}

fn at(folder: &tempfile::TempDir) -> &str {
    folder.path().to_str().expect("a path")
}

pub fn under_load() {
    let (server, folder) = deployed("one");
    let load = Load::start(&server, HOST);
    for version in ["two", "three"] {
        write(&folder, "version", version);
        server.deploy(folder.path(), "app").ok();
        assert_eq!(server.get(HOST, "/").body, format!("version {version}"));
    }
    server.capsule(&["restart", at(&folder)]).ok();
    assert_eq!(server.get(HOST, "/").body, "version three");
    server.capsule(&["rollback", "1", "-C", at(&folder)]).ok();
    assert_eq!(server.get(HOST, "/").body, "version one");
    load.stop();
    eventually("one instance is left", || (server.instances(folder.path()).len() == 1).then_some(()));
}

fn in_flight() {
    let (server, folder) = deployed("one");
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| server.get(HOST, "/slow?seconds=10"));
        std::thread::sleep(std::time::Duration::from_millis(200));
        write(&folder, "version", "two");
        server.deploy(folder.path(), "app").ok();
        assert_eq!(server.get(HOST, "/").body, "version two");
        assert!(!slow.is_finished(), "the deployment waited for the slow request");
        assert_eq!(slow.join().expect("answered").body, "version one");
    });
}

fn broken_build() {
    let (server, folder) = deployed("one");
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there");
    write(&folder, "capsule.toml", &format!("{declared}\n[build]\nbuild = \"echo about to fail; cat no-such-file\"\n"));
    let failed = server.deploy(folder.path(), "app").refused();
    for text in ["about to fail", "no-such-file: No such file or directory", "the build step"] {
        assert!(failed.err.contains(text), "{failed:?}");
    }
    assert!(failed.out.contains("failed") && failed.out.contains("is still live"), "{failed:?}");
    assert_eq!(server.get(HOST, "/").body, "version one");
    let again = server.capsule(&["logs", at(&folder), "--deployment", "2"]).ok();
    assert!(again.out.contains("about to fail"), "{again:?}");
    let status = server.capsule(&["status", at(&folder)]).ok();
    assert!(status.out.contains("failed") && status.out.contains("running"), "{status:?}");
}

fn broken_start() {
    let (server, folder) = deployed("one");
    write(&folder, "version", "broken");
    let failed = server.deploy(folder.path(), "app").refused();
    assert!(failed.err.contains("this version cannot start"), "{failed:?}");
    assert_eq!(server.get(HOST, "/").body, "version one");

    let server_two = Server::with(&["deploy.health_seconds=2"]);
    let folder = probe("unhealthy");
    let failed = server_two.deploy(folder.path(), "app").refused();
    assert!(failed.out.contains("/health was answered with status 500"), "{failed:?}");
    let page = server_two.get(HOST, "/");
    assert_eq!(page.status, 404, "nothing was ever deployed there: {page:?}");
}

fn rollback_restores_configuration() {
    let (server, folder) = deployed("one");
    let environment = |name: &str| server.get(HOST, "/env").json()[name].clone();
    server.capsule(&["env", "set", "COLOUR=red", "-C", at(&folder)]).ok();
    server.capsule_with(&["env", "set", "--secret", "TOKEN", "-C", at(&folder)], "s3cret\n", &[]).ok();
    let listed = server.capsule(&["env", "list", "-C", at(&folder)]).ok();
    assert!(listed.out.contains("red") && !listed.out.contains("s3cret"), "{listed:?}");
    write(&folder, "version", "two");
    server.deploy(folder.path(), "app").ok();
    assert_eq!((environment("COLOUR"), environment("TOKEN")), ("red".into(), "s3cret".into()));

    server.capsule(&["env", "set", "COLOUR=blue", "-C", at(&folder)]).ok();
    server.capsule(&["env", "unset", "TOKEN", "-C", at(&folder)]).ok();
    write(&folder, "version", "three");
    server.deploy(folder.path(), "app").ok();
    assert_eq!((environment("COLOUR"), environment("TOKEN")), ("blue".into(), Value::Null));

    server.capsule(&["rollback", "-C", at(&folder)]).ok();
    assert_eq!(server.get(HOST, "/").body, "version two");
    assert_eq!((environment("COLOUR"), environment("TOKEN")), ("red".into(), "s3cret".into()));
    let refused = server.capsule(&["rollback", "99", "-C", at(&folder)]).refused();
    assert!(refused.err.contains("99"), "{refused:?}");

    // No file of the server contains the secret in clear text.
    let found = std::process::Command::new("grep").args(["-rl", "s3cret"]).arg(server.data()).output().expect("grep runs");
    assert!(found.stdout.is_empty(), "{}", String::from_utf8_lossy(&found.stdout));
    assert!(!server.log_text().contains("s3cret"));
}

fn cancelled() {
    let (server, folder) = deployed("one");
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there");
    write(&folder, "capsule.toml", &format!("{declared}\n[build]\nbuild = \"echo waiting; sleep 987\"\n"));
    let begun = server.capsule(&["deploy", at(&folder), "--detach", "--yes", "--json"]).ok().json();
    let id = capsule_tests::text(&begun, "id");
    let token = server.admin();
    eventually("it builds", || server.capsule(&["logs", at(&folder), "--deployment"]).out.contains("waiting").then_some(()));
    server.api("POST", &format!("/deployments/{id}/cancel"), Some(&token), None).ok();
    eventually("it is cancelled", || {
        (server.api("GET", &format!("/deployments/{id}"), Some(&token), None).ok()["status"] == "cancelled").then_some(())
    });
    eventually("its processes end", || processes("sleep 987").is_empty().then_some(()));
    assert_eq!(server.get(HOST, "/").body, "version one");
}

fn crashed() {
    let (server, folder) = deployed("one");
    let before = server.instances(folder.path())[0]["pid"].as_u64().expect("a pid");
    let _ = server.try_get(HOST, "/crash");
    let after = eventually("it is started again", || {
        let instance = server.instances(folder.path())[0].clone();
        instance["pid"].as_u64().filter(|pid| *pid != before && server.get(HOST, "/").status == 200).map(|_| instance)
    });
    assert_eq!(after["restarts"], 1);
    // The application keeps crashing, and the back-off grows: during one, a client gets the error page.
    eventually("a client gets the error page", || {
        let _ = server.try_get(HOST, "/crash");
        server.get(HOST, "/").body.contains("This app has crashed").then_some(())
    });
    eventually("it is back", || (server.get(HOST, "/").body == "version one").then_some(()));
}

fn stopped() {
    let (server, folder) = deployed("one");
    server.capsule(&["stop", at(&folder)]).ok();
    let page = server.get(HOST, "/");
    assert_eq!(page.status, 503);
    assert!(page.body.contains("This app is stopped"), "{page:?}");
    eventually("its instances are gone", || server.instances(folder.path()).is_empty().then_some(()));
    let logs = server.capsule(&["logs", at(&folder)]).ok().out;
    assert!(logs.contains("goodbye") && !logs.contains("is killed"), "it was killed before it could end by itself: {logs}");
    server.capsule(&["start", at(&folder)]).ok();
    assert_eq!(server.get(HOST, "/").body, "version one");
}

fn destroyed() {
    let (server, folder) = deployed("one");
    let refused = server.capsule(&["destroy", at(&folder)]).refused();
    assert!(refused.err.contains("--yes"), "{refused:?}");
    server.capsule(&["destroy", at(&folder), "--all-environments", "--yes"]).ok();
    eventually("releases, caches, logs and sockets are gone", || {
        let folders = ["releases", "work", "cache", "logs/instances", "logs/deployments", "apps"];
        let left: Vec<&str> = folders.into_iter().filter(|folder| server.entries(folder, "") > 0).collect();
        (left.is_empty() && server.entries("run/i", ".sock") + server.blobs() == 0).then_some(())
    });
    assert_eq!(server.get(HOST, "/").status, 404);
    // The name can be used again.
    server.deploy(folder.path(), "app").ok();
    assert_eq!(server.get(HOST, "/").body, "version one");
}

fn pages() {
    let server = Server::default();
    let page = server.get("nobody-production.localhost", "/");
    assert_eq!(page.status, 404);
    assert!(page.body.contains("No such app"), "{page:?}");
    let folder = tempfile::tempdir().expect("a folder");
    write(&folder, "capsule.toml", "[processes]\nworker = \"exec sleep 1000\"\n");
    server.deploy(folder.path(), "silent").ok();
    let page = server.get("silent-production.localhost", "/");
    assert_eq!(page.status, 404);
    assert!(page.body.contains("has no process that serves requests"), "{page:?}");
}

fn starting() {
    let server = Server::default();
    let folder = probe("one");
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there");
    write(&folder, "capsule.toml", &format!("{declared}\n[build]\nbuild = \"sleep 2\"\n"));
    server.capsule(&["deploy", at(&folder), "--yes", "--detach", "-p", "app", "-s", "app"]).ok();
    eventually("a client gets the error page", || {
        let page = server.get(HOST, "/");
        (page.status == 503 && page.body.contains("This app is starting")).then_some(())
    });
    eventually("it runs", || (server.get(HOST, "/").body == "version one").then_some(()));
}

fn followed() {
    use std::io::BufRead;
    let (server, folder) = deployed("one");
    let mut child = server.spawn_with_stdout(&["logs", "-f", "-n", "1", at(&folder)]);
    let mut lines = std::io::BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let first = lines.next().expect("a line").expect("text");
    assert!(first.contains("version one starts"), "{first}");
    assert_eq!(server.get(HOST, "/count?lines=3").status, 200);
    for number in 0..3 {
        let line = lines.next().expect("a line").expect("text");
        assert!(line.ends_with(&format!("line {number}")) && line.contains(" web."), "{line}");
    }
    let _ = child.kill();
    let _ = child.wait();
}

fn operator_settings() {
    let bundle = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(bundle.path(), "of the operator\n").expect("written");
    let server = Server::with(&[
        "build.environment.npm_config_registry=https://npm.example.com",
        &format!("build.ca_bundle={}", bundle.path().display()),
    ]);
    let folder = probe("one");
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there");
    let build = "echo registry $npm_config_registry; cat $NODE_EXTRA_CA_CERTS; nice";
    write(&folder, "capsule.toml", &format!("{declared}\n[build]\nbuild = \"{build}\"\n"));
    let built = server.deploy(folder.path(), "app").ok();
    assert!(built.err.contains("registry https://npm.example.com") && built.err.contains("of the operator"), "{built:?}");
    assert!(built.err.lines().any(|line| line.trim() == "10"), "the build has no lower priority: {built:?}");
    // Applications get the CA certificates of builds, but not the mirror.
    let environment = server.get(HOST, "/env").json();
    assert!(environment["SSL_CERT_FILE"].is_string() && environment["npm_config_registry"].is_null(), "{environment}");
}

fn limits() {
    let server = Server::with(&["build.seconds=3", "build.memory_mib=128", "build.disk_mib=64"]);
    let folder = probe("one");
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there");
    write(&folder, "capsule.toml", &format!("{declared}\n[build]\nbuild = \"sleep 986\"\n"));
    let failed = server.deploy(folder.path(), "app").refused();
    assert!(failed.err.contains("time limit of 3 s"), "{failed:?}");
    eventually("its processes end", || processes("sleep 986").is_empty().then_some(()));
    write(
        &folder,
        "capsule.toml",
        &format!("{declared}\n[build]\nbuild = \"python3 -c 'x = bytearray(400000000); print(len(x))'\"\n"),
    );
    let failed = server.deploy(folder.path(), "app").refused();
    assert!(!failed.err.contains("400000000\n"), "{failed:?}");
    let fill = "head -c 100000000 /dev/urandom >filled; sleep 987";
    write(&folder, "capsule.toml", &format!("{declared}\n[build]\nbuild = \"{fill}\"\n"));
    let server = Server::with(&["build.seconds=60", "build.disk_mib=64"]);
    let failed = server.deploy(folder.path(), "app").refused();
    assert!(failed.err.contains("exceeded its disk limit of 64 MiB"), "{failed:?}");
    eventually("its processes end", || processes("sleep 987").is_empty().then_some(()));
}

fn masked() {
    let server = Server::default();
    let folder = probe("one");
    let at = folder.path().to_str().expect("a path").to_owned();
    let _ = server.deploy(folder.path(), "app").ok();
    let secret = "correct-horse-battery";
    let _ = server.capsule_with(&["env", "set", "--secret", "TOKEN", "-C", &at], &format!("{secret}\n"), &[]).ok();
    let _ = server.capsule(&["env", "set", "COLOUR=turquoise", "-C", &at]).ok();
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there");
    write(
        &folder,
        "capsule.toml",
        &format!("{declared}\n[build]\nbuild = \"echo $COLOUR is not $TOKEN; test ${{#TOKEN}} = 21\"\n"),
    );
    let built = server.deploy(folder.path(), "app").ok();
    assert!(built.err.contains("turquoise is not ***"), "{built:?}");
    let log = server.capsule(&["logs", &at, "--deployment"]).ok();
    assert!(!built.err.contains(secret) && !log.out.contains(secret), "{log:?}");
    assert!(log.out.contains("build: done in "), "{log:?}");
}

fn kept() {
    let (server, folder) = (Server::default(), tempfile::tempdir().expect("a folder"));
    write(&folder, "package.json", r#"{"name": "x", "scripts": {"build": "sh build.sh", "start": "node server.js"}}"#);
    write(
        &folder,
        "build.sh",
        "mkdir -p node_modules/.cache && echo >>node_modules/.cache/times && echo built $(wc -l <node_modules/.cache/times)",
    );
    let program = "require('http').createServer((q, a) => a.end(String(require('fs').existsSync('node_modules/.cache')))).listen(process.env.PORT)";
    write(&folder, "server.js", program);
    for times in ["built 1", "built 2"] {
        let deployed = server.deploy(folder.path(), "app").ok();
        assert!(deployed.err.contains(times), "{deployed:?}");
        assert_eq!(server.get(HOST, "/").body, "false");
    }
}

fn bottomless() {
    // With a limit of zero, the cache is removed after each build.
    let server = Server::with(&["build.cache_mib=0"]);
    let folder = probe("one");
    let dig = "import os, sys\nfor place in sys.argv[1:]:\n    os.chdir(place)\n    for _ in range(30000):\n        os.mkdir('d')\n        os.chdir('d')\n";
    write(&folder, "dig.py", dig);
    // One folder per service, each with the folder of its environment and the lock file of builds.
    let caches = || {
        let services = std::fs::read_dir(server.data().join("cache")).into_iter().flatten().flatten();
        let inside = services.flat_map(|service| std::fs::read_dir(service.path()).into_iter().flatten().flatten());
        inside.filter(|entry| entry.path().is_dir()).count()
    };
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there");
    for end in ["sleep 600", "false"] {
        write(&folder, "capsule.toml", &format!("{declared}\n[build]\nbuild = 'python3 dig.py /cache /app && {end}'\n"));
        let failed = server.deploy(folder.path(), "app").refused();
        // A folder that cannot be measured counts as exceeding the limit, if a measurement finds it.
        assert!(end == "false" || failed.err.contains("cannot be measured"), "{failed:?}");
        eventually("what the build left is gone", || (server.entries("work", "") == 0 && caches() == 0).then_some(()));
    }
    write(&folder, "capsule.toml", &declared.replace("exec", "python3 dig.py /app; exec"));
    let _ = server.deploy(folder.path(), "app").ok();
    assert_eq!(server.get(HOST, "/").body, "version one");
    server.capsule(&["destroy", at(&folder), "--all-environments", "--yes"]).ok();
    eventually("the release is gone", || (server.entries("releases", "") == 0).then_some(()));
    eventually("what it wrote is gone", || (server.entries("layers", "") == 0).then_some(()));
    assert_eq!(server.get(HOST, "/").status, 404);
}

fn planted() {
    let server = Server::default();
    let folder = probe("one");
    let host = tempfile::tempdir().expect("a folder of the host");
    let victim = host.path().join("victim");
    std::fs::write(&victim, "untouched").expect("written");
    let plant =
        |link: &str, target: &std::path::Path| format!("rm -rf /cache/{link} && ln -s {} /cache/{link}", target.display());
    let commands = [plant("home", host.path()), plant(".used", &victim), plant(".lock", &victim), plant("lock", &victim)];
    let declared = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("there");
    write(&folder, "capsule.toml", &format!("{declared}\n[build]\nbuild = '{}'\n", commands.join(" && ")));
    for _ in 0..2 {
        let _ = server.deploy(folder.path(), "app").ok();
    }
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(host.path()).expect("there"));
    assert_eq!((std::fs::read_to_string(&victim).expect("there").as_str(), owner), ("untouched", 0));
}

fn abrupt() {
    let (server, _folder) = deployed("one");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    assert_eq!(server.get(HOST, "/abrupt").status, 200);
                }
            });
        }
    });
}

fn forwarded() {
    let (server, _folder) = deployed("one");
    let headers = server.get(HOST, "/headers").json();
    assert_eq!(headers["host"].as_str().or(headers["Host"].as_str()), Some(HOST), "{headers}");
    let lower: std::collections::BTreeMap<String, String> = headers
        .as_object()
        .expect("an object")
        .iter()
        .map(|(name, value)| (name.to_lowercase(), value.as_str().unwrap_or_default().to_owned()))
        .collect();
    assert_eq!(lower["x-forwarded-for"], "127.0.0.1");
    assert_eq!(lower["x-forwarded-proto"], "http");
    let environment = server.get(HOST, "/env").json();
    assert_eq!(environment["CAPSULE_SERVICE"], "app");
    assert!(environment["PORT"].as_str().is_some_and(|port| port.parse::<u16>().is_ok()));
    // Applications do not inherit the server's environment.
    assert!(environment["CAPSULE_DATA"].is_null() && environment["XDG_CONFIG_HOME"].is_null(), "{environment}");
}
