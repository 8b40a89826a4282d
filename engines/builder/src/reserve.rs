//! The part of the host's disk that stays free.

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes that may be written between two checks.
const CHECK_INTERVAL: u64 = 64 << 20;
/// Bytes that a file, folder or link takes beside its content: a block of the file system.
const ENTRY_BYTES: u64 = 4 << 10;

/// Returns how many bytes are free, if the file system reports it.
type FreeBytes = Arc<dyn Fn() -> Option<u64> + Send + Sync>;

/// Bytes of the disk that must stay free.
#[derive(Clone)]
pub struct DiskReserve {
    bytes: u64,
    check_interval: u64,
    free_bytes: FreeBytes,
}

impl std::fmt::Debug for DiskReserve {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DiskReserve({} bytes)", self.bytes)
    }
}

impl DiskReserve {
    /// A reserve of `bytes` on the file system of `directory`.
    #[must_use]
    pub fn new(directory: &Path, bytes: u64) -> Self {
        let directory: PathBuf = directory.into();
        let free_bytes = move || {
            let system = rustix::fs::statvfs(&directory).ok()?;
            Some(system.f_bavail.saturating_mul(system.f_frsize))
        };
        Self { bytes, check_interval: CHECK_INTERVAL, free_bytes: Arc::new(free_bytes) }
    }

    /// Returns how many bytes may be written before the reserve is reached; `u64::MAX` if that is unknown.
    #[must_use]
    pub fn available(&self) -> u64 {
        (self.free_bytes)().map_or(u64::MAX, |free| free.saturating_sub(self.bytes))
    }

    /// Checks that no less than the reserve is free.
    ///
    /// # Errors
    /// When less is free.
    pub fn check(&self) -> Result<(), ReserveReached> {
        match (self.free_bytes)() {
            Some(free) if free < self.bytes => Err(ReserveReached { free, reserve: self.bytes }),
            _ => Ok(()),
        }
    }

    /// A reserve of one byte on a disk whose free bytes are `free`, one after the other; checked for each entry.
    #[cfg(test)]
    pub fn scripted(free: impl IntoIterator<Item = u64>) -> Self {
        let free = std::sync::Mutex::new(free.into_iter().collect::<std::collections::VecDeque<_>>());
        let free_bytes = move || Some(free.lock().expect("not poisoned").pop_front().unwrap_or(0));
        Self { bytes: 1, check_interval: 1, free_bytes: Arc::new(free_bytes) }
    }
}

/// Less of the disk is free than its reserve; the text is for the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReserveReached {
    free: u64,
    reserve: u64,
}

impl std::fmt::Display for ReserveReached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "The server has {} MiB of disk free and keeps {} MiB in reserve.", self.free >> 20, self.reserve >> 20)
    }
}

impl std::error::Error for ReserveReached {}

/// Checks a reserve again and again while files are written.
#[derive(Debug)]
pub struct ReserveGuard<'a> {
    reserve: &'a DiskReserve,
    /// Bytes written since the last check.
    unchecked: u64,
}

impl<'a> ReserveGuard<'a> {
    pub fn new(reserve: &'a DiskReserve) -> Self {
        Self { reserve, unchecked: 0 }
    }

    /// Counts a file, folder or link that was made.
    pub fn count_entry(&mut self) -> Result<(), ReserveReached> {
        self.count(ENTRY_BYTES)
    }

    /// Counts bytes of content that were written.
    pub fn count(&mut self, bytes: u64) -> Result<(), ReserveReached> {
        self.unchecked += bytes;
        if self.unchecked < self.reserve.check_interval {
            return Ok(());
        }
        self.unchecked = 0;
        self.reserve.check()
    }

    /// Bytes that may be written at once, before they are counted.
    pub fn chunk(&self) -> u64 {
        self.reserve.check_interval
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::{CHECK_INTERVAL, DiskReserve, ReserveGuard};

    #[test]
    fn the_reserve_is_checked_every_64_mib_and_for_many_small_files() {
        let checks = Arc::new(AtomicU64::new(0));
        let count = checks.clone();
        let mut reserve = DiskReserve::new(std::path::Path::new("/"), 1);
        reserve.free_bytes = Arc::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
            Some(1)
        });
        let mut guard = ReserveGuard::new(&reserve);
        for _ in 0..16 {
            guard.count(CHECK_INTERVAL / 8).expect("enough is free");
        }
        assert_eq!(checks.load(Ordering::Relaxed), 2);
        for _ in 0..(16 << 10) {
            guard.count_entry().expect("enough is free");
        }
        assert_eq!(checks.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn less_free_than_the_reserve_is_an_error_that_names_both() {
        let reserve = DiskReserve::new(std::path::Path::new("/"), u64::MAX);
        assert_eq!(reserve.available(), 0);
        let error = reserve.check().expect_err("no disk is that large").to_string();
        assert!(error.contains("MiB of disk free") && error.contains("in reserve"), "{error}");
        DiskReserve::new(std::path::Path::new("/"), 0).check().expect("a reserve of nothing");
    }
}
