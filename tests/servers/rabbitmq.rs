//! A RabbitMQ server.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::free_port;

/// A server in a temporary folder on free ports. Dropping the value stops it.
#[derive(Debug)]
pub struct RabbitMq {
    folder: TempDir,
    /// The address to listen on.
    address: &'static str,
    port: u16,
    distribution: u16,
    names: u16,
    process: Option<Child>,
    hosts: AtomicU32,
}

const PROGRAMS: &str = "/usr/lib/rabbitmq/bin";

impl RabbitMq {
    /// Whether Debian's or Ubuntu's package is installed.
    #[must_use]
    pub fn is_installed() -> bool {
        Path::new(PROGRAMS).join("rabbitmq-server").is_file()
    }

    /// Creates and starts a server.
    #[must_use]
    pub fn start() -> Self {
        Self::start_at("127.0.0.1")
    }

    /// Like [`RabbitMq::start`], on an address of this host.
    #[must_use]
    pub fn start_at(address: &'static str) -> Self {
        let folder = tempfile::Builder::new().prefix("mq-").tempdir().expect("a temporary folder");
        // Allow the only user, `guest`, from any address.
        std::fs::write(folder.path().join("rabbitmq.conf"), "loopback_users = none\n").expect("written");
        let mut server = Self {
            folder,
            address,
            port: free_port(),
            distribution: free_port(),
            names: free_port(),
            process: None,
            hosts: AtomicU32::new(0),
        };
        server.resume();
        server
    }

    /// Starts the server with its existing data.
    pub fn resume(&mut self) {
        let log = std::fs::File::create(self.path("out.log")).expect("written");
        let mut command = self.command("rabbitmq-server");
        self.process = Some(command.stdout(log).stderr(Stdio::null()).spawn().expect("RabbitMQ starts"));
        let deadline = Instant::now() + Duration::from_secs(120);
        while !self.control(&["await_startup", "--timeout", "60"]) {
            assert!(
                Instant::now() < deadline,
                "RabbitMQ does not start:\n{}",
                std::fs::read_to_string(self.path("out.log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Kills the server with SIGKILL. Its data stays.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // The child is a script that waits for the server process.
            for pid in crate::processes(&format!("{}", self.folder.path().display())) {
                crate::kill(pid);
            }
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Creates a virtual host and returns its URL.
    ///
    /// # Panics
    /// If the virtual host cannot be created.
    #[must_use]
    pub fn url(&self) -> String {
        let host = format!("host{}", self.hosts.fetch_add(1, Ordering::Relaxed));
        assert!(self.control(&["add_vhost", &host]), "the virtual host was not created");
        assert!(
            self.control(&["set_permissions", "-p", &host, "guest", ".*", ".*", ".*"]),
            "the permissions of the virtual host were not set"
        );
        format!("amqp://guest:guest@{}:{}/{host}", self.address, self.port)
    }

    /// The port of the server.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    fn control(&self, arguments: &[&str]) -> bool {
        let mut command = self.command("rabbitmqctl");
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(Path::new(PROGRAMS).join(program));
        command
            .env("HOME", self.folder.path())
            .env("RABBITMQ_NODENAME", format!("capsule{}@localhost", self.port))
            .env("RABBITMQ_NODE_IP_ADDRESS", self.address)
            .env("RABBITMQ_NODE_PORT", self.port.to_string())
            .env("RABBITMQ_DIST_PORT", self.distribution.to_string())
            .env("ERL_EPMD_PORT", self.names.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_MNESIA_BASE", self.path("data"))
            .env("RABBITMQ_LOG_BASE", self.path("log"))
            .env("RABBITMQ_PID_FILE", self.path("pid"))
            .env("RABBITMQ_CONFIG_FILE", self.path("rabbitmq.conf"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", self.path("plugins"))
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none");
        command
    }
}

impl Drop for RabbitMq {
    fn drop(&mut self) {
        let _ = self.command("rabbitmqctl").arg("stop").stdout(Stdio::null()).stderr(Stdio::null()).status();
        self.kill();
        let _ = Command::new("epmd")
            .args(["-port", &self.names.to_string(), "-kill"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}
