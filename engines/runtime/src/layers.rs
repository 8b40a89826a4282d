//! The writable directories of a workload, as overlay mounts: writes go into the upper layer, the lower layer stays unchanged.
//!
//! The shim mounts them over the directories of its workload's [`Spec`], in its own mount namespace, from which each sandbox
//! binds them. So they survive a restart of the workload, and `/proc/self/mountinfo` inside of the sandbox shows a path
//! within the overlay instead of a host path.
//!
//! A directory that is written to directly, as in builds, becomes the upper layer of an overlay with an empty lower layer,
//! only to hide its host path.

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
    /// The directory for layers; without one, nothing is mounted.
    folder: Option<PathBuf>,
    directory: PathBuf,
    writes: Writes,
    owner: Option<u32>,
    /// The directory on disk that receives writes into `/app`.
    app: Option<OwnedFd>,
    /// The other writable directories.
    others: Vec<OwnedFd>,
    /// The limit, if the file system enforces it.
    quota: Option<Quota>,
    /// The size of the copy when it was made, which does not count as usage.
    copied: Option<Usage>,
}

impl Layers {
    /// Moves the calling thread, which must be the only one, into a new mount namespace and mounts the layers. `privileged`
    /// is whether it is root on the host.
    ///
    /// # Errors
    /// Why `/app` cannot be mounted.
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
        // Before anything is mounted over them: measurements need the directories on disk.
        for other in spec.mounts.iter().filter(|mount| mount.writable) {
            layers.others.push(open(&other.source)?);
        }
        if spec.writes == Writes::Directory {
            layers.app = Some(open(&spec.directory)?);
        }
        let Some(folder) = &spec.layers else {
            return match spec.writes {
                Writes::Directory => Ok(layers),
                Writes::Layer => Err("the workload has no directory for its layers".into()),
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
        unshare(CloneFlags::CLONE_NEWNS).map_err(|error| format!("cannot create a mount namespace: {error}"))?;
        let none: Option<&str> = None;
        // Unmounts on the host apply here, too.
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
            .map_err(|error| format!("cannot change the mount propagation: {error}"))?;
        let empty = make(folder, "empty", None)?;
        for (number, other) in spec.mounts.iter().enumerate() {
            // A mount at the same path reveals nothing; a source that cannot be an overlay is bound directly.
            if other.source == other.target || !other.source.is_dir() {
                continue;
            }
            let work = folder.join(format!("work-{number}"));
            let _ =
                if other.writable { mount_over_itself(&other.source, &empty, &work) } else { read_only(&other.source, &empty) };
        }
        match spec.writes {
            Writes::Directory => {
                let _ = mount_over_itself(&spec.directory, &empty, &folder.join("work"));
            }
            Writes::Layer => layers.mount_layer()?,
        }
        Ok(layers)
    }

    /// Whether `/app` is a full copy, since this host cannot mount overlays.
    pub fn is_copy(&self) -> bool {
        self.copied.is_some()
    }

    /// Calls `measure` with each writable directory, as it is on disk.
    pub fn each<E>(&self, mut measure: impl FnMut(&OwnedFd) -> Result<(), E>) -> Result<(), E> {
        if let Some(app) = &self.app {
            measure(app)?;
        }
        self.others.iter().try_for_each(measure)
    }

    /// How deeply directories may be nested. Other programs must be able to use the results of a build.
    pub fn depth(&self) -> usize {
        match self.writes {
            Writes::Directory => trees::DEPTH,
            Writes::Layer => usize::MAX,
        }
    }

    /// The part of a measurement that does not count as the workload's usage.
    pub fn allowance(&self) -> Usage {
        self.copied.unwrap_or(Usage::NOTHING)
    }

    /// The state of the file system that the workload writes to.
    pub fn file_system(&self) -> Option<rustix::fs::StatVfs> {
        rustix::fs::fstatvfs(self.app.as_ref()?).ok()
    }

    /// Discards the writes into `/app`. The workload must not run.
    ///
    /// # Errors
    /// Why `/app` cannot be mounted again.
    pub fn clear(&mut self) -> Result<(), String> {
        let (Writes::Layer, Some(folder)) = (self.writes, self.folder.clone()) else { return Ok(()) };
        self.app = None;
        let _ = umount2(&self.directory, MntFlags::MNT_DETACH);
        for name in ["upper", "copy"] {
            let path = folder.join(name);
            trees::remove(&path).map_err(|error| at(&path, &error))?;
        }
        self.mount_layer()
    }

    /// Mounts the layer over the directory, or a copy if the host cannot mount overlays.
    fn mount_layer(&mut self) -> Result<(), String> {
        let Some(folder) = self.folder.clone() else { return Ok(()) };
        let copy = folder.join("copy");
        // An existing copy is used again, so that its files stay.
        if !copy.exists() {
            let upper = make(&folder, "upper", self.owner)?;
            let why = match overlay(&self.directory, &open(&self.directory)?, &upper, &folder.join("work"), false) {
                Ok(()) => {
                    self.app = Some(open(&upper)?);
                    return Ok(());
                }
                Err(why) => why,
            };
            // Files in the layer must not disappear behind a copy.
            let is_new = std::fs::read_dir(&upper).is_ok_and(|mut entries| entries.next().is_none());
            if !is_new || !copy_tree(&self.directory, &copy) {
                return Err(format!("cannot mount /app as an overlay ({why}), and cannot copy it"));
            }
        }
        // The quota would count the copied files, too, but the limit is for the files that are written.
        if let Some(quota) = self.quota.take() {
            quota.remove();
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

    /// Removes the quota and, after a build, the layers. The workload must have ended.
    pub fn remove(&self) {
        if let Some(quota) = &self.quota {
            quota.remove();
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

/// Creates a directory. An existing one only gets the owner.
fn make(parent: &Path, name: &str, owner: Option<u32>) -> Result<PathBuf, String> {
    let path = parent.join(name);
    let made = match std::fs::create_dir(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        made => made.and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))),
    };
    made.and_then(|()| owner.map_or(Ok(()), |uid| lchown(&path, Some(uid), Some(uid)))).map_err(|error| at(&path, &error))?;
    Ok(path)
}

/// Mounts a directory over itself, as the upper layer of an overlay with an empty lower layer.
fn mount_over_itself(directory: &Path, empty: &Path, work: &Path) -> Result<(), String> {
    overlay(directory, &open(empty)?, directory, work, true)
}

/// Mounts a directory over itself read-only. An overlay needs at least two layers.
fn read_only(directory: &Path, empty: &Path) -> Result<(), String> {
    let (directory_fd, empty) = (open(directory)?, open(empty)?);
    let options = format!("lowerdir={}:{}", link(&directory_fd), link(&empty));
    try_options(directory, &options)
}

/// The path of a layer in the mount options. By descriptor, since `/proc/self/mountinfo` shows it, and since a path may
/// contain any character.
fn link(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Mounts an overlay at `target`. With `volatile`, the unmount does not wait for the disk, and a crash of the host may lose
/// writes. So that is for builds only, which then start over.
fn overlay(target: &Path, lower: &OwnedFd, upper: &Path, work: &Path, volatile: bool) -> Result<(), String> {
    // Leftovers of an earlier mount could make this one fail.
    trees::remove(work).map_err(|error| at(work, &error))?;
    std::fs::create_dir(work).map_err(|error| at(work, &error))?;
    let (upper, work) = (open(upper)?, open(work)?);
    // With an index, this mount could fail while an earlier one is being unmounted.
    let options = format!("lowerdir={},upperdir={},workdir={},index=off", link(lower), link(&upper), link(&work));
    if volatile && try_options(target, &format!("{options},volatile")).is_ok() {
        return Ok(());
    }
    try_options(target, &options)
}

fn try_options(target: &Path, options: &str) -> Result<(), String> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let with = |options: &str| mount(Some("overlay"), target, Some("overlay"), flags, Some(options));
    // In a user namespace, an overlay may use only extended attributes of the user.
    with(options).or_else(|_| with(&format!("{options},userxattr"))).map_err(|error| error.to_string())
}

/// Copies a directory atomically.
fn copy_tree(from: &Path, to: &Path) -> bool {
    let new = to.with_extension("new");
    if trees::remove(&new).is_err() || std::fs::create_dir(&new).is_err() {
        return false;
    }
    let copied = Command::new("cp").args(["-a", "--"]).arg(from.join(".")).arg(&new).status();
    copied.is_ok_and(|status| status.success()) && std::fs::rename(new, to).is_ok()
}
