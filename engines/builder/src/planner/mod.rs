//! Makes plans of untrusted repositories, each in a confined process of its own. A crash, an endless loop or exhausted memory
//! ends that process and becomes an error message.

mod confined;

use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use capsule_buildplan::{Options, Plan};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::sync::Semaphore;

pub use confined::{confine, run};

use crate::DiskReserve;

/// The role of the process: the first argument of the binary.
pub const ROLE: &str = "planner";
/// The argument that sets [`Options::containers`].
const CONTAINERS: &str = "containers";
/// The argument that limits the bytes an archive may be decompressed to.
const SPOOL_BYTES: &str = "room=";

/// Wall time of one plan. The process itself limits its CPU time further.
const PLAN_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a request waits for a permit.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a reply.
const MAX_REPLY_BYTES: u64 = 4 << 20;

/// What to make a plan of.
#[derive(Clone, Debug)]
pub enum Source {
    /// A folder of unpacked files.
    Folder(PathBuf),
    /// A `tar`, `tar.gz` or `zip`.
    Archive(PathBuf),
}

/// Why a plan cannot be made.
#[derive(Debug)]
pub enum PlannerError {
    /// The repository is at fault; the text is for the user.
    Refused(String),
    /// No permit became free in time.
    Busy,
    /// The host is at fault.
    Host(String),
}

impl std::fmt::Display for PlannerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(text) | Self::Host(text) => f.write_str(text),
            Self::Busy => f.write_str("too many plans are being made at the moment; try again later"),
        }
    }
}

impl std::error::Error for PlannerError {}

/// The reply of the process.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Plan(Box<Plan>),
    /// Why the repository cannot be planned.
    Refused(String),
    /// Why the process could not confine itself. It has read nothing.
    Unconfined(String),
}

/// Makes plans in confined processes, with a limit on their number.
#[derive(Clone, Debug)]
pub struct Planner {
    program: PathBuf,
    /// The folder of the unnamed files that archives are decompressed to.
    spool: PathBuf,
    /// Bytes of the disk that must stay free.
    reserve: u64,
    permits: Arc<Semaphore>,
    permit_timeout: Duration,
}

