//! Limits by control groups: version 2, version 1, or a mix of both, as the machine has it.

use std::fs::File;
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
        self.warnings.extend(set(&directory, &settings(UNIFIED, limits)));
        self.memory = Some(directory.join("memory.current"));
        self.directories.push(directory);
    }

    fn create_v1(&mut self, id: &str, limits: &Limits, own: &str) {
        for controller in CONTROLLERS {
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
            self.warnings.extend(set(&directory, &settings(controller, limits)));
            if controller == "memory" {
                self.memory = Some(directory.join("memory.usage_in_bytes"));
            }
            self.directories.push(directory);
        }
    }
}

/// The controllers that limit, in version 2 of control groups all in one hierarchy.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];
const UNIFIED: &str = "";
const ENABLE: &str = "+memory +cpu +pids";

/// A file that holds a limit, the limit, and what lifts it.
type Setting = (&'static str, String, &'static str);

/// The settings of a group in the hierarchy of a controller, or in the unified one.
fn settings(hierarchy: &str, limits: &Limits) -> Vec<Setting> {
    let memory = limits.memory.map(|bytes| bytes.to_string());
    let processes = limits.processes.map(|count| ("pids.max", count.to_string(), "max"));
    let quota = limits.cpu_percent.map(|percent| u64::from(percent) * 1000);
    let all = match hierarchy {
        "memory" => vec![memory.map(|bytes| ("memory.limit_in_bytes", bytes, "-1"))],
        "cpu" => vec![
            quota.map(|quota| ("cpu.cfs_quota_us", quota.to_string(), "-1")),
            limits.low_priority.then(|| ("cpu.shares", "64".to_owned(), "1024")),
        ],
        "pids" => vec![processes],
        _ => vec![
            memory.map(|bytes| ("memory.max", bytes, "max")),
            limits.memory.map(|_| ("memory.swap.max", "0".to_owned(), "max")),
            processes,
            quota.map(|quota| ("cpu.max", format!("{quota} 100000"), "max")),
            limits.low_priority.then(|| ("cpu.weight", "10".to_owned(), "100")),
        ],
    };
    all.into_iter().flatten().collect()
}

/// Writes limits; what could not be set.
fn set(directory: &Path, settings: &[Setting]) -> Vec<String> {
    let write = |(file, value, _): &Setting| {
        let error = std::fs::write(directory.join(file), value).err()?;
        // Swap accounting is often not compiled in; without swap there is nothing to limit.
        (*file != "memory.swap.max").then(|| format!("{file} could not be set: {error}"))
    };
    settings.iter().filter_map(write).collect()
}

/// Limits of a group that is another program's own. They are lifted with the last value that holds them,
/// of this process or another.
#[derive(Debug)]
pub struct Held(Vec<(PathBuf, File, Vec<Setting>)>);

impl Held {
    /// Limits everything in the group of this name, counted from the root; made if it is not there yet.
    ///
    /// # Errors
    /// When that is not possible here; the text says why.
    pub fn limit(group: &Path, limits: &Limits) -> Result<Self, String> {
        let root = Path::new(ROOT);
        let hierarchies = if root.join("cgroup.controllers").exists() { &[UNIFIED][..] } else { &CONTROLLERS };
        let mut held = Self(Vec::new());
        for hierarchy in hierarchies {
            let settings = settings(hierarchy, limits);
            if settings.is_empty() {
                continue;
            }
            let directory = root.join(hierarchy).join(group);
            let open = || {
                std::fs::create_dir_all(&directory)?;
                let file = File::open(&directory)?;
                file.lock_shared().map(|()| file)
            };
            let file = open().map_err(|error| format!("{}: {error}", directory.display()))?;
            if *hierarchy == UNIFIED {
                for above in directory.ancestors().skip(1).take_while(|path| path.starts_with(root)) {
                    let _ = std::fs::write(above.join("cgroup.subtree_control"), ENABLE);
                }
            }
            let failed = set(&directory, &settings);
            held.0.push((directory, file, settings));
            if let Some(failed) = failed.into_iter().next() {
                return Err(failed);
            }
        }
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for (directory, file, settings) in &self.0 {
            // Whoever else holds it keeps it from being locked by one alone.
            if file.try_lock().is_ok() {
                for (name, _, lifted) in settings {
                    let _ = std::fs::write(directory.join(name), lifted);
                }
            }
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
    let given = std::fs::read_to_string(&control)?;
    if CONTROLLERS.iter().all(|controller| given.split_whitespace().any(|name| name == *controller)) {
        return Ok(());
    }
    let enable = || std::fs::write(&control, ENABLE);
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
