//! A Docker Engine, and images made of Debian: no registry is needed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{Ran, free_port, root};

/// The Engine of this machine, or where none runs one of one's own, which ends with this value.
#[derive(Debug)]
pub struct Docker {
    own: Option<(TempDir, Child)>,
    host: Option<String>,
}

/// The Engine that tests of one run share.
static ENGINE: Mutex<Option<Arc<Docker>>> = Mutex::new(None);

impl Docker {
    /// A small Debian, with the certificates that this machine trusts.
    pub const BASE: &str = "capsule-test-debian";

    /// What keeps tests with containers from running on this machine, if anything.
    #[must_use]
    pub fn missing() -> Option<&'static str> {
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

    /// Debian's client has what BuildKit takes built in; another that comes first in the path may not.
    const CLIENT: &str = "/usr/bin/docker";

    /// The Engine, with the base image in it.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn engine() -> Arc<Self> {
        let mut shared = ENGINE.lock().unwrap_or_else(PoisonError::into_inner);
        shared.get_or_insert_with(|| Arc::new(Self::start())).clone()
    }

    /// Ends the shared Engine.
    pub(crate) fn end() {
        ENGINE.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn start() -> Self {
        let mut engine = Self { own: None, host: std::env::var("DOCKER_HOST").ok() };
        if !engine.answers() {
            engine = Self::started(&["dockerd"]);
        }
        if !engine.docker(&["image", "inspect", Self::BASE]).success {
            engine.make_base();
        }
        engine
    }

    /// An Engine of one's own, begun with these arguments; no image is in it yet. Its network is its own, too:
    /// two Engines in one would change each other's.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn apart(arguments: &[&str]) -> Self {
        Self::started(&[&["unshare", "--net", "dockerd"], arguments].concat())
    }

    fn started(words: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("engine-").tempdir().expect("a temporary folder");
        let path = |name: &str| folder.path().join(name);
        let host = format!("unix://{}", path("docker.sock").display());
        // Networks that no other Engine of this machine has.
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
        while !engine.answers() {
            let told = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(Instant::now() < deadline, "Docker Engine does not start:\n{}", told());
            std::thread::sleep(Duration::from_millis(200));
        }
        engine
    }

    /// Makes the base image. `scripts/bootstrap test` makes the archive.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn make_base(&self) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let archive = root().join("target/debian-bookworm.tar.gz");
        std::fs::hard_link(&archive, folder.path().join("debian.tar.gz"))
            .or_else(|_| std::fs::copy(&archive, folder.path().join("debian.tar.gz")).map(|_| ()))
            .unwrap_or_else(|error| panic!("{}: {error}: run scripts/bootstrap run test", archive.display()));
        // One to a file: not every program reads a file with several.
        let trusted = std::fs::read_to_string("/etc/ssl/certs/ca-certificates.crt").expect("the host trusts somebody");
        let (end, certificates) = ("-----END CERTIFICATE-----\n", folder.path().join("certificates"));
        std::fs::create_dir(&certificates).expect("made");
        for (index, certificate) in trusted.split_inclusive(end).enumerate() {
            std::fs::write(certificates.join(format!("host-{index}.crt")), certificate).expect("written");
        }
        let file = "FROM scratch\nADD debian.tar.gz /\nCOPY certificates /usr/local/share/ca-certificates\n";
        std::fs::write(folder.path().join("Dockerfile"), file).expect("written");
        self.build(folder.path(), Self::BASE, &[]);
    }

    fn answers(&self) -> bool {
        self.docker(&["info"]).success
    }

    /// Builds an image with BuildKit.
    ///
    /// # Panics
    /// When it cannot be built.
    pub fn build(&self, context: &Path, name: &str, more: &[&str]) {
        let context = context.to_str().expect("a path");
        let arguments: Vec<&str> = ["build", "--tag", name].into_iter().chain(more.iter().copied()).chain([context]).collect();
        let _ = self.docker(&arguments).ok();
    }

    /// Runs a command of `docker` to its end.
    ///
    /// # Panics
    /// When it is not installed.
    #[must_use]
    pub fn docker(&self, arguments: &[&str]) -> Ran {
        self.run(Self::CLIENT, arguments, &[])
    }

    /// Runs a client of it to its end, with variables.
    ///
    /// # Panics
    /// When it is not installed.
    #[must_use]
    pub fn run(&self, program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
        let mut command = Command::new(program);
        command.args(arguments).env("DOCKER_BUILDKIT", "1").envs(environment.iter().copied()).stdin(Stdio::null());
        if let Some(host) = &self.host {
            command.env("DOCKER_HOST", host);
        }
        Ran::new(&command.output().unwrap_or_else(|error| panic!("{program}: {error}")))
    }

    /// Where the Engine listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        let host = self.host.as_deref().unwrap_or("unix:///var/run/docker.sock");
        host.trim_start_matches("unix://").into()
    }
}

/// With where servers lie, which not every user looks in.
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