impl Planner {
    /// `program` is the binary with the role [`ROLE`]; `directory` belongs to the planner. At most `at_once` plans are
    /// made concurrently.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(program: PathBuf, directory: &Path, at_once: usize) -> std::io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        // The root directory of a process that reads an archive.
        std::fs::DirBuilder::new().recursive(true).mode(0o555).create(directory.join("empty"))?;
        Ok(Self {
            program,
            spool: directory.to_owned(),
            reserve: 0,
            permits: Arc::new(Semaphore::new(at_once)),
            permit_timeout: PERMIT_TIMEOUT,
        })
    }

    /// Sets how long [`Self::plan_now`] waits for a permit.
    #[must_use]
    pub fn with_permit_timeout(self, permit_timeout: Duration) -> Self {
        Self { permit_timeout, ..self }
    }

    /// Sets how many bytes of the disk a decompressed archive must leave free.
    #[must_use]
    pub fn with_disk_reserve(self, reserve: u64) -> Self {
        Self { reserve, ..self }
    }

    /// Bytes of the disk that an archive may be decompressed to.
    fn spool_bytes(&self) -> u64 {
        DiskReserve::new(&self.spool, self.reserve).available()
    }

    /// Makes a plan. Waits for a permit without a timeout.
    ///
    /// # Errors
    /// When the plan cannot be made.
    pub async fn plan(&self, source: &Source, options: Options) -> Result<Plan, PlannerError> {
        let _permit = self.permits.acquire().await.map_err(|_| PlannerError::Busy)?;
        self.make(source, options).await
    }

    /// Makes a plan for an interactive request: waits for a permit with a timeout.
    ///
    /// # Errors
    /// When the plan cannot be made; [`PlannerError::Busy`] after the timeout.
    pub async fn plan_now(&self, source: &Source, options: Options) -> Result<Plan, PlannerError> {
        let permit = tokio::time::timeout(self.permit_timeout, self.permits.acquire()).await;
        let _permit = permit.ok().and_then(Result::ok).ok_or(PlannerError::Busy)?;
        self.make(source, options).await
    }

    async fn make(&self, source: &Source, options: Options) -> Result<Plan, PlannerError> {
        let host = |what: &str, error: &dyn std::fmt::Display| PlannerError::Host(format!("{what}: {error}"));
        let mut command = Command::new(&self.program);
        command.arg(ROLE).env_clear().stdout(Stdio::piped()).kill_on_drop(true);
        match source {
            Source::Folder(folder) => {
                let folder = std::fs::OpenOptions::new()
                    .read(true)
                    .custom_flags(rustix::fs::OFlags::DIRECTORY.bits().cast_signed())
                    .open(folder);
                let folder = folder.map_err(|error| host("the source cannot be opened", &error))?;
                command.arg("folder").stdin(folder).stderr(Stdio::null()).current_dir("/");
            }
            Source::Archive(archive) => {
                let archive = File::open(archive).map_err(|error| host("the archive cannot be opened", &error))?;
                let spool =
                    tempfile::tempfile_in(&self.spool).map_err(|error| host("a temporary file cannot be made", &error))?;
                // Standard error is the third and last descriptor that the process has.
                command.arg("archive").stdin(archive).stderr(spool).current_dir(self.spool.join("empty"));
                command.arg(format!("{SPOOL_BYTES}{}", self.spool_bytes()));
            }
        }
        if options.containers {
            command.arg(CONTAINERS);
        }
        let mut child = command.spawn().map_err(|error| host("the process of the plan cannot be started", &error))?;
        let output = child.stdout.take().ok_or_else(|| PlannerError::Host("the process of the plan has no output".into()))?;
        let mut reply = Vec::new();
        let ended = tokio::time::timeout(PLAN_TIMEOUT, async {
            output.take(MAX_REPLY_BYTES).read_to_end(&mut reply).await?;
            child.wait().await
        });
        let status = match ended.await {
            Ok(status) => status.map_err(|error| host("the process of the plan cannot be waited for", &error))?,
            Err(_) => {
                return Err(PlannerError::Refused(format!("making the plan takes longer than {} s", PLAN_TIMEOUT.as_secs())));
            }
        };
        match serde_json::from_slice(&reply) {
            // The reply is untrusted, even if the process succeeded.
            Ok(Reply::Plan(plan)) if status.success() => match capsule_buildplan::check(&plan) {
                Ok(()) => Ok(*plan),
                Err(error) => Err(PlannerError::Refused(error.to_string())),
            },
            Ok(Reply::Refused(why)) => Err(PlannerError::Refused(why)),
            Ok(Reply::Unconfined(why)) => Err(PlannerError::Host(format!(
                "repositories are read by a process without rights, which this host does not allow: {why}"
            ))),
            _ => Err(PlannerError::Refused(exit_reason(status))),
        }
    }
}

/// Why a process gave no reply, for the user.
fn exit_reason(status: ExitStatus) -> String {
    let signal = status.signal().unwrap_or_default();
    match signal {
        // SIGXCPU, SIGKILL
        24 | 9 => format!(
            "reading the repository was ended by signal {signal}: it probably takes more than {} s of CPU time",
            confined::CPU_SECONDS
        ),
        // SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGSEGV
        4..=7 | 11 => format!(
            "reading the repository was ended by signal {signal}: it probably takes more than {} MiB of memory, or its files are \
             nested too deeply",
            confined::MEMORY_BYTES >> 20
        ),
        // SIGXFSZ
        25 => "the archive decompresses to more bytes than the server has room for".into(),
        0 => format!("the process that reads the repository ended with status {}", status.code().unwrap_or_default()),
        signal => format!("the process that reads the repository was ended by signal {signal}"),
    }
}
