//! The specification of a workload and its limits.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::seccomp::Relaxation;
use crate::trees::Usage;

/// A workload: one command in one sandbox. The runtime sends it to the shim over a pipe, not through a file, since its
/// environment contains secrets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// The name of the instance and of its socket: `a-z`, `0-9` and `-`.
    pub id: String,
    /// The user's own command, run by `/bin/sh -c` inside the sandbox.
    pub command: String,
    /// The directory mounted as `/app`, where the command starts.
    pub directory: PathBuf,
    /// Where writes into `/app` go.
    #[serde(default)]
    pub writes: Writes,
    /// A directory for the layers of its mounts, on the same file system as `directory`. The caller removes it once the
    /// workload has ended for good.
    #[serde(default)]
    pub layers: Option<PathBuf>,
    /// Further parts of the host that the workload sees.
    pub mounts: Vec<Mount>,
    /// Its complete environment.
    pub environment: BTreeMap<String, String>,
    /// The user and group id that it runs under, if the runtime is root.
    pub uid: u32,
    pub limits: Limits,
    pub network: Network,
    /// Whether it runs once, and ends with the parent process, as a build step does. Otherwise it is kept running.
    pub once: bool,
    /// Seconds between SIGTERM and SIGKILL.
    pub grace_seconds: u64,
    /// The directory of the socket.
    pub run_directory: PathBuf,
    /// The directory of the log segments.
    pub log_directory: PathBuf,
    /// Secret values that are replaced by `***` in the output.
    #[serde(default)]
    pub masked: Vec<String>,
    /// Relaxations of the system call filter.
    #[serde(default)]
    pub relaxations: Vec<Relaxation>,
}

/// Where writes into `/app` go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Writes {
    /// Into the directory itself, as in a build.
    #[default]
    Directory,
    /// Into a layer above the directory, which stays unchanged. The layer survives restarts.
    Layer,
}

impl Spec {
    /// Replaces the host paths of this workload in a text, which users read in a log.
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
        // The longest first: one path may be inside another.
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

/// The limits of a workload. `None` is no limit.
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
    /// Whether it runs at low CPU priority.
    pub low_priority: bool,
    /// Disk usage in all writable directories, unlinked files included.
    #[serde(default)]
    pub disk: Option<Usage>,
    /// Bytes of `/tmp` and of the home directory, each. Both are in memory (tmpfs).
    #[serde(default)]
    pub temporary: Option<u64>,
}

/// The network that a workload can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Its own loopback only.
    Isolated,
    /// Its own loopback, and the internet through the host; neither the host's own services nor other workloads.
    Egress,
}
