//! What to run, and within which bounds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::seccomp::Relaxation;
use crate::trees::Usage;

/// A workload: one command in one sandbox. Travels from the runtime to the shim over a pipe, never
/// over a file, since its environment holds secrets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Names the instance; also its socket's file name. `a-z`, `0-9` and `-`.
    pub id: String,
    /// The user's own command, run by `/bin/sh -c` inside the sandbox.
    pub command: String,
    /// The directory mounted as `/app`, where the command starts.
    pub directory: PathBuf,
    /// Where what it writes into `/app` goes.
    #[serde(default)]
    pub writes: Writes,
    /// A folder of its own on the same file system as `directory`, for what its mounts need. Who starts the
    /// workload removes it once the workload has ended for good.
    #[serde(default)]
    pub layers: Option<PathBuf>,
    /// What else the workload sees of the host.
    pub mounts: Vec<Mount>,
    /// All of its environment.
    pub environment: BTreeMap<String, String>,
    /// The user and group id it runs under, when the runtime is root.
    pub uid: u32,
    pub limits: Limits,
    pub network: Network,
    /// Run once, and end when the parent ends: a build step. Otherwise it is kept running.
    pub once: bool,
    /// How long it may take to end after SIGTERM, in seconds.
    pub grace_seconds: u64,
    /// Where the socket lies.
    pub run_directory: PathBuf,
    /// Where the output's segments lie.
    pub log_directory: PathBuf,
    /// Values that are replaced by `***` in the output: secrets, where a log is for more eyes than theirs.
    #[serde(default)]
    pub masked: Vec<String>,
    /// What it may do beyond the filter of system calls.
    #[serde(default)]
    pub relaxations: Vec<Relaxation>,
}

/// Where what a workload writes into `/app` goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Writes {
    /// Into the directory itself: a build.
    #[default]
    Directory,
    /// Into a layer above it, which stays through restarts; the directory stays as it is.
    Layer,
}

impl Spec {
    /// A text without the paths of the host that this workload is made of: it ends in a log that its users read.
    #[must_use]
    pub fn without_host_paths(&self, text: &str) -> String {
        let root = self.run_directory.join("root");
        let mut names: Vec<(String, &str)> = vec![
            (self.directory.to_string_lossy().into_owned(), "/app"),
            (root.to_string_lossy().into_owned(), ""),
            (self.run_directory.to_string_lossy().into_owned(), "the run directory"),
            (self.log_directory.to_string_lossy().into_owned(), "the log directory"),
        ];
        names.extend(self.layers.iter().map(|layers| (layers.to_string_lossy().into_owned(), "the layers of /app")));
        names.extend(
            self.mounts
                .iter()
                .filter(|mount| mount.source != mount.target)
                .filter_map(|mount| Some((mount.source.to_string_lossy().into_owned(), mount.target.to_str()?))),
        );
        // The longest first: one may lie in another.
        names.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        let known = names.iter().filter(|(path, _)| path.len() > 1);
        known.fold(text.to_owned(), |text, (path, name)| text.replace(path.as_str(), name))
    }
}

/// A part of the host that a sandbox sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    pub source: PathBuf,
    pub target: PathBuf,
    pub writable: bool,
}

/// What a workload may use at the most. `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Hundredths of a core.
    pub cpu_percent: Option<u32>,
    /// Processes and threads.
    pub processes: Option<u32>,
    /// Seconds of wall-clock time, for a workload that runs once.
    pub seconds: Option<u64>,
    /// Whether it gives way to everything else that runs.
    pub low_priority: bool,
    /// What it may hold on disk in all folders that it may write to, unlinked files included.
    #[serde(default)]
    pub disk: Option<Usage>,
    /// Bytes of `/tmp` and of the home directory, each. They are memory.
    #[serde(default)]
    pub temporary: Option<u64>,
}

/// What a workload can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Its own loopback only.
    Isolated,
    /// Its own loopback, and the world outside through the host; neither the host's own services nor
    /// other workloads.
    Egress,
}
