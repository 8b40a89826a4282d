//! Measures and removes directory trees of users. They may be nested more deeply than a path or a stack allows, and their
//! links may lead anywhere.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// The deepest nesting of a build result or cache. Programs would fail on a deeper one, since no path is that long.
pub const DEPTH: usize = 1000;
/// The most directories that are kept open on the way down. The others are opened again through `..` on the way up.
const MAX_OPEN: usize = 128;

/// An amount of disk space: a usage or a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub bytes: u64,
    /// Files, directories, links and everything else with an inode.
    pub inodes: u64,
}

impl Usage {
    pub const NOTHING: Self = Self { bytes: 0, inodes: 0 };
    pub const UNLIMITED: Self = Self { bytes: u64::MAX, inodes: u64::MAX };
}

/// Why a measurement ended early. The texts complete "it was stopped: it …".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Excess {
    Bytes(u64),
    Inodes(u64),
    /// Directories that are nested too deeply, or that this user cannot read.
    Unmeasurable,
    /// More descriptors and mappings than can be examined.
    Descriptors(usize),
    /// Descriptors, threads and mappings that take too long to examine.
    Slow,
}

impl std::fmt::Display for Excess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bytes(most) => write!(f, "exceeded its disk limit of {} MiB", most >> 20),
            Self::Inodes(most) => write!(f, "exceeded its limit of {most} files and folders"),
            Self::Unmeasurable => write!(
                f,
                "has directories whose disk usage cannot be measured: they are more than {DEPTH} levels deep, or were moved meanwhile"
            ),
            Self::Descriptors(most) => {
                write!(f, "has more than {most} open files and memory mappings, so that its disk usage cannot be measured")
            }
            Self::Slow => {
                write!(f, "has too many threads, open files and memory mappings for its disk usage to be measured in time")
            }
        }
    }
}

/// Adds up the disk usage of trees and files, and stops at a limit, so that measuring a hostile tree costs no more than one
/// at the limit. A file with several hard links is counted once.
#[derive(Debug)]
pub struct Meter {
    max: Usage,
    usage: Usage,
    /// Device and inode of counted files that have further links.
    counted: HashSet<(u64, u64)>,
}

impl Meter {
    #[must_use]
    pub fn new(max: Usage) -> Self {
        Self { max, usage: Usage::NOTHING, counted: HashSet::new() }
    }

    #[must_use]
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Adds one inode with this many bytes.
    ///
    /// # Errors
    /// When the limit is exceeded.
    pub fn add(&mut self, bytes: u64) -> Result<(), Excess> {
        self.usage.bytes = self.usage.bytes.saturating_add(bytes);
        self.usage.inodes = self.usage.inodes.saturating_add(1);
        if self.usage.bytes > self.max.bytes {
            return Err(Excess::Bytes(self.max.bytes));
        }
        if self.usage.inodes > self.max.inodes {
            return Err(Excess::Inodes(self.max.inodes));
        }
        Ok(())
    }

    /// Adds an inode unless it was added before.
    ///
    /// # Errors
    /// When the limit is exceeded.
    pub fn add_once(&mut self, device: u64, inode: u64, bytes: u64) -> Result<(), Excess> {
        if self.counted.insert((device, inode)) { self.add(bytes) } else { Ok(()) }
    }

    #[allow(clippy::unnecessary_cast, reason = "the types differ between architectures")]
    fn add_stat(&mut self, stat: &Stat) -> Result<(), Excess> {
        let bytes = (stat.st_blocks as u64).saturating_mul(512);
        let is_folder = FileType::from_raw_mode(stat.st_mode).is_dir();
        if is_folder || stat.st_nlink as u64 <= 1 {
            self.add(bytes)
        } else {
            self.add_once(stat.st_dev as u64, stat.st_ino as u64, bytes)
        }
    }

