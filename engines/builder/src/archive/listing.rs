//! Reads the files of an archive without unpacking it: lists them once, and reads each on demand.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use capsule_buildplan::{Listing, MAX_FILE_BYTES};
use flate2::read::GzDecoder;

use super::counting::{Counter, Limited};
use super::{
    ArchiveError, Format, Limits, MAX_PATH_BYTES, check_link, damaged, format, inside, read_error, refused, tar_entries, text,
    zip_directory,
};

/// How much of a file is read: enough to detect that it is too large for a plan.
const MAX_READ_BYTES: u64 = MAX_FILE_BYTES + 1;
/// Links that are followed to one file.
const MAX_HOPS: usize = 8;

/// Lists a `tar`, `tar.gz` or `zip`.
///
/// # Errors
/// When it has another format, is damaged, or has an entry that is not allowed.
pub fn listing(archive: &Path) -> Result<Listing<'static>, ArchiveError> {
    listing_of(File::open(archive).map_err(damaged)?, tempfile::tempfile)
}

/// Lists an open archive. A compressed tar is decompressed to the file that `spool` creates.
///
/// # Errors
/// As [`listing`].
pub fn listing_of(archive: File, spool: impl FnOnce() -> std::io::Result<File>) -> Result<Listing<'static>, ArchiveError> {
    match format(&archive)? {
        Format::Zip => zip(archive),
        Format::Tar => {
            let found = tar_files(tar::Archive::new(&archive).entries_with_seek().map_err(damaged)?)?;
            tar(archive, found)
        }
        Format::TarGz => {
            let unpacked = spool().map_err(damaged)?;
            let reader = Limited::new(GzDecoder::new(BufReader::new(archive)), Limits::default().bytes);
            let mut archive = tar::Archive::new(Copying { reader, copy: BufWriter::with_capacity(1 << 16, &unpacked) });
            let found = tar_files(archive.entries().map_err(read_error)?)?;
            archive.into_inner().copy.flush().map_err(damaged)?;
            tar(unpacked, found)
        }
    }
}

/// Files and links by their paths.
struct Found<P> {
    counter: Counter,
    places: BTreeMap<String, P>,
    links: BTreeMap<String, String>,
    /// Folders that only paths imply.
    folders: HashSet<String>,
}

impl<P: Copy> Found<P> {
    fn new() -> Self {
        Self {
            counter: Counter::new(Limits::default()),
            places: BTreeMap::new(),
            links: BTreeMap::new(),
            folders: HashSet::new(),
        }
    }

    /// The places of all files and of the targets of links.
    fn resolved(mut self) -> Result<BTreeMap<String, P>, ArchiveError> {
        let mut by_link = Vec::new();
        for (path, target) in &self.links {
            check_link(Path::new(path), target)?;
            let mut at = resolve(path, target);
            for _ in 0..MAX_HOPS {
                let Some(next) = at.as_ref().and_then(|at| self.links.get(at).zip(Some(at))) else { break };
                at = resolve(next.1, next.0);
            }
            if let Some(place) = at.and_then(|at| self.places.get(&at)) {
                by_link.push((path.clone(), *place));
            }
        }
        self.places.extend(by_link);
        Ok(self.places)
    }
}

/// Counts the folders above a path that were not seen before.
fn count_folders(path: &str, folders: &mut HashSet<String>, counter: &mut Counter) -> Result<(), ArchiveError> {
    let mut rest = path;
    while let Some((folder, _)) = rest.rsplit_once('/') {
        if !folders.insert(folder.to_owned()) {
            break;
        }
        counter.count_entry(folder.len())?;
        rest = folder;
    }
    Ok(())
}

/// The path that a link leads to, from its text alone.
fn resolve(link: &str, target: &str) -> Option<String> {
    let mut path = PathBuf::from(link);
    path.pop();
    for part in Path::new(target).components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::ParentDir if path.pop() => {}
            Component::CurDir => {}
            _ => return None,
        }
    }
    path.into_os_string().into_string().ok()
}

/// Copies what is read. A listing that fails early has not decompressed the whole archive.
struct Copying<R, W> {
    reader: R,
    copy: W,
}

impl<R: Read, W: Write> Read for Copying<R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.copy.write_all(&buffer[..read])?;
        Ok(read)
    }
}

/// The offset of a file in a tar, and its size.
type Place = (u64, u64);

fn tar_files<R: Read>(entries: tar::Entries<'_, R>) -> Result<Found<Place>, ArchiveError> {
    let mut found = Found::new();
    let (places, links, folders) = (&mut found.places, &mut found.links, &mut found.folders);
    tar_entries::for_each(entries, &mut found.counter, |name, link, entry, counter| {
        let Some(path) = path_of(name)? else { return Ok(()) };
        count_folders(&path, folders, counter)?;
        let kind = entry.header().entry_type();
        if kind.is_file() {
            links.remove(&path);
            places.insert(path, (entry.raw_file_position(), entry.size()));
        } else if let Some(link) = link.filter(|_| kind.is_symlink()) {
            links.insert(path, link.to_owned());
        }
        Ok(())
    })?;
    Ok(found)
}

fn tar(file: File, found: Found<Place>) -> Result<Listing<'static>, ArchiveError> {
    let places = found.resolved()?;
    let paths: Vec<String> = places.keys().cloned().collect();
    Ok(Listing::new(paths, move |path| {
        let (at, size) = places.get(path)?;
        let mut content = vec![0; usize::try_from(*size.min(&MAX_READ_BYTES)).ok()?];
        file.read_exact_at(&mut content, *at).ok()?;
        Some(content)
    }))
}

fn zip(file: File) -> Result<Listing<'static>, ArchiveError> {
    let mut archive = zip_directory::open(file, Limits::default())?;
    let mut found = Found::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(damaged)?;
        let name = text(entry.name_raw())?;
        found.counter.count_entry(name.len())?;
        let Some(path) = path_of(&name)? else { continue };
        count_folders(&path, &mut found.folders, &mut found.counter)?;
        if entry.is_file() {
            found.places.insert(path, index);
        } else if entry.is_symlink() {
            drop(entry);
            let mut link = Vec::new();
            let entry = archive.by_index(index).map_err(damaged)?;
            entry.take(MAX_PATH_BYTES as u64 + 1).read_to_end(&mut link).map_err(damaged)?;
            found.counter.count_name(link.len())?;
            found.links.insert(path, text(&link)?);
        }
    }
    let places = found.resolved()?;
    let (paths, archive): (Vec<String>, _) = (places.keys().cloned().collect(), RefCell::new(archive));
    Ok(Listing::new(paths, move |path| {
        let (mut archive, mut content) = (archive.borrow_mut(), Vec::new());
        archive.by_index(*places.get(path)?).ok()?.take(MAX_READ_BYTES).read_to_end(&mut content).ok()?;
        Some(content)
    }))
}

fn path_of(name: &str) -> Result<Option<String>, ArchiveError> {
    let path = inside(name)?;
    path.map(|path| path.into_os_string().into_string().map_err(|_| refused("a name in the archive is not UTF-8"))).transpose()
}
