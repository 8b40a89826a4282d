//! A Capsule server of one's own, for tests and benchmarks: the built binary on a fresh data
//! directory and free ports, ended with all that it started.

mod server;
mod servers;
mod shape;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
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

/// The binary under test: `CAPSULE_BIN`, from the repository's root on, or the debug build.
#[must_use]
pub fn binary() -> PathBuf {
    let path = root().join(std::env::var_os("CAPSULE_BIN").unwrap_or_else(|| "target/debug/capsule".into()));
    assert!(path.is_file(), "{} is not built: run `cargo build -p capsule`, or scripts/test", path.display());
    path
}

pub use rustix::process::Signal;
pub use server::Server;
pub use servers::{Bucket, Collector, Docker, Kafka, Namespace, Postgres, RabbitMq, Redis, Span};
pub use shape::{Shape, end, everywhere};

/// A user without rights.
pub const NOBODY: u32 = 65534;

/// What a request was answered with.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The body as text.
    pub body: String,
    /// The headers, by their names in lower case.
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
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in the answer {self:?}"))
    }

    /// The body as JSON of an answer that must be a success.
    pub fn ok(&self) -> Value {
        assert!((200..300).contains(&self.status), "{self:?}");
        self.json()
    }
}

/// What a command printed.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Whether it ended with 0.
    pub success: bool,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ran {
    fn new(output: &Output) -> Self {
        Self {
            success: output.status.success(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Panics with what was printed unless it succeeded.
    pub fn ok(self) -> Self {
        assert!(self.success, "{}\n{}", self.out, self.err);
        self
    }

    /// Panics with what was printed if it succeeded.
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

/// Sends a command to the API at this port of this host.
#[must_use]
pub fn post(port: u16, path: &str, body: &Value) -> Reply {
    let config = Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(120)));
    let agent: Agent = config.build().into();
    let mut response = agent.post(format!("http://127.0.0.1:{port}/api/v1{path}")).send_json(body).expect("an answer");
    let body = response.body_mut().read_to_string().expect("a body");
    Reply::new(&response, body)
}

/// A member of a JSON object, as text.
#[must_use]
pub fn text(value: &Value, member: &str) -> String {
    value[member].as_str().unwrap_or_else(|| panic!("no {member} in {value}")).to_owned()
}

/// Waits until something is so.
///
/// # Panics
/// When it is not after a minute.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not after a minute");
        std::thread::sleep(Duration::from_millis(25));
    }
}

/// A copy of an example, free to be written to.
#[must_use]
pub fn example(name: &str) -> TempDir {
    copy(&root().join("examples").join(name))
}

/// The processes of this host whose command line has this in it.
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

/// SIGKILL to a process.
pub fn kill(pid: u32) {
    signal(pid, Signal::KILL);
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// A port that is free now.
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

/// The fixture of a small program that tells what it sees, in this version.
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

/// The small repositories that plans are tested with, each as a folder.
///
/// # Panics
/// When they cannot be written.
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
