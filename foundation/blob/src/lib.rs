//! Content-addressed storage for uploads: files in a local directory, named by the SHA-256 of their content.
//! Only digests are sent over the bus, never the content.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

/// An unfinished blob that was not written to for this long is abandoned.
const ABANDONED_AFTER: std::time::Duration = std::time::Duration::from_secs(3600);

/// The free disk space is checked each time this many bytes were written.
const RESERVE_CHECK_BYTES: u64 = 4 << 20;

/// A directory of blobs.
#[derive(Clone, Debug)]
pub struct Blobs {
    directory: PathBuf,
    reserve: u64,
}

impl Blobs {
    /// Opens the blobs in `directory`, and removes abandoned ones.
    ///
    /// # Errors
    /// When the directory cannot be created.
    pub fn open(directory: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(directory.join("unfinished"))?;
        let blobs = Self { directory: directory.into(), reserve: 0 };
        // Other processes may be writing newer ones.
        if let Some(before) = SystemTime::now().checked_sub(ABANDONED_AFTER) {
            blobs.remove_unfinished(before);
        }
        Ok(blobs)
    }

    /// Makes writes fail while the disk has less than `reserve` bytes free.
    #[must_use]
    pub fn with_reserve(self, reserve: u64) -> Self {
        Self { reserve, ..self }
    }

    /// Removes unfinished blobs that were last written to before `before`.
    pub fn remove_unfinished(&self, before: SystemTime) {
        for path in files_older_than(&self.directory.join("unfinished"), before) {
            let _ = std::fs::remove_file(path);
        }
    }

    /// The digests of blobs that were last written to before `before`.
    #[must_use]
    pub fn older_than(&self, before: SystemTime) -> Vec<String> {
        let names = files_older_than(&self.directory, before).into_iter();
        names.filter_map(|path| path.file_name()?.to_str().map(str::to_owned)).collect()
    }

    /// Begins a blob. `name` must be unique among unfinished blobs.
    ///
    /// # Errors
    /// When the file cannot be created. `StorageFull` when less than the reserve is free.
    pub async fn begin(&self, name: &str) -> std::io::Result<Writer> {
        let path = self.directory.join("unfinished").join(name);
        let file = File::create(&path).await?;
        let mut writer = Writer {
            directory: self.directory.clone(),
            path,
            file,
            digest: Sha256::new(),
            bytes: 0,
            is_committed: false,
            reserve: self.reserve,
            unchecked: 0,
        };
        writer.check_reserve()?;
        Ok(writer)
    }

    /// The path of a blob's file. The digest must be 64 hexadecimal digits.
    ///
    /// # Errors
    /// `InvalidInput` for a malformed digest, `NotFound` if there is no such blob.
    pub fn path(&self, digest: &str) -> std::io::Result<PathBuf> {
        if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let path = self.directory.join(digest);
        if path.is_file() { Ok(path) } else { Err(std::io::ErrorKind::NotFound.into()) }
    }

    /// Removes a blob, if it exists.
    ///
    /// # Errors
    /// When it exists and cannot be removed.
    pub fn remove(&self, digest: &str) -> std::io::Result<()> {
        match self.path(digest) {
            Ok(path) => std::fs::remove_file(path),
            Err(_) => Ok(()),
        }
    }
}

/// The files in a directory that were last written to before `before`.
fn files_older_than(directory: &Path, before: SystemTime) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let is_old = |entry: &std::fs::DirEntry| {
        let kind = entry.metadata();
        kind.is_ok_and(|kind| kind.is_file() && kind.modified().is_ok_and(|written| written < before))
    };
    entries.filter(is_old).map(|entry| entry.path()).collect()
}

/// Writes a blob. Dropping it before [`Writer::commit`] removes what was written.
#[derive(Debug)]
pub struct Writer {
    directory: PathBuf,
    path: PathBuf,
    file: File,
    digest: Sha256,
    bytes: u64,
    is_committed: bool,
    reserve: u64,
    /// Bytes written since the free space was last checked.
    unchecked: u64,
}

impl Writer {
    fn check_reserve(&mut self) -> std::io::Result<()> {
        self.unchecked = 0;
        let free = rustix::fs::statvfs(&self.directory).map(|system| system.f_bavail.saturating_mul(system.f_frsize));
        // If the free space is unknown, the write itself fails when the disk is full.
        if free.is_ok_and(|free| free < self.reserve) { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// When they cannot be written. `StorageFull` when less than the reserve is free.
    pub async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.unchecked += bytes.len() as u64;
        if self.unchecked >= RESERVE_CHECK_BYTES {
            self.check_reserve()?;
        }
        self.file.write_all(bytes).await?;
        self.digest.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// The number of bytes written so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Syncs the blob to disk and makes it available. Returns its digest and its size in bytes.
    ///
    /// # Errors
    /// When it cannot be synced or renamed.
    pub async fn commit(mut self) -> std::io::Result<(String, u64)> {
        self.file.flush().await?;
        self.file.sync_all().await?;
        let digest = hex::encode(std::mem::take(&mut self.digest).finalize());
        tokio::fs::rename(&self.path, self.directory.join(&digest)).await?;
        self.is_committed = true;
        Ok((digest, self.bytes))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.is_committed {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Blobs;

    #[tokio::test]
    async fn a_committed_blob_is_found_by_its_digest_and_a_dropped_one_is_removed() {
        let directory = tempfile::tempdir().expect("tempdir");
        let blobs = Blobs::open(directory.path()).expect("opens");
        let mut writer = blobs.begin("one").await.expect("begins");
        writer.write(b"hello").await.expect("writes");
        let (digest, bytes) = writer.commit().await.expect("keeps");
        assert_eq!(bytes, 5);
        assert_eq!(digest, "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824");
        assert_eq!(std::fs::read(blobs.path(&digest).expect("is there")).expect("reads"), b"hello");
        let mut dropped = blobs.begin("two").await.expect("begins");
        dropped.write(b"x").await.expect("writes");
        drop(dropped);
        assert_eq!(std::fs::read_dir(directory.path().join("unfinished")).expect("lists").count(), 0);
        blobs.path("../../etc/passwd").expect_err("no digest");
    }

    #[tokio::test]
    async fn a_write_that_would_use_the_disk_reserve_fails() {
        let directory = tempfile::tempdir().expect("tempdir");
        let blobs = Blobs::open(directory.path()).expect("opens").with_reserve(u64::MAX);
        let error = blobs.begin("one").await.expect_err("no disk is that large");
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        assert_eq!(std::fs::read_dir(directory.path().join("unfinished")).expect("lists").count(), 0);
    }
}
