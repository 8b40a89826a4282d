//! The disk limit of a workload: measured every two seconds, sooner when the file system fills quickly. Who
//! holds more than it may is stopped with the reason.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::held;
use crate::layers::Layers;
use crate::trees::{Excess, Meter, Usage};

/// How often the free space is looked at, which costs one system call.
pub const TICK: Duration = Duration::from_millis(500);
/// How often a workload is measured.
const PERIOD: Duration = Duration::from_secs(2);
/// Measuring takes at most one part in so many of the time, unless the file system fills quickly.
const SHARE: u32 = 10;
/// The longest time between two measurements, however long one takes.
const LONGEST_PERIOD: Duration = Duration::from_secs(10);
/// A file system that lost one part in so many of a workload's limit is a reason to measure at once.
const QUICK: u64 = 16;

/// What a workload holds on disk, and how it is kept from holding more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    pub usage: Usage,
    pub limit: Usage,
    pub enforcement: Enforcement,
}

/// How a disk limit is enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Enforcement {
    /// The file system refuses to take more.
    ProjectQuota,
    /// Usage is measured, and who exceeds the limit is stopped.
    Measured,
}

impl Enforcement {
    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ProjectQuota => "project quota",
            Self::Measured => "measured",
        }
    }
}

/// When a workload is due to be measured.
#[derive(Debug)]
pub struct Schedule {
    limit: Usage,
    due: Instant,
    /// Not before, whatever happens: measuring takes at most half of the time of one core.
    earliest: Instant,
    /// What the file system had free at the last measurement.
    free: Option<Usage>,
}

impl Schedule {
    pub fn new(limit: Usage) -> Self {
        let now = Instant::now();
        Self { limit, due: now, earliest: now, free: None }
    }

    /// Whether to measure now.
    pub fn is_due(&self, layers: &Layers) -> bool {
        let now = Instant::now();
        now >= self.earliest && (now >= self.due || self.fills_quickly(free(layers)))
    }

    fn fills_quickly(&self, free: Option<Usage>) -> bool {
        let (Some(before), Some(now)) = (self.free, free) else { return false };
        before.bytes.saturating_sub(now.bytes) > self.limit.bytes / QUICK
            || before.inodes.saturating_sub(now.inodes) > self.limit.inodes / QUICK
    }

    /// Notes that a measurement is done that took so long.
    pub fn measured(&mut self, took: Duration, layers: &Layers) {
        let now = Instant::now();
        self.earliest = now + took.min(LONGEST_PERIOD);
        self.due = now + took.saturating_mul(SHARE).clamp(PERIOD, LONGEST_PERIOD);
        self.free = free(layers);
    }
}

fn free(layers: &Layers) -> Option<Usage> {
    let system = layers.file_system()?;
    Some(Usage { bytes: system.f_bfree.saturating_mul(system.f_frsize), inodes: system.f_ffree })
}

/// Measures a workload. `pid` is its first process, through which the others are found, while it runs; its threads
/// `share_files` where they cannot have tables of descriptors of their own.
///
/// # Errors
/// When it holds more than `limit`.
pub fn measure(layers: &Layers, limit: Usage, pid: Option<u32>, targets: &[PathBuf], share_files: bool) -> Result<Usage, Excess> {
    let allowance = layers.allowance();
    let most =
        Usage { bytes: limit.bytes.saturating_add(allowance.bytes), inodes: limit.inodes.saturating_add(allowance.inodes) };
    let mut meter = Meter::new(most);
    let mut measure = || -> Result<(), Excess> {
        layers.each(|folder| meter.add_tree(folder, layers.depth()))?;
        if let Some(pid) = pid {
            let root = PathBuf::from(format!("/proc/{pid}/root"));
            // Before the sandbox has a root of its own, this is the `/proc` of the host.
            let namespace = |process: &Path| std::fs::read_link(process.join("ns/pid")).ok();
            if namespace(&root.join("proc/1")) != namespace(Path::new(&format!("/proc/{pid}"))) {
                return Ok(());
            }
            let mounts: Vec<_> = targets.iter().map(|target| root.join(target.strip_prefix("/").unwrap_or(target))).collect();
            held::add(&mut meter, &root.join("proc"), &mounts, share_files)?;
        }
        Ok(())
    };
    match measure() {
        Ok(()) => {
            let usage = meter.usage();
            Ok(Usage {
                bytes: usage.bytes.saturating_sub(allowance.bytes),
                inodes: usage.inodes.saturating_sub(allowance.inodes),
            })
        }
        // Told as the limit that was set.
        Err(Excess::Bytes(_)) => Err(Excess::Bytes(limit.bytes)),
        Err(Excess::Inodes(_)) => Err(Excess::Inodes(limit.inodes)),
        Err(other) => Err(other),
    }
}