    /// Adds a directory with its content, down to `depth` levels. Links and mounts are not followed. Files that are removed
    /// meanwhile are not counted.
    ///
    /// # Errors
    /// When the limit is exceeded, or the tree cannot be measured.
    pub fn add_tree(&mut self, folder: impl AsFd, depth: usize) -> Result<(), Excess> {
        let Ok(top) = fstat(&folder) else { return Ok(()) };
        self.add_stat(&top)?;
        let folder = open(folder, c".").map_err(|_| Excess::Unmeasurable)?;
        let mut levels =
            vec![Level { id: (top.st_dev, top.st_ino), inner: self.add_entries(&folder, &top)?, folder: Some(folder) }];
        while let Some(level) = levels.last_mut() {
            let Some(folder) = &level.folder else { return Err(Excess::Unmeasurable) };
            if let Some(name) = level.inner.pop() {
                let inner = match open(folder, &name) {
                    Ok(inner) => inner,
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                    Err(_) => return Err(Excess::Unmeasurable),
                };
                let Ok(stat) = fstat(&inner) else { continue };
                if levels.len() >= depth {
                    return Err(Excess::Unmeasurable);
                }
                if let Some(far) = levels.len().checked_sub(MAX_OPEN) {
                    levels[far].folder = None;
                }
                let names = self.add_entries(&inner, &top)?;
                levels.push(Level { id: (stat.st_dev, stat.st_ino), inner: names, folder: Some(inner) });
                continue;
            }
            let done = levels.pop().and_then(|level| level.folder);
            if let (Some(parent), Some(done)) = (levels.last_mut(), done)
                && parent.folder.is_none()
            {
                // A directory that was moved meanwhile makes the tree unmeasurable: it could hide files.
                let up = open(done, c"..").map_err(|_| Excess::Unmeasurable)?;
                let is_parent = fstat(&up).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == parent.id);
                parent.folder = Some(up).filter(|_| is_parent);
            }
        }
        Ok(())
    }

    /// Adds the entries of a directory; returns the names of its subdirectories.
    fn add_entries(&mut self, folder: &OwnedFd, top: &Stat) -> Result<Vec<CString>, Excess> {
        let mut inner = Vec::new();
        for entry in Dir::read_from(folder).map_err(|_| Excess::Unmeasurable)?.flatten() {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            if stat.st_dev == top.st_dev {
                self.add_stat(&stat)?;
                if FileType::from_raw_mode(stat.st_mode).is_dir() {
                    inner.push(name.to_owned());
                }
            }
        }
        Ok(inner)
    }
}

/// A directory on the way down.
struct Level {
    /// Device and inode.
    id: (u64, u64),
    /// `None` if it was closed because it is far above.
    folder: Option<OwnedFd>,
    /// Its subdirectories that are not measured yet.
    inner: Vec<CString>,
}

/// The disk usage of a tree; `None` if it cannot be measured. A missing tree has none.
#[must_use]
pub fn size(path: &Path) -> Option<Usage> {
    let mut meter = Meter::new(Usage::UNLIMITED);
    match c_path(path).map(|path| open(CWD, &path)) {
        Ok(Ok(folder)) => meter.add_tree(folder, DEPTH).ok()?,
        Ok(Err(Errno::NOENT)) => {}
        _ => return None,
    }
    Some(meter.usage())
}

/// Removes a tree. Succeeds if there is none. Each directory is first moved to the top, so that none is deep, and is emptied
/// through its descriptor, which no link can redirect.
///
/// # Errors
/// When something in it cannot be removed.
pub fn remove(path: &Path) -> std::io::Result<()> {
    let top = match open_to_empty(CWD, &c_path(path)?) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR | Errno::LOOP) => return std::fs::remove_file(path),
        Err(error) => return Err(error.into()),
    };
    let mut moved: u64 = 0;
    let mut folders: Vec<CString> = Vec::new();
    let mut empty = |folder: &OwnedFd, folders: &mut Vec<CString>, is_top: bool| -> std::io::Result<()> {
        // Listed to the end before anything in it changes.
        let entries = Dir::read_from(folder)?.collect::<Result<Vec<_>, _>>()?;
        for entry in entries.iter().filter(|entry| !matches!(entry.file_name().to_bytes(), b"." | b"..")) {
            let name = entry.file_name();
            if is_folder(folder, name, entry.file_type())? {
                if is_top {
                    folders.push(name.to_owned());
                    continue;
                }
                let mut unlocked = false;
                let new = loop {
                    moved += 1;
                    let new = CString::new(format!(".removed-{moved}")).unwrap_or_default();
                    // A user's file may have this name: a directory with content is not replaced.
                    match renameat(folder, name, &top, &new) {
                        Ok(()) => break new,
                        Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
                        // A directory without write permission for its owner cannot be moved.
                        Err(Errno::ACCESS) if !std::mem::replace(&mut unlocked, true) => unlock(folder, name)?,
                        Err(error) => return Err(error.into()),
                    }
                };
                folders.push(new);
            } else {
                unlink(folder, name, AtFlags::empty())?;
            }
        }
        Ok(())
    };
    empty(&top, &mut folders, true)?;
    while let Some(name) = folders.pop() {
        match open_to_empty(&top, &name) {
            Ok(folder) => empty(&folder, &mut folders, false)?,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        }
        unlink(&top, &name, AtFlags::REMOVEDIR)?;
    }
    std::fs::remove_dir(path)
}

