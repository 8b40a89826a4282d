//! The control plane's side of the ingress's socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::control::{Command, Reply};
use crate::table::Table;

/// Talks to the ingress.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// Who the ingress is.
#[derive(Clone, Debug)]
pub struct Hello {
    pub pid: u32,
    /// The address it listens on, with the real port.
    pub listen: String,
    pub revision: u64,
    /// See [`crate::build`]; empty from one that does not tell.
    pub build: String,
}

impl Client {
    /// A client of the ingress whose control socket is at `socket`.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.into() }
    }

    async fn call(&self, command: &Command, patience: Duration) -> std::io::Result<Reply> {
        let exchange = async {
            let mut stream = UnixStream::connect(&self.socket).await?;
            let mut line = serde_json::to_vec(command)?;
            line.push(b'\n');
            stream.write_all(&line).await?;
            let mut reply = String::new();
            BufReader::new(stream).read_line(&mut reply).await?;
            Ok(serde_json::from_str::<Reply>(&reply)?)
        };
        tokio::time::timeout(patience, exchange).await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
    }

    /// Finds out whether an ingress is there.
    ///
    /// # Errors
    /// When none answers.
    pub async fn hello(&self) -> std::io::Result<Hello> {
        let reply = self.call(&Command::Hello, Duration::from_secs(2)).await?;
        Ok(Hello { pid: reply.pid, listen: reply.listen, revision: reply.revision, build: reply.build })
    }

    /// Puts a table in force; returns the revision in force then.
    ///
    /// # Errors
    /// When the ingress does not answer, or cannot keep the table.
    pub async fn apply(&self, table: Table) -> std::io::Result<u64> {
        let reply = self.call(&Command::Apply { table }, Duration::from_secs(10)).await?;
        match reply.error {
            None => Ok(reply.revision),
            Some(error) => Err(std::io::Error::other(error)),
        }
    }

    /// Asks an instance for `path` through the ingress; the HTTP status it answered, or why not.
    ///
    /// # Errors
    /// When the ingress does not answer.
    pub async fn probe(&self, instance: &str, path: &str) -> std::io::Result<Result<u16, String>> {
        let command = Command::Probe { instance: instance.into(), path: path.into() };
        let reply = self.call(&command, Duration::from_secs(10)).await?;
        Ok(reply.status.ok_or_else(|| reply.error.unwrap_or_default()))
    }

    /// Waits until the instances are done with their requests; returns how many are left after `seconds`.
    ///
    /// # Errors
    /// When the ingress does not answer.
    pub async fn drain(&self, instances: Vec<String>, seconds: u64) -> std::io::Result<usize> {
        let reply = self.call(&Command::Drain { instances, seconds }, Duration::from_secs(seconds + 5)).await?;
        Ok(reply.busy)
    }

    /// Tells the ingress to end.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn shutdown(&self) -> std::io::Result<()> {
        self.call(&Command::Shutdown, Duration::from_secs(5)).await.map(drop)
    }
}
