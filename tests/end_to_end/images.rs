//! Images that Docker Engine builds from plans: each is built, runs without root, and serves requests.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use capsule_tests::{CommandOutput, Docker, Server, corpus, eventually, example, fixture, free_port, root};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::examples::LANGUAGES;
use crate::{test_of_containers, test_with};

/// Images that replace the public base images, built from [`Docker::BASE`].
const TOOLCHAINS: &str = "capsule-test-toolchains";
const FILES: &str = "capsule-test-files";
/// The base images that plans use.
const BASES: [&str; 13] =
    ["node", "python", "go", "rust", "maven", "gradle", "jdk", "jre", "ruby", "php", "debian", "bun", "deno"];

/// The path of hadolint, which `scripts/bootstrap test` installs.
const HADOLINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/hadolint/bin/hadolint");

/// An example or fixture, a path, and text that the response must contain.
const CASES: [(&str, &str, &str); 17] = [
    ("examples/express", "/greet/Ada", "Ada"),
    ("examples/next", "/", "Hello from Next"),
    ("examples/vite-react", "/any/page/of/it", "Hello from Vite"),
    ("examples/fastapi", "/openapi.json", "\"title\":\"Items\""),
    ("examples/go", "/greet/Ada", "Hello, Ada"),
    ("examples/spring-boot", "/greet/Ada", "Hello, Ada"),
    // A missing page gets the site's own 404 page.
    ("examples/static", "/no/such/page", "There is no such page"),
    ("managers/pnpm", "/", "two days are 172800000 ms"),
    ("managers/yarn", "/", "two days are 172800000 ms"),
    ("managers/yarn-berry", "/", "two days are 172800000 ms"),
    ("managers/bun", "/", "two days are 172800000 ms on Bun"),
    ("managers/deno", "/", "two days are 172800000 ms on Deno"),
    ("managers/uv", "/", "installed by uv"),
    ("managers/poetry", "/", "installed by poetry"),
    ("managers/pdm", "/", "installed by pdm"),
    ("managers/pipenv", "/", "installed by pipenv"),
    ("managers/hatch", "/", "installed by hatch"),
];

pub fn trials() -> Vec<Trial> {
    let on = |name: &str, work: fn()| test_of_containers(&format!("images: {name}"), work);
    let languages = LANGUAGES.into_iter().map(|(language, _, content)| (format!("languages/{language}"), "/", content));
    let all = CASES.into_iter().map(|(folder, path, content)| (folder.to_owned(), path, content)).chain(languages);
    let builds = all.map(|(folder, path, content)| {
        test_of_containers(&format!("images: {folder} is built and serves requests"), move || answers(&folder, path, content))
    });
    let more = [
        on("a program with OpenTelemetry instrumentation serves requests", traced),
        on("a second build repeats only the changed steps", done_before),
        on("the cache stays within its limit during parallel builds", kept_within_bounds),
        on("every Debian package that an image installs exists", packaged),
        on("a build can read a build secret, which is in no layer and no log", secret),
        on("a build ends when it exceeds its time or size, or is cancelled", bounds),
        on("the classic builder builds, and refuses secrets", classic),
        on("memory and CPU limits of a build are enforced with both builders", held),
        on("memory and CPU limits of a build are enforced if systemd manages the Engine's cgroups", held_in_slices),
        on("pulls from a private registry use the credentials of docker login", private),
        on("a Dockerfile of the repository is built unchanged", own_dockerfile),
        test_with("images: every generated Dockerfile passes hadolint", &[HADOLINT], linted),
    ];
    builds.chain(more).collect()
}

/// The Engine, with the base images.
fn engine() -> Arc<Docker> {
    static MADE: Mutex<bool> = Mutex::new(false);
    let engine = Docker::engine();
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if !*made {
        let base = format!("BASE={}", Docker::BASE);
        for (stage, name) in [("toolchains", TOOLCHAINS), ("files", FILES)] {
            engine.build(&root().join("tests/servers/toolchains"), name, &["--build-arg", &base, "--target", stage]);
        }
        *made = true;
    }
    drop(made);
    engine
}

