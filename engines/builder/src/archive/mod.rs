//! Unpacks an uploaded `tar`, `tar.gz` or `zip`. Its size, names and links are untrusted.
//!
//! Only regular files, folders and symbolic links within the tree are created. Links are created last, so that no file is
//! written through one. All decompressed bytes count towards the limit: content, headers, long names and padding.

mod counting;
mod listing;
mod tar_entries;
mod zip_directory;

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, Permissions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use capsule_buildplan::truncate_to;
use capsule_runtime::trees;
use flate2::read::GzDecoder;

use counting::{Counter, Limited};

pub use listing::{listing, listing_of};

use crate::reserve::{DiskReserve, ReserveGuard, ReserveReached};

/// Limits of an archive.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// All decompressed bytes.
    pub bytes: u64,
    /// Files, links and folders, including folders that only paths imply.
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 2 << 30, entries: 200_000 }
    }
}

/// Bytes of a path in an archive, and of one of its parts: the limits of Linux.
const MAX_PATH_BYTES: usize = 4096;
const MAX_PART_BYTES: usize = 255;
/// Parts of a path.
const MAX_PARTS: usize = 128;
/// Bytes of a text from the archive that a message shows.
const MAX_SHOWN_BYTES: usize = 200;

/// Why an archive was refused; the text is for the user.
#[derive(Debug)]
pub struct ArchiveError(pub String);

impl std::fmt::Display for ArchiveError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ArchiveError {}

impl From<ReserveReached> for ArchiveError {
    fn from(error: ReserveReached) -> Self {
        Self(error.to_string())
    }
}

/// The beginning of a text from the archive: a name may have millions of bytes.
fn excerpt(text: &str) -> String {
    truncate_to(text, MAX_SHOWN_BYTES)
}

fn refused(text: impl Into<String>) -> ArchiveError {
    ArchiveError(text.into())
}

fn damaged(error: impl std::fmt::Display) -> ArchiveError {
    refused(format!("the archive is damaged or cut short: {}", excerpt(&error.to_string())))
}

/// The error of a failed read: the archive is too large, or damaged.
fn read_error(error: std::io::Error) -> ArchiveError {
    if error.kind() == std::io::ErrorKind::FileTooLarge { refused(error.to_string()) } else { damaged(error) }
}

/// Formats of archives.
enum Format {
    Tar,
    TarGz,
    Zip,
}

/// Detects the format of an archive.
fn format(mut file: &File) -> Result<Format, ArchiveError> {
    let mut block = Vec::new();
    file.take(512).read_to_end(&mut block).map_err(damaged)?;
    file.seek(SeekFrom::Start(0)).map_err(damaged)?;
    match block.as_slice() {
        [0x1f, 0x8b, ..] => Ok(Format::TarGz),
        [b'P', b'K', 3 | 5 | 7, _, ..] => Ok(Format::Zip),
        [] => Err(refused("the archive is empty")),
        block if is_tar(block) => Ok(Format::Tar),
        _ => Err(refused("unknown archive format: use a tar, tar.gz or zip archive of the folder")),
    }
}

/// Whether a file begins like a `tar`: with a block that contains its own checksum, or a block of zeros.
fn is_tar(block: &[u8]) -> bool {
    let Ok(block) = <&[u8; 512]>::try_from(block) else { return false };
    let sum: u32 = block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) }).sum();
    let recorded = tar::Header::from_byte_slice(block).cksum();
    block.iter().all(|byte| *byte == 0) || recorded.is_ok_and(|recorded| recorded == sum)
}

