//! The files of an installation: keys, settings, uploads, releases.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, statat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use crate::repository::{BackupWriter, Repository};
use crate::{BackupError, Result, failed};

/// Paths in a data directory that are backed up. Logs, caches and unfinished work are not; databases are stored as rows.
const INCLUDED: [&str; 6] = ["capsule.toml", "local-token", "keys", "blobs", "releases", "apps"];
/// Paths below these that are left out: the backup's own key, and unfinished uploads.
const EXCLUDED: [&str; 2] = ["keys/backup.key", "blobs/unfinished"];
/// The size of a file's pieces. The last one may be smaller.
const PIECE_BYTES: u64 = 4 << 20;
/// Files with longer absolute paths are left out. The margin below `PATH_MAX` allows a restore into a directory with a
/// longer name.
const MAX_PATH_BYTES: usize = 3840;

/// A file, folder or symbolic link.
#[derive(Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to the data directory.
    path: PathBuf,
    mode: u32,
    uid: u32,
    gid: u32,
    #[serde(rename = "what")]
    kind: EntryKind,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum EntryKind {
    Folder,
    File { pieces: Vec<String> },
    Link { to: PathBuf },
}

impl Entry {
    fn new(path: PathBuf, stat: &Stat, kind: EntryKind) -> Self {
        Self { path, mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid, kind }
    }

    /// The names of the pieces of its content.
    pub fn pieces(&self) -> &[String] {
        match &self.kind {
            EntryKind::File { pieces } => pieces,
            EntryKind::Folder | EntryKind::Link { .. } => &[],
        }
    }
}

/// Reads the files and writes their pieces. Applications may change files meanwhile, so symbolic links are never
/// followed, and only regular files are read.
pub async fn back_up(data: &Path, writer: &mut BackupWriter<'_>) -> Result<Vec<Entry>> {
    let root = std::fs::File::open(data).map_err(|error| failed(&data.display().to_string(), &error))?;
    let root = OwnedFd::from(root);
    let mut entries = Vec::new();
    let mut left = vec![PathBuf::new()];
    while let Some(path) = left.pop() {
        let at = |error: Errno| failed(&data.join(&path).display().to_string(), &error);
        let Some(folder) = unless_gone(open_folder(&root, &path)).map_err(at)? else { continue };
        let names = if path.as_os_str().is_empty() {
            INCLUDED.iter().map(OsString::from).collect()
        } else {
            let Some(names) = unless_gone(names(&folder)).map_err(at)? else { continue };
            entries.push(Entry::new(path.clone(), &fstat(&folder).map_err(at)?, EntryKind::Folder));
            names
        };
        let mut inner = Vec::new();
        for name in &names {
            let path = path.join(name);
            let whole = data.join(&path);
            if EXCLUDED.iter().any(|out| path == Path::new(out)) || whole.as_os_str().len() > MAX_PATH_BYTES {
                continue;
            }
            let at = |error: Errno| failed(&whole.display().to_string(), &error);
            let stat = statat(&folder, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW);
            let Some(stat) = unless_gone(stat).map_err(at)? else { continue };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => inner.push(path),
                FileType::Symlink => {
                    let to = readlinkat(&folder, name.as_os_str(), Vec::<u8>::new());
                    let Some(to) = unless_gone(to).map_err(at)? else { continue };
                    entries.push(Entry::new(path, &stat, EntryKind::Link { to: OsStr::from_bytes(to.to_bytes()).into() }));
                }
                FileType::RegularFile => {
                    let Some(file) = unless_gone(open(&folder, name, OFlags::empty())).map_err(at)? else { continue };
                    // The file may have been replaced since `statat`.
                    let stat = fstat(&file).map_err(at)?;
                    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
                        let pieces = write_pieces(File::from_std(file.into()), writer).await;
                        let pieces = pieces.map_err(|error| failed(&whole.display().to_string(), &error))??;
                        entries.push(Entry::new(path, &stat, EntryKind::File { pieces }));
                    }
                }
                _ => {}
            }
        }
        left.extend(inner.into_iter().rev());
    }
    Ok(entries)
}

/// `None` where the file was removed or replaced by another type of file meanwhile.
fn unless_gone<T>(outcome: rustix::io::Result<T>) -> rustix::io::Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::INVAL | Errno::NXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens a folder component by component, following no symbolic link.
fn open_folder(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let mut folder = open(root, OsStr::new("."), OFlags::DIRECTORY)?;
    for name in path {
        folder = open(&folder, name, OFlags::DIRECTORY)?;
    }
    Ok(folder)
}

/// Opens a file without following a symbolic link, and without blocking on a pipe.
fn open(at: &OwnedFd, name: &OsStr, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    openat(at, name, flags, Mode::empty())
}

