//! Trees that users' programs made. Their folders may lie deeper than a path can say and than a stack can
//! follow; links in them lead anywhere.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// What is built or cached may not be nested deeper: whatever uses it would fail, for no path is that long.
pub const DEPTH: usize = 1000;
/// So many folders are kept open on the way down; above those, the way back up leads by `..`.
const OPEN: usize = 128;

/// What is held on disk, or may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub bytes: u64,
    /// Files, folders, links and whatever else takes an inode.
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
    /// Folders that are nested too deeply, or that this user cannot read.
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
                "has folders whose disk usage cannot be measured: more than {DEPTH} levels deep, or moved while they were read"
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

/// Adds up what trees and single files hold, and stops at a limit: the cost of measuring a hostile tree is
/// that of one at the limit. A file with several names is counted once.
#[derive(Debug)]
pub struct Meter {
    most: Usage,
    usage: Usage,
    /// Device and inode of what was counted and may be met again.
    counted: HashSet<(u64, u64)>,
}

impl Meter {
    #[must_use]
    pub fn new(most: Usage) -> Self {
        Self { most, usage: Usage::NOTHING, counted: HashSet::new() }
    }

    #[must_use]
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Adds so many bytes in one more inode.
    ///
    /// # Errors
    /// When that is more than the limit.
    pub fn add(&mut self, bytes: u64) -> Result<(), Excess> {
        self.usage.bytes = self.usage.bytes.saturating_add(bytes);
        self.usage.inodes = self.usage.inodes.saturating_add(1);
        if self.usage.bytes > self.most.bytes {
            return Err(Excess::Bytes(self.most.bytes));
        }
        if self.usage.inodes > self.most.inodes {
            return Err(Excess::Inodes(self.most.inodes));
        }
        Ok(())
    }

    /// Adds an inode that may be met again, unless it was.
    ///
    /// # Errors
    /// When that is more than the limit.
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

    /// Adds a folder and all in it, down to `depth` levels. Links are not followed, and neither are mounts;
    /// what goes away meanwhile is not counted.
    ///
    /// # Errors
    /// When that is more than the limit, or cannot be measured.
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
                if let Some(far) = levels.len().checked_sub(OPEN) {
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
                // Unless it was moved meanwhile, which nobody does so deep down but to hide something.
                let up = open(done, c"..").map_err(|_| Excess::Unmeasurable)?;
                let is_parent = fstat(&up).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == parent.id);
                parent.folder = Some(up).filter(|_| is_parent);
            }
        }
        Ok(())
    }

    /// Adds what lies directly in a folder; returns the names of the folders among it.
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

/// A folder on the way down.
struct Level {
    /// Device and inode.
    id: (u64, u64),
    /// Open, unless it is far above.
    folder: Option<OwnedFd>,
    /// Folders in it that are still to be measured.
    inner: Vec<CString>,
}

/// What a tree holds; nothing if it cannot be measured. What is not there holds nothing.
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

/// Removes a tree; one that is not there is removed. Each folder in it is first moved to the top, so
/// that none is deep, and is emptied by a handle that no link can turn elsewhere.
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
                    // The user may have had the same idea for a name: a folder with something in it stays.
                    match renameat(folder, name, &top, &new) {
                        Ok(()) => break new,
                        Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
                        // A folder that its owner closed to itself cannot be moved.
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

/// Opens a folder that is to be emptied. Without root, its owner may have closed it to itself.
fn open_to_empty(at: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    match open(&at, name) {
        Ok(folder) => {
            // Readable is not enough to remove what is in it; what cannot be changed fails there.
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

/// Lets the owner of a folder read and change it. A link is not followed.
fn unlock(at: impl AsFd, name: &CStr) -> Result<(), Errno> {
    let folder = openat(at, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::chmod(format!("/proc/self/fd/{}", folder.as_raw_fd()), Mode::RWXU)
}

/// What is gone already is removed.
fn unlink(at: &OwnedFd, name: &CStr, flags: AtFlags) -> std::io::Result<()> {
    match unlinkat(at, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn is_folder(at: &OwnedFd, name: &CStr, told: FileType) -> std::io::Result<bool> {
    if told != FileType::Unknown {
        return Ok(told.is_dir());
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
    fn files_are_counted_with_their_inodes_and_once_for_all_their_names() {
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
    fn a_measurement_ends_at_its_limit() {
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
    fn deep_trees_are_removed_and_links_lead_nowhere() {
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