/// The path of an entry below the archive's folder; `None` for that folder itself.
fn inside(name: &str) -> Result<Option<PathBuf>, ArchiveError> {
    if name.len() > MAX_PATH_BYTES || name.contains('\0') {
        return Err(refused(format!(
            "the path `{}` in the archive is longer than {MAX_PATH_BYTES} bytes or holds a NUL byte",
            excerpt(name)
        )));
    }
    let mut path = PathBuf::new();
    let mut parts = 0;
    for part in Path::new(name).components() {
        match part {
            Component::Normal(part) if part.len() > MAX_PART_BYTES => {
                return Err(refused(format!("a name in the path `{}` is longer than {MAX_PART_BYTES} bytes", excerpt(name))));
            }
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::RootDir | Component::ParentDir | Component::Prefix(_) => {
                return Err(refused(format!("`{}` leads out of the archive", excerpt(name))));
            }
        }
        parts += 1;
    }
    if parts > MAX_PARTS {
        return Err(refused(format!("`{}` is nested more than {MAX_PARTS} folders deep", excerpt(name))));
    }
    Ok((!path.as_os_str().is_empty()).then_some(path))
}

/// Refuses a link that leads out of the archive's folder. Its target may have `..` only at its beginning: after a name,
/// which may be another link, the text alone does not determine where `..` leads.
fn check_link(path: &Path, target: &str) -> Result<(), ArchiveError> {
    let mut depth = path.components().count() - 1;
    let mut has_name = false;
    let leaves = || {
        let (path, target) = (excerpt(&path.to_string_lossy()), excerpt(target));
        refused(format!("`{path}` is a link to `{target}`, out of the archive's folder"))
    };
    if target.len() > MAX_PATH_BYTES {
        return Err(refused(format!("the link `{}` is longer than {MAX_PATH_BYTES} bytes", excerpt(&path.to_string_lossy()))));
    }
    for part in Path::new(target).components() {
        match part {
            Component::Normal(_) => has_name = true,
            Component::CurDir => {}
            Component::ParentDir if has_name => {
                let (path, target) = (excerpt(&path.to_string_lossy()), excerpt(target));
                return Err(refused(format!("`{path}` is a link to `{target}`, which may have `..` only at its beginning")));
            }
            Component::ParentDir => depth = depth.checked_sub(1).ok_or_else(leaves)?,
            Component::RootDir | Component::Prefix(_) => return Err(leaves()),
        }
    }
    Ok(())
}

/// Unpacks `archive` into the empty folder `target`. What comes out can be read by everyone who may enter
/// `target`, whatever this process's file mode mask is. After an error, `target` is empty again.
///
/// # Errors
/// When it is none of the known kinds, is damaged, or holds what it must not; or when less of the disk is left than
/// `reserve`, which is checked while files are written.
pub fn unpack(archive: &Path, target: &Path, limits: Limits, reserve: &DiskReserve) -> Result<(), ArchiveError> {
    let unpacked = unpack_all(archive, target, limits, ReserveGuard::new(reserve));
    if unpacked.is_err() {
        for entry in std::fs::read_dir(target).into_iter().flatten().flatten() {
            // The first error is the one to report.
            let _ = trees::remove(&entry.path());
        }
    }
    unpacked
}

fn unpack_all(archive: &Path, target: &Path, limits: Limits, guard: ReserveGuard<'_>) -> Result<(), ArchiveError> {
    let counter = Counter::new(limits);
    let mut unpacking = Unpacking { target, limits, counter, guard, bytes: 0, made: HashSet::new(), links: BTreeMap::new() };
    let file = File::open(archive).map_err(damaged)?;
    match format(&file)? {
        Format::TarGz => unpacking.tar(GzDecoder::new(BufReader::new(file)))?,
        Format::Zip => unpacking.zip(file)?,
        Format::Tar => unpacking.tar(BufReader::new(file))?,
    }
    unpacking.make_links()?;
    if unpacking.counter.is_empty() {
        return Err(refused("the archive holds no files; is it a tar, tar.gz or zip archive of the folder?"));
    }
    Ok(())
}

struct Unpacking<'a> {
    target: &'a Path,
    limits: Limits,
    counter: Counter,
    guard: ReserveGuard<'a>,
    /// Decompressed bytes of a zip, whose entries are decompressed one by one.
    bytes: u64,
    /// Folders that were created.
    made: HashSet<PathBuf>,
    links: BTreeMap<PathBuf, PathBuf>,
}

