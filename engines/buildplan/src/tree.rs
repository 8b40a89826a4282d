//! The files a plan is made from: a folder, or anything else that can list and read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A larger file decides nothing.
const MOST_BYTES: u64 = 2 << 20;

/// A repository's files. Paths are relative, with `/` between parts.
pub trait Tree {
    /// A file's text without a byte-order mark; `None` if it is not there, too large, or not text.
    fn read(&self, path: &str) -> Option<String>;

    /// The names in a folder, `""` being the root: files as they are, folders with `/` behind.
    fn list(&self, folder: &str) -> Vec<String>;

    /// Whether a file is there.
    fn has(&self, path: &str) -> bool {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.list(folder).iter().any(|entry| entry == name)
    }
}

/// A folder on disk. Symbolic links are not followed.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// The folder at `path`.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self(path.into())
    }
}

impl Tree for Folder {
    fn read(&self, path: &str) -> Option<String> {
        let path = self.0.join(path);
        let kind = std::fs::symlink_metadata(&path).ok()?;
        if !kind.is_file() || kind.len() > MOST_BYTES {
            return None;
        }
        text(std::fs::read(path).ok()?)
    }

    fn list(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.0.join(folder)) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let kind = entry.file_type().ok()?;
                Some(if kind.is_dir() { format!("{name}/") } else { name })
            })
            .collect();
        names.sort();
        names
    }
}

/// Files in memory, for tests and for listings of archives.
#[derive(Debug, Default)]
pub struct Memory(BTreeMap<String, Vec<u8>>);

impl Memory {
    /// A tree of these files.
    pub fn new<P: Into<String>, C: Into<Vec<u8>>>(files: impl IntoIterator<Item = (P, C)>) -> Self {
        Self(files.into_iter().map(|(path, content)| (path.into(), content.into())).collect())
    }
}

impl Tree for Memory {
    fn read(&self, path: &str) -> Option<String> {
        text(self.0.get(path)?.clone())
    }

    fn list(&self, folder: &str) -> Vec<String> {
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let mut names: Vec<String> = self
            .0
            .keys()
            .filter_map(|path| path.strip_prefix(&prefix))
            .map(|rest| match rest.split_once('/') {
                Some((folder, _)) => format!("{folder}/"),
                None => rest.to_owned(),
            })
            .collect();
        names.dedup();
        names
    }
}

fn text(bytes: Vec<u8>) -> Option<String> {
    let text = String::from_utf8(bytes).ok()?;
    Some(text.strip_prefix('\u{feff}').map_or_else(|| text.clone(), str::to_owned))
}

/// The 1-based number of the first line that contains `needle`.
pub fn line_of(text: &str, needle: &str) -> Option<usize> {
    text.lines().position(|line| line.contains(needle)).map(|index| index + 1)
}
