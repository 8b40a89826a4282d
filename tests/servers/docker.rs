//! A Docker Engine, and images built from Debian packages without a registry.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{CommandOutput, free_port, root};

/// This machine's Engine, or if none is running a new one, which stops when the value is dropped.
#[derive(Debug)]
pub struct Docker {
    own: Option<(TempDir, Child)>,
    host: Option<String>,
}

/// The Engine that all tests of a run share.
static ENGINE: Mutex<Option<Arc<Docker>>> = Mutex::new(None);

impl Docker {
    /// A small Debian, with the certificates that this machine trusts.
    pub const BASE: &str = "capsule-test-debian";

    /// The reason why container tests cannot run on this machine, if any.
    #[must_use]
    pub fn missing_requirement() -> Option<&'static str> {
        static MISSING: OnceLock<Option<&str>> = OnceLock::new();
        *MISSING.get_or_init(|| {
            let works = |program: &str, words: &[&str]| {
                let mut command = Command::new(program);
                command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                command.env("PATH", search_path());
                command.status().is_ok_and(|status| status.success())
            };
            let checks = [
                ("no Docker Engine here", works("dockerd", &["--version"])),
                ("no docker-compose here", works("docker-compose", &["version"])),
                ("no root here", rustix::process::geteuid().is_root()),
                ("nothing can be mounted here", works("unshare", &["--mount", "true"])),
                ("no packet filter here", works("iptables", &["-w", "-t", "nat", "-S"])),
                (
                    "no control groups here",
                    Path::new("/sys/fs/cgroup").read_dir().is_ok_and(|mut entries| entries.next().is_some()),
                ),
            ];
            checks.into_iter().find(|(_, works)| !works).map(|(why, _)| why)
        })
    }

    /// Debian's client, which contains the BuildKit client. Another client earlier in `PATH` may not.
    const CLIENT: &str = "/usr/bin/docker";

    /// The shared Engine, with the base image.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn engine() -> Arc<Self> {
        let mut shared = ENGINE.lock().unwrap_or_else(PoisonError::into_inner);
        shared.get_or_insert_with(|| Arc::new(Self::start())).clone()
    }

    /// Stops the shared Engine.
    pub(crate) fn stop_shared() {
        ENGINE.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn start() -> Self {
        let mut engine = Self { own: None, host: std::env::var("DOCKER_HOST").ok() };
        if !engine.is_ready() {
            engine = Self::spawn(&["dockerd"]);
        }
        if !engine.docker(&["image", "inspect", Self::BASE]).success {
            engine.make_base();
        }
        engine
    }

    /// Starts an Engine with these arguments and without images, in its own network namespace: two Engines in one network
    /// namespace would change each other's rules.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start_isolated(arguments: &[&str]) -> Self {
        Self::spawn(&[&["unshare", "--net", "dockerd"], arguments].concat())
    }

    fn spawn(words: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("engine-").tempdir().expect("a temporary folder");
        let path = |name: &str| folder.path().join(name);
        let host = format!("unix://{}", path("docker.sock").display());
        // Networks that no other Engine of this machine uses.
        let networks = 64 + free_port() % 64;
        let log = std::fs::File::create(path("log")).expect("written");
        let child = Command::new(words[0])
            .args(&words[1..])
            .env("PATH", search_path())
            .args(["--host", &host, "--bip", &format!("10.{networks}.0.1/24")])
            .args(["--default-address-pool", &format!("base=10.{networks}.128.0/17,size=24")])
            .arg("--data-root")
            .arg(path("data"))
            .arg("--exec-root")
            .arg(path("exec"))
            .arg("--pidfile")
            .arg(path("pid"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("dockerd starts");
        let log = path("log");
        let engine = Self { own: Some((folder, child)), host: Some(host) };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !engine.is_ready() {
            let log_text = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(Instant::now() < deadline, "Docker Engine does not start:\n{}", log_text());
            std::thread::sleep(Duration::from_millis(200));
        }
        engine
    }

    /// Builds the base image from the archive that `scripts/bootstrap test` creates.
    ///
    /// # Panics
    /// If the build fails.
    pub fn make_base(&self) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let archive = root().join("target/debian-bookworm.tar.gz");
        std::fs::hard_link(&archive, folder.path().join("debian.tar.gz"))
            .or_else(|_| std::fs::copy(&archive, folder.path().join("debian.tar.gz")).map(|_| ()))
            .unwrap_or_else(|error| panic!("{}: {error}: run scripts/bootstrap run test", archive.display()));
        // One certificate per file: some programs read only the first of a file.
        let trusted = std::fs::read_to_string("/etc/ssl/certs/ca-certificates.crt").expect("the host has CA certificates");
        let (end, certificates) = ("-----END CERTIFICATE-----\n", folder.path().join("certificates"));
        std::fs::create_dir(&certificates).expect("made");
        for (index, certificate) in trusted.split_inclusive(end).enumerate() {
            std::fs::write(certificates.join(format!("host-{index}.crt")), certificate).expect("written");
        }
        let file = "FROM scratch\nADD debian.tar.gz /\nCOPY certificates /usr/local/share/ca-certificates\n";
        std::fs::write(folder.path().join("Dockerfile"), file).expect("written");
        self.build(folder.path(), Self::BASE, &[]);
    }

    fn is_ready(&self) -> bool {
        self.docker(&["info"]).success
    }

    /// Builds an image with BuildKit.
    ///
    /// # Panics
    /// If the build fails.
    pub fn build(&self, context: &Path, name: &str, more: &[&str]) {
        let context = context.to_str().expect("a path");
        let arguments: Vec<&str> = ["build", "--tag", name].into_iter().chain(more.iter().copied()).chain([context]).collect();
        let _ = self.docker(&arguments).ok();
    }

    /// Runs a `docker` command and waits for its end.
    ///
    /// # Panics
    /// If `docker` is not installed.
    #[must_use]
    pub fn docker(&self, arguments: &[&str]) -> CommandOutput {
        self.run(Self::CLIENT, arguments, &[])
    }

    /// Runs a client of the Engine with environment variables, and waits for its end.
    ///
    /// # Panics
    /// If the client is not installed.
    #[must_use]
    pub fn run(&self, program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> CommandOutput {
        let mut command = Command::new(program);
        command.args(arguments).env("DOCKER_BUILDKIT", "1").envs(environment.iter().copied()).stdin(Stdio::null());
        if let Some(host) = &self.host {
            command.env("DOCKER_HOST", host);
        }
        CommandOutput::new(&command.output().unwrap_or_else(|error| panic!("{program}: {error}")))
    }

    /// The path of the Engine's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        let host = self.host.as_deref().unwrap_or("unix:///var/run/docker.sock");
        host.trim_start_matches("unix://").into()
    }
}

/// `PATH` with the folders of system programs, which some users do not have in theirs.
fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

impl Drop for Docker {
    fn drop(&mut self) {
        let running = self.docker(&["ps", "--quiet", "--no-trunc"]).out;
        let Some((folder, child)) = &mut self.own else { return };
        for container in running.lines() {
            crate::processes(container).into_iter().for_each(crate::kill);
        }
        if let Ok(Some(status)) = child.try_wait() {
            let log = std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
            let why = log.find("\npanic").map_or(log.as_str(), |at| &log[at..]);
            eprintln!("Docker Engine ended before the tests did ({status}):{}", &why[..why.floor_char_boundary(2000)]);
            return;
        }
        crate::signal(child.id(), crate::Signal::TERM);
        let _ = child.wait();
    }
}
