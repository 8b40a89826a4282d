//! Unpacks what a user uploaded: `tar`, `tar.gz` or `zip`. Nothing is trusted: not its size, not
//! its names, not its links.
//!
//! Only regular files, folders and symbolic links that stay within the tree come out of it. Links
//! are made last, so that nothing is ever written through one.

mod listing;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use flate2::read::GzDecoder;

pub use listing::listing;

/// How much may come out of an archive.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub bytes: u64,
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 2 << 30, entries: 200_000 }
    }
}

/// Why an archive was refused; the text is for the user.
#[derive(Debug)]
pub struct ArchiveError(pub String);

impl std::fmt::Display for ArchiveError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ArchiveError {}

fn refused(text: impl Into<String>) -> ArchiveError {
    ArchiveError(text.into())
}

fn damaged(error: impl std::fmt::Display) -> ArchiveError {
    refused(format!("the archive is damaged or cut short: {error}"))
}

/// The kinds of archive.
enum Format {
    Tar,
    TarGz,
    Zip,
}

/// Opens an archive, and sees of which kind it is.
fn open(archive: &Path) -> Result<(Format, File), ArchiveError> {
    let mut file = File::open(archive).map_err(damaged)?;
    let mut block = Vec::new();
    (&file).take(512).read_to_end(&mut block).map_err(damaged)?;
    file.seek(SeekFrom::Start(0)).map_err(damaged)?;
    let format = match block.as_slice() {
        [0x1f, 0x8b, ..] => Format::TarGz,
        [b'P', b'K', 3 | 5 | 7, _, ..] => Format::Zip,
        [] => return Err(refused("the archive is empty")),
        block if is_tar(block) => Format::Tar,
        _ => return Err(refused("it is no archive that is known: a tar, tar.gz or zip archive of the folder is")),
    };
    Ok((format, file))
}

/// Whether a file begins as a `tar` does: with a block that holds its own sum, or with nothing at all.
fn is_tar(block: &[u8]) -> bool {
    let Ok(block) = <&[u8; 512]>::try_from(block) else { return false };
    let sum: u32 = block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) }).sum();
    let told = tar::Header::from_byte_slice(block).cksum();
    block.iter().all(|byte| *byte == 0) || told.is_ok_and(|told| told == sum)
}

/// The path of an entry below the archive's folder; `None` for that folder itself.
fn inside(name: &str) -> Result<Option<PathBuf>, ArchiveError> {
    if name.len() > 1024 || name.contains('\0') {
        return Err(refused("a path in the archive is longer than 1024 bytes or holds a NUL byte"));
    }
    let mut path = PathBuf::new();
    for part in Path::new(name).components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::RootDir | Component::ParentDir | Component::Prefix(_) => {
                return Err(refused(format!("`{name}` leads out of the archive's folder")));
            }
        }
    }
    Ok((!path.as_os_str().is_empty()).then_some(path))
}

/// Unpacks `archive` into the empty folder `target`.
///
/// # Errors
/// When it is none of the known kinds, is damaged, or holds what it must not.
pub fn unpack(archive: &Path, target: &Path, limits: Limits) -> Result<(), ArchiveError> {
    let mut unpacking = Unpacking { target, limits, bytes: 0, entries: 0, links: BTreeMap::new() };
    match open(archive)? {
        (Format::TarGz, file) => unpacking.tar(GzDecoder::new(BufReader::new(file)))?,
        (Format::Zip, file) => unpacking.zip(file)?,
        (Format::Tar, file) => unpacking.tar(BufReader::new(file))?,
    }
    unpacking.make_links()?;
    if unpacking.entries == 0 {
        return Err(refused("the archive holds no files; is it a tar, tar.gz or zip archive of the folder?"));
    }
    Ok(())
}

struct Unpacking<'a> {
    target: &'a Path,
    limits: Limits,
    bytes: u64,
    entries: u64,
    links: BTreeMap<PathBuf, PathBuf>,
}

