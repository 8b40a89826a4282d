//! Backups of an installation: its databases, keys and files, to a local directory or S3, made while it runs.
//!
//! Everything is cut into pieces of at most a few MiB, each compressed, encrypted, and named by a keyed digest of
//! what is in it. A full backup begins a generation and writes every piece; an incremental one writes those
//! that its generation does not have yet. A manifest, sealed too, says what a backup consists of. A database
//! is read as it is at one moment, and told as rows: what was backed up of one engine can be restored on
//! the other.

mod files;
mod repository;
mod staging;

use std::path::{Path, PathBuf};

use capsule_contracts::Timestamp;
use capsule_store::copy::{CHUNK, Filling, Row, Snapshot, Summary, Summing, Table};
use capsule_store::{Databases, DerivedKey, Migrations};
use serde::{Deserialize, Serialize};

pub use repository::{Repository, Stored};
pub use staging::{INSIDE, Staging};

/// What went wrong, for people.
#[derive(Debug)]
pub struct BackupError(pub String);

impl std::fmt::Display for BackupError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BackupError {}

fn failed(what: &str, cause: &dyn std::fmt::Display) -> BackupError {
    BackupError(format!("{what}: {cause}"))
}

type Result<T> = std::result::Result<T, BackupError>;

/// Whether a backup stands by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Begins a generation: nothing written earlier is needed.
    Full,
    /// Takes what has not changed from its generation.
    Incremental,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

/// An installation.
#[derive(Clone, Debug)]
pub struct Installation {
    pub data: PathBuf,
    pub databases: Databases,
    /// Every service, with its migrations.
    pub services: Vec<(&'static str, Migrations)>,
}

/// What a backup consists of.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    kind: Kind,
    created_at: Timestamp,
    databases: Vec<Database>,
    files: Vec<files::Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Database {
    service: String,
    versions: Vec<(String, i32)>,
    tables: Vec<(Table, Summary, Vec<String>)>,
}

/// The format that this program writes.
const FORMAT: u32 = 1;

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub id: String,
    pub rows: u64,
    pub files: u64,
    /// Pieces that were written, or read.
    pub pieces: u64,
    /// Bytes of these, as they are stored.
    pub bytes: u64,
}

/// Rows that were told to others shortly before a backup are told again after it is restored: the others' copies
/// are of other moments. Whoever knows an event already takes no notice.
const TELL_AGAIN_MICROSECONDS: i64 = 3600 * 1_000_000;

impl Repository {
    /// Makes a backup. An incremental one is full where there is nothing to go on from.
    ///
    /// # Errors
    /// When something cannot be read, or the place cannot be written.
    pub async fn create(&self, installation: &Installation, kind: Kind) -> Result<Report> {
        let mut writing = self.begin(kind).await?;
        let mut databases = Vec::new();
        let mut rows = 0;
        for (service, _) in &installation.services {
            let snapshot = Snapshot::take(&installation.databases, service).await.map_err(|error| failed(service, &error))?;
            let Some(snapshot) = snapshot else { continue };
            let mut tables = Vec::new();
            for table in snapshot.tables() {
                let (mut summing, mut pieces, mut from) = (Summing::default(), Vec::new(), 0);
                loop {
                    let chunk = snapshot.rows(table, from).await.map_err(|error| failed(service, &error))?;
                    chunk.iter().for_each(|row| summing.add(row));
                    if !chunk.is_empty() {
                        let bytes = serde_json::to_vec(&chunk).map_err(|error| failed(&table.name, &error))?;
                        pieces.push(writing.piece(&bytes).await?);
                    }
                    from += chunk.len();
                    if chunk.len() < CHUNK {
                        break;
                    }
                }
                let summary = summing.end();
                rows += summary.count;
                tables.push((table.clone(), summary, pieces));
            }
            let versions = snapshot.versions().await.map_err(|error| failed(service, &error))?;
            databases.push(Database { service: (*service).into(), versions, tables });
        }
        let files = files::back_up(&installation.data, &mut writing).await?;
        let count = files.len() as u64;
        let kind = writing.kind();
        let manifest = Manifest { format: FORMAT, kind, created_at: Timestamp::now(), databases, files };
        let manifest = serde_json::to_vec(&manifest).map_err(|error| failed("the manifest", &error))?;
        let (id, pieces, bytes) = writing.finish(&manifest).await?;
        Ok(Report { id, rows, files: count, pieces, bytes })
    }