fn open(at: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Opens a directory that is to be emptied, and adds the permissions that its owner lacks.
fn open_to_empty(at: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    match open(&at, name) {
        Ok(folder) => {
            // Removing entries needs write and search permission. If this fails, the removal fails.
            if fstat(&folder).is_ok_and(|stat| stat.st_mode & 0o300 != 0o300) {
                let _ = rustix::fs::fchmod(&folder, Mode::RWXU);
            }
            Ok(folder)
        }
        Err(Errno::ACCESS) => {
            unlock(&at, name)?;
            open(at, name)
        }
        Err(error) => Err(error),
    }
}

/// Gives the owner of a directory all permissions. Links are not followed.
fn unlock(at: impl AsFd, name: &CStr) -> Result<(), Errno> {
    let folder = openat(at, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::chmod(format!("/proc/self/fd/{}", folder.as_raw_fd()), Mode::RWXU)
}

/// Unlinks an entry. Succeeds if it does not exist.
fn unlink(at: &OwnedFd, name: &CStr, flags: AtFlags) -> std::io::Result<()> {
    match unlinkat(at, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn is_folder(at: &OwnedFd, name: &CStr, file_type: FileType) -> std::io::Result<bool> {
    if file_type != FileType::Unknown {
        return Ok(file_type.is_dir());
    }
    match statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode).is_dir()),
        Err(error) => Err(error.into()),
    }
}

fn c_path(path: &Path) -> std::io::Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::{DEPTH, Excess, Meter, Usage, remove, size};
    use rustix::fs::{Mode, OFlags, mkdirat, openat, symlinkat};

    #[test]
    fn a_file_with_several_links_is_counted_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let tree = folder.path().join("tree");
        std::fs::create_dir_all(tree.join("inner")).expect("made");
        let before = size(&tree).expect("measured");
        std::fs::write(tree.join("inner/large"), vec![1; 1 << 20]).expect("written");
        std::fs::hard_link(tree.join("inner/large"), tree.join("again")).expect("linked");
        std::os::unix::fs::symlink("/usr", tree.join("usr")).expect("linked");
        let after = size(&tree).expect("measured");
        assert_eq!(after.inodes, before.inodes + 2);
        assert!((1 << 20..2 << 20).contains(&(after.bytes - before.bytes)), "{before:?} {after:?}");
        assert_eq!(size(&folder.path().join("nothing")), Some(Usage::NOTHING));
    }

    #[test]
    fn a_measurement_stops_at_its_limit() {
        let folder = tempfile::tempdir().expect("a folder");
        for number in 0..100 {
            std::fs::write(folder.path().join(number.to_string()), "").expect("written");
        }
        std::fs::write(folder.path().join("large"), vec![1; 1 << 20]).expect("written");
        let measure = |bytes, inodes| {
            let mut meter = Meter::new(Usage { bytes, inodes });
            let outcome = meter.add_tree(std::fs::File::open(folder.path()).expect("opened"), DEPTH);
            (outcome, meter.usage())
        };
        let (outcome, usage) = measure(u64::MAX, 50);
        assert_eq!((outcome, usage.inodes), (Err(Excess::Inodes(50)), 51));
        assert_eq!(measure(1 << 19, 1000).0, Err(Excess::Bytes(1 << 19)));
        assert_eq!(measure(2 << 20, 1000).0, Ok(()));
    }

    #[test]
    fn deep_trees_are_removed_and_links_are_not_followed() {
        let folder = tempfile::tempdir().expect("a folder");
        let outside = folder.path().join("outside");
        std::fs::create_dir(&outside).expect("made");
        std::fs::write(outside.join("kept"), "kept").expect("written");
        let tree = folder.path().join("tree");
        std::fs::create_dir_all(tree.join(".removed-1/.removed-2")).expect("made");
        std::fs::write(tree.join(".removed-3"), "a file").expect("written");
        assert!(size(&tree).is_some_and(|usage| usage.bytes > 0));
        let open = |at: &std::os::fd::OwnedFd, name: &str| openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
        let mut at: std::os::fd::OwnedFd = std::fs::File::open(&tree).expect("opened").into();
        for _ in 0..30_000 {
            mkdirat(&at, "d", Mode::RWXU).expect("made");
            symlinkat(&outside, &at, "link").expect("linked");
            at = open(&at, "d").expect("opened");
        }
        drop(at);
        assert_eq!(size(&tree), None, "too deep to be measured");
        let mut meter = Meter::new(Usage::UNLIMITED);
        meter.add_tree(std::fs::File::open(&tree).expect("opened"), usize::MAX).expect("measured");
        assert!((60_000..60_010).contains(&meter.usage().inodes), "{:?}", meter.usage());
        remove(&tree).expect("removed");
        assert!(!tree.exists() && outside.join("kept").exists());
        remove(&tree).expect("what is not there is removed");
        std::os::unix::fs::symlink(&outside, &tree).expect("linked");
        remove(&tree).expect("the link is removed");
        assert!(!tree.exists() && outside.join("kept").exists());
    }
}