impl Unpacking<'_> {
    fn tar(&mut self, reader: impl Read) -> Result<(), ArchiveError> {
        let mut archive = tar::Archive::new(Limited::new(reader, self.limits.bytes));
        let entries = archive.entries().map_err(read_error)?;
        // Taken out of `self`, which the closure borrows as well.
        let mut counter = std::mem::replace(&mut self.counter, Counter::new(self.limits));
        let unpacked = tar_entries::for_each(entries, &mut counter, |name, link, entry, counter| {
            let Some(path) = inside(name)? else { return Ok(()) };
            let header = entry.header();
            let kind = header.entry_type();
            if kind.is_dir() {
                self.folder(&path, counter)
            } else if kind.is_file() {
                let executable = header.mode().is_ok_and(|mode| mode & 0o100 != 0);
                self.file(&path, entry, executable, counter)
            } else if kind.is_symlink() {
                self.link(path, link.ok_or_else(|| refused(format!("`{}` is a link to nowhere", excerpt(name))))?)
            } else {
                Err(refused(format!("`{}` is neither a file, a folder nor a symbolic link", excerpt(name))))
            }
        });
        self.counter = counter;
        unpacked
    }

    fn zip(&mut self, file: File) -> Result<(), ArchiveError> {
        let mut archive = zip_directory::open(file, self.limits)?;
        let mut counter = std::mem::replace(&mut self.counter, Counter::new(self.limits));
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).map_err(damaged)?;
            let name = text(entry.name_raw())?;
            counter.count_entry(name.len())?;
            let Some(path) = inside(&name)? else { continue };
            if entry.is_dir() {
                self.folder(&path, &mut counter)?;
            } else if entry.is_symlink() {
                let mut link = Vec::new();
                (&mut entry).take(MAX_PATH_BYTES as u64 + 1).read_to_end(&mut link).map_err(damaged)?;
                counter.count_name(link.len())?;
                self.link(path, &text(&link)?)?;
            } else {
                let executable = entry.unix_mode().is_some_and(|mode| mode & 0o100 != 0);
                self.file(&path, &mut entry, executable, &mut counter)?;
            }
        }
        self.counter = counter;
        Ok(())
    }

    /// Creates a folder and its parents; each counts as an entry.
    fn folder(&mut self, path: &Path, counter: &mut Counter) -> Result<(), ArchiveError> {
        if path.as_os_str().is_empty() || self.made.contains(path) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.folder(parent, counter)?;
        }
        counter.count_entry(path.as_os_str().len())?;
        let here = |error: std::io::Error| refused(format!("`{}`: {error}", excerpt(&path.to_string_lossy())));
        let target = self.target.join(path);
        match std::fs::create_dir(&target) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists || !target.is_dir() => return Err(here(error)),
            _ => {}
        }
        std::fs::set_permissions(&target, Permissions::from_mode(0o755)).map_err(here)?;
        self.made.insert(path.to_owned());
        Ok(self.guard.count_entry()?)
    }

    fn file(&mut self, path: &Path, reader: &mut impl Read, executable: bool, counter: &mut Counter) -> Result<(), ArchiveError> {
        if let Some(parent) = path.parent() {
            self.folder(parent, counter)?;
        }
        let here = |error: std::io::Error| refused(format!("`{}`: {error}", excerpt(&path.to_string_lossy())));
        let mode = if executable { 0o755 } else { 0o644 };
        let target = self.target.join(path);
        let mut file =
            std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(target).map_err(here)?;
        file.set_permissions(Permissions::from_mode(mode)).map_err(here)?;
        self.guard.count_entry()?;
        let left = self.limits.bytes - self.bytes;
        let mut buffer = vec![0; 64 << 10];
        let mut written = 0;
        loop {
            let read = reader.read(&mut buffer).map_err(read_error)?;
            if read == 0 {
                break;
            }
            written += read as u64;
            if written > left {
                return Err(refused(counting::too_large(self.limits.bytes)));
            }
            file.write_all(&buffer[..read]).map_err(here)?;
            self.guard.count(read as u64)?;
        }
        self.bytes += written;
        self.links.remove(path);
        Ok(())
    }

    /// Records a link to be created last.
    fn link(&mut self, path: PathBuf, target: &str) -> Result<(), ArchiveError> {
        check_link(&path, target)?;
        self.links.insert(path, target.into());
        Ok(())
    }

    fn make_links(&mut self) -> Result<(), ArchiveError> {
        let mut counter = std::mem::replace(&mut self.counter, Counter::new(self.limits));
        let links = std::mem::take(&mut self.links);
        for (path, target) in &links {
            // A link whose path goes through another link would be created elsewhere.
            if path.ancestors().skip(1).any(|parent| links.contains_key(parent)) {
                return Err(refused(format!("the path of `{}` goes through a link", excerpt(&path.to_string_lossy()))));
            }
            if let Some(parent) = path.parent() {
                self.folder(parent, &mut counter)?;
            }
            let here = |error: std::io::Error| refused(format!("`{}`: {error}", excerpt(&path.to_string_lossy())));
            symlink(target, self.target.join(path)).map_err(here)?;
            self.guard.count_entry()?;
        }
        self.counter = counter;
        Ok(())
    }
}

