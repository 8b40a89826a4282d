//! The process runtime, which the control plane calls: starts, finds, queries and stops workloads.

use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

use crate::protocol::{self, ShimStatus};
use crate::shim::{READY, STOPPED};
use crate::spec::Spec;

/// How long a shim may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// Why an operation on a workload failed.
#[derive(Debug)]
pub struct RuntimeError(pub String);

impl std::fmt::Display for RuntimeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for RuntimeError {}

/// Runs workloads as sandboxed processes of this host.
#[derive(Clone, Debug)]
pub struct ProcessRuntime {
    run_directory: PathBuf,
    program: PathBuf,
}

impl ProcessRuntime {
    /// Creates a runtime with its sockets in `run_directory`, which only this user may enter. `program` is the binary with
    /// the roles of shim and sandbox.
    ///
    /// # Errors
    /// When the directory cannot be created.
    pub fn new(run_directory: PathBuf, program: PathBuf) -> std::io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&run_directory)?;
        Ok(Self { run_directory, program })
    }

    /// The directory of the sockets.
    #[must_use]
    pub fn run_directory(&self) -> &Path {
        &self.run_directory
    }

    /// Starts a workload that outlives this process. Does nothing if it already runs.
    ///
    /// # Errors
    /// When the shim cannot be started or cannot create the sandbox.
    pub async fn start(&self, spec: &Spec) -> Result<(), RuntimeError> {
        if self.status(&spec.id).await.is_some() {
            return Ok(());
        }
        let (mut child, _) = self.spawn(spec).await?;
        // Reaps the shim if it ends before this process.
        tokio::spawn(async move { child.wait().await });
        Ok(())
    }

    /// Starts a workload that runs once. Dropping the returned handle ends it.
    ///
    /// # Errors
    /// As [`ProcessRuntime::start`].
    pub async fn run_once(&self, spec: &Spec) -> Result<RunHandle, RuntimeError> {
        let (child, output) = self.spawn(spec).await?;
        Ok(RunHandle { child, output })
    }

    async fn spawn(&self, spec: &Spec) -> Result<(Child, BufReader<ChildStdout>), RuntimeError> {
        let failed = |what: &str, error: &dyn std::fmt::Display| RuntimeError(format!("{what}: {error}"));
        let mut child = Command::new(&self.program)
            .arg("shim")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| failed("cannot start the shim", &error))?;
        let mut line = serde_json::to_vec(spec).map_err(|error| failed("cannot encode the workload", &error))?;
        line.push(b'\n');
        let mut stdin = child.stdin.take().ok_or_else(|| RuntimeError("the shim has no standard input".into()))?;
        stdin.write_all(&line).await.map_err(|error| failed("cannot send the workload to the shim", &error))?;
        if spec.once {
            child.stdin = Some(stdin);
        }
        let stdout = child.stdout.take().ok_or_else(|| RuntimeError("the shim has no standard output".into()))?;
        let mut reply = String::new();
        let mut stdout = BufReader::new(stdout);
        let read = tokio::time::timeout(START_TIMEOUT, stdout.read_line(&mut reply)).await;
        if matches!(read, Ok(Ok(_))) && reply.trim() == READY {
            return Ok((child, stdout));
        }
        let _ = child.kill().await;
        let why = if reply.trim().is_empty() { "the shim sent no reply".into() } else { reply.trim().to_owned() };
        Err(RuntimeError(format!("cannot start the workload: {why}")))
    }

    /// The status of a workload; `None` if it does not run.
    pub async fn status(&self, id: &str) -> Option<ShimStatus> {
        let (directory, id) = (self.run_directory.clone(), id.to_owned());
        blocking(move || protocol::status(&directory, &id)).await.ok()
    }

    /// Stops a workload; returns once it has ended.
    ///
    /// # Errors
    /// When its shim does not reply.
    pub async fn stop(&self, id: &str) -> Result<(), RuntimeError> {
        let (directory, name) = (self.run_directory.clone(), id.to_owned());
        match blocking(move || protocol::stop(&directory, &name)).await {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                let _ = std::fs::remove_file(self.run_directory.join(format!("{id}.sock")));
                return Ok(());
            }
            Err(error) => return Err(RuntimeError(format!("cannot stop the instance {id}: {error}"))),
        }
        while self.run_directory.join(format!("{id}.sock")).exists() && self.status(id).await.is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Kills a workload and discards its writes into `/app`; it restarts after a delay. The reason completes "it …".
    /// Returns whether there was anything to kill or to discard.
    ///
    /// # Errors
    /// When its shim does not reply.
    pub async fn evict(&self, id: &str, reason: &str) -> Result<bool, RuntimeError> {
        let (directory, name, reason) = (self.run_directory.clone(), id.to_owned(), reason.to_owned());
        blocking(move || protocol::evict(&directory, &name, &reason))
            .await
            .map_err(|error| RuntimeError(format!("cannot evict the instance {id}: {error}")))
    }

    /// The names of all workloads with a socket, running or not.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> std::io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.run_directory)? {
            if let Some(name) = entry?.file_name().to_str().and_then(|name| name.strip_suffix(".sock")) {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }
}

/// A workload that runs once. Dropping it ends it.
#[derive(Debug)]
pub struct RunHandle {
    child: Child,
    output: BufReader<ChildStdout>,
}

/// How a workload that ran once ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOutcome {
    /// The command's exit code, 128 and the signal's number, or 126 if it could not be started.
    pub code: i32,
    /// The limit for which Capsule stopped it, if it did. Completes "it …".
    pub stopped: Option<String>,
}

impl RunHandle {
    /// Waits for its end.
    ///
    /// # Errors
    /// When the shim cannot be waited for.
    pub async fn wait(&mut self) -> Result<RunOutcome, RuntimeError> {
        // `wait` closes the standard input, which would end the workload.
        let lifeline = self.child.stdin.take();
        let status = self.child.wait().await.map_err(|error| RuntimeError(format!("cannot wait for the shim: {error}")));
        drop(lifeline);
        // The shim has ended, so its output is complete.
        let mut output = String::new();
        let _ = tokio::time::timeout(START_TIMEOUT, (&mut self.output).take(4096).read_to_string(&mut output)).await;
        let stopped = output.lines().find_map(|line| line.strip_prefix(STOPPED)).map(str::to_owned);
        Ok(RunOutcome { code: status?.code().unwrap_or(137), stopped })
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
}