/// Runs `capsule build`.
fn build(
    engine: &Docker,
    server: &Server,
    folder: &Path,
    tag: &str,
    more: &[&str],
    environment: &[(&str, &str)],
) -> CommandOutput {
    let socket = engine.socket();
    let mut arguments: Vec<String> = vec!["build".into(), folder.display().to_string(), "--tag".into(), tag.into()];
    arguments.extend(["--engine".into(), socket.display().to_string()]);
    for base in BASES {
        arguments.extend(["--image".into(), format!("{base}={TOOLCHAINS}")]);
    }
    arguments.extend(["--image".into(), format!("static={FILES}")]);
    arguments.extend(more.iter().map(|word| (*word).to_owned()));
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    server.capsule_with(&words, "", environment)
}

/// A container. Dropping the value removes it.
struct Container(Arc<Docker>, String);

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0.docker(&["logs", &self.1]).err);
        }
        let _ = self.0.docker(&["rm", "--force", "--volumes", &self.1]);
    }
}

/// Runs an image with few privileges, and returns its response.
fn page(engine: &Arc<Docker>, tag: &str, path: &str) -> String {
    let port = free_port();
    let inside = engine.docker(&["image", "inspect", "--format", "{{index .Config.Env}}", tag]).ok().out;
    let inside =
        inside.split(['[', ' ', ']']).find_map(|word| word.trim().strip_prefix("PORT=").map(str::to_owned)).expect("a port");
    let published = format!("127.0.0.1:{port}:{inside}");
    let started = engine
        .docker(&["run", "--detach", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--publish", &published, tag])
        .ok();
    let container = Container(engine.clone(), started.out.trim().to_owned());
    let url = format!("http://127.0.0.1:{port}{path}");
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let body = eventually("the container answers", || agent.get(&url).call().ok()?.body_mut().read_to_string().ok());
    let healthy = || {
        (engine.docker(&["inspect", "--format", "{{.State.Health.Status}}", &container.1]).out.trim() == "healthy").then_some(())
    };
    eventually("the container is healthy", healthy);
    let user = engine.docker(&["exec", &container.1, "id", "-u"]).ok().out;
    assert_ne!(user.trim(), "0", "not as root");
    body
}

fn answers(folder: &str, path: &str, content: &str) {
    let (engine, server) = (engine(), Server::unstarted(&[]));
    let copy = match folder.strip_prefix("examples/") {
        Some(name) => example(name),
        None => fixture(folder),
    };
    let tag = format!("capsule-test-{}", folder.replace('/', "-"));
    let built = build(&engine, &server, copy.path(), &tag, &["--json"], &[]).ok();
    assert!(built.json()["steps"].as_u64().is_some_and(|steps| steps > 0), "{built:?}");
    let body = page(&engine, &tag, path);
    assert!(body.contains(content), "{body}");
    if std::fs::read_to_string(copy.path().join("package.json")).is_ok_and(|manifest| manifest.contains("is-number")) {
        let fetched = engine.docker(&["run", "--rm", "--entrypoint", "ls", &tag, "node_modules"]).ok().out;
        assert!(fetched.contains("ms") && !fetched.contains("is-number"), "only development takes it: {fetched}");
    }
}

fn traced() {
    let (engine, server) = (engine(), Server::unstarted(&[]));
    for (name, path, sign) in
        [("express", "/greet/Ada", "NODE_OPTIONS=--require"), ("fastapi", "/openapi.json", "opentelemetry-instrument")]
    {
        let tag = format!("capsule-test-traced-{name}");
        build(&engine, &server, example(name).path(), &tag, &["--opentelemetry"], &[]).ok();
        assert!(!page(&engine, &tag, path).is_empty());
        let output = engine.docker(&["image", "inspect", &tag]).ok().out;
        assert!(output.contains(sign), "{output}");
    }
}

/// The events of `capsule build --json`.
fn events(ran: &CommandOutput) -> Vec<Value> {
    ran.err.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn done_before() {
    let (engine, server) = (engine(), Server::unstarted(&[]));
    let folder = fixture("managers/uv");
    let tag = "capsule-test-twice";
    let once = || build(&engine, &server, folder.path(), tag, &["--json"], &[]).ok();
    once();
    let again = once().json();
    assert_eq!(again["steps"].as_u64().map(|steps| steps > 4), Some(true));
    let source = std::fs::read_to_string(folder.path().join("app.py")).expect("read");
    // Whether a build of this source takes the installed dependencies from the cache.
    let is_cached = |text: &str| {
        std::fs::write(folder.path().join("app.py"), source.replace("installed by uv", text)).expect("written");
        let all = events(&once());
        let is_install = |event: &&Value| event["name"].as_str().is_some_and(|name| name.contains("uv sync"));
        let install = all.iter().find(is_install).expect("the dependencies have a step of their own")["step"].clone();
        let done = all.iter().find(|event| event["event"] == "done" && event["step"] == install).expect("the step ends");
        done["cached"] == true
    };
    // Docker Engine 20.10 may repeat all steps of a build that shares its base image with a build that is cancelled at that
    // moment, as another test does.
    let text = (1..=6).map(|round| format!("changed {round} times")).find(|text| is_cached(text));
    let text = text.expect("a build that changes only the source takes the dependencies from the cache");
    assert_eq!(page(&engine, tag, "/"), text);
}

/// Debian's Engine crashes if a build begins while the cache entries that it uses are pruned.
fn kept_within_bounds() {
    let (engine, server) = (Docker::start_isolated(&[]), Server::unstarted(&[]));
    engine.make_base();
    let once = |tag: &str, round: u32, more: &[&str]| {
        let folder = tempfile::tempdir().expect("a folder");
        let file = format!("FROM {}\nRUN echo {tag} {round} >/it\n", Docker::BASE);
        std::fs::write(folder.path().join("Dockerfile"), file).expect("written");
        build(&engine, &server, folder.path(), tag, more, &[]).ok()
    };
    std::thread::scope(|all| {
        let keep: &[&str] = &["--keep-mib", "0"];
        for (tag, more) in [("kept-one", keep), ("kept-two", keep), ("kept-three", &[]), ("kept-four", &[])] {
            let once = &once;
            all.spawn(move || (0..15).for_each(|round| assert!(!once(tag, round, more).err.contains("warning"))));
        }
    });
    // Builds wait for pruning, in any process.
    let turn = std::fs::File::open(engine.socket().parent().expect("a folder")).expect("opened");
    turn.lock().expect("locked");
    std::thread::scope(|all| {
        let waiting = all.spawn(|| once("kept-waiting", 0, &["--keep-mib", "0"]));
        std::thread::sleep(Duration::from_secs(3));
        let is_there = || engine.docker(&["image", "inspect", "kept-waiting"]).success;
        let early = is_there();
        // Always release the waiting builds, also if an assertion fails.
        turn.unlock().expect("unlocked");
        waiting.join().expect("it is built");
        assert!(!early && is_there(), "it is built when it may be");
    });
    let usage = engine.docker(&["system", "df", "--format", "{{.Type}} {{.Reclaimable}}"]).ok().out;
    let cache =
        usage.lines().find(|line| line.starts_with("Build Cache")).expect("docker system df lists the build cache").to_owned();
    assert!(cache.ends_with(" 0B"), "{usage}");
}

fn secret() {
    let (engine, server) = (engine(), Server::unstarted(&[]));
    let folder = fixture("languages/php");
    let value = "correct-horse-battery";
    // A command that no build has run. Not `--no-cache`: BuildKit shares an uncached step with every build that has the
    // same step at that moment, and `done_before` would find its own steps uncached.
    let command = format!("echo it is $TOKEN in {}; test ${{#TOKEN}} = 21", std::process::id());
    std::fs::write(folder.path().join("capsule.toml"), format!("[build]\nbuild = '{command}'\n")).expect("written");
    let tag = "capsule-test-secret";
    let ran = build(&engine, &server, folder.path(), tag, &["--secret", "TOKEN"], &[("TOKEN", value)]).ok();
    assert!(ran.err.contains("it is ***"), "{ran:?}");
    assert!(!ran.err.contains(value) && !ran.out.contains(value), "{ran:?}");
    let output = engine.docker(&["history", "--no-trunc", tag]).ok().out;
    assert!(!output.contains(value), "{output}");
    let found =
        engine.docker(&["run", "--rm", "--user", "0", "--entrypoint", "grep", tag, "--recursive", value, "/app", "/run", "/tmp"]);
    assert!(!found.success, "{found:?}");
    let missing = build(&engine, &server, folder.path(), tag, &["--secret", "NOT_SET"], &[]).refused();
    assert!(missing.err.contains("The environment variable NOT_SET is not set"), "{missing:?}");
}

fn bounds() {
    let (engine, server) = (engine(), Server::unstarted(&[]));
    let folder = fixture("languages/php");
    let slow = |command: &str| {
        std::fs::write(folder.path().join("capsule.toml"), format!("[build]\nbuild = \"{command}\"\n")).expect("written");
    };
    let tag = "capsule-test-bounds";
    slow("sleep 600");
    let ran = build(&engine, &server, folder.path(), tag, &["--seconds", "10"], &[]).refused();
    assert!(ran.err.contains("longer than 10 s"), "{ran:?}");
    let still = || capsule_tests::processes("sleep 600").is_empty().then_some(());
    eventually("what was built has ended", still);
    slow("exit 3");
    let ran = build(&engine, &server, folder.path(), tag, &[], &[]).refused();
    assert!(ran.err.contains("exit 3"), "the step is named: {ran:?}");
    slow("head -c 100000000 /dev/urandom >big");
    let ran = build(&engine, &server, folder.path(), tag, &["--size-mib", "50"], &[]).refused();
    assert!(ran.err.contains("more than the limit of 50 MiB"), "{ran:?}");
    assert!(!engine.docker(&["image", "inspect", tag]).success, "it is removed");
    // Ctrl-C.
    slow("sleep 601");
    let socket = engine.socket().display().to_string();
    let at = folder.path().display().to_string();
    let images: Vec<String> = BASES.iter().map(|base| format!("{base}={TOOLCHAINS}")).collect();
    let mut words = vec!["build", &at, "--tag", tag, "--engine", &socket];
    words.extend(images.iter().flat_map(|image| ["--image", image.as_str()]));
    let mut child = server.spawn_with_stdout(&words);
    eventually("the step runs", || (!capsule_tests::processes("sleep 601").is_empty()).then_some(()));
    capsule_tests::signal(child.id(), capsule_tests::Signal::INT);
    assert!(!child.wait().expect("it ends").success());
    eventually("what was built has ended", || capsule_tests::processes("sleep 601").is_empty().then_some(()));
    let nowhere = server.capsule(&["build", &at, "--tag", tag, "--engine", "/nowhere.sock"]).refused();
    assert!(nowhere.err.contains("Docker Engine does not answer at /nowhere.sock"), "{nowhere:?}");
}

fn classic() {
    let (engine, server) = (engine(), Server::unstarted(&[]));
    let folder = fixture("managers/yarn");
    let tag = "capsule-test-classic";
    build(&engine, &server, folder.path(), tag, &["--classic"], &[]).ok();
    assert_eq!(page(&engine, tag, "/"), "two days are 172800000 ms");
    let again = build(&engine, &server, folder.path(), tag, &["--classic", "--json"], &[]).ok().json();
    // Base images are used as they are; every other step comes from the cache.
    let (steps, cached) = (again["steps"].as_u64().expect("a number"), again["cached"].as_u64().expect("a number"));
    assert!(steps > 10 && steps - cached <= 2, "{again}");
    let refused = build(&engine, &server, folder.path(), tag, &["--classic", "--secret", "A"], &[("A", "value")]).refused();
    assert!(refused.err.contains("BuildKit"), "{refused:?}");
}

fn held() {
    held_by(&Docker::engine(), &[None, Some("--classic")]);
}

/// With this `--cgroup-parent`, `BuildKit` names its cgroups as with systemd, also on a machine without systemd.
fn held_in_slices() {
    let engine = Docker::start_isolated(&["--cgroup-parent", "system.slice:docker:"]);
    engine.make_base();
    held_by(&engine, &[None]);
}

/// A step that exceeds its memory limit is killed, and a step with a quarter of a core gets no more.
fn held_by(engine: &Docker, methods: &[Option<&str>]) {
    let (server, folder, tag) = (Server::unstarted(&[]), tempfile::tempdir().expect("a folder"), "capsule-test-held");
    let with = |program: &str| {
        let file = format!("FROM {}\nCOPY a.pl .\nRUN perl a.pl\n", Docker::BASE);
        std::fs::write(folder.path().join("Dockerfile"), file).expect("written");
        std::fs::write(folder.path().join("a.pl"), program).expect("written");
    };
    for method in methods {
        let build = |more: &[&str]| {
            let words: Vec<&str> = method.iter().copied().chain(["--no-cache"]).chain(more.iter().copied()).collect();
            build(engine, &server, folder.path(), tag, &words, &[])
        };
        with("my $held = 'x' x 400000000; print length($held), qq(\\n);");
        let killed = build(&["--memory-mib", "100"]).refused();
        assert!(killed.err.contains("137") || killed.err.contains("emory"), "{method:?}: {killed:?}");
        // The limits do not apply to the next build.
        let _ = build(&[]).ok();
        // Compare CPU seconds with elapsed seconds.
        with("my $began = time; 1 while (times)[0] < 2; print 'ratio ', 2 / (time - $began || 1), qq( end\\n);");
        let ran = build(&["--cpu-percent", "25"]).ok();
        let ratio = ran.err.split("ratio ").skip(1).find_map(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        assert!(ratio.is_some_and(|ratio| ratio < 0.4), "{method:?}: {ran:?}");
    }
}

/// A registry with a password.
struct Registry {
    _folder: tempfile::TempDir,
    process: std::process::Child,
    host: String,
}

impl Registry {
    const USER: (&str, &str) = ("ada", "correct-horse");

    fn start() -> Self {
        let (folder, port) = (tempfile::tempdir().expect("a folder"), free_port());
        let at = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(at("users"), "ada:$2y$05$FzZwmXFpfsT6V2pk3hipxOasWJhTnEEIDDW3krn7hVODV7Zqo0VVy\n").expect("written");
        let settings = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\nauth: {{htpasswd: {{realm: test, path: {}}}}}\n",
            at("images"),
            at("users")
        );
        std::fs::write(at("config.yml"), settings).expect("written");
        let mut command = std::process::Command::new("docker-registry");
        let process =
            command.arg("serve").arg(at("config.yml")).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let process = process.spawn().expect("it starts");
        let host = format!("localhost:{port}");
        eventually("the registry answers", || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
        Self { _folder: folder, process, host }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn private() {
    let (engine, server, registry) = (Docker::engine(), Server::unstarted(&[]), Registry::start());
    let (login, folder) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let configuration = [("DOCKER_CONFIG", login.path().to_str().expect("a path"))];
    let base = format!("{}/base:1", registry.host);
    let (user, password) = Registry::USER;
    let docker = |words: &[&str]| engine.run("/usr/bin/docker", words, &configuration).ok();
    let _ = docker(&["login", "--username", user, "--password", password, &registry.host]);
    let _ = docker(&["tag", Docker::BASE, &base]);
    let _ = docker(&["push", &base]);
    // Remove the image from this Engine.
    let forget = || {
        let _ = engine.docker(&["rmi", "--force", "capsule-test-private", &base]);
    };
    std::fs::write(folder.path().join("Dockerfile"), format!("FROM {base}\nRUN echo hello >/hello\nCMD [\"true\"]\n"))
        .expect("written");
    for method in [None, Some("--classic")] {
        forget();
        let more: Vec<&str> = ["--no-cache"].into_iter().chain(method).collect();
        let refused = build(&engine, &server, folder.path(), "capsule-test-private", &more, &[]).refused();
        assert!(
            refused.err.contains("authoriz") || refused.err.contains("credentials") || refused.err.contains("denied"),
            "{refused:?}"
        );
        let built = build(&engine, &server, folder.path(), "capsule-test-private", &more, &configuration).ok();
        assert!(!built.err.contains(password), "{built:?}");
    }
    forget();
}

fn linted() {
    let (server, corpus, written) = (Server::unstarted(&[]), corpus(), tempfile::tempdir().expect("a folder"));
    for folder in std::fs::read_dir(corpus.path()).expect("unpacked").flatten() {
        for (kind, more) in [("buildkit", None), ("classic", Some("--classic")), ("traced", Some("--opentelemetry"))] {
            let path = folder.path().display().to_string();
            let words: Vec<&str> = ["plan", "--dockerfile", &path].into_iter().chain(more).collect();
            let ran = server.capsule(&words);
            if ran.success {
                let name = format!("{}.{kind}.Dockerfile", folder.file_name().display());
                std::fs::write(written.path().join(name), ran.out).expect("written");
            }
        }
    }
    let files: Vec<_> = std::fs::read_dir(written.path()).expect("there").flatten().map(|entry| entry.path()).collect();
    assert!(files.len() > 700, "{} Dockerfiles", files.len());
    // Ignored rules: the base image's digest pins package versions, and a user's own steps may use `cd`.
    let words = ["--no-color", "--failure-threshold", "warning", "--ignore", "DL3008", "--ignore", "DL3003"];
    let linted = std::process::Command::new(HADOLINT).args(words).args(&files).output().expect("it runs");
    assert!(linted.status.success(), "{}", String::from_utf8_lossy(&linted.stdout));
}

/// Checks that Debian has every package in the Dockerfiles of the corpus, and every package that plans can name.
fn packaged() {
    let (engine, server, corpus) = (Docker::engine(), Server::unstarted(&[]), corpus());
    let all = root().join("engines/buildplan/src/packages.txt");
    let all = std::fs::read_to_string(all).expect("the table");
    let rows = all.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split('|').nth(2));
    let named: Vec<String> = rows.flat_map(str::split_whitespace).map(|name| format!("\"{name}\"")).collect();
    let folder = corpus.path().join("all");
    std::fs::create_dir(&folder).expect("made");
    let declared = format!("[build]\npackages = [{}]\n[processes]\nweb = \"true\"\n", named.join(", "));
    std::fs::write(folder.join("capsule.toml"), declared).expect("written");
    let mut taken = std::collections::BTreeSet::new();
    for folder in std::fs::read_dir(corpus.path()).expect("unpacked").flatten() {
        let written = server.capsule(&["plan", "--dockerfile", &folder.path().display().to_string()]);
        if written.out.contains("FROM debian:forky") {
            continue;
        }
        let lists = written.out.lines().filter_map(|line| line.split(" --no-install-recommends ").nth(1));
        let names = lists.filter_map(|list| list.split(" && ").next()).flat_map(str::split_whitespace);
        taken.extend(names.map(str::to_owned));
    }
    let script = "apt-get update -qq && apt-cache pkgnames";
    let known = engine.docker(&["run", "--rm", Docker::BASE, "sh", "-c", script]).ok().out;
    let known: std::collections::HashSet<&str> = known.lines().collect();
    let strange: Vec<_> = taken.iter().filter(|name| !known.contains(name.as_str())).collect();
    assert!(taken.len() > 120 && strange.is_empty(), "{} taken; not there: {strange:?}", taken.len());
}

fn own_dockerfile() {
    let (engine, server) = (engine(), Server::unstarted(&[]));
    let folder = tempfile::tempdir().expect("a folder");
    let file = format!(
        "FROM {TOOLCHAINS}\nARG COLOUR\nWORKDIR /srv\nCOPY . .\nRUN echo $COLOUR > colour\nENV PORT=9000\nEXPOSE 9000\nUSER 1000\nHEALTHCHECK --interval=1s CMD true\nCMD [\"python3\", \"-m\", \"http.server\", \"9000\"]\n"
    );
    std::fs::write(folder.path().join("Dockerfile"), file).expect("written");
    std::fs::write(folder.path().join("kept"), "kept").expect("written");
    std::fs::write(folder.path().join("left.out"), "left out").expect("written");
    std::fs::write(folder.path().join(".dockerignore"), "*.out\n").expect("written");
    let tag = "capsule-test-own";
    build(&engine, &server, folder.path(), tag, &["--build-arg", "COLOUR"], &[("COLOUR", "green")]).ok();
    let listing = page(&engine, tag, "/");
    assert!(listing.contains("kept") && !listing.contains("left.out"), "{listing}");
    assert_eq!(page(&engine, tag, "/colour"), "green\n");
}