/// Decodes a name.
fn text(bytes: &[u8]) -> Result<String, ArchiveError> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => {
            let begin = String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_SHOWN_BYTES)]);
            Err(refused(format!("the name `{begin}` in the archive is not UTF-8")))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use super::{DiskReserve, Limits, unpack};

    fn attempt(archive: &[u8], limits: Limits) -> (tempfile::TempDir, Result<(), String>) {
        attempt_with(archive, limits, &DiskReserve::new(Path::new("/"), 0))
    }

    fn attempt_with(archive: &[u8], limits: Limits, reserve: &DiskReserve) -> (tempfile::TempDir, Result<(), String>) {
        let directory = tempfile::tempdir().expect("tempdir");
        let file = directory.path().join("archive");
        std::fs::write(&file, archive).expect("writes");
        let target = directory.path().join("target");
        std::fs::create_dir(&target).expect("makes the target");
        let result = unpack(&file, &target, limits, reserve).map_err(|error| error.to_string());
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
    fn files_folders_and_inner_links_are_unpacked_without_special_bits() {
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
    fn entries_that_lead_out_of_the_tree_are_refused() {
        for (entries, expected) in [
            (vec![(&b"../evil"[..], T::Regular, &b"x"[..])], "leads out"),
            (vec![(b"a/../../evil", T::Regular, b"x")], "leads out"),
            (vec![(b"/etc/evil", T::Regular, b"x")], "leads out"),
            (vec![(b"link", T::Symlink, b"/etc/passwd")], "out of the archive"),
            (vec![(b"a/link", T::Symlink, b"../../x")], "out of the archive"),
            (vec![(b"d/s", T::Symlink, b".."), (b"x", T::Symlink, b"d/s/../../etc")], "only at its beginning"),
            (vec![(b"link", T::Link, b"/etc/passwd")], "neither a file"),
            (vec![(b"pipe", T::Fifo, b"")], "neither a file"),
            (vec![(b"null", T::Char, b"")], "neither a file"),
            (vec![(b"a", T::Symlink, b"b"), (b"a/c", T::Symlink, b"x")], "through a link"),
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
    fn unpacking_stops_at_the_reserve_and_leaves_nothing() {
        let archive = tar(&[
            (b"a/first", T::Regular, &vec![1; 200 << 10]),
            (b"link", T::Symlink, b"a/first"),
            (b"second", T::Regular, b"x"),
        ]);
        // One check for each folder, file and link, and one for each 64 KiB of content.
        for checks in 0..8 {
            let reserve = DiskReserve::scripted(vec![1; checks]);
            let (directory, result) = attempt_with(&archive, Limits::default(), &reserve);
            let error = result.expect_err("the disk runs full");
            assert!(error.contains("in reserve"), "{error}");
            let target = directory.path().join("target");
            assert_eq!(std::fs::read_dir(target).expect("it is kept").count(), 0, "after {checks} checks");
        }
        let (_directory, result) = attempt_with(&archive, Limits::default(), &DiskReserve::scripted(vec![1; 200]));
        result.expect("enough is free");
    }

    #[test]
    fn an_unknown_or_truncated_archive_is_refused() {
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
