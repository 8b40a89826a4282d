//! The process runtime as the control plane sees it: start, find again, ask, stop.

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

/// How long a shim may take to come up.
const START: Duration = Duration::from_secs(20);

/// Why a workload could not be started, asked or stopped.
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
    /// Keeps its sockets in `run_directory`, which only this user may enter. `program` is the binary
    /// that has the roles of shim and sandbox.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(run_directory: PathBuf, program: PathBuf) -> std::io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&run_directory)?;
        Ok(Self { run_directory, program })
    }

    /// Where the sockets lie.
    #[must_use]
    pub fn run_directory(&self) -> &Path {
        &self.run_directory
    }

    /// Starts a workload and keeps it running, whatever becomes of this process. Nothing happens if
    /// it runs already.
    ///
    /// # Errors
    /// When the shim cannot be started or the sandbox cannot be made.
    pub async fn start(&self, spec: &Spec) -> Result<(), RuntimeError> {
        if self.status(&spec.id).await.is_some() {
            return Ok(());
        }
        let (mut child, _) = self.spawn(spec).await?;
        // Reaped when it ends, if this process still lives then.
        tokio::spawn(async move { child.wait().await });
        Ok(())
    }

    /// Runs a workload once. It ends when it is done, or when the returned handle is dropped.
    ///
    /// # Errors
    /// As [`ProcessRuntime::start`].
    pub async fn run_once(&self, spec: &Spec) -> Result<Once, RuntimeError> {
        let (child, output) = self.spawn(spec).await?;
        Ok(Once { child, output })
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
            .map_err(|error| failed("the shim cannot be started", &error))?;
        let mut line = serde_json::to_vec(spec).map_err(|error| failed("the workload cannot be told", &error))?;
        line.push(b'\n');
        let mut stdin = child.stdin.take().ok_or_else(|| RuntimeError("the shim has no input".into()))?;
        stdin.write_all(&line).await.map_err(|error| failed("the shim does not listen", &error))?;
        if spec.once {
            child.stdin = Some(stdin);
        }
        let stdout = child.stdout.take().ok_or_else(|| RuntimeError("the shim has no output".into()))?;
        let mut said = String::new();
        let mut stdout = BufReader::new(stdout);
        let heard = tokio::time::timeout(START, stdout.read_line(&mut said)).await;
        if matches!(heard, Ok(Ok(_))) && said.trim() == READY {
            return Ok((child, stdout));
        }
        let _ = child.kill().await;
        let why = if said.trim().is_empty() { "it said nothing".into() } else { said.trim().to_owned() };
        Err(RuntimeError(format!("the workload could not be started: {why}")))
    }

    /// How a workload is; `None` if it does not run here.
    pub async fn status(&self, id: &str) -> Option<ShimStatus> {
        let (directory, id) = (self.run_directory.clone(), id.to_owned());
        blocking(move || protocol::status(&directory, &id)).await.ok()
    }

    /// Ends a workload; returns when it is gone.
    ///
    /// # Errors
    /// When it could not be told.
    pub async fn stop(&self, id: &str) -> Result<(), RuntimeError> {
        let (directory, name) = (self.run_directory.clone(), id.to_owned());
        match blocking(move || protocol::stop(&directory, &name)).await {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                let _ = std::fs::remove_file(self.run_directory.join(format!("{id}.sock")));
                return Ok(());
            }
            Err(error) => return Err(RuntimeError(format!("the instance {id} cannot be told to stop: {error}"))),
        }
        while self.run_directory.join(format!("{id}.sock")).exists() && self.status(id).await.is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Kills a workload and throws away what it wrote into `/app`; it starts again after a pause. The reason
    /// completes "it …". Whether there was anything to kill or to throw away.
    ///
    /// # Errors
    /// When it could not be told.
    pub async fn evict(&self, id: &str, reason: &str) -> Result<bool, RuntimeError> {
        let (directory, name, reason) = (self.run_directory.clone(), id.to_owned(), reason.to_owned());
        blocking(move || protocol::evict(&directory, &name, &reason))
            .await
            .map_err(|error| RuntimeError(format!("the instance {id} cannot be told to stop: {error}")))
    }

    /// The names of all workloads whose sockets are here, alive or not.
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
pub struct Once {
    child: Child,
    output: BufReader<ChildStdout>,
}

/// How a workload that ran once ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The command's exit code, 128 and the signal's number, or 126 if it could not be started.
    pub code: i32,
    /// Why Capsule stopped it, if it did for a limit. Completes "it …".
    pub stopped: Option<String>,
}

impl Once {
    /// Waits for its end.
    ///
    /// # Errors
    /// When the shim cannot be waited for.
    pub async fn wait(&mut self) -> Result<Ended, RuntimeError> {
        // Waiting closes the input, which would end the workload: it is kept aside meanwhile.
        let lifeline = self.child.stdin.take();
        let status = self.child.wait().await.map_err(|error| RuntimeError(format!("the shim cannot be waited for: {error}")));
        drop(lifeline);
        // The shim is gone: what it said is all there.
        let mut said = String::new();
        let _ = tokio::time::timeout(START, (&mut self.output).take(4096).read_to_string(&mut said)).await;
        let stopped = said.lines().find_map(|line| line.strip_prefix(STOPPED)).map(str::to_owned);
        Ok(Ended { code: status?.code().unwrap_or(137), stopped })
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
}
