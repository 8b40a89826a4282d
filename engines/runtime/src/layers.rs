//! What a workload may write to, as overlay mounts: the upper layer takes the writes, the layer below stays
//! as it is.
//!
//! The shim mounts them over the directories of its workload's [`Spec`], in a mount namespace of its own from
//! which each sandbox binds them. So they outlive a restart of the workload, and what `/proc/self/mountinfo`
//! shows inside is a path within the overlay: no path of the host.
//!
//! A directory that is written to directly, as builds do, becomes the upper layer of an overlay with nothing
//! below, for the sake of that path alone.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::disk::Enforcement;
use crate::quota::Quota;
use crate::spec::{Spec, Writes};
use crate::trees::{self, Usage};

/// The mounts of one workload.
#[derive(Debug)]
pub struct Layers {
    /// The folder of the workload's own; nothing is mounted without one.
    folder: Option<PathBuf>,
    directory: PathBuf,
    writes: Writes,
    owner: Option<u32>,
    /// Where what is written into `/app` goes, as it lies on disk.
    app: Option<OwnedFd>,
    /// What else may be written to.
    others: Vec<OwnedFd>,
    /// The limit that the file system enforces, if it does.
    quota: Option<Quota>,
    /// What a copy held when it was made: it does not count as the workload's.
    copied: Option<Usage>,
}

impl Layers {
    /// Moves the calling thread into a mount namespace of its own and makes the mounts. Called while it is
    /// the only thread. `privileged` is root of the host.
    ///
    /// # Errors
    /// When the workload cannot have an `/app`; the text says why.
    pub fn mount(spec: &Spec, privileged: bool) -> Result<Self, String> {
        let mut layers = Self {
            folder: spec.layers.clone(),
            directory: spec.directory.clone(),
            writes: spec.writes,
            owner: privileged.then_some(spec.uid),
            app: None,
            others: Vec::new(),
            quota: None,
            copied: None,
        };
        // Opened before anything is mounted over them: measured is what lies on disk.
        for other in spec.mounts.iter().filter(|mount| mount.writable) {
            layers.others.push(open(&other.source)?);
        }
        if spec.writes == Writes::Directory {
            layers.app = Some(open(&spec.directory)?);
        }
        let Some(folder) = &spec.layers else {
            return match spec.writes {
                Writes::Directory => Ok(layers),
                Writes::Layer => Err("the workload has no folder for its layers".into()),
            };
        };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|error| at(folder, &error))?;
        if let Some(limit) = spec.limits.disk.filter(|_| privileged) {
            let mut folders = vec![folder.as_path()];
            if spec.writes == Writes::Directory {
                folders.push(&spec.directory);
            }
            folders.extend(spec.mounts.iter().filter(|mount| mount.writable).map(|mount| mount.source.as_path()));
            layers.quota = Quota::set(&spec.id, &folders, limit);
        }
        unshare(CloneFlags::CLONE_NEWNS).map_err(|error| format!("no mount namespace: {error}"))?;
        let none: Option<&str> = None;
        // What the host unmounts goes here, too.
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
            .map_err(|error| format!("no mounts of its own: {error}"))?;
        let empty = make(folder, "empty", None)?;
        for (number, other) in spec.mounts.iter().enumerate() {
            // What is seen under its own path says nothing new; what cannot be an overlay is bound as it is.
            if other.source == other.target || !other.source.is_dir() {
                continue;
            }
            let work = folder.join(format!("work-{number}"));
            let _ = if other.writable { through(&other.source, &empty, &work) } else { read_only(&other.source, &empty) };
        }
        match spec.writes {
            Writes::Directory => {
                let _ = through(&spec.directory, &empty, &folder.join("work"));
            }
            Writes::Layer => layers.lay()?,
        }
        Ok(layers)
    }

    /// Whether what is written into `/app` goes into a full copy, since this host mounts no overlays.
    pub fn is_copy(&self) -> bool {
        self.copied.is_some()
    }

    /// Calls `measure` with each folder that is written to, as it lies on disk.
    pub fn each<E>(&self, mut measure: impl FnMut(&OwnedFd) -> Result<(), E>) -> Result<(), E> {
        if let Some(app) = &self.app {
            measure(app)?;
        }
        self.others.iter().try_for_each(measure)
    }

    /// How deeply folders may be nested: what is built must be of use to others.
    pub fn depth(&self) -> usize {
        match self.writes {
            Writes::Directory => trees::DEPTH,
            Writes::Layer => usize::MAX,
        }
    }

    /// What a measurement finds that is not the workload's.
    pub fn allowance(&self) -> Usage {
        self.copied.unwrap_or(Usage::NOTHING)
    }

    /// How full the file system is that the workload writes to.
    pub fn file_system(&self) -> Option<rustix::fs::StatVfs> {
        rustix::fs::fstatvfs(self.app.as_ref()?).ok()
    }

    /// Throws away what was written into `/app`. The workload does not run meanwhile.
    ///
    /// # Errors
    /// When the workload cannot have an `/app` any more; the text says why.
    pub fn clear(&mut self) -> Result<(), String> {
        let (Writes::Layer, Some(folder)) = (self.writes, self.folder.clone()) else { return Ok(()) };
        self.app = None;
        let _ = umount2(&self.directory, MntFlags::MNT_DETACH);
        for name in ["upper", "copy"] {
            let path = folder.join(name);
            trees::remove(&path).map_err(|error| at(&path, &error))?;
        }
        self.lay()
    }

    /// Mounts the layer, or a copy where there are no overlays, over the directory.
    fn lay(&mut self) -> Result<(), String> {
        let Some(folder) = self.folder.clone() else { return Ok(()) };
        let copy = folder.join("copy");
        // A copy that was begun goes on, so that what was written stays.
        if !copy.exists() {
            let upper = make(&folder, "upper", self.owner)?;
            let why = match overlay(&self.directory, &open(&self.directory)?, &upper, &folder.join("work"), false) {
                Ok(()) => {
                    self.app = Some(open(&upper)?);
                    return Ok(());
                }
                Err(why) => why,
            };
            // What a layer holds must not disappear behind a copy.
            let is_new = std::fs::read_dir(&upper).is_ok_and(|mut entries| entries.next().is_none());
            if !is_new || !copy_tree(&self.directory, &copy) {
                return Err(format!("/app can neither be an overlay ({why}) nor be copied"));
            }
        }
        // A copy counts what it copied, too: the limit is for what is written above that.
        if let Some(quota) = self.quota.take() {
            quota.lift();
        }
        self.copied = Some(trees::size(&self.directory).unwrap_or(Usage::NOTHING));
        self.app = Some(open(&copy)?);
        let none: Option<&str> = None;
        mount(Some(&copy), &self.directory, none, MsFlags::MS_BIND, none).map_err(|error| at(&copy, &error))
    }

    /// How the limit is enforced.
    pub fn enforcement(&self) -> Enforcement {
        if self.quota.is_some() { Enforcement::ProjectQuota } else { Enforcement::Measured }
    }

    /// Undoes what is not needed once the workload has ended.
    pub fn remove(&self) {
        if let Some(quota) = &self.quota {
            quota.lift();
        }
        if let (Writes::Directory, Some(folder)) = (self.writes, &self.folder) {
            let _ = trees::remove(folder);
        }
    }
}

