//! Storage of backups: `<generation>/pieces/<name>` and `<generation>/<id>.manifest`, in a directory or an S3 bucket.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::sync::Arc;

use bytes::Bytes;
use capsule_contracts::Timestamp;
use capsule_resilience::{Guard, Policy};
use capsule_store::DerivedKey;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use futures_util::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::Serialize;

use crate::{BackupError, BackupKey, Kind, Result, failed};

/// A directory or bucket with backups.
#[derive(Clone, Debug)]
pub struct Repository {
    store: Arc<dyn ObjectStore>,
    prefix: String,
    key: DerivedKey,
    guard: Guard,
}

/// A backup in a repository.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct StoredBackup {
    /// Time and kind, such as `20261121T121530.123456Z-full`.
    pub id: String,
    /// The id of the full backup that it is based on, or is.
    pub generation: String,
    pub created_at: Timestamp,
}

impl Repository {
    /// Opens the repository at `location`: a directory, or `s3://bucket/prefix` with credentials in the environment
    /// (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`).
    ///
    /// # Errors
    /// When the location is invalid, or the directory cannot be created.
    pub fn open(location: &str, key: BackupKey) -> Result<Self> {
        let (store, prefix): (Arc<dyn ObjectStore>, String) = match location.strip_prefix("s3://") {
            Some(rest) => {
                // Fails if the process has already installed a provider, which is fine.
                let _ = rustls::crypto::ring::default_provider().install_default();
                let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                let plain = std::env::var("AWS_ENDPOINT").is_ok_and(|endpoint| endpoint.starts_with("http://"));
                let builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_allow_http(plain);
                (Arc::new(builder.build().map_err(|error| failed(location, &error))?), format!("{}/", prefix.trim_matches('/')))
            }
            None => {
                std::fs::create_dir_all(location).map_err(|error| failed(location, &error))?;
                (Arc::new(LocalFileSystem::new_with_prefix(location).map_err(|error| failed(location, &error))?), String::new())
            }
        };
        Ok(Self {
            store,
            prefix: prefix.trim_start_matches('/').into(),
            key: key.0,
            guard: Guard::new(Policy::new("the backup location")),
        })
    }

    fn path(&self, name: &str) -> Path {
        Path::from(format!("{}{name}", self.prefix))
    }

    async fn put(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        let (store, path, bytes) = (self.store.clone(), self.path(name), Bytes::from(bytes));
        let put = self.guard.call(move || {
            let (store, path, bytes) = (store.clone(), path.clone(), bytes.clone());
            async move {
                store
                    .put(&path, bytes.into())
                    .await
                    .inspect_err(|error| tracing::warn!(%error, "cannot write to the backup location"))
            }
        });
        put.await.map(|_| ()).map_err(|problem| failed(name, &problem.detail))
    }

    async fn get(&self, name: &str) -> Result<Vec<u8>> {
        let (store, path) = (self.store.clone(), self.path(name));
        let got = self.guard.call(move || {
            let (store, path) = (store.clone(), path.clone());
            async move {
                match store.get(&path).await {
                    Ok(found) => found.bytes().await.map(Some),
                    Err(object_store::Error::NotFound { .. }) => Ok(None),
                    Err(error) => Err(error),
                }
            }
        });
        let got = got.await.map_err(|problem| failed(name, &problem.detail))?;
        got.map(|bytes| bytes.to_vec()).ok_or_else(|| BackupError(format!("{name} is missing")))
    }

    /// The names of all objects below a prefix.
    async fn list_names(&self, below: &str) -> Result<Vec<String>> {
        let (store, path) = (self.store.clone(), self.path(below));
        let listed = self.guard.call(move || {
            let (store, path) = (store.clone(), path.clone());
            async move { store.list(Some(&path)).map_ok(|object| object.location.to_string()).try_collect::<Vec<_>>().await }
        });
        let listed = listed.await.map_err(|problem| failed("the list of backups", &problem.detail))?;
        Ok(listed.into_iter().filter_map(|name| name.strip_prefix(&self.prefix).map(str::to_owned)).collect())
    }

    /// All backups, oldest first.
    ///
    /// # Errors
    /// When the repository does not respond.
    pub async fn list(&self) -> Result<Vec<StoredBackup>> {
        let mut all: Vec<StoredBackup> = self
            .list_names("")
            .await?
            .iter()
            .filter_map(|name| {
                let (generation, manifest) = name.split_once('/')?;
                let id = manifest.strip_suffix(".manifest")?;
                Some(StoredBackup { id: id.into(), generation: generation.into(), created_at: parse_time(id)? })
            })
            .collect();
        all.sort();
        Ok(all)
    }

    /// The backup with this id, or the newest.
    ///
    /// # Errors
    /// When there is no such backup, or the repository does not respond.
    pub async fn find(&self, id: Option<&str>) -> Result<StoredBackup> {
        let all = self.list().await?;
        let found = match id {
            Some(id) => all.into_iter().find(|stored| stored.id == id),
            None => all.into_iter().last(),
        };
        found.ok_or_else(|| {
            BackupError(id.map_or_else(|| "no backup here yet".into(), |id| format!("backup {id} does not exist")))
        })
    }

