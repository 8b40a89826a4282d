//! Runs the steps of a build (install, build, release), each in a sandbox, and manages build caches.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use capsule_buildplan::Plan;
use capsule_runtime::logs::{Stream, Writer};
use capsule_runtime::{Limits, Mask, Mount, Network, ProcessRuntime, Relaxation, RuntimeError, Spec, Writes, trees};

use crate::toolchains::Toolchains;

/// Builds on this host.
#[derive(Clone, Debug)]
pub struct Builder {
    pub runtime: ProcessRuntime,
    pub toolchains: Toolchains,
    pub limits: Limits,
    /// The folder for the layers of sandboxes, on the file system of the builds.
    pub layers: PathBuf,
}

/// One build.
#[derive(Clone, Debug)]
pub struct Job {
    /// The name of the build on this host, unique among running builds.
    pub id: String,
    /// The unpacked source. Steps change it in place.
    pub directory: PathBuf,
    /// The cache folder, shared by the builds of one service and environment.
    pub cache: PathBuf,
    pub log: PathBuf,
    pub uid: u32,
    /// The user's variables.
    pub environment: BTreeMap<String, String>,
    /// Secret values, masked in the log.
    pub masked: Vec<String>,
    /// Exceptions from the filter of system calls.
    pub relaxations: Vec<Relaxation>,
}

/// Why a build failed.
#[derive(Debug)]
pub enum BuildError {
    /// The build itself failed; the text is for the user.
    Failed(String),
    /// The host failed.
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
    /// Runs the steps of a plan in the job's directory. Dropping the future stops the running step.
    ///
    /// # Errors
    /// When a toolchain is missing or a step fails.
    pub async fn build(&self, plan: &Plan, job: &Job) -> Result<(), BuildError> {
        if let Some(missing) = self.toolchains.missing(plan) {
            return Err(BuildError::Failed(missing));
        }
        // The application may write to its own folder, even if no step runs.
        chown_tree(&job.directory, job.uid)?;
        if plan.build.install.is_none() && plan.build.build.is_none() {
            return Ok(());
        }
        let cache = job.cache.clone();
        let _lock = tokio::task::spawn_blocking(move || lock_cache(&cache)).await.map_err(std::io::Error::other)??;
        std::fs::create_dir_all(job.cache.join("home"))?;
        chown(&job.cache, job.uid)?;
        chown(&job.cache.join("home"), job.uid)?;
        let environment = self.toolchains.build_environment().into_iter().chain(plan.build.env.clone());
        let environment: BTreeMap<_, _> = environment.chain(job.environment.clone()).collect();
        if let Some(command) = &plan.build.install {
            self.step("install", command, job, environment.clone()).await?;
        }
        if let Some(command) = &plan.build.build {
            // In the sandbox, not by this process: the paths of these folders may be links to anywhere.
            let folders = capsule_buildplan::build_cache_folders(plan);
            let link_command = |folder: &&str| {
                format!("mkdir -p /cache/kept/{folder} {folder} && rm -rf {folder} && ln -s /cache/kept/{folder} {folder}; ")
            };
            let link_commands: String = folders.iter().map(link_command).collect();
            if !link_commands.is_empty() {
                self.run("keep", &link_commands, job, environment.clone()).await?;
            }
            self.step("build", command, job, environment.clone()).await?;
            if !link_commands.is_empty() {
                self.run("keep", &format!("rm -rf {}", folders.join(" ")), job, environment).await?;
            }
        }
        Ok(())
    }

    /// Runs one build or release command in the job's directory and logs it.
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
        // The command may contain a secret.
        log_line(&job.log, &Mask::new(&job.masked).text(&format!("{step}: {command}")))?;
        let began = Instant::now();
        match self.run(step, command, job, environment).await? {
            0 => Ok(log_line(&job.log, &format!("{step}: done in {:.1} s", began.elapsed().as_secs_f64()))?),
            126 => Err(BuildError::Failed(format!("the {step} step could not start; see the log above"))),
            127 => Err(BuildError::Failed(format!(
                "the {step} step (`{command}`) needs a program that is not installed; see the log above"
            ))),
            137 => Err(BuildError::Failed(format!(
                "the {step} step (`{command}`) was killed: it exceeded the timeout of {} s or the memory limit of {} MiB",
                self.limits.seconds.unwrap_or_default(),
                self.limits.memory.unwrap_or_default() >> 20
            ))),
            code => {
                Err(BuildError::Failed(format!("the {step} step (`{command}`) exited with status {code}; see the log above")))
            }
        }
    }

    /// Runs a command without logging it. Returns its exit status.
    async fn run(&self, step: &str, command: &str, job: &Job, environment: BTreeMap<String, String>) -> Result<i32, BuildError> {
        let mut mounts = self.toolchains.mounts().to_vec();
        if job.cache.is_dir() {
            mounts.push(Mount { source: job.cache.clone(), target: "/cache".into(), writable: true });
        }
        let id = format!("{}-{step}", job.id);
        let spec = Spec {
            layers: Some(self.layers.join(&id)),
            id,
            command: command.into(),
            directory: job.directory.clone(),
            writes: Writes::Directory,
            mounts,
            environment,
            uid: job.uid,
            limits: self.limits,
            network: Network::Egress,
            once: true,
            grace_seconds: 5,
            run_directory: self.runtime.run_directory().into(),
            log_directory: job.log.clone(),
            masked: job.masked.clone(),
            relaxations: job.relaxations.clone(),
        };
        let ended = self.runtime.run_once(&spec).await?.wait().await?;
        match ended.stopped {
            Some(reason) => {
                Err(BuildError::Failed(format!("the {step} step (`{command}`) was stopped: with its cache, it {reason}")))
            }
            None => Ok(ended.code),
        }
    }
}

