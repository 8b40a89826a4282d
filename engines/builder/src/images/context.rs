//! The build context: a folder as an archive. The same files make the same archive, independent of users and times.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use capsule_buildplan::{Folder, Tree};
use flate2::Compression;
use flate2::write::GzEncoder;
use ignore::gitignore::{Gitignore, GitignoreBuilder};

use crate::BuildError;

/// The path in the archive of a Dockerfile that is not in the folder.
pub const DOCKERFILE: &str = ".capsule.Dockerfile";
/// How deep folders may be nested.
const MAX_DEPTH: usize = 256;
/// Bytes of the compressed archive.
const MAX_BYTES: usize = 1 << 30;

/// A folder, packed.
#[derive(Clone)]
pub struct Context {
    /// A gzipped tar archive.
    pub(super) archive: Vec<u8>,
    /// The Dockerfile's path in it.
    pub(super) dockerfile: String,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Context({} bytes, {})", self.archive.len(), self.dockerfile)
    }
}

impl Context {
    /// Packs a folder with its own Dockerfile.
    ///
    /// # Errors
    /// When a file cannot be read, or the archive is too large.
    pub fn of(folder: &Path, dockerfile: &str) -> Result<Self, BuildError> {
        // Not through a link out of the folder: error messages quote malformed lines.
        let own = Folder::new(folder).bytes(".dockerignore").unwrap_or_default();
        Self::pack(folder, &String::from_utf8_lossy(&own), dockerfile, BTreeMap::new())
    }

    /// Packs a folder with a generated Dockerfile and `.dockerignore`.
    ///
    /// # Errors
    /// As [`Context::of`].
    pub fn with(folder: &Path, dockerfile: &str, dockerignore: &str) -> Result<Self, BuildError> {
        Self::pack(folder, dockerignore, DOCKERFILE, [(DOCKERFILE.to_owned(), dockerfile.as_bytes().to_vec())].into())
    }

    fn pack(folder: &Path, ignored: &str, dockerfile: &str, more: BTreeMap<String, Vec<u8>>) -> Result<Self, BuildError> {
        let ignored = matcher(ignored)?;
        let mut files = Vec::new();
        walk(folder, Path::new(""), &ignored, dockerfile, &mut files)?;
        files.sort();
        let mut archive = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for path in files {
            let full = folder.join(&path);
            let at = |error: std::io::Error| BuildError::Failed(format!("{}: {error}", path.display()));
            let kind = std::fs::symlink_metadata(&full).map_err(at)?;
            let mut header = tar::Header::new_gnu();
            header.set_mtime(0);
            if kind.is_symlink() {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_mode(0o777);
                header.set_size(0);
                archive.append_link(&mut header, &path, std::fs::read_link(&full).map_err(at)?).map_err(at)?;
            } else {
                use std::os::unix::fs::PermissionsExt;
                header.set_mode(if kind.permissions().mode() & 0o100 == 0 { 0o644 } else { 0o755 });
                header.set_size(kind.len());
                archive.append_data(&mut header, &path, std::fs::File::open(&full).map_err(at)?).map_err(at)?;
            }
            if archive.get_ref().get_ref().len() > MAX_BYTES {
                let text =
                    format!("the build context is larger than {} MiB; list what is not source in .dockerignore", MAX_BYTES >> 20);
                return Err(BuildError::Failed(text));
            }
        }
        for (path, content) in more {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, path, content.as_slice())?;
        }
        Ok(Self { archive: archive.into_inner()?.finish()?, dockerfile: dockerfile.to_owned() })
    }
}

/// Parses a `.dockerignore`: paths are relative to the folder, and `!` includes a path again.
fn matcher(text: &str) -> Result<Gitignore, BuildError> {
    let mut builder = GitignoreBuilder::new("");
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (not, path) = line.strip_prefix('!').map_or(("", line), |path| ("!", path));
        let path = path.trim_start_matches("./").trim_start_matches('/');
        let rooted = format!("{not}/{path}");
        builder.add_line(None, &rooted).map_err(|error| BuildError::Failed(format!(".dockerignore:{}: {error}", index + 1)))?;
    }
    builder.build().map_err(|error| BuildError::Failed(format!(".dockerignore: {error}")))
}

fn walk(root: &Path, at: &Path, ignored: &Gitignore, dockerfile: &str, files: &mut Vec<PathBuf>) -> Result<(), BuildError> {
    let shown = if at.as_os_str().is_empty() { root } else { at };
    if at.components().count() > MAX_DEPTH {
        return Err(BuildError::Failed(format!(
            "{} is nested more than {MAX_DEPTH} folders deep; add it to .dockerignore",
            at.display()
        )));
    }
    let entries =
        std::fs::read_dir(root.join(at)).map_err(|error| BuildError::Failed(format!("{}: {error}", shown.display())))?;
    for entry in entries {
        let entry = entry?;
        let path = at.join(entry.file_name());
        let kind = entry.file_type()?;
        // The Dockerfile is always included.
        if path == Path::new(dockerfile) && kind.is_file() {
            files.push(path);
            continue;
        }
        let out = ignored.matched(&path, kind.is_dir()).is_ignore();
        if kind.is_dir() {
            // A file in it may be included again.
            if !out || ignored.num_whitelists() > 0 {
                walk_in(root, &path, ignored, dockerfile, files, out)?;
            }
        } else if !out && (kind.is_file() || kind.is_symlink()) {
            files.push(path);
        }
    }
    Ok(())
}

/// Walks a folder; of an ignored one, only the files that are included again.
fn walk_in(
    root: &Path,
    at: &Path,
    ignored: &Gitignore,
    dockerfile: &str,
    files: &mut Vec<PathBuf>,
    out: bool,
) -> Result<(), BuildError> {
    let before = files.len();
    walk(root, at, ignored, dockerfile, files)?;
    if out {
        let kept: Vec<PathBuf> = files
            .drain(before..)
            .filter(|path| ignored.matched(path, false).is_whitelist() || path == Path::new(dockerfile))
            .collect();
        files.extend(kept);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Context;
    use std::collections::BTreeSet;
    use std::io::Read;

    fn names(context: &Context) -> BTreeSet<String> {
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(context.archive.as_slice()));
        let entries = archive.entries().expect("an archive");
        entries.map(|entry| entry.expect("an entry").path().expect("a path").display().to_string()).collect()
    }

    #[test]
    fn the_same_files_make_the_same_archive_without_ignored_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(path, text).expect("written");
        };
        for path in ["a.js", "node_modules/x/y.js", "docs/a.md", "docs/keep.md", "src/.env", ".env"] {
            write(path, path);
        }
        let ignore = "# ours\nnode_modules\n**/.env\ndocs/*\n!docs/keep.md\n";
        let one = Context::with(folder.path(), "FROM scratch\n", ignore).expect("packed");
        assert_eq!(names(&one), [".capsule.Dockerfile", "a.js", "docs/keep.md"].map(str::to_owned).into());
        std::thread::sleep(std::time::Duration::from_millis(20));
        write("a.js", "a.js");
        let other = Context::with(folder.path(), "FROM scratch\n", ignore).expect("packed");
        assert!(one.archive == other.archive, "times are not packed");
        let mut text = String::new();
        flate2::read::GzDecoder::new(one.archive.as_slice()).read_to_string(&mut text).expect("text");
        assert!(!text.contains("root"), "neither are users");
    }
}