    /// Removes all but the newest `generations`, and returns how many were removed.
    ///
    /// # Errors
    /// When the repository does not respond.
    pub async fn prune(&self, generations: usize) -> Result<usize> {
        let mut all: Vec<String> = self.list().await?.into_iter().map(|stored| stored.generation).collect();
        all.dedup();
        let old = all.len().saturating_sub(generations.max(1));
        for generation in &all[..old] {
            // Manifests first, so that a half-removed backup is no longer listed.
            let mut names = self.list_names(generation).await?;
            names.sort_by_key(|name| !name.ends_with(".manifest"));
            for name in names {
                self.store.delete(&self.path(&name)).await.map_err(|error| failed(&name, &error))?;
            }
        }
        Ok(old)
    }

    /// Begins a backup.
    pub(crate) async fn begin(&self, kind: Kind) -> Result<BackupWriter<'_>> {
        let newest = self.list().await?.into_iter().last().filter(|_| kind == Kind::Incremental);
        let kind = if newest.is_some() { Kind::Incremental } else { Kind::Full };
        let id = format!("{}-{}", format_time(Timestamp::now()), kind.name());
        let (generation, known) = match newest {
            Some(stored) => {
                let names = self.list_names(&format!("{}/pieces", stored.generation)).await?;
                let known = names.iter().filter_map(|name| name.rsplit('/').next().map(str::to_owned)).collect();
                (stored.generation, known)
            }
            None => (id.clone(), HashSet::new()),
        };
        Ok(BackupWriter { repository: self, id, generation, kind, known, pieces: 0, bytes: 0 })
    }

    /// The decrypted content of a piece.
    pub(crate) async fn piece(&self, generation: &str, name: &str) -> Result<Vec<u8>> {
        self.open_sealed(&format!("{generation}/pieces/{name}"), name).await
    }

    pub(crate) async fn sealed_manifest(&self, stored: &StoredBackup) -> Result<Vec<u8>> {
        self.open_sealed(&format!("{}/{}.manifest", stored.generation, stored.id), &stored.id).await
    }

    async fn open_sealed(&self, path: &str, context: &str) -> Result<Vec<u8>> {
        let sealed = self.get(path).await?;
        let packed = self.key.open(context, &sealed);
        let packed =
            packed.ok_or_else(|| BackupError(format!("cannot decrypt {path}: it is damaged, or this is not its key")))?;
        let mut bytes = Vec::new();
        GzDecoder::new(packed.as_slice()).read_to_end(&mut bytes).map_err(|error| failed(path, &error))?;
        Ok(bytes)
    }
}

/// Writes one backup.
#[derive(Debug)]
pub struct BackupWriter<'a> {
    repository: &'a Repository,
    id: String,
    generation: String,
    kind: Kind,
    /// Names of the pieces that the generation already has.
    known: HashSet<String>,
    pieces: u64,
    bytes: u64,
}

impl BackupWriter<'_> {
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Writes a piece unless its generation already has it. Returns its name.
    pub async fn piece(&mut self, bytes: &[u8]) -> Result<String> {
        let name = self.repository.key.sign(bytes);
        if self.known.insert(name.clone()) {
            let sealed = self.seal(&name, bytes)?;
            self.pieces += 1;
            self.bytes += sealed.len() as u64;
            self.repository.put(&format!("{}/pieces/{name}", self.generation), sealed).await?;
        }
        Ok(name)
    }

    /// Writes the manifest, which completes the backup. Returns its id, and the number of pieces and bytes written.
    pub async fn finish(self, manifest: &[u8]) -> Result<(String, u64, u64)> {
        let sealed = self.seal(&self.id, manifest)?;
        self.repository.put(&format!("{}/{}.manifest", self.generation, self.id), sealed).await?;
        Ok((self.id, self.pieces, self.bytes))
    }

    fn seal(&self, context: &str, bytes: &[u8]) -> Result<Vec<u8>> {
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(bytes).map_err(|error| failed(context, &error))?;
        let packed = packed.finish().map_err(|error| failed(context, &error))?;
        self.repository.key.seal(context, &packed).map_err(|problem| failed(context, &problem))
    }
}

/// `2026-11-21T12:15:30.123456Z` as `20261121T121530.123456Z`.
fn format_time(at: Timestamp) -> String {
    at.to_string().replace(['-', ':'], "")
}

/// The time in a backup's id.
fn parse_time(id: &str) -> Option<Timestamp> {
    let (date, rest) = id.split_once('-')?.0.split_once('T')?;
    let (year, month, day) = (date.get(..4)?, date.get(4..6)?, date.get(6..)?);
    let (hour, minute, second) = (rest.get(..2)?, rest.get(2..4)?, rest.get(4..)?);
    serde_json::from_value(format!("{year}-{month}-{day}T{hour}:{minute}:{second}").into()).ok()
}

#[cfg(test)]
mod tests {
    use super::{format_time, parse_time};
    use capsule_contracts::Timestamp;

    #[test]
    fn an_id_contains_the_time_of_the_backup() {
        let now = Timestamp::now();
        assert_eq!(parse_time(&format!("{}-full", format_time(now))), Some(now));
        assert_eq!(parse_time("pieces"), None);
    }
}
