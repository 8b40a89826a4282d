//! Checks the size of a zip's directory before the library reads all of it into memory.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};

use zip::ZipArchive;

use super::{ArchiveError, Limits, damaged, refused};

/// The signature of a directory entry.
const SIGNATURE: [u8; 4] = *b"PK\x01\x02";
/// Bytes of the fixed part of a directory entry.
const HEADER: usize = 46;
/// Names, comments and extra fields of all entries together.
const MAX_BYTES: u64 = 64 << 20;

/// Opens a zip if its directory is within the limits.
pub fn open(file: File, limits: Limits) -> Result<ZipArchive<BufReader<File>>, ArchiveError> {
    let mut file = file;
    check_directory(&mut file, limits)?;
    file.seek(SeekFrom::Start(0)).map_err(damaged)?;
    ZipArchive::new(BufReader::new(file)).map_err(damaged)
}

/// Counts everything that looks like a directory entry, anywhere in the file. If a zip has several directories, each has at
/// most as many entries.
fn check_directory(file: &mut File, limits: Limits) -> Result<(), ArchiveError> {
    let (mut entries, mut bytes) = (0, 0);
    let mut buffer = vec![0; 1 << 20];
    let mut kept = 0;
    loop {
        let read = file.read(&mut buffer[kept..]).map_err(damaged)?;
        let length = kept + read;
        let is_end = read == 0;
        // An entry that crosses the end of the buffer is checked in the next round.
        let until = if is_end { length } else { length.saturating_sub(HEADER) };
        let mut at = 0;
        while let Some(found) = find(&buffer[at..until.max(at)]) {
            at += found;
            let varying = buffer.get(at + 28..at + 34).filter(|_| at + 34 <= length);
            let sizes = varying
                .map(|sizes| sizes.chunks_exact(2).map(|pair| u64::from(u16::from_le_bytes([pair[0], pair[1]]))).sum::<u64>());
            entries += 1;
            bytes += sizes.unwrap_or_default();
            at += SIGNATURE.len();
        }
        if entries > limits.entries {
            return Err(refused(format!("the archive holds more than {} entries", limits.entries)));
        }
        if bytes > MAX_BYTES {
            return Err(refused(format!("the names in the archive have more than {} MiB", MAX_BYTES >> 20)));
        }
        if is_end {
            return Ok(());
        }
        // A signature may begin in the last three bytes.
        let rest = at.max(until.saturating_sub(SIGNATURE.len() - 1));
        buffer.copy_within(rest..length, 0);
        kept = length - rest;
    }
}

/// The position of the first complete signature.
fn find(bytes: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|byte| *byte == SIGNATURE[0]) {
        let at = from + at;
        if bytes[at..].starts_with(&SIGNATURE) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}
