//! A Redis server.

use std::process::{Child, Command, Stdio};

use super::{kill_process, wait_for};
use crate::free_port;

/// A server on a free port, with a password and without persistence. Dropping the value stops it.
#[derive(Debug)]
pub struct Redis {
    port: u16,
    process: Option<Child>,
}

const PASSWORD: &str = "the-redis-password";

impl Redis {
    /// Whether it is installed.
    #[must_use]
    pub fn is_installed() -> bool {
        std::path::Path::new("/usr/bin/redis-server").is_file()
    }

    /// Starts a server.
    #[must_use]
    pub fn start() -> Self {
        let mut server = Self { port: free_port(), process: None };
        server.resume();
        server
    }

    /// Starts the server, without data.
    pub fn resume(&mut self) {
        let port = self.port.to_string();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port, "--bind", "127.0.0.1", "--requirepass", PASSWORD, "--save", "", "--appendonly", "no"]);
        self.process = Some(command.current_dir("/").stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts"));
        wait_for("Redis", self.port);
    }

    /// Kills the server with SIGKILL. Its data is lost.
    pub fn kill(&mut self) {
        kill_process(&mut self.process);
    }

    /// `redis://:password@host:port`
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://:{PASSWORD}@127.0.0.1:{}", self.port)
    }

    /// Runs a command with `redis-cli` and returns its output.
    #[must_use]
    pub fn run(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("redis-cli");
        command.args(["-p", &self.port.to_string(), "-a", PASSWORD, "--no-auth-warning"]).args(arguments);
        String::from_utf8_lossy(&command.output().expect("redis-cli runs").stdout).trim().to_owned()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}
