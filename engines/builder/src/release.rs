//! Copies the files of a static site out of a build into a folder of their own. The ingress then reads regular files only,
//! which never change.

use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use capsule_buildplan::{is_published, is_published_folder};

use capsule_runtime::trees;

use crate::archive::Limits;
use crate::reserve::{DiskReserve, ReserveGuard, ReserveReached};

/// Why the files of a site cannot be copied; the text is for the user.
#[derive(Debug)]
pub struct SiteError(pub String);

impl std::fmt::Display for SiteError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SiteError {}

/// Hidden folders that cannot be the output of a build. Others may: some frameworks build into one.
const NEVER_PUBLISHED: [&str; 10] = [".aws", ".azure", ".docker", ".git", ".gnupg", ".hg", ".kube", ".npm", ".ssh", ".svn"];
/// How many names of unpublished files a log line contains, and how many characters of each.
const MAX_LOGGED_NAMES: usize = 20;
const MAX_LOGGED_NAME_CHARS: usize = 100;

/// Files of a site that are not published, for the build log.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    names: Vec<String>,
    more: usize,
}

impl LeftOut {
    fn add(&mut self, path: &Path) {
        if self.names.len() < MAX_LOGGED_NAMES {
            self.names.push(path.to_string_lossy().chars().flat_map(char::escape_debug).take(MAX_LOGGED_NAME_CHARS).collect());
        } else {
            self.more += 1;
        }
    }

    /// Returns a line for the build log, or `None` if all files are published.
    #[must_use]
    pub fn line(&self) -> Option<String> {
        let more = if self.more > 0 { format!(" and {} more", self.more) } else { String::new() };
        let names = self.names.join(", ");
        (!names.is_empty()).then(|| {
            format!("not published (hidden files, keys, files for tools, links to such files or out of the build): {names}{more}")
        })
    }
}

/// Copies the files below `source/output` that a site publishes into `target`, which must not exist. A link is
/// followed if it stays within `source`, and left out otherwise. Returns what was left out. After an error, there is
/// no `target`.
///
/// # Errors
/// When the folder is not there or cannot be copied, or when less of the disk is left than `reserve`, which is checked
/// while files are copied.
pub fn collect_site(source: &Path, output: &str, target: &Path, reserve: &DiskReserve) -> Result<LeftOut, SiteError> {
    collect_within(source, output, target, Limits::default(), reserve)
}

fn collect_within(
    source: &Path,
    output: &str,
    target: &Path,
    limits: Limits,
    reserve: &DiskReserve,
) -> Result<LeftOut, SiteError> {
    let inside = Path::new(output).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    let source = source.canonicalize().map_err(|error| SiteError(format!("the build folder cannot be opened: {error}")))?;
    let named: PathBuf =
        source.components().chain(Path::new(output).components()).filter(|part| *part != Component::CurDir).collect();
    let found = source.join(output).canonicalize().ok();
    let Some(folder) = found.filter(|folder| inside && folder.starts_with(&source) && folder.is_dir()) else {
        return Err(SiteError(format!(
            "the build has no folder `{output}`; set the folder of the site in capsule.toml: [build] output = \"…\""
        )));
    };
    let below = folder.strip_prefix(&source).unwrap_or(&folder);
    let is_never_published =
        below.iter().any(|part| part.to_str().is_some_and(|part| NEVER_PUBLISHED.contains(&part.to_lowercase().as_str())));
    if is_never_published || (folder != named && !is_published_folder(below)) {
        return Err(SiteError(format!(
            "the folder `{output}` is `{}`, which is not published; set the folder of the site in capsule.toml: [build] output = \"…\"",
            below.display()
        )));
    }
    let guard = ReserveGuard::new(reserve);
    let mut copying = Copying { root: &source, folder: &folder, limits, remaining: limits, guard, left_out: LeftOut::default() };
    if let Err(error) = copying.copy(&folder, target, Path::new(""), 0) {
        // The first error is the one to report.
        let _ = trees::remove(target);
        return Err(SiteError(match error.downcast::<ReserveReached>() {
            Ok(error) => error.to_string(),
            Err(error) => format!("the folder `{output}` cannot be copied: {error}"),
        }));
    }
    Ok(copying.left_out)
}