fn at(path: &Path, error: &dyn std::fmt::Display) -> String {
    format!("{}: {error}", path.display())
}

fn open(path: &Path) -> Result<OwnedFd, String> {
    File::open(path).map(Into::into).map_err(|error| at(path, &error))
}

/// A folder that is there already stays as it is, but for its owner.
fn make(parent: &Path, name: &str, owner: Option<u32>) -> Result<PathBuf, String> {
    let path = parent.join(name);
    let made = match std::fs::create_dir(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        made => made.and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))),
    };
    made.and_then(|()| owner.map_or(Ok(()), |uid| lchown(&path, Some(uid), Some(uid)))).map_err(|error| at(&path, &error))?;
    Ok(path)
}

/// Mounts a directory over itself, as the upper layer of an overlay with nothing below.
fn through(directory: &Path, empty: &Path, work: &Path) -> Result<(), String> {
    overlay(directory, &open(empty)?, directory, work, true)
}

/// Mounts a directory over itself read-only. An overlay takes two layers at the least.
fn read_only(directory: &Path, empty: &Path) -> Result<(), String> {
    let (directory_fd, empty) = (open(directory)?, open(empty)?);
    let options = format!("lowerdir={}:{}", link(&directory_fd), link(&empty));
    try_options(directory, &options)
}

/// Layers are named by descriptors: `/proc/self/mountinfo` shows the names, and paths may have any characters.
fn link(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Mounts an overlay at `target`. With `volatile`, its end does not wait for the disk; a host that crashes may
/// lose what was written, and so it is for builds only, which then begin anew.
fn overlay(target: &Path, lower: &OwnedFd, upper: &Path, work: &Path, volatile: bool) -> Result<(), String> {
    // What an earlier mount left in it may stand in the way of this one.
    trees::remove(work).map_err(|error| at(work, &error))?;
    std::fs::create_dir(work).map_err(|error| at(work, &error))?;
    let (upper, work) = (open(upper)?, open(work)?);
    // Without an index, an earlier mount that is just being taken down is not in the way.
    let options = format!("lowerdir={},upperdir={},workdir={},index=off", link(lower), link(&upper), link(&work));
    if volatile && try_options(target, &format!("{options},volatile")).is_ok() {
        return Ok(());
    }
    try_options(target, &options)
}

fn try_options(target: &Path, options: &str) -> Result<(), String> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let with = |options: &str| mount(Some("overlay"), target, Some("overlay"), flags, Some(options));
    // In a user namespace an overlay may keep its notes in the user's own attributes only.
    with(options).or_else(|_| with(&format!("{options},userxattr"))).map_err(|error| error.to_string())
}

/// Copies a directory, whole or not at all.
fn copy_tree(from: &Path, to: &Path) -> bool {
    let new = to.with_extension("new");
    if trees::remove(&new).is_err() || std::fs::create_dir(&new).is_err() {
        return false;
    }
    let copied = Command::new("cp").args(["-a", "--"]).arg(from.join(".")).arg(&new).status();
    copied.is_ok_and(|status| status.success()) && std::fs::rename(new, to).is_ok()
}
