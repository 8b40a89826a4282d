//! The disk limit of a workload. Usage is measured every two seconds, and sooner when the file system fills quickly. A
//! workload that exceeds its limit is stopped.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::layers::Layers;
use crate::trees::{Excess, Meter, Usage};
use crate::unlinked;

/// How often the free space is checked, which costs one system call.
pub const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// How often a workload is measured, unless that takes long.
const MEASURE_INTERVAL: Duration = Duration::from_secs(2);
/// The interval between measurements is at least this many times the duration of one, unless the file system fills quickly.
const MEASURE_COST_FACTOR: u32 = 10;
/// The longest interval between measurements.
const MAX_MEASURE_INTERVAL: Duration = Duration::from_secs(10);
/// A workload is measured at once if the free space has fallen by more than this fraction of its limit: one part in so many.
const QUICK_FILL_DIVISOR: u64 = 16;

/// The disk usage of a workload, and its limit.
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
    /// The file system rejects writes beyond the limit.
    ProjectQuota,
    /// Usage is measured, and a workload that exceeds the limit is stopped.
    Measured,
}

impl Enforcement {
    /// The name to show to people.
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
    /// No measurement begins before: measuring takes at most half of the time of one core.
    earliest: Instant,
    /// The free space of the file system at the last measurement.
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
        before.bytes.saturating_sub(now.bytes) > self.limit.bytes / QUICK_FILL_DIVISOR
            || before.inodes.saturating_sub(now.inodes) > self.limit.inodes / QUICK_FILL_DIVISOR
    }

    /// Schedules the next measurement after one that took `duration`.
    pub fn record_measurement(&mut self, duration: Duration, layers: &Layers) {
        let now = Instant::now();
        self.earliest = now + duration.min(MAX_MEASURE_INTERVAL);
        self.due = now + duration.saturating_mul(MEASURE_COST_FACTOR).clamp(MEASURE_INTERVAL, MAX_MEASURE_INTERVAL);
        self.free = free(layers);
    }
}

fn free(layers: &Layers) -> Option<Usage> {
    let system = layers.file_system()?;
    Some(Usage { bytes: system.f_bfree.saturating_mul(system.f_frsize), inodes: system.f_ffree })
}

/// Measures the disk usage of a workload. `pid` is its first process, if it runs, through which the others are found.
/// `share_files` is whether all threads of a process share one descriptor table.
///
/// # Errors
/// When the usage exceeds `limit`, or cannot be measured.
pub fn measure(layers: &Layers, limit: Usage, pid: Option<u32>, targets: &[PathBuf], share_files: bool) -> Result<Usage, Excess> {
    let allowance = layers.allowance();
    let max = Usage { bytes: limit.bytes.saturating_add(allowance.bytes), inodes: limit.inodes.saturating_add(allowance.inodes) };
    let mut meter = Meter::new(max);
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
            unlinked::add(&mut meter, &root.join("proc"), &mounts, share_files)?;
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
        // Report the limit that was set, without the allowance.
        Err(Excess::Bytes(_)) => Err(Excess::Bytes(limit.bytes)),
        Err(Excess::Inodes(_)) => Err(Excess::Inodes(limit.inodes)),
        Err(other) => Err(other),
    }
}
