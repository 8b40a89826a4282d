//! Limits by control groups, version 1 or 2.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::spec::Limits;

const ROOT: &str = "/sys/fs/cgroup";

/// What the shim may use beyond the workload's limits: it copies output and opens connections.
const HEADROOM_BYTES: u64 = 32 << 20;
const HEADROOM_CPU_PERCENT: u32 = 10;

/// The control groups of one workload. Each is inside an outer group that also contains the shim, the workload's owner: what
/// the shim uses for the workload is limited, too, and the workload cannot take the shim's headroom.
#[derive(Debug, Default)]
pub struct Groups {
    /// Those of the workload.
    directories: Vec<PathBuf>,
    /// Those of its owner.
    owners: Vec<Owner>,
    /// The file that reports the memory in use.
    memory: Option<PathBuf>,
    /// The limits that cannot be enforced on this host.
    pub warnings: Vec<String>,
}

/// The group of a workload's owner in one hierarchy.
#[derive(Debug)]
struct Owner {
    /// The outer group, with the limits of both.
    whole: PathBuf,
    /// The group of the owner's processes.
    members: PathBuf,
    /// The group that they were in before.
    before: PathBuf,
}

impl Groups {
    /// Creates the groups of the workload `id`. A limit that the host does not support becomes a warning.
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

    /// Moves the owner's processes into its groups.
    pub fn add_owner(&mut self, pids: impl Iterator<Item = u32>) {
        for pid in pids {
            for owner in &self.owners {
                if let Err(error) = std::fs::write(owner.members.join("cgroup.procs"), pid.to_string()) {
                    self.warnings
                        .push(format!("the resources of the shim are not limited: {}: {error}", owner.members.display()));
                }
            }
        }
    }

    /// Bytes of memory in use, if the host reports them.
    pub fn memory_in_use(&self) -> Option<u64> {
        std::fs::read_to_string(self.memory.as_ref()?).ok()?.trim().parse().ok()
    }

    /// Removes the groups. The owner's processes return to their previous groups. The workload must have ended.
    pub fn remove(&self) {
        for directory in &self.directories {
            let _ = std::fs::remove_dir(directory);
        }
        for owner in &self.owners {
            for pid in std::fs::read_to_string(owner.members.join("cgroup.procs")).unwrap_or_default().lines() {
                let _ = std::fs::write(owner.before.join("cgroup.procs"), pid);
            }
            let _ = std::fs::remove_dir(&owner.members);
            let _ = std::fs::remove_dir(&owner.whole);
        }
    }

    fn create_v2(&mut self, id: &str, limits: &Limits, own: &str) {
        let path = own_path(own, UNIFIED).unwrap_or("/");
        // This process may be in a group of Capsule itself: the base is above all of those.
        let path = path.split("/capsule.").next().unwrap_or("/");
        let base = Path::new(ROOT).join(path.trim_start_matches('/'));
        if let Err(error) = delegate(&base) {
            self.warnings.push(format!("memory, CPU and process limits are not enforced: {}: {error}", base.display()));
            return;
        }
        // Delegation may have moved this process.
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let before = Path::new(ROOT).join(own_path(&own, UNIFIED).unwrap_or("/").trim_start_matches('/'));
        let whole = base.join(format!("capsule.{id}"));
        let (directory, members) = (whole.join("app"), whole.join("shim"));
        // A group that delegates controllers may have no process of its own.
        let made = make(&whole).and_then(|()| {
            std::fs::write(whole.join("cgroup.subtree_control"), CONTROLLERS.map(|name| format!("+{name}")).join(" "))?;
            make(&directory)?;
            make(&members)
        });
        if let Err(error) = made {
            self.warnings.push(format!("memory, CPU and process limits are not enforced: {}: {error}", whole.display()));
            return;
        }
        self.warnings.extend(set(&whole, &settings(UNIFIED, &with_headroom(limits))));
        self.warnings.extend(set(&directory, &settings(UNIFIED, limits)));
        self.memory = Some(directory.join("memory.current"));
        self.directories.push(directory);
        self.owners.push(Owner { whole, members, before });
    }

