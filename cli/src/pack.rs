//! Packs a folder for upload: a gzipped tar archive without the files that `.gitignore` and `.capsuleignore` exclude.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;

use anyhow::{Context, bail};
use flate2::Compression;
use flate2::write::GzEncoder;
use ignore::WalkBuilder;

/// Never packed, whatever the ignore files contain.
const EXCLUDED: [&str; 3] = [".git", ".hg", ".svn"];

/// An archive in an unnamed temporary file.
pub struct Packed {
    pub file: File,
    pub bytes: u64,
    pub files: usize,
}

/// Packs a folder.
///
/// # Errors
/// When a file cannot be read, or there is none to pack.
pub fn pack(folder: &Path) -> anyhow::Result<Packed> {
    let file = tempfile::tempfile().context("cannot create a temporary file")?;
    // Fast rather than small: most uploads stay on one machine or a fast network.
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::fast()));
    archive.mode(tar::HeaderMode::Deterministic);
    archive.follow_symlinks(false);
    let mut files = 0;
    let walk = WalkBuilder::new(folder)
        .hidden(false)
        .parents(false)
        .git_global(false)
        .git_exclude(true)
        .require_git(false)
        .add_custom_ignore_filename(".capsuleignore")
        .filter_entry(|entry| !EXCLUDED.iter().any(|name| entry.file_name() == *name))
        .sort_by_file_name(Ord::cmp)
        .build();
    for entry in walk {
        let entry = entry?;
        let path = entry.path();
        let name = path.strip_prefix(folder)?;
        if name.as_os_str().is_empty() {
            continue;
        }
        let Some(kind) = entry.file_type() else { continue };
        if kind.is_file() || kind.is_dir() || kind.is_symlink() {
            archive.append_path_with_name(path, name).with_context(|| format!("cannot read {}", path.display()))?;
            files += usize::from(!kind.is_dir());
        }
    }
    if files == 0 {
        bail!(
            "Nothing to deploy in {}: the folder is empty, or .gitignore and .capsuleignore exclude every file.",
            folder.display()
        );
    }
    let mut file = archive.into_inner()?.finish()?;
    file.flush()?;
    let bytes = file.stream_position()?;
    Ok(Packed { file, bytes, files })
}

#[cfg(test)]
mod tests {
    use super::pack;
    use std::collections::BTreeSet;
    use std::io::Seek;

    #[test]
    fn ignored_files_are_not_packed() {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, content) in [
            (".gitignore", "node_modules/\n*.log\n!keep.log\n"),
            (".capsuleignore", "fixtures/\n"),
            ("server.js", "1"),
            (".env.example", "A=1"),
            ("node_modules/a/index.js", "2"),
            ("debug.log", "3"),
            ("keep.log", "4"),
            ("fixtures/big.bin", "5"),
            (".git/HEAD", "6"),
            ("src/.gitignore", "generated.js\n"),
            ("src/generated.js", "7"),
            ("src/app.js", "8"),
        ] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().expect("inside")).expect("made");
            std::fs::write(path, content).expect("written");
        }
        let mut packed = pack(folder.path()).expect("packed");
        packed.file.rewind().expect("rewound");
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(packed.file));
        let names: BTreeSet<String> = archive
            .entries()
            .expect("a tar")
            .map(|entry| entry.expect("whole").path().expect("a path").display().to_string())
            .collect();
        let expected =
            [".capsuleignore", ".env.example", ".gitignore", "keep.log", "server.js", "src", "src/.gitignore", "src/app.js"];
        assert_eq!(names.iter().map(|name| name.trim_end_matches('/')).collect::<Vec<_>>(), expected);
        assert_eq!(packed.files, 7);
    }

    #[test]
    fn an_empty_folder_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(pack(folder.path()).is_err());
    }
}
