//! Online backups of an installation (databases, keys and files) to a local directory or S3.
//!
//! Everything is split into pieces of at most a few MiB, each compressed, encrypted, and named by a keyed digest of
//! its content. A full backup begins a generation and writes every piece; an incremental one writes the pieces
//! that its generation does not have yet. An encrypted manifest lists what a backup consists of. A database
//! is read from a consistent snapshot and stored as rows, so a backup of one engine can be restored on
//! the other.

mod files;
mod repository;
mod staging;

use std::path::{Path, PathBuf};

use capsule_contracts::Timestamp;
use capsule_store::copy::{CHUNK_ROWS, DatabaseImport, Row, Snapshot, Summarizer, Summary, Table};
use capsule_store::{Databases, DerivedKey, Migrations};
use serde::{Deserialize, Serialize};

pub use repository::{Repository, StoredBackup};
pub use staging::{STAGING_DIRECTORY, Staging};

/// Why a backup or restore failed, as a message for the operator.
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

/// Whether a backup is complete by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Begins a generation. Needs no earlier backup.
    Full,
    /// Reuses the unchanged pieces of its generation.
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

/// The parts of an installation that are backed up.
#[derive(Clone, Debug)]
pub struct Installation {
    pub data: PathBuf,
    pub databases: Databases,
    /// Every service, with its migrations.
    pub services: Vec<(&'static str, Migrations)>,
}

/// The content of a backup.
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

/// The version of the manifest that this program writes.
const FORMAT_VERSION: u32 = 1;

/// What a backup, verification or restore processed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub id: String,
    pub rows: u64,
    pub files: u64,
    /// Number of pieces written or read.
    pub pieces: u64,
    /// Their total size in bytes, as written or read.
    pub bytes: u64,
}

/// Events relayed within this time before a backup are relayed again after a restore, because each service's
/// database was read at another moment. Consumers ignore events that they have already processed.
const RELAY_AGAIN_MICROSECONDS: i64 = 3600 * 1_000_000;

impl Repository {
    /// Creates a backup. The first one is full, whatever `kind` is.
    ///
    /// # Errors
    /// When data cannot be read, or the repository cannot be written.
    pub async fn create(&self, installation: &Installation, kind: Kind) -> Result<Report> {
        let mut writer = self.begin(kind).await?;
        let mut databases = Vec::new();
        let mut rows = 0;
        for (service, _) in &installation.services {
            let snapshot = Snapshot::take(&installation.databases, service).await.map_err(|error| failed(service, &error))?;
            let Some(snapshot) = snapshot else { continue };
            let mut tables = Vec::new();
            for table in snapshot.tables() {
                let (mut summarizer, mut pieces, mut from) = (Summarizer::default(), Vec::new(), 0);
                loop {
                    let chunk = snapshot.rows(table, from).await.map_err(|error| failed(service, &error))?;
                    chunk.iter().for_each(|row| summarizer.add(row));
                    if !chunk.is_empty() {
                        let bytes = serde_json::to_vec(&chunk).map_err(|error| failed(&table.name, &error))?;
                        pieces.push(writer.piece(&bytes).await?);
                    }
                    from += chunk.len();
                    if chunk.len() < CHUNK_ROWS {
                        break;
                    }
                }
                let summary = summarizer.finish();
                rows += summary.count;
                tables.push((table.clone(), summary, pieces));
            }
            let versions = snapshot.versions().await.map_err(|error| failed(service, &error))?;
            databases.push(Database { service: (*service).into(), versions, tables });
        }
        let files = files::back_up(&installation.data, &mut writer).await?;
        let count = files.len() as u64;
        let kind = writer.kind();
        let manifest = Manifest { format: FORMAT_VERSION, kind, created_at: Timestamp::now(), databases, files };
        let manifest = serde_json::to_vec(&manifest).map_err(|error| failed("the manifest", &error))?;
        let (id, pieces, bytes) = writer.finish(&manifest).await?;
        Ok(Report { id, rows, files: count, pieces, bytes })
    }

