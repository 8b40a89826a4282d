//! Where the services' databases are, and how they are connected to.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sea_orm::sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous};
use sea_orm::{ConnectOptions, ConnectionTrait, Database, DatabaseBackend, DatabaseConnection, Statement};

use crate::StoreError;

/// Readers that an embedded database has beside its one writer.
const READERS: u32 = 3;
/// How long a caller waits for a connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the services' databases are: one for each.
#[derive(Clone)]
pub enum Databases {
    /// Files `<service>.db` in this directory.
    Embedded(PathBuf),
    /// Databases `capsule_<service>` of a `PostgreSQL` server, made where they are missing.
    Postgres {
        /// `postgres://user:password@host:port`, with parameters behind a `?` if need be, without a database.
        url: String,
        /// The most connections that one service holds.
        connections: u32,
    },
}

impl std::fmt::Debug for Databases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Embedded(directory) => write!(f, "Embedded({})", directory.display()),
            // The address holds a password.
            Self::Postgres { connections, .. } => write!(f, "Postgres({connections} connections)"),
        }
    }
}

impl Databases {
    /// Whether a service's database is there.
    pub(crate) async fn has(&self, service: &str) -> Result<bool, StoreError> {
        match self {
            Self::Embedded(directory) => Ok(file(directory, service).exists()),
            Self::Postgres { url, .. } => {
                let server = postgres(url, "postgres", 1).await?;
                is_there(&server, &database(service)).await
            }
        }
    }

    /// Whether one of these services' databases is there, as a file.
    #[must_use]
    pub fn any(&self, services: &[&str]) -> bool {
        matches!(self, Self::Embedded(directory) if services.iter().any(|service| file(directory, service).exists()))
    }

    /// Connects to a service's database to write. It is made if it is missing.
    pub(crate) async fn writer(&self, service: &str) -> Result<DatabaseConnection, StoreError> {
        match self {
            Self::Embedded(directory) => embedded(directory, service, 1).await,
            Self::Postgres { url, connections } => {
                let name = database(service);
                create(url, &name).await?;
                postgres(url, &name, *connections).await
            }
        }
    }

    /// A session of its own on the server, which ends with the value. `None` where there is no server.
    pub(crate) async fn session(&self, service: &str) -> Result<Option<DatabaseConnection>, StoreError> {
        match self {
            Self::Embedded(_) => Ok(None),
            Self::Postgres { url, .. } => {
                let name = database(service);
                let mut options = options(address(url, &name), 1);
                options.idle_timeout(None).max_lifetime(None);
                Database::connect(options).await.map(Some).map_err(|cause| unreachable(&name, &cause))
            }
        }
    }

    /// Connects to a service's database to read; on a server, writers and readers share a pool.
    pub(crate) async fn readers(&self, service: &str, writer: &DatabaseConnection) -> Result<DatabaseConnection, StoreError> {
        match self {
            Self::Embedded(directory) => embedded(directory, service, READERS).await,
            Self::Postgres { .. } => Ok(writer.clone()),
        }
    }
}

fn file(directory: &Path, service: &str) -> PathBuf {
    directory.join(format!("{service}.db"))
}

fn database(service: &str) -> String {
    format!("capsule_{service}")
}

async fn embedded(directory: &Path, service: &str, connections: u32) -> Result<DatabaseConnection, StoreError> {
    let file = file(directory, service);
    // Made here, for its owner alone; SQLite gives its other files the mode of this one.
    let made = std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&file);
    made.map_err(|cause| StoreError(format!("cannot open the database {}: {cause}", file.display())))?;
    let mut options = options(format!("sqlite://{}?mode=rwc", file.display()), connections);
    options.map_sqlx_sqlite_opts(|options| {
        options
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(PATIENCE)
            .pragma("cache_size", "-512")
            // What is deleted is overwritten: an erased person is in no free page either.
            .pragma("secure_delete", "ON")
    });
    Database::connect(options).await.map_err(|cause| StoreError(format!("cannot open the database {}: {cause}", file.display())))
}

async fn postgres(url: &str, database: &str, connections: u32) -> Result<DatabaseConnection, StoreError> {
    Database::connect(options(address(url, database), connections)).await.map_err(|cause| unreachable(database, &cause))
}

fn address(url: &str, database: &str) -> String {
    let (server, parameters) = url.split_once('?').unwrap_or((url, ""));
    format!("{}/{database}?{parameters}", server.trim_end_matches('/'))
}

/// What the server says names the user and the database, never the password.
fn unreachable(database: &str, cause: &sea_orm::DbErr) -> StoreError {
    StoreError(format!("cannot connect to the PostgreSQL database {database}: {cause}"))
}

/// Makes a database unless it is there.
async fn create(url: &str, database: &str) -> Result<(), StoreError> {
    let server = postgres(url, "postgres", 1).await?;
    let failed = |cause| StoreError(format!("cannot make the PostgreSQL database {database}: {cause}"));
    if !is_there(&server, database).await? {
        // A name of our own making: no quoting to get wrong.
        let made = server.execute_unprepared(&format!("CREATE DATABASE {database}")).await;
        // Another process may have been faster.
        if made.is_err() && !is_there(&server, database).await? {
            made.map_err(failed)?;
        }
    }
    server.close().await.map_err(failed)
}

async fn is_there(server: &DatabaseConnection, database: &str) -> Result<bool, StoreError> {
    let sql = "SELECT datname::text FROM pg_database WHERE datname = $1";
    let known = Statement::from_sql_and_values(DatabaseBackend::Postgres, sql, [database.into()]);
    let found = server.query_one_raw(known).await;
    Ok(found.map_err(|cause| StoreError(format!("cannot look for the PostgreSQL database {database}: {cause}")))?.is_some())
}

fn options(address: String, connections: u32) -> ConnectOptions {
    let mut options = ConnectOptions::new(address);
    options
        .max_connections(connections)
        .min_connections(0)
        .sqlx_logging(false)
        .acquire_timeout(PATIENCE)
        .idle_timeout(Duration::from_secs(60));
    options
}