/// The sorted names in a folder.
fn names(folder: &OwnedFd) -> rustix::io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Writes a file's pieces one by one, with one in memory at a time. Returns their names.
async fn write_pieces(file: File, writer: &mut BackupWriter<'_>) -> std::io::Result<Result<Vec<String>>> {
    let mut pieces = Vec::new();
    let mut rest = file;
    loop {
        let mut piece = Vec::new();
        (&mut rest).take(PIECE_BYTES).read_to_end(&mut piece).await?;
        if piece.is_empty() {
            return Ok(Ok(pieces));
        }
        match writer.piece(&piece).await {
            Ok(name) => pieces.push(name),
            Err(error) => return Ok(Err(error)),
        }
    }
}

pub async fn restore(data: &Path, entries: &[Entry], repository: &Repository, generation: &str) -> Result<()> {
    let root = std::fs::metadata(data).is_ok_and(|metadata| metadata.uid() == 0);
    for entry in entries {
        // The manifest is authenticated; this is a second barrier.
        if entry.path.is_absolute() || entry.path.components().any(|part| part == std::path::Component::ParentDir) {
            return Err(BackupError(format!("{} is outside of the data directory", entry.path.display())));
        }
        let whole = data.join(&entry.path);
        let at = |error: std::io::Error| failed(&whole.display().to_string(), &error);
        match &entry.kind {
            EntryKind::Folder => DirBuilder::new().mode(0o700).create(&whole).map_err(at)?,
            EntryKind::Link { to } => symlink(to, &whole).map_err(at)?,
            EntryKind::File { pieces } => {
                // Readable only by its owner until its mode is set. Never overwrites a file.
                let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&whole).map_err(at)?;
                for piece in pieces {
                    file.write_all(&repository.piece(generation, piece).await?).map_err(at)?;
                }
            }
        }
        if root {
            lchown(&whole, Some(entry.uid), Some(entry.gid)).map_err(at)?;
        }
    }
    // Last, and innermost first: a folder's mode may forbid writing into it.
    for entry in entries.iter().rev().filter(|entry| !matches!(entry.kind, EntryKind::Link { .. })) {
        let whole = data.join(&entry.path);
        let set = std::fs::set_permissions(&whole, PermissionsExt::from_mode(entry.mode));
        set.map_err(|error| failed(&whole.display().to_string(), &error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::fs::{CWD, FileType, Mode, RenameFlags, mknodat, renameat_with};

    use super::{EntryKind, back_up};
    use crate::{BackupKey, Kind, Repository};

    #[tokio::test]
    async fn a_file_replaced_by_a_link_during_a_backup_is_not_followed() {
        let folder = tempfile::tempdir().expect("a folder");
        let data = folder.path().join("data");
        let app = data.join("releases/1/app");
        std::fs::create_dir_all(app.join("inner")).expect("made");
        std::fs::create_dir(folder.path().join("outside")).expect("made");
        std::fs::write(folder.path().join("outside/file"), "secret").expect("written");
        std::fs::write(app.join("file"), "own").expect("written");
        std::fs::write(app.join("inner/file"), "own").expect("written");
        std::os::unix::fs::symlink("../../../../outside/file", app.join("link")).expect("linked");
        std::os::unix::fs::symlink("../../../../outside", app.join("outside")).expect("linked");
        mknodat(CWD, app.join("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("made");

        let repository = folder.path().join("backups");
        let key = BackupKey::open(&folder.path().join("key")).expect("a key");
        let repository = Repository::open(repository.to_str().expect("text"), key).expect("opened");
        let mut writer = repository.begin(Kind::Full).await.expect("begun");
        let entries = back_up(&data, &mut writer).await.expect("backed up");
        let paths: Vec<&Path> = entries.iter().map(|entry| entry.path.as_path()).collect();
        let expected = ["", "/1", "/1/app", "/1/app/file", "/1/app/link", "/1/app/outside", "/1/app/inner", "/1/app/inner/file"];
        assert_eq!(paths, expected.map(|path| PathBuf::from(format!("releases{path}"))));
        assert!(matches!(&entries[5].kind, EntryKind::Link { to } if to == Path::new("../../../../outside")));

        let is_over = Arc::new(AtomicBool::new(false));
        let exchanging = std::thread::spawn({
            let (is_over, app) = (is_over.clone(), app.clone());
            move || {
                while !is_over.load(Ordering::Relaxed) {
                    for (one, other) in [("file", "link"), ("inner", "outside"), ("file", "pipe")] {
                        renameat_with(CWD, app.join(one), CWD, app.join(other), RenameFlags::EXCHANGE).expect("exchanged");
                    }
                }
            }
        });
        let mut pieces = Vec::new();
        for _ in 0..200 {
            let entries = back_up(&data, &mut writer).await.expect("backed up");
            pieces.extend(entries.iter().flat_map(|entry| entry.pieces().to_vec()));
        }
        is_over.store(true, Ordering::Relaxed);
        exchanging.join().expect("ended");
        pieces.sort();
        pieces.dedup();
        let (generation, _, _) = writer.finish(b"{}").await.expect("finished");
        for piece in &pieces {
            assert_eq!(repository.piece(&generation, piece).await.expect("there"), b"own");
        }
        assert!(!pieces.is_empty());
    }
}
