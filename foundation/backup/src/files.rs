//! The files of an installation: keys, settings, uploads, releases.

use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use crate::repository::{Repository, Writing};
use crate::{BackupError, Result, failed};

/// What is backed up of a data directory. Logs, caches and what is under way are not; databases are told as rows.
const KEPT: [&str; 6] = ["capsule.toml", "local-token", "keys", "blobs", "releases", "apps"];
/// Not even then: a backup that holds its own key, and what is being written.
const LEFT_OUT: [&str; 2] = ["keys/backup.key", "blobs/unfinished"];
/// A file is cut into pieces of this size, in bytes.
const PIECE: u64 = 4 << 20;

/// A file, folder or link.
#[derive(Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Below the data directory.
    path: PathBuf,
    mode: u32,
    uid: u32,
    gid: u32,
    what: What,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum What {
    Folder,
    File { pieces: Vec<String> },
    Link { to: PathBuf },
}

impl Entry {
    /// The pieces of its content.
    pub fn pieces(&self) -> &[String] {
        match &self.what {
            What::File { pieces } => pieces,
            What::Folder | What::Link { .. } => &[],
        }
    }
}

pub async fn back_up(data: &Path, writing: &mut Writing<'_>) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut left: Vec<PathBuf> = KEPT.iter().rev().map(PathBuf::from).collect();
    while let Some(path) = left.pop() {
        let whole = data.join(&path);
        let at = |error: &std::io::Error| failed(&whole.display().to_string(), error);
        // What ended meanwhile is not needed any more.
        let Ok(metadata) = std::fs::symlink_metadata(&whole) else { continue };
        if LEFT_OUT.iter().any(|out| path == Path::new(out)) {
            continue;
        }
        let what = if metadata.is_dir() {
            let mut inner: Vec<PathBuf> = std::fs::read_dir(&whole)
                .map_err(|error| at(&error))?
                .flatten()
                .map(|entry| path.join(entry.file_name()))
                .collect();
            inner.sort();
            left.extend(inner.into_iter().rev());
            What::Folder
        } else if metadata.is_symlink() {
            What::Link { to: std::fs::read_link(&whole).map_err(|error| at(&error))? }
        } else if metadata.is_file() {
            match File::open(&whole).await {
                Ok(file) => What::File { pieces: cut(file, writing).await.map_err(|error| at(&error))?? },
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(at(&error)),
            }
        } else {
            continue;
        };
        entries.push(Entry { mode: metadata.mode() & 0o7777, uid: metadata.uid(), gid: metadata.gid(), path, what });
    }
    Ok(entries)
}

/// Writes a file's pieces, one after the other: however large it is, one is in memory.
async fn cut(file: File, writing: &mut Writing<'_>) -> std::io::Result<Result<Vec<String>>> {
    let mut pieces = Vec::new();
    let mut rest = file;
    loop {
        let mut piece = Vec::new();
        (&mut rest).take(PIECE).read_to_end(&mut piece).await?;
        if piece.is_empty() {
            return Ok(Ok(pieces));
        }
        match writing.piece(&piece).await {
            Ok(name) => pieces.push(name),
            Err(error) => return Ok(Err(error)),
        }
    }
}

pub async fn restore(data: &Path, entries: &[Entry], repository: &Repository, generation: &str) -> Result<()> {
    let root = std::fs::metadata(data).is_ok_and(|metadata| metadata.uid() == 0);
    for entry in entries {
        // Sealed, and so our own; looked at all the same.
        if entry.path.is_absolute() || entry.path.components().any(|part| part == std::path::Component::ParentDir) {
            return Err(BackupError(format!("{} leads out of the data directory", entry.path.display())));
        }
        let whole = data.join(&entry.path);
        let at = |error: std::io::Error| failed(&whole.display().to_string(), &error);
        match &entry.what {
            What::Folder => DirBuilder::new().mode(0o700).create(&whole).map_err(at)?,
            What::Link { to } => symlink(to, &whole).map_err(at)?,
            What::File { pieces } => {
                // Nobody else reads it before its mode is set, and nothing that is there is written into.
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
    // Last, and the innermost first: a folder may be one that nothing can be written into.
    for entry in entries.iter().rev().filter(|entry| !matches!(entry.what, What::Link { .. })) {
        let whole = data.join(&entry.path);
        let set = std::fs::set_permissions(&whole, PermissionsExt::from_mode(entry.mode));
        set.map_err(|error| failed(&whole.display().to_string(), &error))?;
    }
    Ok(())
}
