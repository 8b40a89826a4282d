//! The client side of the ingress's control socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::control::{Command, Reply};
use crate::table::Table;

/// Sends commands to an ingress.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// The reply to a `hello` command: which ingress runs.
#[derive(Clone, Debug)]
pub struct Hello {
    pub pid: u32,
    /// The address that it listens on, with the actual port.
    pub listen: String,
    pub revision: u64,
    /// See [`crate::build_id`]; empty if the ingress is older than this member.
    pub build: String,
}

impl Client {
    /// Creates a client for the control socket at `socket`.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.into() }
    }

    async fn call(&self, command: &Command, timeout: Duration) -> std::io::Result<Reply> {
        let exchange = async {
            let mut stream = UnixStream::connect(&self.socket).await?;
            let mut line = serde_json::to_vec(command)?;
            line.push(b'\n');
            stream.write_all(&line).await?;
            let mut reply = String::new();
            BufReader::new(stream).read_line(&mut reply).await?;
            Ok(serde_json::from_str::<Reply>(&reply)?)
        };
        tokio::time::timeout(timeout, exchange).await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
    }

    /// Asks which ingress runs.
    ///
    /// # Errors
    /// When no ingress answers.
    pub async fn hello(&self) -> std::io::Result<Hello> {
        let reply = self.call(&Command::Hello, Duration::from_secs(2)).await?;
        Ok(Hello { pid: reply.pid, listen: reply.listen, revision: reply.revision, build: reply.build })
    }

    /// Replaces the routing table, unless the ingress has a newer one. Returns the revision that is in force afterwards.
    ///
    /// # Errors
    /// When the ingress does not answer, or cannot save the table.
    pub async fn apply(&self, table: Table) -> std::io::Result<u64> {
        let reply = self.call(&Command::Apply { table }, Duration::from_secs(10)).await?;
        match reply.error {
            None => Ok(reply.revision),
            Some(error) => Err(std::io::Error::other(error)),
        }
    }

    /// Sends a GET request for `path` to an instance through the ingress. Returns the HTTP status, or why there is none.
    ///
    /// # Errors
    /// When the ingress does not answer.
    pub async fn probe(&self, instance: &str, path: &str) -> std::io::Result<Result<u16, String>> {
        let command = Command::Probe { instance: instance.into(), path: path.into() };
        let reply = self.call(&command, Duration::from_secs(10)).await?;
        Ok(reply.status.ok_or_else(|| reply.error.unwrap_or_default()))
    }

    /// Waits until no request to the instances is in flight, at most `seconds`. Returns how many are left.
    ///
    /// # Errors
    /// When the ingress does not answer.
    pub async fn drain(&self, instances: Vec<String>, seconds: u64) -> std::io::Result<usize> {
        let reply = self.call(&Command::Drain { instances, seconds }, Duration::from_secs(seconds + 5)).await?;
        Ok(reply.in_flight)
    }

    /// Shuts the ingress down.
    ///
    /// # Errors
    /// When the ingress does not answer.
    pub async fn shutdown(&self) -> std::io::Result<()> {
        self.call(&Command::Shutdown, Duration::from_secs(5)).await.map(drop)
    }
}
