//! Plans of strangers' repositories, each made in a process of its own that may do nothing else: a crash, a
//! loop or a hunger for memory ends that process and becomes an error message.

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

/// The name of the role, as the binary's first argument.
pub const ROLE: &str = "planner";
/// Whether containers are used, as the last argument.
const CONTAINERS: &str = "containers";
/// How many bytes an archive's process may write, as an argument.
const ROOM: &str = "room=";

/// Wall time of one plan. CPU time is bounded more closely, in the process itself.
const PLAN_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a request waits for other plans to end.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an answer.
const MOST_ANSWER: u64 = 4 << 20;

/// What is planned.
#[derive(Clone, Debug)]
pub enum Source {
    /// A folder of unpacked files.
    Folder(PathBuf),
    /// A `tar`, `tar.gz` or `zip`.
    Archive(PathBuf),
}

/// Why there is no plan.
#[derive(Debug)]
pub enum PlannerError {
    /// The repository's; the text is for its user.
    Refused(String),
    /// Too many plans are being made.
    Busy,
    /// The host's.
    Host(String),
}

impl std::fmt::Display for PlannerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(text) | Self::Host(text) => f.write_str(text),
            Self::Busy => f.write_str("too many plans are being made at the moment"),
        }
    }
}

impl std::error::Error for PlannerError {}

/// What the process answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Plan(Box<Plan>),
    /// The repository cannot be planned; why.
    Refused(String),
    /// The process could not give up its rights, and has read nothing.
    Unconfined(String),
}

/// Makes plans in processes of their own, a few at a time.
#[derive(Clone, Debug)]
pub struct Planner {
    program: PathBuf,
    /// Where archives are decompressed to, in files without names.
    spool: PathBuf,
    /// Bytes of the disk that decompressed archives leave free.
    reserve: u64,
    permits: Arc<Semaphore>,
    permit_timeout: Duration,
}

impl Planner {
    /// `program` is the binary that has the role of the planner; `directory` is the planner's own. So many
    /// plans are made `at_once`.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(program: PathBuf, directory: &Path, at_once: usize) -> std::io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        // What a process sees as its root that is given an archive.
        std::fs::DirBuilder::new().recursive(true).mode(0o555).create(directory.join("empty"))?;
        Ok(Self {
            program,
            spool: directory.to_owned(),
            reserve: 0,
            permits: Arc::new(Semaphore::new(at_once)),
            permit_timeout: PERMIT_TIMEOUT,
        })
    }

    /// The same, where those who wait for an answer wait at most so long for other plans to end.
    #[must_use]
    pub fn waiting_at_most(self, permit_timeout: Duration) -> Self {
        Self { permit_timeout, ..self }
    }

    /// The same, where a decompressed archive leaves so many bytes of the disk free.
    #[must_use]
    pub fn keeping_free(self, reserve: u64) -> Self {
        Self { reserve, ..self }
    }

    /// Bytes of the disk that an archive may be decompressed to.
    fn room(&self) -> u64 {
        DiskReserve::new(&self.spool, self.reserve).available()
    }

    /// Makes a plan once other plans have ended, however long that takes.
    ///
    /// # Errors
    /// When there is no plan.
    pub async fn plan(&self, source: &Source, options: Options) -> Result<Plan, PlannerError> {
        let _permit = self.permits.acquire().await.map_err(|_| PlannerError::Busy)?;
        self.make(source, options).await
    }

    /// Makes a plan for someone who waits for it, and not behind a long queue.
    ///
    /// # Errors
    /// When there is no plan; [`PlannerError::Busy`] if others are in the way.
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
                // The third of the three descriptors that a process begins with.
                command.arg("archive").stdin(archive).stderr(spool).current_dir(self.spool.join("empty"));
                command.arg(format!("{ROOM}{}", self.room()));
            }
        }
        if options.containers {
            command.arg(CONTAINERS);
        }
        let mut child = command.spawn().map_err(|error| host("the process of the plan cannot be started", &error))?;
        let output = child.stdout.take().ok_or_else(|| PlannerError::Host("the process of the plan has no output".into()))?;
        let mut answer = Vec::new();
        let ended = tokio::time::timeout(PLAN_TIMEOUT, async {
            output.take(MOST_ANSWER).read_to_end(&mut answer).await?;
            child.wait().await
        });
        let status = match ended.await {
            Ok(status) => status.map_err(|error| host("the process of the plan cannot be waited for", &error))?,
            Err(_) => return Err(PlannerError::Refused(format!("it takes longer than {} s", PLAN_TIMEOUT.as_secs()))),
        };
        match serde_json::from_slice(&answer) {
            // The answer is untrusted input, even of a process that succeeded.
            Ok(Answer::Plan(plan)) if status.success() => match capsule_buildplan::check(&plan) {
                Ok(()) => Ok(*plan),
                Err(error) => Err(PlannerError::Refused(error.to_string())),
            },
            Ok(Answer::Refused(why)) => Err(PlannerError::Refused(why)),
            Ok(Answer::Unconfined(why)) => Err(PlannerError::Host(format!(
                "repositories are read by a process without rights, which this host does not allow: {why}"
            ))),
            _ => Err(PlannerError::Refused(how_it_ended(status))),
        }
    }
}

/// Why a process gave no answer, for the user.
fn how_it_ended(status: ExitStatus) -> String {
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
