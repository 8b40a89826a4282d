//! Limits by control groups: version 2, version 1, or a mix of both, as the machine has it.

use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use crate::spec::Limits;

const ROOT: &str = "/sys/fs/cgroup";

/// The groups of one workload.
#[derive(Debug, Default)]
pub struct Groups {
    directories: Vec<PathBuf>,
    /// Where the memory in use can be read.
    memory: Option<PathBuf>,
    /// What could not be limited here.
    pub warnings: Vec<String>,
}

impl Groups {
    /// Makes the groups of the workload `id`. What the machine does not allow becomes a warning.
    pub fn create(id: &str, limits: &Limits) -> Self {
        let mut groups = Self::default();
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        if Path::new(ROOT).join("cgroup.controllers").exists() {
            groups.create_v2(id, limits, &own);
        } else {
            groups.create_v1(id, limits, &own);
        }
        groups
    }

    /// The files a process writes its id to in order to join.
    pub fn members(&self) -> Vec<PathBuf> {
        self.directories.iter().map(|directory| directory.join("cgroup.procs")).collect()
    }

    /// Bytes of memory in use, where it can be told.
    pub fn memory_in_use(&self) -> Option<u64> {
        std::fs::read_to_string(self.memory.as_ref()?).ok()?.trim().parse().ok()
    }

    /// Removes the groups; nobody may be left in them.
    pub fn remove(&self) {
        for directory in &self.directories {
            let _ = std::fs::remove_dir(directory);
        }
    }

    fn create_v2(&mut self, id: &str, limits: &Limits, own: &str) {
        let path = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
        // Shims live in `<base>/…` too: the base is what lies above any group of ours.
        let path = path.split("/capsule.").next().unwrap_or("/");
        let base = Path::new(ROOT).join(path.trim_start_matches('/'));
        if let Err(error) = delegate(&base) {
            self.warnings.push(format!("memory, CPU and process limits are not enforced: {}: {error}", base.display()));
            return;
        }
        let directory = base.join(format!("capsule.{id}"));
        if let Err(error) = make(&directory) {
            self.warnings.push(format!("memory, CPU and process limits are not enforced: {}: {error}", directory.display()));
            return;
        }
        self.set(&directory, "memory.max", limits.memory.map(|bytes| bytes.to_string()));
        self.set(&directory, "memory.swap.max", limits.memory.map(|_| "0".into()));
        self.set(&directory, "pids.max", limits.processes.map(|count| count.to_string()));
        self.set(&directory, "cpu.max", limits.cpu_percent.map(|percent| format!("{} 100000", u64::from(percent) * 1000)));
        self.set(&directory, "cpu.weight", limits.low_priority.then(|| "10".into()));
        self.memory = Some(directory.join("memory.current"));
        self.directories.push(directory);
    }

    fn create_v1(&mut self, id: &str, limits: &Limits, own: &str) {
        for controller in ["memory", "cpu", "pids"] {
            let path = own.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                parts.next()?.split(',').any(|name| name == controller).then(|| parts.next())?
            });
            let hierarchy = Path::new(ROOT).join(controller);
            // A container sees its own group as the hierarchy's root, and is told its name on the host.
            let base = path
                .map(|path| hierarchy.join(path.trim_start_matches('/')))
                .into_iter()
                .chain([hierarchy])
                .find(|base| base.join("cgroup.procs").exists());
            let made = match base {
                Some(base) => {
                    let directory = base.join(format!("capsule.{id}"));
                    make(&directory).map(|()| directory)
                }
                None => Err(std::io::Error::new(std::io::ErrorKind::NotFound, "no such control group hierarchy")),
            };
            let directory = match made {
                Ok(directory) => directory,
                Err(error) => {
                    self.warnings.push(format!("the {controller} limit is not enforced: {error}"));
                    continue;
                }
            };
            match controller {
                "memory" => {
                    self.set(&directory, "memory.limit_in_bytes", limits.memory.map(|bytes| bytes.to_string()));
                    self.memory = Some(directory.join("memory.usage_in_bytes"));
                }
                "cpu" => {
                    let quota = limits.cpu_percent.map(|percent| (u64::from(percent) * 1000).to_string());
                    self.set(&directory, "cpu.cfs_quota_us", quota);
                    self.set(&directory, "cpu.shares", limits.low_priority.then(|| "64".into()));
                }
                _ => self.set(&directory, "pids.max", limits.processes.map(|count| count.to_string())),
            }
            self.directories.push(directory);
        }
    }

    fn set(&mut self, directory: &Path, file: &str, value: Option<String>) {
        let Some(value) = value else { return };
        // Swap accounting is often not compiled in; without swap there is nothing to limit.
        let optional = file == "memory.swap.max";
        if let Err(error) = std::fs::write(directory.join(file), value)
            && !optional
        {
            self.warnings.push(format!("{file} could not be set: {error}"));
        }
    }
}

/// What of a workload's limits cannot be enforced on this host: tried, not guessed at.
#[must_use]
pub fn unenforced() -> Vec<String> {
    let limits = Limits { memory: Some(64 << 20), cpu_percent: Some(100), processes: Some(64), ..Limits::default() };
    let groups = Groups::create(&format!("check-{}", std::process::id()), &limits);
    groups.remove();
    groups.warnings
}

fn make(directory: &Path) -> std::io::Result<()> {
    let made = match std::fs::create_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem && make_writable(directory) => {
            std::fs::create_dir(directory)
        }
        made => made,
    };
    match made {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Container engines mount the groups read-only; who may mount may change that for its own container.
fn make_writable(directory: &Path) -> bool {
    let none: Option<&str> = None;
    let hierarchies = directory.ancestors().filter(|path| path.starts_with(ROOT));
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    hierarchies.into_iter().any(|path| mount(none, path, none, flags, none).is_ok())
}

/// Lets groups below `base` have limits. Version 2 wants no process in a group that has such
/// children, so those in `base` move to a leaf first.
fn delegate(base: &Path) -> std::io::Result<()> {
    let control = base.join("cgroup.subtree_control");
    let wanted = ["memory", "cpu", "pids"];
    let given = std::fs::read_to_string(&control)?;
    if wanted.iter().all(|controller| given.split_whitespace().any(|name| name == *controller)) {
        return Ok(());
    }
    let enable = || std::fs::write(&control, wanted.map(|name| format!("+{name}")).join(" "));
    match enable() {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {
            make_writable(base);
        }
        Err(_) => {}
    }
    let leaf = base.join("capsule.control");
    make(&leaf)?;
    for pid in std::fs::read_to_string(base.join("cgroup.procs"))?.lines() {
        // A process that ended meanwhile cannot be moved, and need not be.
        let _ = std::fs::write(leaf.join("cgroup.procs"), pid);
    }
    enable()
}
