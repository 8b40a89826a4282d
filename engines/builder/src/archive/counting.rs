//! What comes out of an archive, counted before it is kept.

use std::io::{Error, ErrorKind, Read, Seek, SeekFrom};

use super::{ArchiveError, Limits, refused};

/// Bytes of all names and links of an archive together: they are kept in memory.
const MOST_NAMES: u64 = 64 << 20;

/// Why an archive that holds too much is refused.
pub fn too_much(bytes: u64) -> String {
    format!("the archive unpacks to more than {} MiB; leave out what is built or downloaded (.capsuleignore)", bytes >> 20)
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

    /// Counts an entry whose name has so many bytes.
    pub fn entry(&mut self, name: usize) -> Result<(), ArchiveError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(refused(format!("the archive holds more than {} entries", self.limits.entries)));
        }
        self.name(name)
    }

    /// Counts a name that is kept beside an entry's own.
    pub fn name(&mut self, bytes: usize) -> Result<(), ArchiveError> {
        self.names += bytes as u64;
        if self.names > MOST_NAMES {
            return Err(refused(format!("the names in the archive have more than {} MiB", MOST_NAMES >> 20)));
        }
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }
}

/// A reader that fails once more was read than may be.
#[derive(Debug)]
pub struct Limited<R> {
    inner: R,
    most: u64,
    read: u64,
}

impl<R> Limited<R> {
    pub fn new(inner: R, most: u64) -> Self {
        Self { inner, most, read: 0 }
    }
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.read += read as u64;
        if self.read > self.most {
            return Err(Error::new(ErrorKind::FileTooLarge, too_much(self.most)));
        }
        Ok(read)
    }
}

impl<R: Seek> Seek for Limited<R> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.inner.seek(to)
    }
}