    /// Reads a whole backup and compares its rows with the summaries in its manifest.
    ///
    /// # Errors
    /// When a piece is missing, damaged, or was encrypted with another key.
    pub async fn verify(&self, stored: &StoredBackup) -> Result<Report> {
        let manifest = self.manifest(stored).await?;
        let mut report = Report { id: stored.id.clone(), ..Report::default() };
        for database in &manifest.databases {
            for (table, expected, pieces) in &database.tables {
                let mut summarizer = Summarizer::default();
                for piece in pieces {
                    let rows = self.rows(stored, piece).await?;
                    rows.iter().for_each(|row| summarizer.add(row));
                }
                report.pieces += pieces.len() as u64;
                report.rows += expected.count;
                if summarizer.finish() != *expected {
                    return Err(BackupError(format!(
                        "{}: the rows of {} differ from the manifest",
                        database.service, table.name
                    )));
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

    /// Restores the files of a backup into a fresh directory. [`DatabaseRestore::run`] restores the databases afterwards.
    ///
    /// # Errors
    /// When the backup is incomplete or damaged, or the files cannot be written.
    pub async fn restore_files(&self, stored: &StoredBackup, staging: &Staging) -> Result<DatabaseRestore<'_>> {
        let manifest = self.manifest(stored).await?;
        files::restore(staging.path(), &manifest.files, self, &stored.generation).await?;
        Ok(DatabaseRestore { repository: self, stored: stored.clone(), manifest })
    }

    async fn manifest(&self, stored: &StoredBackup) -> Result<Manifest> {
        let manifest: Manifest =
            serde_json::from_slice(&self.sealed_manifest(stored).await?).map_err(|error| failed("the manifest", &error))?;
        if manifest.format > FORMAT_VERSION {
            return Err(BackupError(format!("{} was made by a newer version of Capsule; use that version", stored.id)));
        }
        Ok(manifest)
    }

    async fn rows(&self, stored: &StoredBackup, piece: &str) -> Result<Vec<Row>> {
        serde_json::from_slice(&self.piece(&stored.generation, piece).await?).map_err(|error| failed(piece, &error))
    }
}

/// The second half of a restore. It follows the files, because `capsule.toml` configures where the databases are.
#[derive(Debug)]
pub struct DatabaseRestore<'a> {
    repository: &'a Repository,
    stored: StoredBackup,
    manifest: Manifest,
}

impl DatabaseRestore<'_> {
    /// Restores the databases.
    ///
    /// # Errors
    /// When a database is not empty, or a row does not match its table.
    pub async fn run(self, installation: &Installation) -> Result<Report> {
        let mut report = Report { id: self.stored.id.clone(), files: self.manifest.files.len() as u64, ..Report::default() };
        for database in &self.manifest.databases {
            let known = installation.services.iter().find(|(service, _)| *service == database.service);
            let (service, migrations) = known.ok_or_else(|| {
                BackupError(format!("the service {} is from a newer version of Capsule; use that version", database.service))
            })?;
            let import = DatabaseImport::begin(&installation.databases, service, migrations, &database.versions).await;
            let import = import.map_err(|error| failed(service, &error))?;
            for (table, expected, pieces) in &database.tables {
                let mut summarizer = Summarizer::default();
                for piece in pieces {
                    let mut rows = self.repository.rows(&self.stored, piece).await?;
                    rows.iter().for_each(|row| summarizer.add(row));
                    relay_again(table, &mut rows, self.manifest.created_at);
                    import.write(table, &rows).await.map_err(|error| failed(service, &error))?;
                }
                report.pieces += pieces.len() as u64;
                report.rows += expected.count;
                if summarizer.finish() != *expected {
                    return Err(BackupError(format!(
                        "{service}: the rows of {} differ from the manifest; the database was not restored",
                        table.name
                    )));
                }
            }
            import.commit().await.map_err(|error| failed(service, &error))?;
        }
        Ok(report)
    }
}

fn relay_again(table: &Table, rows: &mut [Row], created_at: Timestamp) {
    let Some(at) = table.columns.iter().position(|(name, _)| name == "relayed_at").filter(|_| table.name == "outbox") else {
        return;
    };
    for row in rows {
        if row[at].as_i64().is_some_and(|relayed| relayed > created_at.0 - RELAY_AGAIN_MICROSECONDS) {
            row[at] = serde_json::Value::Null;
        }
    }
}

/// The key that backups are encrypted with. Keep a copy of it elsewhere: without it, no backup can be restored.
#[derive(Clone, Debug)]
pub struct BackupKey(DerivedKey);

impl BackupKey {
    /// Reads the key from a file, or creates the file with a new key.
    ///
    /// # Errors
    /// When the file can be neither read nor created.
    pub fn open(file: &Path) -> Result<Self> {
        let keyring = capsule_store::Keyring::open(file).map_err(|error| failed(&file.display().to_string(), &error))?;
        Ok(Self(keyring.derive("backup")))
    }
}