struct Copying<'a> {
    root: &'a Path,
    /// The site's folder in the build.
    folder: &'a Path,
    limits: Limits,
    /// What may still be copied. Links can make the copy larger than the build.
    remaining: Limits,
    guard: ReserveGuard<'a>,
    left_out: LeftOut,
}

impl Copying<'_> {
    /// Copies a folder. `site_path` is its path on the site.
    fn copy(&mut self, from: &Path, to: &Path, site_path: &Path, depth: usize) -> std::io::Result<()> {
        // Links can form a cycle.
        if depth > 64 {
            return Err(std::io::Error::other(format!("{} is nested too deeply", site_path.display())));
        }
        std::fs::create_dir_all(to)?;
        std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o755))?;
        self.guard.count_entry().map_err(std::io::Error::other)?;
        for entry in std::fs::read_dir(from)? {
            let entry = entry?;
            let name = entry.file_name();
            let site_path = site_path.join(&name);
            let Some((real, kind)) = self.resolve(&entry.path()) else {
                self.left_out.add(&site_path);
                continue;
            };
            // Both its name on the site and the name of its target must be published.
            let below = real.strip_prefix(self.folder).or_else(|_| real.strip_prefix(self.root)).unwrap_or(&real);
            let target = to.join(&name);
            if kind.is_dir() && is_published_folder(&site_path) && is_published_folder(below) {
                self.consume(0)?;
                self.copy(&real, &target, &site_path, depth + 1)?;
            } else if kind.is_file() && is_published(&site_path) && is_published(below) {
                self.consume(kind.len())?;
                self.copy_file(&real, &target)?;
            } else {
                self.left_out.add(&site_path);
            }
        }
        Ok(())
    }

    fn copy_file(&mut self, from: &Path, to: &Path) -> std::io::Result<()> {
        let (mut from, mut to) = (File::open(from)?, File::create(to)?);
        self.guard.count_entry().map_err(std::io::Error::other)?;
        loop {
            let copied = std::io::copy(&mut (&mut from).take(self.guard.chunk()), &mut to)?;
            if copied == 0 {
                return to.set_permissions(std::fs::Permissions::from_mode(0o644));
            }
            self.guard.count(copied).map_err(std::io::Error::other)?;
        }
    }

    /// Follows links. Returns `None` if the target does not exist or is outside of the build.
    fn resolve(&self, path: &Path) -> Option<(PathBuf, Metadata)> {
        let real = path.canonicalize().ok().filter(|real| real.starts_with(self.root))?;
        let kind = std::fs::metadata(&real).ok()?;
        Some((real, kind))
    }

    fn consume(&mut self, bytes: u64) -> std::io::Result<()> {
        let remaining = self.remaining.entries.checked_sub(1).zip(self.remaining.bytes.checked_sub(bytes));
        let Some((entries, bytes)) = remaining else {
            let Limits { bytes, entries } = self.limits;
            let text = format!("it has more than {entries} files or {} MiB, including the targets of links", bytes >> 20);
            return Err(std::io::Error::other(text));
        };
        self.remaining = Limits { bytes, entries };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{DiskReserve, LeftOut, Limits, SiteError, collect_within};
    use std::os::unix::fs::symlink;
    use std::path::Path;

    fn collect_site(source: &Path, output: &str, target: &Path) -> Result<LeftOut, SiteError> {
        super::collect_site(source, output, target, &DiskReserve::new(target, 0))
    }

    #[test]
    fn copying_stops_at_the_reserve_and_leaves_nothing() {
        let directory = tempfile::tempdir().expect("tempdir");
        let (source, target) = (directory.path().join("source"), directory.path().join("site"));
        std::fs::create_dir_all(source.join("dist/assets")).expect("makes");
        std::fs::write(source.join("dist/index.html"), "page").expect("writes");
        std::fs::write(source.join("dist/assets/a.js"), "1").expect("writes");
        let collect = |checks| {
            let reserve = DiskReserve::scripted(vec![1; checks]);
            super::collect_site(&source, "dist", &target, &reserve)
        };
        // One check for each folder and file, and one for each byte of content.
        for checks in 0..9 {
            let error = collect(checks).expect_err("the disk runs full").to_string();
            assert!(error.starts_with("The server has") && error.contains("in reserve"), "{error}");
            assert!(!target.exists(), "after {checks} checks");
        }
        collect(9).expect("enough is free");
        assert_eq!(std::fs::read(target.join("index.html")).expect("reads"), b"page");
    }

    #[test]
    fn links_out_of_the_build_and_hidden_files_are_not_copied() {
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
    fn unpublished_files_are_not_copied_and_are_listed() {
        let directory = tempfile::tempdir().expect("tempdir");
        let source = directory.path().join("source");
        let files = [
            "index.html",
            ".npmrc",
            ".netrc",
            ".htpasswd",
            ".envrc",
            ".ssh/id_rsa",
            ".aws/credentials",
            ".git-credentials",
            ".git/config",
            ".svn/entries",
            ".well-known/security.txt",
            "keys/id_ed25519",
            "keys/tls.PEM",
            "capsule.toml",
            "_redirects",
            "docs/_headers",
            "docs/index.html",
        ];
        for file in files {
            let path = source.join(file);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("makes");
            std::fs::write(path, file).expect("writes");
        }
        // Through links, and links to links.
        for (target, link) in [
            (".git", "x"),
            ("x", "y"),
            ("../.git/config", "docs/config"),
            ("keys/id_ed25519", "key.txt"),
            (".well-known/security.txt", "security.txt"),
            ("nowhere", "dangling"),
            ("/etc/passwd", "passwd"),
            (".git", "dist"),
        ] {
            symlink(target, source.join(link)).expect("links");
        }
        let target = directory.path().join("site");
        let left_out = collect_site(&source, ".", &target).expect("copies");
        let mut copied = Vec::new();
        let mut folders = vec![target.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).expect("lists").flatten() {
                if entry.file_type().expect("a kind").is_dir() {
                    folders.push(entry.path());
                } else {
                    copied.push(entry.path().strip_prefix(&target).expect("below").display().to_string());
                }
            }
        }
        copied.sort();
        assert_eq!(copied, [".well-known/security.txt", "docs/index.html", "index.html", "security.txt"]);
        let line = left_out.line().expect("something is left out");
        for name in [
            ".npmrc",
            ".ssh",
            ".git",
            "x",
            "y",
            "docs/config",
            "key.txt",
            "keys/tls.PEM",
            "_redirects",
            "docs/_headers",
            "dangling",
        ] {
            assert!(line.contains(name), "{name}: {line}");
        }
        for output in ["dist", ".git", "x"] {
            let error = collect_site(&source, output, &directory.path().join("no")).expect_err(output);
            assert!(error.to_string().contains("not published"), "{error}");
        }
    }

    #[test]
    fn nested_links_are_limited_by_the_number_and_size_of_files() {
        let none = DiskReserve::new(Path::new("/"), 0);
        let directory = tempfile::tempdir().expect("tempdir");
        let source = directory.path().join("source");
        for depth in 0..12 {
            std::fs::create_dir_all(source.join(depth.to_string())).expect("makes");
            for link in ["a", "b", "c", "d"] {
                symlink(format!("../{}", depth + 1), source.join(depth.to_string()).join(link)).expect("links");
            }
        }
        std::fs::create_dir(source.join("12")).expect("makes");
        let error = collect_within(&source, "0", &directory.path().join("site"), Limits { bytes: 1 << 20, entries: 500 }, &none);
        assert!(error.expect_err("16 million folders").to_string().contains("more than 500 files"));
        std::fs::write(source.join("12/large"), vec![0; 2000]).expect("writes");
        let error = collect_within(&source, "12", &directory.path().join("large"), Limits { bytes: 1000, entries: 500 }, &none);
        assert!(error.expect_err("2000 bytes").to_string().contains("targets of links"));
    }
}