impl Unpacking<'_> {
    fn tar(&mut self, reader: impl Read) -> Result<(), ArchiveError> {
        let mut archive = tar::Archive::new(reader);
        for entry in archive.entries().map_err(damaged)? {
            let mut entry = entry.map_err(damaged)?;
            let kind = entry.header().entry_type();
            if kind.is_pax_global_extensions() {
                continue;
            }
            let name = text(&entry.path_bytes())?;
            let Some(path) = self.admit(&name)? else { continue };
            if kind.is_dir() {
                self.folder(&path)?;
            } else if kind.is_file() {
                let executable = entry.header().mode().is_ok_and(|mode| mode & 0o100 != 0);
                self.file(&path, &mut entry, executable)?;
            } else if kind.is_symlink() {
                let link = entry.link_name_bytes().ok_or_else(|| refused(format!("`{name}` is a link to nowhere")))?;
                self.link(path, &text(&link)?)?;
            } else {
                return Err(refused(format!("`{name}` is neither a file, a folder nor a symbolic link")));
            }
        }
        Ok(())
    }

    fn zip(&mut self, file: File) -> Result<(), ArchiveError> {
        let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).map_err(damaged)?;
            let name = text(entry.name_raw())?;
            let Some(path) = self.admit(&name)? else { continue };
            if entry.is_dir() {
                self.folder(&path)?;
            } else if entry.is_symlink() {
                let mut link = Vec::new();
                (&mut entry).take(4096).read_to_end(&mut link).map_err(damaged)?;
                self.link(path, &text(&link)?)?;
            } else {
                let executable = entry.unix_mode().is_some_and(|mode| mode & 0o100 != 0);
                self.file(&path, &mut entry, executable)?;
            }
        }
        Ok(())
    }

    /// Counts an entry, and gives its path below the target; `None` for the target itself.
    fn admit(&mut self, name: &str) -> Result<Option<PathBuf>, ArchiveError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(refused(format!("the archive holds more than {} entries", self.limits.entries)));
        }
        inside(name)
    }

    fn folder(&self, path: &Path) -> Result<(), ArchiveError> {
        std::fs::create_dir_all(self.target.join(path)).map_err(|error| refused(format!("`{}`: {error}", path.display())))
    }

    fn file(&mut self, path: &Path, reader: &mut impl Read, executable: bool) -> Result<(), ArchiveError> {
        if let Some(parent) = path.parent() {
            self.folder(parent)?;
        }
        let here = |error: std::io::Error| refused(format!("`{}`: {error}", path.display()));
        let mode = if executable { 0o755 } else { 0o644 };
        let target = self.target.join(path);
        let mut file =
            std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(target).map_err(here)?;
        let left = self.limits.bytes - self.bytes;
        let mut buffer = vec![0; 64 << 10];
        let mut written = 0;
        loop {
            let read = reader.read(&mut buffer).map_err(damaged)?;
            if read == 0 {
                break;
            }
            written += read as u64;
            if written > left {
                return Err(refused(format!(
                    "the archive unpacks to more than {} MiB; leave out what is built or downloaded (.capsuleignore)",
                    self.limits.bytes >> 20
                )));
            }
            file.write_all(&buffer[..read]).map_err(here)?;
        }
        self.bytes += written;
        self.links.remove(path);
        Ok(())
    }

    /// Notes a link; it must stay within the tree.
    fn link(&mut self, path: PathBuf, target: &str) -> Result<(), ArchiveError> {
        let mut depth = path.components().count() - 1;
        let leaves = || refused(format!("`{}` is a link to `{target}`, out of the archive's folder", path.display()));
        for part in Path::new(target).components() {
            match part {
                Component::Normal(_) => depth += 1,
                Component::CurDir => {}
                Component::ParentDir => depth = depth.checked_sub(1).ok_or_else(leaves)?,
                Component::RootDir | Component::Prefix(_) => return Err(leaves()),
            }
        }
        self.links.insert(path, target.into());
        Ok(())
    }

    fn make_links(&self) -> Result<(), ArchiveError> {
        for (path, target) in &self.links {
            // A link whose path goes on through another link would be made elsewhere.
            if path.ancestors().skip(1).any(|parent| self.links.contains_key(parent)) {
                return Err(refused(format!("`{}` lies behind a link", path.display())));
            }
            if let Some(parent) = path.parent() {
                self.folder(parent)?;
            }
            symlink(target, self.target.join(path)).map_err(|error| refused(format!("`{}`: {error}", path.display())))?;
        }
        Ok(())
    }
}

