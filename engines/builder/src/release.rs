//! What is served as files: copied out of the build into a folder of its own, so that the ingress
//! reads regular files only, which nobody changes any more.

use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path};

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
    let inside = Path::new(output).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    let source = source.canonicalize().map_err(|error| SiteError(format!("the build is gone: {error}")))?;
    let folder =
        source.join(output).canonicalize().ok().filter(|folder| inside && folder.starts_with(&source) && folder.is_dir());
    let Some(folder) = folder else {
        return Err(SiteError(format!(
            "the build left no folder `{output}` to serve; say where the files are in capsule.toml: [build] output = \"…\""
        )));
    };
    copy(&source, &folder, target, 0).map_err(|error| SiteError(format!("the folder `{output}` cannot be copied: {error}")))
}

fn copy(root: &Path, from: &Path, to: &Path, depth: usize) -> std::io::Result<()> {
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
        if !real.starts_with(root) {
            continue;
        }
        let kind = std::fs::metadata(&real)?;
        let target = to.join(&name);
        if kind.is_dir() {
            copy(root, &real, &target, depth + 1)?;
        } else if kind.is_file() {
            std::fs::copy(&real, &target)?;
            std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o644))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::collect_site;
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
}