/// The lock file of a cache; its modification time is that of the last use. It is beside the cache, not in it, where a
/// build could replace it with a link.
fn lock_of(cache: &Path) -> PathBuf {
    cache.with_extension("lock")
}

/// Locks a cache against eviction until the returned file is closed. Waits for an eviction in progress.
fn lock_cache(cache: &Path) -> std::io::Result<File> {
    let path = lock_of(cache);
    std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
    let lock = File::create(path)?;
    lock.lock_shared()?;
    lock.set_modified(SystemTime::now())?;
    Ok(lock)
}

/// Removes the least recently used build caches until the rest holds no more than `keep` bytes. Caches are at
/// `<service>/<environment>` below `caches`. Those in use stay.
///
/// # Errors
/// When the caches cannot be listed, or one cannot be removed.
pub fn evict(caches: &Path, keep: u64) -> std::io::Result<()> {
    let mut all = Vec::new();
    let services = match std::fs::read_dir(caches) {
        // No build has made a cache yet.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        services => services?,
    };
    for service in services.flatten() {
        for cache in std::fs::read_dir(service.path()).into_iter().flatten().flatten().map(|entry| entry.path()) {
            if cache.is_dir() {
                let used = std::fs::metadata(lock_of(&cache)).and_then(|kind| kind.modified());
                all.push((used.unwrap_or(SystemTime::UNIX_EPOCH), trees::size(&cache).map(|usage| usage.bytes), cache));
            }
        }
    }
    all.sort();
    let mut held: u64 = all.iter().filter_map(|(_, bytes, _)| *bytes).sum();
    for (_, bytes, cache) in all {
        // A cache that cannot be measured is removed, too.
        if held <= keep && bytes.is_some() {
            continue;
        }
        let lock = File::options().create(true).truncate(false).write(true).open(lock_of(&cache))?;
        if lock.try_lock().is_ok() {
            trees::remove(&cache)?;
            held -= bytes.unwrap_or_default();
        }
    }
    Ok(())
}

/// Removes a cache and its lock file.
pub fn remove_cache(cache: &Path) {
    let _ = trees::remove(cache);
    let _ = std::fs::remove_file(lock_of(cache));
}

/// Appends a line to a build log in the name of Capsule.
///
/// # Errors
/// When the log cannot be written.
pub fn log_line(log: &Path, text: &str) -> std::io::Result<()> {
    Writer::open(log)?.write(Stream::Capsule, text.as_bytes())
}

fn chown(path: &Path, uid: u32) -> std::io::Result<()> {
    if is_root() { std::os::unix::fs::lchown(path, Some(uid), Some(uid)) } else { Ok(()) }
}

/// Changes the owner of a tree to `uid`. Links are not followed.
fn chown_tree(path: &Path, uid: u32) -> std::io::Result<()> {
    if !is_root() {
        return Ok(());
    }
    chown(path, uid)?;
    if std::fs::symlink_metadata(path)?.is_dir() {
        for entry in std::fs::read_dir(path)? {
            chown_tree(&entry?.path(), uid)?;
        }
    }
    Ok(())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::{evict, lock_cache};
    use std::time::{Duration, SystemTime};

    #[test]
    fn eviction_removes_the_least_recently_used_cache_and_none_in_use() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = |name: &str, hours: u64| {
            let path = folder.path().join(name).join("production");
            std::fs::create_dir_all(&path).expect("made");
            std::fs::write(path.join("data"), vec![1; 1 << 20]).expect("written");
            let lock = lock_cache(&path).expect("held");
            lock.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).expect("set");
            (path, lock)
        };
        let (used, lock) = cache("used", 40);
        let [old, older, new] = [("old", 20), ("older", 30), ("new", 0)].map(|(name, hours)| cache(name, hours).0);
        evict(folder.path(), 7 << 19).expect("evicted");
        assert!(!older.exists() && old.exists() && used.exists() && new.exists(), "only the least recently used");
        evict(folder.path(), 0).expect("evicted");
        assert!(!old.exists() && !new.exists() && used.exists(), "all but the one in use");
        drop(lock);
        evict(folder.path(), 0).expect("evicted");
        assert!(!used.exists());
    }
}
