//! A PostgreSQL server.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{NOBODY, free_port};

/// A server in a temporary folder on a free port, with a password. Dropping the value stops it.
#[derive(Debug)]
pub struct Postgres {
    folder: TempDir,
    programs: PathBuf,
    port: u16,
    process: Option<Child>,
}

const PASSWORD: &str = "the-database-password";

impl Postgres {
    /// The folder of its programs on Debian and Ubuntu, if it is installed.
    #[must_use]
    pub fn programs() -> Option<PathBuf> {
        let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
        versions.flatten().map(|entry| entry.path().join("bin")).find(|folder| folder.join("initdb").is_file())
    }

    /// Creates and starts a server.
    #[must_use]
    pub fn start() -> Self {
        let programs = Self::programs().expect("PostgreSQL is installed");
        let folder = tempfile::Builder::new().prefix("pg-").tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("password"), PASSWORD).expect("written");
        for path in [folder.path(), &folder.path().join("password")] {
            std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).expect("this needs root");
        }
        let mut server = Self { folder, programs, port: free_port(), process: None };
        let password = server.folder.path().join("password");
        let made = server
            .command("initdb")
            .args(["-U", "capsule", "--auth=scram-sha-256", "-E", "UTF8", "--no-sync", "--pwfile"])
            .arg(password)
            .arg("-D")
            .arg(server.data())
            .output()
            .expect("initdb runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        server.resume();
        server
    }

    /// Starts the server with its existing data.
    pub fn resume(&mut self) {
        let sockets = format!("unix_socket_directories={}", self.folder.path().display());
        let port = format!("port={}", self.port);
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.data());
        for setting in ["listen_addresses=127.0.0.1", "max_connections=200", &sockets, &port] {
            command.arg("-c").arg(setting);
        }
        self.process = Some(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("postgres starts"));
        let deadline = Instant::now() + Duration::from_secs(60);
        let port = self.port.to_string();
        while !self
            .command("pg_isready")
            .args(["-q", "-h", "127.0.0.1", "-p", &port])
            .status()
            .is_ok_and(|status| status.success())
        {
            assert!(Instant::now() < deadline, "PostgreSQL does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Kills the server with SIGKILL. Its data stays.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // The children of a killed server end by themselves.
            let _ = process.kill();
            let _ = process.wait();
            let _ = std::fs::remove_file(self.data().join("postmaster.pid"));
        }
    }

    /// `postgres://user:password@host:port`
    #[must_use]
    pub fn url(&self) -> String {
        format!("postgres://capsule:{PASSWORD}@127.0.0.1:{}", self.port)
    }

    /// Runs SQL with `psql` and returns the lines of its output.
    ///
    /// # Panics
    /// If the query fails.
    #[must_use]
    pub fn query(&self, database: &str, sql: &str) -> Vec<String> {
        let mut command = self.command("psql");
        command.args(["-X", "-A", "-t", "-c", sql]).arg(format!("{}/{database}", self.url()));
        let output = command.output().expect("psql runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
    }

    /// The password in its URL.
    #[must_use]
    pub fn password(&self) -> &'static str {
        PASSWORD
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// One of its programs, as an unprivileged user: PostgreSQL refuses to run as root.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".into()]);
        command.arg(self.programs.join(program)).current_dir(Path::new("/"));
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.kill();
    }
}