    /// Reads a backup to its last byte, and compares it with what it says of itself.
    ///
    /// # Errors
    /// When a piece is missing, damaged, or was made under another key.
    pub async fn verify(&self, stored: &Stored) -> Result<Report> {
        let manifest = self.manifest(stored).await?;
        let mut report = Report { id: stored.id.clone(), ..Report::default() };
        for database in &manifest.databases {
            for (table, expected, pieces) in &database.tables {
                let mut summing = Summing::default();
                for piece in pieces {
                    let rows = self.rows(stored, piece).await?;
                    rows.iter().for_each(|row| summing.add(row));
                }
                report.pieces += pieces.len() as u64;
                report.rows += expected.count;
                if summing.end() != *expected {
                    return Err(BackupError(format!("{}: {} is not what it was", database.service, table.name)));
                }
            }
        }
        for entry in &manifest.files {
            report.files += 1;
            for piece in entry.pieces() {
                let bytes = self.piece(&stored.generation, piece).await?;
                report.pieces += 1;
                report.bytes += bytes.len() as u64;
            }
        }
        Ok(report)
    }

    /// Restores the files of a backup into a fresh directory; the databases follow.
    ///
    /// # Errors
    /// When the backup is not whole, or the files cannot be written.
    pub async fn restore(&self, stored: &Stored, staging: &Staging) -> Result<Restoring<'_>> {
        let manifest = self.manifest(stored).await?;
        files::restore(staging.path(), &manifest.files, self, &stored.generation).await?;
        Ok(Restoring { repository: self, stored: stored.clone(), manifest })
    }

    async fn manifest(&self, stored: &Stored) -> Result<Manifest> {
        let manifest: Manifest =
            serde_json::from_slice(&self.sealed_manifest(stored).await?).map_err(|error| failed("the manifest", &error))?;
        if manifest.format > FORMAT {
            return Err(BackupError(format!("{} was made by a newer version of Capsule: use that to read it", stored.id)));
        }
        Ok(manifest)
    }

    async fn rows(&self, stored: &Stored, piece: &str) -> Result<Vec<Row>> {
        serde_json::from_slice(&self.piece(&stored.generation, piece).await?).map_err(|error| failed(piece, &error))
    }
}

/// A backup whose files are in place, and whose databases are to follow: where they are kept is in one of these
/// files.
#[derive(Debug)]
pub struct Restoring<'a> {
    repository: &'a Repository,
    stored: Stored,
    manifest: Manifest,
}

impl Restoring<'_> {
    /// Fills the databases.
    ///
    /// # Errors
    /// When one is not empty, or a row does not fit.
    pub async fn databases(self, installation: &Installation) -> Result<Report> {
        let mut report = Report { id: self.stored.id.clone(), files: self.manifest.files.len() as u64, ..Report::default() };
        for database in &self.manifest.databases {
            let known = installation.services.iter().find(|(service, _)| *service == database.service);
            let (service, migrations) = known.ok_or_else(|| {
                BackupError(format!("the service {} is not known here: use the newer version", database.service))
            })?;
            let filling = Filling::begin(&installation.databases, service, migrations, &database.versions).await;
            let filling = filling.map_err(|error| failed(service, &error))?;
            for (table, expected, pieces) in &database.tables {
                let mut summing = Summing::default();
                for piece in pieces {
                    let mut rows = self.repository.rows(&self.stored, piece).await?;
                    rows.iter().for_each(|row| summing.add(row));
                    tell_again(table, &mut rows, self.manifest.created_at);
                    filling.write(table, &rows).await.map_err(|error| failed(service, &error))?;
                }
                report.pieces += pieces.len() as u64;
                report.rows += expected.count;
                if summing.end() != *expected {
                    return Err(BackupError(format!("{service}: {} is not what it was; nothing of it was restored", table.name)));
                }
            }
            filling.commit().await.map_err(|error| failed(service, &error))?;
        }
        Ok(report)
    }
}

fn tell_again(table: &Table, rows: &mut [Row], created_at: Timestamp) {
    let Some(at) = table.columns.iter().position(|(name, _)| name == "relayed_at").filter(|_| table.name == "outbox") else {
        return;
    };
    for row in rows {
        if row[at].as_i64().is_some_and(|relayed| relayed > created_at.0 - TELL_AGAIN_MICROSECONDS) {
            row[at] = serde_json::Value::Null;
        }
    }
}

/// The key that backups of an installation are encrypted with. Keep a copy of it elsewhere: without it a backup
/// is worth nothing.
#[derive(Clone, Debug)]
pub struct BackupKey(DerivedKey);

impl BackupKey {
    /// Reads the key from a file, or makes one there.
    ///
    /// # Errors
    /// When it can be neither.
    pub fn open(file: &Path) -> Result<Self> {
        let keyring = capsule_store::Keyring::open(file).map_err(|error| failed(&file.display().to_string(), &error))?;
        Ok(Self(keyring.derive("backup")))
    }
}
