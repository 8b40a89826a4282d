//! The fresh directory that a backup is restored into, and its swap with the data directory. The data directory is
//! not changed before the swap. Both have the mode 0700 at all times.

use std::fs::{DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, lchown};
use std::path::{Path, PathBuf};

use capsule_contracts::Timestamp;
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with, syncfs};

use crate::{BackupError, Result, failed};

/// The name of the staging directory where it is inside the data directory.
pub const STAGING_DIRECTORY: &str = ".restoring";
/// The previous content of the data directory is kept under this name and the time of the swap.
const KEPT_PREFIX: &str = "before-restore";

/// A directory that a restore fills and then puts in place of the data directory.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    directory: PathBuf,
    /// Whether the directory is inside the target, whose entries are then replaced one by one.
    is_inside: bool,
    /// Held while the directory is being filled, to distinguish it from an abandoned one.
    lock: File,
    is_exchanging: bool,
    is_swapped: bool,
}

impl Staging {
    /// Creates a fresh directory beside `target`, or inside it where `target` is a mount point or its parent is not
    /// writable.
    ///
    /// # Errors
    /// When `target` is not empty and `replace` is false, or another restore is in progress.
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
        if !replace && entries(&target)?.iter().any(|entry| entry.file_name().is_none_or(|name| name != STAGING_DIRECTORY)) {
            return Err(BackupError(format!(
                "{} is not empty. Use another data directory, or --replace, which moves the current content aside",
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
        let made = if is_mount { Err(ErrorKind::CrossesDevices.into()) } else { create_fresh(&beside) };
        let (directory, is_inside) = match made {
            Ok(()) => (beside, false),
            Err(error) if is_mount || (error.kind() == ErrorKind::PermissionDenied && target.is_dir()) => {
                let inside = target.join(STAGING_DIRECTORY);
                create_fresh(&inside).map_err(at)?;
                (inside, true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return Err(BackupError(format!("another restore into {} is in progress", target.display())));
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

    /// Puts the directory in place of the data directory. Returns where the previous content is kept, if there was any.
    ///
    /// # Errors
    /// When it cannot be renamed. The data directory is then unchanged, or the error contains the place of its content.
    pub fn swap(mut self) -> Result<Option<PathBuf>> {
        let shown = self.target.display().to_string();
        let at = |error: std::io::Error| failed(&shown, &error);
        syncfs(&self.lock).map_err(|error| at(error.into()))?;
        let old = entries(&self.target)?;
        let old: Vec<_> = old.into_iter().filter(|entry| *entry != self.directory).collect();
        let before = format!("{KEPT_PREFIX}-{}", Timestamp::now().as_seconds());
        self.is_exchanging = self.is_inside;
        let kept = if self.is_inside {
            self.exchange_entries(&old, &before).map_err(at)?
        } else {
            if let Ok(owner) = std::fs::metadata(&self.target) {
                // The server may run as another user than the restore.
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
                    // Not every file system supports the exchange.
                    Err(_) => std::fs::rename(&self.target, &kept).and_then(|()| std::fs::rename(&self.directory, &self.target)),
                };
                moved.map_err(|error| {
                    failed(&format!("the previous content of {} is now in {}", self.target.display(), kept.display()), &error)
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
            let Some(name) = entry.file_name().filter(|name| !name.to_string_lossy().starts_with(&format!(".{KEPT_PREFIX}")))
            else {
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
        // After the exchange began, the directory stays as a marker of an incomplete data directory.
        if !self.is_swapped && !self.is_exchanging {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

/// Creates the directory, after removing one that an interrupted restore left behind.
fn create_fresh(directory: &Path) -> std::io::Result<()> {
    let create = || DirBuilder::new().mode(0o700).create(directory);
    match create() {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let left = File::open(directory)?;
            flock(&left, FlockOperation::NonBlockingLockExclusive).map_err(|_| std::io::Error::from(ErrorKind::WouldBlock))?;
            std::fs::remove_dir_all(directory)?;
            create()
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
    use super::{STAGING_DIRECTORY, Staging};
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
    fn a_data_directory_appears_at_once_and_only_its_owner_can_enter_it() {
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
            assert!(Staging::begin(&target, false).expect_err("twice").to_string().contains("in progress"));
            assert_eq!(staging.swap().expect("swapped"), None);
            assert_eq!((names(&target), mode(&target)), (vec!["file".to_owned()], 0o700));
        }
        assert_eq!(names(folder.path()), ["deep", "empty", "new"]);
    }

    #[test]
    fn previous_content_is_replaced_only_with_replace_and_is_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let target = folder.path().join("data");
        std::fs::create_dir(&target).expect("made");
        std::fs::write(target.join("file"), "old").expect("written");
        assert!(Staging::begin(&target, false).expect_err("not empty").to_string().contains("not empty"));
        // A failed restore changes nothing.
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
    fn a_directory_that_cannot_be_renamed_is_replaced_entry_by_entry() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("file"), "old").expect("written");
        let directory = folder.path().join(STAGING_DIRECTORY);
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
