//! Capsule servers for tests and benchmarks: the built binary with a new data directory on free ports. Dropping a server
//! stops it, its applications and its ingress.

mod server;
mod servers;
mod shape;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use ureq::Agent;

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// The binary under test: `CAPSULE_BIN`, relative to the repository's root, or the debug build.
#[must_use]
pub fn binary() -> PathBuf {
    let path = root().join(std::env::var_os("CAPSULE_BIN").unwrap_or_else(|| "target/debug/capsule".into()));
    assert!(path.is_file(), "{} is not built: run `cargo build -p capsule`, or scripts/test", path.display());
    path
}

/// The environment variable that selects a failpoint. A binary without failpoints does not contain its name.
pub const FAILPOINT_VARIABLE: &str = "CAPSULE_FAILPOINT";

/// Whether the binary under test has failpoints.
///
/// # Panics
/// If the binary cannot be searched.
#[must_use]
pub fn has_failpoints() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let status = Command::new("grep").args(["-qaF", FAILPOINT_VARIABLE]).arg(binary()).status().expect("grep runs");
        status.success()
    })
}

pub use rustix::process::Signal;
pub use server::Server;
pub use servers::{Bucket, Collector, Docker, Kafka, Namespace, Postgres, RabbitMq, Redis, Span};
pub use shape::{Shape, stop_shared_servers, with_shape};

/// The user id of an unprivileged user.
pub const NOBODY: u32 = 65534;

/// The response to a request.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The body as text.
    pub body: String,
    /// The headers by their lower-case names.
    pub headers: BTreeMap<String, String>,
}

impl Reply {
    fn new<B>(response: &ureq::http::Response<B>, body: String) -> Self {
        let text = |value: &ureq::http::HeaderValue| value.to_str().unwrap_or_default().to_owned();
        let headers = response.headers().iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect();
        Self { status: response.status().as_u16(), body, headers }
    }

    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in the response {self:?}"))
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// If the status is not 2xx.
    pub fn ok(&self) -> Value {
        assert!((200..300).contains(&self.status), "{self:?}");
        self.json()
    }
}

/// The result of a finished command.
#[derive(Clone, Debug)]
pub struct CommandOutput {
    /// Whether the exit status was 0.
    pub success: bool,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl CommandOutput {
    fn new(output: &Output) -> Self {
        Self {
            success: output.status.success(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Panics with the output unless the command succeeded.
    pub fn ok(self) -> Self {
        assert!(self.success, "{}\n{}", self.out, self.err);
        self
    }

    /// Panics with the output if the command succeeded.
    pub fn refused(self) -> Self {
        assert!(!self.success, "{}\n{}", self.out, self.err);
        self
    }

    /// Standard output as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }
}

/// Runs a command and waits for its end.
///
/// # Panics
/// If it cannot be started.
#[must_use]
pub fn run(command: &mut Command) -> CommandOutput {
    CommandOutput::new(
        &command.stdin(std::process::Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}")),
    )
}

/// Sends a POST request to the API on this port of the loopback address.
#[must_use]
pub fn post(port: u16, path: &str, body: &Value) -> Reply {
    let config = Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(120)));
    let agent: Agent = config.build().into();
    let mut response = agent.post(format!("http://127.0.0.1:{port}/api/v1{path}")).send_json(body).expect("a response");
    let body = response.body_mut().read_to_string().expect("a body");
    Reply::new(&response, body)
}

/// A string member of a JSON object.
#[must_use]
pub fn text(value: &Value, member: &str) -> String {
    value[member].as_str().unwrap_or_else(|| panic!("no {member} in {value}")).to_owned()
}

/// Calls `attempt` until it returns a value.
///
/// # Panics
/// After a minute without a value.
pub fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not after a minute");
        std::thread::sleep(Duration::from_millis(25));
    }
}

/// A writable copy of an example application.
#[must_use]
pub fn example(name: &str) -> TempDir {
    copy(&root().join("examples").join(name))
}

/// The processes of this host whose command line contains `text`.
#[must_use]
pub fn processes(text: &str) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").expect("it is Linux").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&words).trim_end_matches('\0').replace('\0', " ").contains(text)
    })
    .collect()
}

/// Sends SIGKILL to a process.
pub fn kill(pid: u32) {
    signal(pid, Signal::KILL);
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// A port that is free at the moment.
#[must_use]
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener.expect("a port").port()
}

/// A copy of a fixture.
#[must_use]
pub fn fixture(name: &str) -> TempDir {
    copy(&root().join("tests/fixtures").join(name))
}

/// The fixture `probe`, with this version: a web server that reports its environment and runs code of a test.
#[must_use]
pub fn probe(version: &str) -> TempDir {
    let folder = fixture("probe");
    std::fs::write(folder.path().join("version"), version).expect("written");
    folder
}

fn copy(from: &Path) -> TempDir {
    let to = tempfile::tempdir().expect("a temporary folder");
    let status = Command::new("cp").arg("-R").arg(from.join(".")).arg(to.path()).status().expect("cp runs");
    assert!(status.success(), "{} cannot be copied", from.display());
    to
}

/// The small repositories for tests of plans, each as a folder.
///
/// # Panics
/// If they cannot be written.
#[must_use]
pub fn corpus() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let corpus = root().join("engines/buildplan/tests/plans/corpus");
    for file in std::fs::read_dir(corpus).expect("the corpus").flatten() {
        let text = std::fs::read_to_string(file.path()).expect("a fixture");
        let input = text.split("== plan\n").next().unwrap_or_default();
        let into = folder.path().join(file.path().file_stem().unwrap_or_default());
        std::fs::create_dir(&into).expect("made");
        let mut at: Option<(PathBuf, String)> = None;
        let write = |at: &mut Option<(PathBuf, String)>| {
            if let Some((path, content)) = at.take() {
                std::fs::create_dir_all(path.parent().unwrap_or(&into)).expect("made");
                std::fs::write(path, content).expect("written");
            }
        };
        for line in input.split_inclusive('\n') {
            if let Some(path) = line.trim_end().strip_prefix("-- ").and_then(|rest| rest.strip_suffix(" --")) {
                write(&mut at);
                at = Some((into.join(path), String::new()));
            } else if let Some((_, content)) = &mut at {
                content.push_str(line);
            }
        }
        write(&mut at);
    }
    folder
}