    fn create_v1(&mut self, id: &str, limits: &Limits, own: &str) {
        for controller in CONTROLLERS {
            let path = own_path(own, controller);
            let hierarchy = Path::new(ROOT).join(controller);
            // In a container, the hierarchy's root is the container's group, while `/proc/self/cgroup` has its path on the host.
            let base = path
                .map(|path| hierarchy.join(path.trim_start_matches('/')))
                .into_iter()
                .chain([hierarchy])
                .find(|base| base.join("cgroup.procs").exists());
            let made = match &base {
                Some(base) => {
                    let whole = base.join(format!("capsule.{id}"));
                    make(&whole).and_then(|()| make(&whole.join("app"))).map(|()| (base.clone(), whole))
                }
                None => Err(std::io::Error::new(std::io::ErrorKind::NotFound, "no such control group hierarchy")),
            };
            let (before, whole) = match made {
                Ok(made) => made,
                Err(error) => {
                    self.warnings.push(format!("the {controller} limit is not enforced: {error}"));
                    continue;
                }
            };
            let directory = whole.join("app");
            self.warnings.extend(set(&whole, &settings(controller, &with_headroom(limits))));
            self.warnings.extend(set(&directory, &settings(controller, limits)));
            if controller == "memory" {
                self.memory = Some(directory.join("memory.usage_in_bytes"));
            }
            self.directories.push(directory);
            self.owners.push(Owner { members: whole.clone(), whole, before });
        }
    }
}

/// The limits of a workload and its owner together. The process limit is for the workload alone: its owner must be able to
/// start a thread when the workload has reached it.
fn with_headroom(limits: &Limits) -> Limits {
    Limits {
        memory: limits.memory.map(|bytes| bytes.saturating_add(HEADROOM_BYTES)),
        cpu_percent: limits.cpu_percent.map(|percent| percent.saturating_add(HEADROOM_CPU_PERCENT)),
        processes: None,
        ..*limits
    }
}

/// The controllers that are used. In version 2 they share one hierarchy.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];
const UNIFIED: &str = "";

