//! Large things, kept by what they are: uploads named by the SHA-256 of their bytes, in a local
//! directory. They never go over the bus; their digests do.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

/// What nobody has written to for so long is not being written any more.
const ABANDONED: std::time::Duration = std::time::Duration::from_secs(3600);

/// The free space of the disk is looked at whenever so many bytes were written.
const CHECKED_EVERY: u64 = 4 << 20;

/// A directory of blobs.
#[derive(Clone, Debug)]
pub struct Blobs {
    directory: PathBuf,
    reserve: u64,
}

impl Blobs {
    /// Keeps blobs in `directory`, and forgets what was begun long ago and never finished.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(directory: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(directory.join("unfinished"))?;
        let blobs = Self { directory: directory.into(), reserve: 0 };
        // Other processes may be writing theirs.
        if let Some(before) = SystemTime::now().checked_sub(ABANDONED) {
            blobs.remove_unfinished(before);
        }
        Ok(blobs)
    }

    /// Refuses to write when the disk has less than `reserve` bytes free.
    #[must_use]
    pub fn with_reserve(self, reserve: u64) -> Self {
        Self { reserve, ..self }
    }

    /// Removes what was begun, never finished, and last written to before a moment.
    pub fn remove_unfinished(&self, before: SystemTime) {
        for path in old(&self.directory.join("unfinished"), before) {
            let _ = std::fs::remove_file(path);
        }
    }

    /// The digests of blobs that were kept before a moment.
    #[must_use]
    pub fn older_than(&self, before: SystemTime) -> Vec<String> {
        let names = old(&self.directory, before).into_iter();
        names.filter_map(|path| path.file_name()?.to_str().map(str::to_owned)).collect()
    }

    /// Begins a blob. `name` tells it from others under way.
    ///
    /// # Errors
    /// When the file cannot be made, or the reserve is reached: `StorageFull`.
    pub async fn begin(&self, name: &str) -> std::io::Result<Writer> {
        let path = self.directory.join("unfinished").join(name);
        let file = File::create(&path).await?;
        let mut writer = Writer {
            directory: self.directory.clone(),
            path,
            file,
            digest: Sha256::new(),
            bytes: 0,
            kept: false,
            reserve: self.reserve,
            unchecked: 0,
        };
        writer.check_reserve()?;
        Ok(writer)
    }

    /// Where a blob's bytes are. The digest must be 64 hexadecimal digits.
    ///
    /// # Errors
    /// When it is not, or there is no such blob.
    pub fn path(&self, digest: &str) -> std::io::Result<PathBuf> {
        if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let path = self.directory.join(digest);
        if path.is_file() { Ok(path) } else { Err(std::io::ErrorKind::NotFound.into()) }
    }

    /// Forgets a blob, if it is there.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove(&self, digest: &str) -> std::io::Result<()> {
        match self.path(digest) {
            Ok(path) => std::fs::remove_file(path),
            Err(_) => Ok(()),
        }
    }
}

/// The files of a directory that were last written to before a moment.
fn old(directory: &Path, before: SystemTime) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let is_old = |entry: &std::fs::DirEntry| {
        let kind = entry.metadata();
        kind.is_ok_and(|kind| kind.is_file() && kind.modified().is_ok_and(|written| written < before))
    };
    entries.filter(is_old).map(|entry| entry.path()).collect()
}

/// A blob being written. Dropped before it is kept, it leaves nothing.
#[derive(Debug)]
pub struct Writer {
    directory: PathBuf,
    path: PathBuf,
    file: File,
    digest: Sha256,
    bytes: u64,
    kept: bool,
    reserve: u64,
    /// Bytes written since the free space was looked at.
    unchecked: u64,
}

impl Writer {
    fn check_reserve(&mut self) -> std::io::Result<()> {
        self.unchecked = 0;
        let free = rustix::fs::statvfs(&self.directory).map(|system| system.f_bavail.saturating_mul(system.f_frsize));
        // Where it cannot be told, the disk itself is the limit.
        if free.is_ok_and(|free| free < self.reserve) { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// When the disk does not take them, or the reserve is reached: `StorageFull`.
    pub async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.unchecked += bytes.len() as u64;
        if self.unchecked >= CHECKED_EVERY {
            self.check_reserve()?;
        }
        self.file.write_all(bytes).await?;
        self.digest.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// How many bytes were written.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Keeps the blob for good; returns its digest and its size in bytes.
    ///
    /// # Errors
    /// When it cannot be made to last.
    pub async fn keep(mut self) -> std::io::Result<(String, u64)> {
        self.file.flush().await?;
        self.file.sync_all().await?;
        let digest = hex::encode(std::mem::take(&mut self.digest).finalize());
        tokio::fs::rename(&self.path, self.directory.join(&digest)).await?;
        self.kept = true;
        Ok((digest, self.bytes))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.kept {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Blobs;

    #[tokio::test]
    async fn a_blob_is_found_by_its_digest_and_one_not_kept_leaves_nothing() {
        let directory = tempfile::tempdir().expect("tempdir");
        let blobs = Blobs::open(directory.path()).expect("opens");
        let mut writer = blobs.begin("one").await.expect("begins");
        writer.write(b"hello").await.expect("writes");
        let (digest, bytes) = writer.keep().await.expect("keeps");
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
    async fn the_reserve_of_the_disk_is_not_given_away() {
        let directory = tempfile::tempdir().expect("tempdir");
        let blobs = Blobs::open(directory.path()).expect("opens").with_reserve(u64::MAX);
        let error = blobs.begin("one").await.expect_err("no disk is that large");
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        assert_eq!(std::fs::read_dir(directory.path().join("unfinished")).expect("lists").count(), 0);
    }
}
