//! The files of an archive without unpacking it: listed once, and each read when it is asked for.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use capsule_buildplan::{Listing, MOST_BYTES};
use flate2::read::GzDecoder;

use super::{ArchiveError, Format, Limits, damaged, inside, open, refused, text};

/// Of a larger file so much is read that it is seen to be larger.
const READ: u64 = MOST_BYTES + 1;

/// Lists a `tar`, `tar.gz` or `zip`. Links are left out.
///
/// # Errors
/// When it is none of them, is damaged, or holds what it must not.
pub fn listing(archive: &Path) -> Result<Listing<'static>, ArchiveError> {
    match open(archive)? {
        (Format::Zip, file) => zip(file),
        (Format::Tar, file) => tar(file),
        (Format::TarGz, file) => {
            let mut unpacked = tempfile::tempfile().map_err(damaged)?;
            let most = Limits::default().bytes;
            let bytes =
                std::io::copy(&mut GzDecoder::new(BufReader::new(file)).take(most + 1), &mut unpacked).map_err(damaged)?;
            if bytes > most {
                return Err(refused(format!("the archive unpacks to more than {} MiB", most >> 20)));
            }
            tar(unpacked)
        }
    }
}

fn tar(mut file: File) -> Result<Listing<'static>, ArchiveError> {
    use std::io::Seek;
    file.rewind().map_err(damaged)?;
    let mut places = BTreeMap::new();
    let mut archive = tar::Archive::new(&file);
    for entry in archive.entries_with_seek().map_err(damaged)? {
        let entry = entry.map_err(damaged)?;
        if entry.header().entry_type().is_file()
            && let Some(path) = path_of(&entry.path_bytes())?
        {
            places.insert(path, (entry.raw_file_position(), entry.size()));
        }
    }
    let paths: Vec<String> = places.keys().cloned().collect();
    Ok(Listing::new(paths, move |path| {
        let (at, size) = places.get(path)?;
        let mut content = vec![0; usize::try_from(*size.min(&READ)).ok()?];
        file.read_exact_at(&mut content, *at).ok()?;
        Some(content)
    }))
}

fn zip(file: File) -> Result<Listing<'static>, ArchiveError> {
    let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
    let mut places = BTreeMap::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(damaged)?;
        if entry.is_file()
            && let Some(path) = path_of(entry.name_raw())?
        {
            places.insert(path, index);
        }
    }
    let (paths, archive): (Vec<String>, _) = (places.keys().cloned().collect(), RefCell::new(archive));
    Ok(Listing::new(paths, move |path| {
        let (mut archive, mut content) = (archive.borrow_mut(), Vec::new());
        archive.by_index(*places.get(path)?).ok()?.take(READ).read_to_end(&mut content).ok()?;
        Some(content)
    }))
}

fn path_of(name: &[u8]) -> Result<Option<String>, ArchiveError> {
    Ok(inside(&text(name)?)?.and_then(|path| path.into_os_string().into_string().ok()))
}
