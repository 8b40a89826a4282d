//! The steps of a build, each in a sandbox: fetch the dependencies, make the release.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use capsule_buildplan::Plan;
use capsule_runtime::logs::{Stream, Writer};
use capsule_runtime::{Limits, Mount, Network, ProcessRuntime, RuntimeError, Spec};

use crate::toolchains::Toolchains;

/// Builds on this host.
#[derive(Clone, Debug)]
pub struct Builder {
    pub runtime: ProcessRuntime,
    pub toolchains: Toolchains,
    pub limits: Limits,
}

/// One build.
#[derive(Clone, Debug)]
pub struct Job {
    /// Names it on this host.
    pub id: String,
    /// The unpacked source; the release is made in place.
    pub directory: PathBuf,
    /// Kept between builds of the same service.
    pub cache: PathBuf,
    pub log: PathBuf,
    pub uid: u32,
    /// The user's variables.
    pub environment: BTreeMap<String, String>,
}

/// Why there is no release.
#[derive(Debug)]
pub enum BuildError {
    /// The user's to mend; the text says how.
    Failed(String),
    /// Not the user's fault.
    Host(String),
}

impl std::fmt::Display for BuildError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Failed(text) | Self::Host(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for BuildError {}

impl From<RuntimeError> for BuildError {
    fn from(error: RuntimeError) -> Self {
        Self::Host(error.to_string())
    }
}

impl From<std::io::Error> for BuildError {
    fn from(error: std::io::Error) -> Self {
        Self::Host(error.to_string())
    }
}

impl Builder {
    /// Runs a plan's steps in the job's directory. Dropping the future ends the step under way.
    ///
    /// # Errors
    /// When a toolchain is missing or a step fails.
    pub async fn build(&self, plan: &Plan, job: &Job) -> Result<(), BuildError> {
        if let Some(missing) = self.toolchains.missing(plan) {
            return Err(BuildError::Failed(missing));
        }
        // The application may write in its own folder, whether or not a step makes anything there.
        own_all(&job.directory, job.uid)?;
        if plan.build.install.is_none() && plan.build.build.is_none() {
            return Ok(());
        }
        std::fs::create_dir_all(job.cache.join("home"))?;
        own(&job.cache, job.uid)?;
        own(&job.cache.join("home"), job.uid)?;
        for (step, command) in [("install", &plan.build.install), ("build", &plan.build.build)] {
            if let Some(command) = command {
                let environment = self.toolchains.build_environment().into_iter().chain(plan.build.env.clone());
                self.step(step, command, job, environment.chain(job.environment.clone()).collect()).await?;
            }
        }
        Ok(())
    }

    /// Runs one command in the job's directory, as builds and release commands are.
    ///
    /// # Errors
    /// When it fails.
    pub async fn step(
        &self,
        step: &str,
        command: &str,
        job: &Job,
        environment: BTreeMap<String, String>,
    ) -> Result<(), BuildError> {
        say(&job.log, &format!("{step}: {command}"))?;
        let mut mounts = self.toolchains.mounts().to_vec();
        if job.cache.is_dir() {
            mounts.push(Mount { source: job.cache.clone(), target: "/cache".into(), writable: true });
        }
        let spec = Spec {
            id: format!("{}-{step}", job.id),
            command: command.into(),
            directory: job.directory.clone(),
            mounts,
            environment,
            uid: job.uid,
            limits: self.limits,
            network: Network::Egress,
            once: true,
            grace_seconds: 5,
            run_directory: self.runtime.run_directory().into(),
            log_directory: job.log.clone(),
        };
        let mut running = self.runtime.run_once(&spec).await?;
        match running.wait().await? {
            0 => Ok(()),
            126 => Err(BuildError::Failed(format!("the {step} step could not be started; the log above says why"))),
            127 => Err(BuildError::Failed(format!(
                "the {step} step (`{command}`) needs a program that is not there; the log above names it"
            ))),
            137 => Err(BuildError::Failed(format!(
                "the {step} step (`{command}`) was killed: it took longer than {} s or needed more memory than a build may use ({} MiB)",
                self.limits.seconds.unwrap_or_default(),
                self.limits.memory.unwrap_or_default() >> 20
            ))),
            code => {
                Err(BuildError::Failed(format!("the {step} step (`{command}`) ended with status {code}; the log above says why")))
            }
        }
    }
}

/// Adds a line of Capsule's own to a build log.
///
/// # Errors
/// When the log cannot be written.
pub fn say(log: &Path, text: &str) -> std::io::Result<()> {
    Writer::open(log)?.write(Stream::Capsule, text.as_bytes())
}

fn own(path: &Path, uid: u32) -> std::io::Result<()> {
    if is_root() { std::os::unix::fs::lchown(path, Some(uid), Some(uid)) } else { Ok(()) }
}

/// Gives a tree to `uid`. Links are given, not followed.
fn own_all(path: &Path, uid: u32) -> std::io::Result<()> {
    if !is_root() {
        return Ok(());
    }
    own(path, uid)?;
    if std::fs::symlink_metadata(path)?.is_dir() {
        for entry in std::fs::read_dir(path)? {
            own_all(&entry?.path(), uid)?;
        }
    }
    Ok(())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
