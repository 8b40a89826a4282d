//! Trees that users' programs made. Their folders may lie deeper than a path can say and than a stack can
//! follow; links in them lead anywhere.

use std::ffi::{CStr, CString};
use std::fs::Metadata;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, renameat, unlinkat};
use rustix::io::Errno;

/// The bytes on disk of a tree; nothing if it is too deep to be measured. Links are not followed; what
/// goes away meanwhile is not counted.
pub fn size(path: &Path) -> Option<u64> {
    let room = |kind: &Metadata| kind.blocks() * 512;
    let mut bytes = std::fs::symlink_metadata(path).as_ref().map_or(0, room);
    let mut folders = vec![path.to_owned()];
    while let Some(folder) = folders.pop() {
        match std::fs::read_dir(folder) {
            Ok(entries) => {
                for entry in entries.flatten() {
                    let Ok(kind) = entry.metadata() else { continue };
                    bytes += room(&kind);
                    if kind.is_dir() {
                        folders.push(entry.path());
                    }
                }
            }
            Err(error) if error.raw_os_error() == Some(Errno::NAMETOOLONG.raw_os_error()) => return None,
            Err(_) => {}
        }
    }
    Some(bytes)
}

/// Removes a tree; one that is not there is removed. Each folder in it is first moved to the top, so
/// that none is deep, and is emptied by a handle that no link can turn elsewhere.
///
/// # Errors
/// When something in it cannot be removed.
pub fn remove(path: &Path) -> std::io::Result<()> {
    let top = match open(CWD, &c_path(path)?) {
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
                let new = loop {
                    moved += 1;
                    let new = CString::new(format!(".removed-{moved}")).unwrap_or_default();
                    // The user may have had the same idea for a name: a folder with something in it stays.
                    match renameat(folder, name, &top, &new) {
                        Ok(()) => break new,
                        Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
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
        match open(&top, &name) {
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
    match rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
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
    use super::{remove, size};
    use rustix::fs::{Mode, OFlags, mkdirat, openat, symlinkat};

    #[test]
    fn deep_trees_are_removed_and_links_lead_nowhere() {
        let folder = tempfile::tempdir().expect("a folder");
        let outside = folder.path().join("outside");
        std::fs::create_dir(&outside).expect("made");
        std::fs::write(outside.join("kept"), "kept").expect("written");
        let tree = folder.path().join("tree");
        std::fs::create_dir_all(tree.join(".removed-1/.removed-2")).expect("made");
        std::fs::write(tree.join(".removed-3"), "a file").expect("written");
        assert!(size(&tree).is_some_and(|bytes| bytes > 0));
        let open = |at: &std::os::fd::OwnedFd, name: &str| openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
        let mut at: std::os::fd::OwnedFd = std::fs::File::open(&tree).expect("opened").into();
        for _ in 0..30_000 {
            mkdirat(&at, "d", Mode::RWXU).expect("made");
            symlinkat(&outside, &at, "link").expect("linked");
            at = open(&at, "d").expect("opened");
        }
        drop(at);
        assert_eq!(size(&tree), None, "deeper than a path can say");
        remove(&tree).expect("removed");
        assert!(!tree.exists() && outside.join("kept").exists());
        remove(&tree).expect("what is not there is removed");
        std::os::unix::fs::symlink(&outside, &tree).expect("linked");
        remove(&tree).expect("the link is removed");
        assert!(!tree.exists() && outside.join("kept").exists());
    }
}