/// A file that holds a limit, and the limit.
type Setting = (&'static str, String);

/// The settings of a group in the hierarchy of a controller, or in the unified one.
fn settings(hierarchy: &str, limits: &Limits) -> Vec<Setting> {
    let memory = limits.memory.map(|bytes| bytes.to_string());
    let processes = limits.processes.map(|count| ("pids.max", count.to_string()));
    let quota = limits.cpu_percent.map(|percent| u64::from(percent) * 1000);
    let all = match hierarchy {
        "memory" => vec![memory.map(|bytes| ("memory.limit_in_bytes", bytes))],
        "cpu" => vec![
            quota.map(|quota| ("cpu.cfs_quota_us", quota.to_string())),
            limits.low_priority.then(|| ("cpu.shares", "64".to_owned())),
        ],
        "pids" => vec![processes],
        _ => vec![
            memory.map(|bytes| ("memory.max", bytes)),
            limits.memory.map(|_| ("memory.swap.max", "0".to_owned())),
            processes,
            quota.map(|quota| ("cpu.max", format!("{quota} 100000"))),
            limits.low_priority.then(|| ("cpu.weight", "10".to_owned())),
        ],
    };
    all.into_iter().flatten().collect()
}

/// Writes limits; returns an error text for each that cannot be set.
fn set(directory: &Path, settings: &[Setting]) -> Vec<String> {
    let write = |(file, value): &Setting| {
        let error = std::fs::write(directory.join(file), value).err()?;
        // Swap accounting is often not compiled in; without swap there is nothing to limit.
        (*file != "memory.swap.max").then(|| format!("cannot set {file}: {error}"))
    };
    settings.iter().filter_map(write).collect()
}

/// Limits control groups that another program creates, as soon as they are found.
#[derive(Debug)]
pub struct Watch {
    limits: Limits,
    /// Selects groups by their path below the root.
    is_watched: fn(&str) -> bool,
    /// The directories to search, each with its hierarchy.
    places: Vec<(&'static str, PathBuf)>,
    known: BTreeSet<PathBuf>,
    outcome: Option<Result<(), String>>,
}

impl Watch {
    /// Creates a watch; groups that exist already are not limited. It searches the directories `within` the root, the slices
    /// in the root, and this process's own group.
    ///
    /// # Errors
    /// Why limits cannot be set.
    pub fn start(within: &[&str], is_watched: fn(&str) -> bool, limits: &Limits) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("it takes root".into());
        }
        let root = Path::new(ROOT);
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let hierarchies = if root.join("cgroup.controllers").exists() { &[UNIFIED][..] } else { &CONTROLLERS };
        let mut places = Vec::new();
        for hierarchy in hierarchies.iter().filter(|hierarchy| !settings(hierarchy, limits).is_empty()) {
            let top = root.join(hierarchy);
            let slices = std::fs::read_dir(&top).map_err(|error| format!("{}: {error}", top.display()))?.flatten();
            let slices = slices.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "slice"));
            let own = own_path(&own, hierarchy).map(|path| top.join(path.trim_start_matches('/')));
            let folders = within.iter().map(|folder| top.join(folder)).chain(slices).chain(own);
            places.extend(folders.map(|folder| (*hierarchy, folder)));
        }
        let mut watch = Self { limits: *limits, is_watched, places, known: BTreeSet::new(), outcome: None };
        watch.known = watch.groups().into_iter().map(|(_, path)| path).collect();
        Ok(watch)
    }

    /// The selected groups that exist now, each with its hierarchy.
    fn groups(&self) -> Vec<(&'static str, PathBuf)> {
        let inside = |(hierarchy, folder): &(&'static str, PathBuf)| {
            let hierarchy = *hierarchy;
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            let groups = entries.map(|entry| entry.path()).filter(|path| path.to_str().is_some_and(self.is_watched));
            groups.filter(|path| path.is_dir()).map(|path| (hierarchy, path)).collect::<Vec<_>>()
        };
        self.places.iter().flat_map(inside).collect()
    }

    /// `None` if no group was found; otherwise whether all are limited, and if not, why.
    pub fn outcome(self) -> Option<Result<(), String>> {
        self.outcome
    }

    /// Limits the groups that are new since the last call. The processes of a group that cannot be limited are killed.
    pub fn limit_new_groups(&mut self) {
        for (hierarchy, path) in self.groups() {
            if self.known.contains(&path) {
                continue;
            }
            let failed = set(&path, &settings(hierarchy, &self.limits));
            if failed.is_empty() {
                self.outcome.get_or_insert(Ok(()));
                self.known.insert(path);
            } else if path.is_dir() {
                // In version 1, for example because its usage already exceeds the limit.
                self.outcome = Some(Err(failed.join("; ")));
                for pid in std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default().lines() {
                    if let Ok(pid) = pid.parse() {
                        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    }
                }
            }
        }
    }
}

/// The group of a process in a hierarchy, from its `/proc/<pid>/cgroup`.
fn own_path<'o>(own: &'o str, hierarchy: &str) -> Option<&'o str> {
    own.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        parts.next()?.split(',').any(|name| name == hierarchy).then(|| parts.next())?
    })
}

/// Tries to set limits, and returns a warning for each that cannot be enforced on this host.
#[must_use]
pub fn unenforced_limits() -> Vec<String> {
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

/// Container engines mount control groups read-only. A privileged container may remount them.
fn make_writable(directory: &Path) -> bool {
    let none: Option<&str> = None;
    let hierarchies = directory.ancestors().filter(|path| path.starts_with(ROOT));
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    hierarchies.into_iter().any(|path| mount(none, path, none, flags, none).is_ok())
}

/// Enables the controllers for groups below `base`. In version 2, a group that delegates controllers may have no process of
/// its own, so those in `base` move to a leaf first.
fn delegate(base: &Path) -> std::io::Result<()> {
    let control = base.join("cgroup.subtree_control");
    let given = std::fs::read_to_string(&control)?;
    if CONTROLLERS.iter().all(|controller| given.split_whitespace().any(|name| name == *controller)) {
        return Ok(());
    }
    let enable = || std::fs::write(&control, CONTROLLERS.map(|name| format!("+{name}")).join(" "));
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
        // Fails for a process that has ended meanwhile.
        let _ = std::fs::write(leaf.join("cgroup.procs"), pid);
    }
    enable()
}