/// A name as text.
fn text(bytes: &[u8]) -> Result<String, ArchiveError> {
    String::from_utf8(bytes.to_vec())
        .map_err(|_| refused(format!("the name `{}` in the archive is not UTF-8", String::from_utf8_lossy(bytes))))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use super::{Limits, unpack};

    fn attempt(archive: &[u8], limits: Limits) -> (tempfile::TempDir, Result<(), String>) {
        let directory = tempfile::tempdir().expect("tempdir");
        let file = directory.path().join("archive");
        std::fs::write(&file, archive).expect("writes");
        let target = directory.path().join("target");
        std::fs::create_dir(&target).expect("makes the target");
        let result = unpack(&file, &target, limits).map_err(|error| error.to_string());
        (directory, result)
    }

    /// A tar of raw entries, as an attacker would write them.
    fn tar(entries: &[(&[u8], tar::EntryType, &[u8])]) -> Vec<u8> {
        let mut archive = Vec::new();
        for (name, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.as_mut_bytes()[..name.len()].copy_from_slice(name);
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            let body: &[u8] = if kind.is_symlink() || kind.is_hard_link() {
                header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content);
                &[]
            } else {
                content
            };
            header.set_size(body.len() as u64);
            header.set_cksum();
            archive.extend_from_slice(header.as_bytes());
            archive.extend_from_slice(body);
            archive.resize(archive.len().next_multiple_of(512), 0);
        }
        archive.resize(archive.len() + 1024, 0);
        archive
    }

    use tar::EntryType as T;

    #[test]
    fn files_folders_and_inner_links_come_out_and_special_bits_do_not() {
        use std::os::unix::fs::PermissionsExt;
        let archive = tar(&[
            (b"./bin/run", T::Regular, b"#!/bin/sh\n"),
            (b"current", T::Symlink, b"bin/run"),
            (b"empty/", T::Directory, b""),
        ]);
        let (directory, result) = attempt(&archive, Limits::default());
        result.expect("unpacks");
        let target = directory.path().join("target");
        assert_eq!(std::fs::read(target.join("current")).expect("reads"), b"#!/bin/sh\n");
        assert_eq!(std::fs::metadata(target.join("bin/run")).expect("is there").permissions().mode() & 0o7777, 0o755);
        assert!(target.join("empty").is_dir());
    }

    #[test]
    fn whatever_leads_out_of_the_tree_is_refused_and_named() {
        for (entries, expected) in [
            (vec![(&b"../evil"[..], T::Regular, &b"x"[..])], "leads out"),
            (vec![(b"a/../../evil", T::Regular, b"x")], "leads out"),
            (vec![(b"/etc/evil", T::Regular, b"x")], "leads out"),
            (vec![(b"link", T::Symlink, b"/etc/passwd")], "out of the archive"),
            (vec![(b"a/link", T::Symlink, b"../../x")], "out of the archive"),
            (vec![(b"link", T::Link, b"/etc/passwd")], "neither a file"),
            (vec![(b"pipe", T::Fifo, b"")], "neither a file"),
            (vec![(b"null", T::Char, b"")], "neither a file"),
            (vec![(b"a", T::Symlink, b"b"), (b"a/c", T::Symlink, b"x")], "behind a link"),
            (vec![(b"bad\xff", T::Regular, b"x")], "not UTF-8"),
        ] {
            let (directory, result) = attempt(&tar(&entries), Limits::default());
            let error = result.expect_err(expected);
            assert!(error.contains(expected), "{error}");
            assert!(!directory.path().join("evil").exists() && !Path::new("/etc/evil").exists());
        }
    }

    #[test]
    fn a_file_is_never_written_through_a_link() {
        let archive = tar(&[(b"sub", T::Symlink, b"."), (b"sub/file", T::Regular, b"x")]);
        let (_directory, result) = attempt(&archive, Limits::default());
        result.expect_err("a folder and a link of the same name");
    }

    #[test]
    fn a_bomb_is_stopped_at_the_limit() {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gz.write_all(&tar(&[(b"zeros", T::Regular, &vec![0; 8 << 20])])).expect("compresses");
        let bomb = gz.finish().expect("compresses");
        assert!(bomb.len() < 20_000);
        let (_directory, result) = attempt(&bomb, Limits { bytes: 1 << 20, entries: 10 });
        assert!(result.expect_err("too large").contains("more than 1 MiB"));
        let many: Vec<_> = (0..20).map(|_| (&b"a"[..], T::Regular, &b""[..])).collect();
        let (_directory, result) = attempt(&tar(&many), Limits { bytes: 1 << 20, entries: 10 });
        assert!(result.expect_err("too many").contains("more than 10 entries"));
    }

    #[test]
    fn what_is_no_archive_or_is_cut_short_is_said_to_be() {
        for garbage in [&b""[..], b"hello", b"PK\x03\x04garbage", b"\x1f\x8bgarbage", &[0xff; 2000]] {
            let (_directory, result) = attempt(garbage, Limits::default());
            let error = result.expect_err("no archive");
            assert!(error.contains("archive"), "{error}");
        }
    }

    #[test]
    fn a_zip_is_unpacked_under_the_same_rules() {
        let zip = |name: &str| {
            let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
            zip.start_file(name, zip::write::SimpleFileOptions::default()).expect("starts");
            zip.write_all(b"hi").expect("writes");
            zip.finish().expect("finishes").into_inner()
        };
        let (directory, result) = attempt(&zip("a/b.txt"), Limits::default());
        result.expect("unpacks");
        assert_eq!(std::fs::read(directory.path().join("target/a/b.txt")).expect("reads"), b"hi");
        let (_directory, result) = attempt(&zip("../evil"), Limits::default());
        assert!(result.expect_err("refused").contains("leads out"));
    }
}
