//! The fresh directory that a backup is restored into, and its swap with the data directory. Until the swap, what is
//! in the data directory is not touched; nobody but its owner can enter either of them at any time.

use std::fs::{DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, lchown};
use std::path::{Path, PathBuf};

use capsule_contracts::Timestamp;
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with, syncfs};

use crate::{BackupError, Result, failed};

/// The name of the directory that is filled, where it lies in the data directory itself.
pub const INSIDE: &str = ".restoring";
/// What was in the data directory before is kept under this name and the time.
const BEFORE: &str = "before-restore";

/// A directory that is being filled, to become the data directory.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    directory: PathBuf,
    /// Whether it lies in the target, entry by entry of which is then exchanged.
    is_inside: bool,
    /// Tells one that is being filled from one that was left behind.
    lock: File,
    is_exchanging: bool,
    is_swapped: bool,
}

impl Staging {
    /// Makes a fresh directory beside `target`; within it where it is a file system of its own, or its parent
    /// cannot be written.
    ///
    /// # Errors
    /// When `target` is not empty, unless it is to be replaced, or another restore is under way.
    pub fn begin(target: &Path, replace: bool) -> Result<Self> {
        let at = |error: std::io::Error| failed(&target.display().to_string(), &error);
        let target = match target.canonicalize() {
            Ok(target) => target,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
                DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(at)?;
                parent.canonicalize().map_err(at)?.join(target.file_name().ok_or_else(|| at(ErrorKind::InvalidInput.into()))?)
            }
            Err(error) => return Err(at(error)),
        };
        if !replace && entries(&target)?.iter().any(|entry| entry.file_name().is_none_or(|name| name != INSIDE)) {
            return Err(BackupError(format!(
                "{} is not empty. Name another data directory, or give --replace: what is there is then kept beside it",
                target.display()
            )));
        }
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(at(ErrorKind::InvalidInput.into()));
        };
        let beside = parent.join(format!(".{}.restoring", name.to_string_lossy()));
        let is_mount = match (std::fs::metadata(&target), std::fs::metadata(parent)) {
            (Ok(target), Ok(parent)) => target.dev() != parent.dev(),
            _ => false,
        };
        let made = if is_mount { Err(ErrorKind::CrossesDevices.into()) } else { make(&beside) };
        let (directory, is_inside) = match made {
            Ok(()) => (beside, false),
            Err(error) if is_mount || (error.kind() == ErrorKind::PermissionDenied && target.is_dir()) => {
                let inside = target.join(INSIDE);
                make(&inside).map_err(at)?;
                (inside, true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return Err(BackupError(format!("another restore into {} is under way", target.display())));
            }
            Err(error) => return Err(at(error)),
        };
        let lock = File::open(&directory).map_err(at)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| at(error.into()))?;
        Ok(Self { target, directory, is_inside, lock, is_exchanging: false, is_swapped: false })
    }

    /// The directory to fill.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Puts the directory in the place of the data directory. Tells where what was there before is kept, if anything
    /// was there.
    ///
    /// # Errors
    /// When it cannot be renamed; the data directory is then as it was, or the error says where its content is.
    pub fn swap(mut self) -> Result<Option<PathBuf>> {
        let shown = self.target.display().to_string();
        let at = |error: std::io::Error| failed(&shown, &error);
        syncfs(&self.lock).map_err(|error| at(error.into()))?;
        let old = entries(&self.target)?;
        let old: Vec<_> = old.into_iter().filter(|entry| *entry != self.directory).collect();
        let before = format!("{BEFORE}-{}", Timestamp::now().as_seconds());
        self.is_exchanging = self.is_inside;
        let kept = if self.is_inside {
            self.exchange_entries(&old, &before).map_err(at)?
        } else {
            if let Ok(owner) = std::fs::metadata(&self.target) {
                // The server may run as another user than who restores.
                let _ = lchown(&self.directory, Some(owner.uid()), Some(owner.gid()));
            }
            if old.is_empty() {
                std::fs::rename(&self.directory, &self.target).map_err(at)?;
                None
            } else {
                let name = self.target.file_name().unwrap_or_default().to_string_lossy();
                let kept = self.target.with_file_name(format!("{name}.{before}"));
                let exchanged = renameat_with(CWD, &self.directory, CWD, &self.target, RenameFlags::EXCHANGE);
                let moved = match exchanged {
                    Ok(()) => std::fs::rename(&self.directory, &kept),
                    // Not every file system exchanges.
                    Err(_) => std::fs::rename(&self.target, &kept).and_then(|()| std::fs::rename(&self.directory, &self.target)),
                };
                moved.map_err(|error| {
                    failed(&format!("what was in {} is in {}", self.target.display(), kept.display()), &error)
                })?;
                Some(kept)
            }
        };
        self.is_swapped = true;
        Ok(kept)
    }

    fn exchange_entries(&self, old: &[PathBuf], before: &str) -> std::io::Result<Option<PathBuf>> {
        let kept = self.target.join(format!(".{before}"));
        let mut any = false;
        for entry in old {
            let Some(name) = entry.file_name().filter(|name| !name.to_string_lossy().starts_with(&format!(".{BEFORE}"))) else {
                continue;
            };
            if !std::mem::replace(&mut any, true) {
                DirBuilder::new().mode(0o700).create(&kept)?;
            }
            std::fs::rename(entry, kept.join(name))?;
        }
        for entry in std::fs::read_dir(&self.directory)? {
            let entry = entry?;
            std::fs::rename(entry.path(), self.target.join(entry.file_name()))?;
        }
        std::fs::remove_dir(&self.directory)?;
        Ok(any.then_some(kept))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Where an exchange was begun, the directory stays: it says that the data directory is not whole.
        if !self.is_swapped && !self.is_exchanging {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

/// Makes the directory, in place of one that an interrupted restore left behind.
fn make(directory: &Path) -> std::io::Result<()> {
    let make = || DirBuilder::new().mode(0o700).create(directory);
    match make() {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let left = File::open(directory)?;
            flock(&left, FlockOperation::NonBlockingLockExclusive).map_err(|_| std::io::Error::from(ErrorKind::WouldBlock))?;
            std::fs::remove_dir_all(directory)?;
            make()
        }
        made => made,
    }
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    match std::fs::read_dir(directory) {
        Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).collect()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(&directory.display().to_string(), &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::{INSIDE, Staging};
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).expect("there").flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).expect("there").permissions().mode() & 0o777
    }

    #[test]
    fn a_data_directory_appears_as_a_whole_and_only_for_its_owner() {
        let folder = tempfile::tempdir().expect("a folder");
        for (target, is_there) in [("new", false), ("empty", true), ("deep/er/new", false)] {
            let target = folder.path().join(target);
            if is_there {
                std::fs::create_dir(&target).expect("made");
                std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o755)).expect("set");
            }
            let staging = Staging::begin(&target, false).expect("begun");
            assert_eq!(mode(staging.path()), 0o700);
            std::fs::write(staging.path().join("file"), "new").expect("written");
            assert!(!target.join("file").exists());
            assert!(Staging::begin(&target, false).expect_err("twice").to_string().contains("under way"));
            assert_eq!(staging.swap().expect("swapped"), None);
            assert_eq!((names(&target), mode(&target)), (vec!["file".to_owned()], 0o700));
        }
        assert_eq!(names(folder.path()), ["deep", "empty", "new"]);
    }

    #[test]
    fn what_was_there_is_replaced_only_when_asked_for_and_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let target = folder.path().join("data");
        std::fs::create_dir(&target).expect("made");
        std::fs::write(target.join("file"), "old").expect("written");
        assert!(Staging::begin(&target, false).expect_err("not empty").to_string().contains("not empty"));
        // One that fails leaves everything as it was.
        let staging = Staging::begin(&target, true).expect("begun");
        std::fs::write(staging.path().join("file"), "half").expect("written");
        drop(staging);
        assert_eq!((names(folder.path()), names(&target)), (vec!["data".to_owned()], vec!["file".to_owned()]));
        std::fs::create_dir_all(folder.path().join(".data.restoring/left")).expect("left behind");
        let staging = Staging::begin(&target, true).expect("begun");
        assert!(names(staging.path()).is_empty());
        std::fs::write(staging.path().join("file"), "new").expect("written");
        let kept = staging.swap().expect("swapped").expect("kept");
        assert_eq!(std::fs::read_to_string(target.join("file")).expect("there"), "new");
        assert_eq!(std::fs::read_to_string(kept.join("file")).expect("there"), "old");
        assert_eq!(names(folder.path()).len(), 2);
    }

    #[test]
    fn a_directory_that_cannot_be_renamed_is_filled_from_within() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("file"), "old").expect("written");
        let directory = folder.path().join(INSIDE);
        std::fs::create_dir(&directory).expect("made");
        let lock = std::fs::File::open(&directory).expect("opened");
        let staging =
            Staging { target: folder.path().into(), directory, is_inside: true, lock, is_exchanging: false, is_swapped: false };
        std::fs::write(staging.path().join("file"), "new").expect("written");
        std::fs::write(staging.path().join("other"), "new").expect("written");
        let kept = staging.swap().expect("swapped").expect("kept");
        assert_eq!(names(folder.path())[1..], ["file", "other"]);
        assert_eq!(std::fs::read_to_string(kept.join("file")).expect("there"), "old");
        assert_eq!(mode(&kept), 0o700);
    }
}
