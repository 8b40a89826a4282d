//! Locations of the services' databases, and connections to them.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};

use crate::StoreError;
use crate::embedded::Embedded;
use crate::failure::Failure;
use crate::server;
use crate::session::Session;

/// How long a caller waits for a connection, or for `SQLite`'s lock.
pub const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

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
                let mut server = connect(url, "postgres").await?;
                database_exists(&mut server, &database(service)).await
            }
        }
    }

    /// Whether any of these services has a database file.
    #[must_use]
    pub fn any_exists(&self, services: &[&str]) -> bool {
        matches!(self, Self::Embedded(directory) if services.iter().any(|service| file(directory, service).exists()))
    }

    /// Opens a service's database. Creates it if it is missing.
    pub(crate) async fn engine(&self, service: &str) -> Result<Engine, StoreError> {
        match self {
            Self::Embedded(directory) => {
                let file = create_file(directory, service)?;
                Embedded::open(file.clone()).map(Engine::Embedded).map_err(|cause| open_error(&file, &cause))
            }
            Self::Postgres { url, connections } => {
                let name = database(service);
                create(url, &name).await?;
                pool(url, &name, *connections).await.map(Engine::Server)
            }
        }
    }

    /// Opens a separate session on a service's database; dropping the value ends it. Creates the database if it is
    /// missing.
    pub(crate) async fn session(&self, service: &str) -> Result<Session, StoreError> {
        match self {
            Self::Embedded(directory) => {
                let file = create_file(directory, service)?;
                Session::embedded(&file).map_err(|cause| open_error(&file, &cause))
            }
            Self::Postgres { url, .. } => {
                let name = database(service);
                create(url, &name).await?;
                connect(url, &name).await.map(Session::server)
            }
        }
    }

    /// Opens a separate session where the database is on a server.
    pub(crate) async fn server_session(&self, service: &str) -> Result<Option<Session>, StoreError> {
        match self {
            Self::Embedded(_) => Ok(None),
            Self::Postgres { url, .. } => connect(url, &database(service)).await.map(|session| Some(Session::server(session))),
        }
    }
}

/// A service's database.
#[derive(Debug)]
pub enum Engine {
    Embedded(Embedded),
    Server(PgPool),
}

fn file(directory: &Path, service: &str) -> PathBuf {
    directory.join(format!("{service}.db"))
}

fn database(service: &str) -> String {
    format!("capsule_{service}")
}

/// Creates a service's file unless it exists.
fn create_file(directory: &Path, service: &str) -> Result<PathBuf, StoreError> {
    let file = file(directory, service);
    // Created here with the mode 0600; SQLite gives its other files the mode of this one.
    let made = std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&file);
    made.map_err(|cause| open_error(&file, &cause))?;
    Ok(file)
}

fn open_error(file: &Path, cause: &dyn std::fmt::Display) -> StoreError {
    StoreError(format!("cannot open the database {}: {cause}", file.display()))
}

async fn pool(url: &str, database: &str, connections: u32) -> Result<PgPool, StoreError> {
    let failed = |cause: sqlx::Error| connection_error(database, &cause);
    let options: PgConnectOptions = address(url, database).parse().map_err(failed)?;
    let pool = PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(Duration::from_secs(60))
        .connect_with(options.disable_statement_logging());
    pool.await.map_err(failed)
}

/// A separate connection. A pool opens it, because a pool retries while the server starts.
async fn connect(url: &str, database: &str) -> Result<PgConnection, StoreError> {
    let pool = pool(url, database, 1).await?;
    let connection = pool.acquire().await.map_err(|cause| connection_error(database, &cause))?;
    Ok(connection.detach())
}

fn address(url: &str, database: &str) -> String {
    let (server, parameters) = url.split_once('?').unwrap_or((url, ""));
    format!("{}/{database}?{parameters}", server.trim_end_matches('/'))
}

/// The server's error contains the user and the database, never the password.
fn connection_error(database: &str, cause: &sqlx::Error) -> StoreError {
    StoreError(format!("cannot connect to the PostgreSQL database {database}: {cause}"))
}

/// Creates a database unless it exists.
async fn create(url: &str, database: &str) -> Result<(), StoreError> {
    let mut server = connect(url, "postgres").await?;
    let failed = |cause: &dyn std::fmt::Display| StoreError(format!("cannot create the PostgreSQL database {database}: {cause}"));
    if !database_exists(&mut server, database).await? {
        // `database` comes from a constant, so it needs no quoting.
        let made = server::execute(&mut server, format!("CREATE DATABASE {database}").into(), Vec::new()).await;
        // Another process may have created it meanwhile.
        if let Err(cause) = made
            && !database_exists(&mut server, database).await?
        {
            return Err(failed(&cause));
        }
    }
    server.close().await.map_err(|cause| failed(&cause))
}

async fn database_exists(server: &mut PgConnection, database: &str) -> Result<bool, StoreError> {
    let sql = "SELECT datname::text FROM pg_database WHERE datname = $1";
    let found = server::query(server, sql.into(), vec![database.into()], true, |_| Ok(())).await;
    let failed = |cause: Failure| StoreError(format!("cannot query the PostgreSQL database {database}: {cause}"));
    Ok(!found.map_err(failed)?.is_empty())
}
