//! What is served as files: copied out of the build into a folder of its own, so that the ingress
//! reads regular files only, which nobody changes any more.

use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path};

use crate::archive::Limits;

/// Why a site's files cannot be served; the text is for the user.
#[derive(Debug)]
pub struct SiteError(pub String);

impl std::fmt::Display for SiteError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SiteError {}

/// Names that are never served, wherever they lie.
const PRIVATE: [&str; 6] = [".git", ".env", ".capsuleignore", ".gitignore", "capsule.toml", "node_modules"];

/// Copies the files below `source/output` into `target`, which must not exist. A link is followed if
/// it stays within `source`, and left out otherwise.
///
/// # Errors
/// When the folder is not there or cannot be copied.
pub fn collect_site(source: &Path, output: &str, target: &Path) -> Result<(), SiteError> {
    collect_within(source, output, target, Limits::default())
}

fn collect_within(source: &Path, output: &str, target: &Path, most: Limits) -> Result<(), SiteError> {
    let inside = Path::new(output).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    let source = source.canonicalize().map_err(|error| SiteError(format!("the build is gone: {error}")))?;
    let folder =
        source.join(output).canonicalize().ok().filter(|folder| inside && folder.starts_with(&source) && folder.is_dir());
    let Some(folder) = folder else {
        return Err(SiteError(format!(
            "the build left no folder `{output}` to serve; say where the files are in capsule.toml: [build] output = \"…\""
        )));
    };
    let mut copying = Copying { root: &source, most, left: most };
    copying.copy(&folder, target, 0).map_err(|error| SiteError(format!("the folder `{output}` cannot be copied: {error}")))
}

struct Copying<'a> {
    root: &'a Path,
    most: Limits,
    /// What may still be copied. Links can lead to the same files again and again.
    left: Limits,
}

impl Copying<'_> {
    fn copy(&mut self, from: &Path, to: &Path, depth: usize) -> std::io::Result<()> {
        // Links can make circles.
        if depth > 64 {
            return Err(std::io::Error::other(format!("{} lies too deep", from.display())));
        }
        std::fs::create_dir_all(to)?;
        std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o755))?;
        for entry in std::fs::read_dir(from)? {
            let entry = entry?;
            let name = entry.file_name();
            let hidden = name.to_str().is_some_and(|name| PRIVATE.contains(&name) || name.starts_with(".env."));
            if hidden {
                continue;
            }
            let Ok(real) = entry.path().canonicalize() else { continue };
            if !real.starts_with(self.root) {
                continue;
            }
            let kind = std::fs::metadata(&real)?;
            let target = to.join(&name);
            if kind.is_dir() {
                self.take(0)?;
                self.copy(&real, &target, depth + 1)?;
            } else if kind.is_file() {
                self.take(kind.len())?;
                std::fs::copy(&real, &target)?;
                std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o644))?;
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: u64) -> std::io::Result<()> {
        let left = self.left.entries.checked_sub(1).zip(self.left.bytes.checked_sub(bytes));
        let Some((entries, bytes)) = left else {
            let Limits { bytes, entries } = self.most;
            let text = format!("with what its links lead to, it holds more than {entries} files or {} MiB", bytes >> 20);
            return Err(std::io::Error::other(text));
        };
        self.left = Limits { bytes, entries };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Limits, collect_site, collect_within};
    use std::os::unix::fs::symlink;

    #[test]
    fn only_files_of_the_tree_are_served_and_nothing_private() {
        let directory = tempfile::tempdir().expect("tempdir");
        let source = directory.path().join("source");
        std::fs::create_dir_all(source.join("dist/assets")).expect("makes");
        for (file, text) in [("dist/index.html", "hi"), ("dist/.env", "SECRET=1"), ("dist/assets/a.js", "1"), ("shared.css", "x")]
        {
            std::fs::write(source.join(file), text).expect("writes");
        }
        symlink("../shared.css", source.join("dist/shared.css")).expect("links");
        symlink("/etc/passwd", source.join("dist/passwd")).expect("links");
        let target = directory.path().join("site");
        collect_site(&source, "dist", &target).expect("copies");
        assert_eq!(std::fs::read_to_string(target.join("shared.css")).expect("follows"), "x");
        assert!(target.join("assets/a.js").is_file());
        assert!(!target.join("passwd").exists() && !target.join(".env").exists());
        for output in ["../source/dist", "/etc", "missing", "dist/passwd"] {
            let error = collect_site(&source, output, &directory.path().join("no")).expect_err(output);
            assert!(error.to_string().contains("output"), "{error}");
        }
    }

    #[test]
    fn links_do_not_multiply_files_without_end() {
        let directory = tempfile::tempdir().expect("tempdir");
        let source = directory.path().join("source");
        for depth in 0..12 {
            std::fs::create_dir_all(source.join(depth.to_string())).expect("makes");
            for link in ["a", "b", "c", "d"] {
                symlink(format!("../{}", depth + 1), source.join(depth.to_string()).join(link)).expect("links");
            }
        }
        std::fs::create_dir(source.join("12")).expect("makes");
        let error = collect_within(&source, "0", &directory.path().join("site"), Limits { bytes: 1 << 20, entries: 500 });
        assert!(error.expect_err("16 million folders").to_string().contains("more than 500 files"));
        std::fs::write(source.join("12/large"), vec![0; 2000]).expect("writes");
        let error = collect_within(&source, "12", &directory.path().join("large"), Limits { bytes: 1000, entries: 500 });
        assert!(error.expect_err("2000 bytes").to_string().contains("links lead to"));
    }
}
