//! The steps of a build, each in a sandbox: fetch the dependencies, make the release.

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
    /// Where sandboxes keep what their mounts need; on the file system of the builds.
    pub layers: PathBuf,
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
    /// Values that the log must not show.
    pub masked: Vec<String>,
    /// What its steps may do beyond the filter of system calls.
    pub relaxations: Vec<Relaxation>,
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
        let cache = job.cache.clone();
        let _held = tokio::task::spawn_blocking(move || hold(&cache)).await.map_err(std::io::Error::other)??;
        std::fs::create_dir_all(job.cache.join("home"))?;
        own(&job.cache, job.uid)?;
        own(&job.cache.join("home"), job.uid)?;
        let environment = self.toolchains.build_environment().into_iter().chain(plan.build.env.clone());
        let environment: BTreeMap<_, _> = environment.chain(job.environment.clone()).collect();
        if let Some(command) = &plan.build.install {
            self.step("install", command, job, environment.clone()).await?;
        }
        if let Some(command) = &plan.build.build {
            // By the user's own rights: what is in the way of these folders may be a link to anywhere.
            let kept = capsule_buildplan::kept(plan);
            let lend = |folder: &&str| {
                format!("mkdir -p /cache/kept/{folder} {folder} && rm -rf {folder} && ln -s /cache/kept/{folder} {folder}; ")
            };
            let lend: String = kept.iter().map(lend).collect();
            if !lend.is_empty() {
                self.run("keep", &lend, job, environment.clone()).await?;
            }
            self.step("build", command, job, environment.clone()).await?;
            if !lend.is_empty() {
                self.run("keep", &format!("rm -rf {}", kept.join(" ")), job, environment).await?;
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
        // A command may hold a secret in the clear.
        say(&job.log, &Mask::new(&job.masked).text(&format!("{step}: {command}")))?;
        let began = Instant::now();
        match self.run(step, command, job, environment).await? {
            0 => Ok(say(&job.log, &format!("{step}: done in {:.1} s", began.elapsed().as_secs_f64()))?),
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

    /// The same, without a word of it in the log; how it ended.
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

/// The file beside a cache that builds hold while they use it; its time is that of the last use. Not
/// in the cache: what builds may write, they may make a link to anywhere.
fn lock_of(cache: &Path) -> PathBuf {
    cache.with_extension("lock")
}

/// What is held is not evicted, for as long as the file is open. Waits for an eviction under way.
fn hold(cache: &Path) -> std::io::Result<File> {
    let path = lock_of(cache);
    std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
    let lock = File::create(path)?;
    lock.lock_shared()?;
    lock.set_modified(SystemTime::now())?;
    Ok(lock)
}

/// Removes caches of builds, those used longest ago first, until all together hold no more than `keep`
/// bytes. They lie two folders down: one for each service and environment. Those in use stay.
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
        // What cannot be measured does not stay.
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

/// Removes a cache that no build will use again.
pub fn remove_cache(cache: &Path) {
    let _ = trees::remove(cache);
    let _ = std::fs::remove_file(lock_of(cache));
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

#[cfg(test)]
mod tests {
    use super::{evict, hold};
    use std::time::{Duration, SystemTime};

    #[test]
    fn caches_used_longest_ago_go_first_and_those_in_use_stay() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = |name: &str, hours: u64| {
            let path = folder.path().join(name).join("production");
            std::fs::create_dir_all(&path).expect("made");
            std::fs::write(path.join("data"), vec![1; 1 << 20]).expect("written");
            let lock = hold(&path).expect("held");
            lock.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).expect("set");
            (path, lock)
        };
        let (busy, held) = cache("busy", 40);
        let [old, older, new] = [("old", 20), ("older", 30), ("new", 0)].map(|(name, hours)| cache(name, hours).0);
        evict(folder.path(), 7 << 19).expect("evicted");
        assert!(!older.exists() && old.exists() && busy.exists() && new.exists(), "the one used longest ago");
        evict(folder.path(), 0).expect("evicted");
        assert!(!old.exists() && !new.exists() && busy.exists(), "all that no build uses");
        drop(held);
        evict(folder.path(), 0).expect("evicted");
        assert!(!busy.exists());
    }
}
