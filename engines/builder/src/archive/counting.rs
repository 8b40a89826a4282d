//! Counts entries and bytes of an archive against its limits.

use std::io::{Error, ErrorKind, Read, Seek, SeekFrom};

use super::{ArchiveError, Limits, refused};

/// Bytes of all names and link targets of an archive together; they are kept in memory.
const MAX_NAME_BYTES: u64 = 64 << 20;

/// The message for an archive that is too large.
pub fn too_large(bytes: u64) -> String {
    format!("the archive unpacks to more than {} MiB; list built and downloaded files in .capsuleignore", bytes >> 20)
}

/// Entries and the bytes of their names.
#[derive(Debug)]
pub struct Counter {
    limits: Limits,
    entries: u64,
    names: u64,
}

impl Counter {
    pub fn new(limits: Limits) -> Self {
        Self { limits, entries: 0, names: 0 }
    }

    /// Counts an entry and the bytes of its name.
    pub fn count_entry(&mut self, name: usize) -> Result<(), ArchiveError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(refused(format!("the archive holds more than {} entries", self.limits.entries)));
        }
        self.count_name(name)
    }

    /// Counts the bytes of a further name, such as the target of a link.
    pub fn count_name(&mut self, bytes: usize) -> Result<(), ArchiveError> {
        self.names += bytes as u64;
        if self.names > MAX_NAME_BYTES {
            return Err(refused(format!("the names in the archive have more than {} MiB", MAX_NAME_BYTES >> 20)));
        }
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }
}

/// A reader that fails after more than `max_bytes` bytes.
#[derive(Debug)]
pub struct Limited<R> {
    inner: R,
    max_bytes: u64,
    read: u64,
}

impl<R> Limited<R> {
    pub fn new(inner: R, max_bytes: u64) -> Self {
        Self { inner, max_bytes, read: 0 }
    }
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.read += read as u64;
        if self.read > self.max_bytes {
            return Err(Error::new(ErrorKind::FileTooLarge, too_large(self.max_bytes)));
        }
        Ok(read)
    }
}

impl<R: Seek> Seek for Limited<R> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.inner.seek(to)
    }
}
