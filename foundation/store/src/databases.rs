//! Locations of the services' databases, and connections to them.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sea_orm::sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous};
use sea_orm::{ConnectOptions, ConnectionTrait, Database, DatabaseBackend, DatabaseConnection, Statement};

use crate::StoreError;

/// Read connections to an embedded database, beside its one write connection.
const MAX_READERS: u32 = 3;
/// How long a caller waits for a connection, or for `SQLite`'s lock.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the services' databases are. Each service has its own.
#[derive(Clone)]
pub enum Databases {
    /// Files `<service>.db` in this directory.
    Embedded(PathBuf),
    /// Databases `capsule_<service>` of a `PostgreSQL` server, created where they are missing.
    Postgres {
        /// `postgres://user:password@host:port`, optionally with `?` and parameters, without a database.
        url: String,
        /// The maximum number of connections per service.
        connections: u32,
    },
}

impl std::fmt::Debug for Databases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Embedded(directory) => write!(f, "Embedded({})", directory.display()),
            // The URL contains a password.
            Self::Postgres { connections, .. } => write!(f, "Postgres({connections} connections)"),
        }
    }
}

impl Databases {
    /// Whether a service's database exists.
    pub(crate) async fn exists(&self, service: &str) -> Result<bool, StoreError> {
        match self {
            Self::Embedded(directory) => Ok(file(directory, service).exists()),
            Self::Postgres { url, .. } => {
                let server = postgres(url, "postgres", 1).await?;
                database_exists(&server, &database(service)).await
            }
        }
    }

    /// Whether any of these services has a database file.
    #[must_use]
    pub fn any_exists(&self, services: &[&str]) -> bool {
        matches!(self, Self::Embedded(directory) if services.iter().any(|service| file(directory, service).exists()))
    }

    /// Connects to a service's database to write. Creates it if it is missing.
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

    /// Opens a separate session on the server; dropping the value ends it. `None` where there is no server.
    pub(crate) async fn session(&self, service: &str) -> Result<Option<DatabaseConnection>, StoreError> {
        match self {
            Self::Embedded(_) => Ok(None),
            Self::Postgres { url, .. } => {
                let name = database(service);
                let mut options = options(address(url, &name), 1);
                options.idle_timeout(None).max_lifetime(None);
                Database::connect(options).await.map(Some).map_err(|cause| connection_error(&name, &cause))
            }
        }
    }

    /// Connects to a service's database to read. On a server, writers and readers share a pool.
    pub(crate) async fn readers(&self, service: &str, writer: &DatabaseConnection) -> Result<DatabaseConnection, StoreError> {
        match self {
            Self::Embedded(directory) => embedded(directory, service, MAX_READERS).await,
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
    // Created here with the mode 0600; SQLite gives its other files the mode of this one.
    let made = std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&file);
    made.map_err(|cause| StoreError(format!("cannot open the database {}: {cause}", file.display())))?;
    let mut options = options(format!("sqlite://{}?mode=rwc", file.display()), connections);
    options.map_sqlx_sqlite_opts(|options| {
        options
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(ACQUIRE_TIMEOUT)
            .pragma("cache_size", "-512")
            // Overwrites deleted rows, so that free pages hold no data of erased users.
            .pragma("secure_delete", "ON")
    });
    Database::connect(options).await.map_err(|cause| StoreError(format!("cannot open the database {}: {cause}", file.display())))
}

async fn postgres(url: &str, database: &str, connections: u32) -> Result<DatabaseConnection, StoreError> {
    Database::connect(options(address(url, database), connections)).await.map_err(|cause| connection_error(database, &cause))
}

fn address(url: &str, database: &str) -> String {
    let (server, parameters) = url.split_once('?').unwrap_or((url, ""));
    format!("{}/{database}?{parameters}", server.trim_end_matches('/'))
}

/// The server's error contains the user and the database, never the password.
fn connection_error(database: &str, cause: &sea_orm::DbErr) -> StoreError {
    StoreError(format!("cannot connect to the PostgreSQL database {database}: {cause}"))
}

/// Creates a database unless it exists.
async fn create(url: &str, database: &str) -> Result<(), StoreError> {
    let server = postgres(url, "postgres", 1).await?;
    let failed = |cause| StoreError(format!("cannot create the PostgreSQL database {database}: {cause}"));
    if !database_exists(&server, database).await? {
        // `database` comes from a constant, so it needs no quoting.
        let made = server.execute_unprepared(&format!("CREATE DATABASE {database}")).await;
        // Another process may have created it meanwhile.
        if made.is_err() && !database_exists(&server, database).await? {
            made.map_err(failed)?;
        }
    }
    server.close().await.map_err(failed)
}

async fn database_exists(server: &DatabaseConnection, database: &str) -> Result<bool, StoreError> {
    let sql = "SELECT datname::text FROM pg_database WHERE datname = $1";
    let known = Statement::from_sql_and_values(DatabaseBackend::Postgres, sql, [database.into()]);
    let found = server.query_one_raw(known).await;
    Ok(found.map_err(|cause| StoreError(format!("cannot query the PostgreSQL database {database}: {cause}")))?.is_some())
}

fn options(address: String, connections: u32) -> ConnectOptions {
    let mut options = ConnectOptions::new(address);
    options
        .max_connections(connections)
        .min_connections(0)
        .sqlx_logging(false)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(Duration::from_secs(60));
    options
}
