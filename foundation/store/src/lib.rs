//! Databases: one per service, with migrations, encrypted columns, and statements that do not compile
//! without a tenant filter.
//!
//! An embedded database is one `SQLite` file: WAL, `synchronous=FULL`, one writer and any number of readers.
//! The alternative is a `PostgreSQL` database. Both take the same migrations and statements, which use the
//! subset of SQL that the two engines share.

// For `#[derive(FromRow)]` in this crate.
extern crate self as capsule_store;

pub mod copy;
mod databases;
mod embedded;
mod failure;
pub mod idempotency;
mod keyring;
pub mod lease;
mod migrate;
mod row;
mod server;
mod session;
#[doc(hidden)]
pub mod sql;
mod statement;
mod transaction;
mod value;

use capsule_contracts::Problem;

use databases::Engine;
use failure::Failure;
use session::Session;

pub use capsule_store_derive::FromRow;
pub use databases::Databases;
pub use keyring::{DerivedKey, Keyring, create_secret_file};
pub use migrate::{Migration, MigrationState, MigrationStatus, Migrations};
pub use row::{DecodeError, FromColumn, FromRow, Row};
pub use statement::{Query, Scope, Statement, UserScope};
pub use transaction::{Reader, Transaction};
pub use value::{Value, ValueType};

/// Waits for the lock that admits one migrating process at a time to a `PostgreSQL` database. The session holds it.
const MIGRATION_LOCK: &str = "SELECT pg_advisory_lock(7305001)";

/// A service's database.
#[derive(Debug)]
pub struct Store {
    name: &'static str,
    engine: Engine,
    databases: Databases,
    keyring: Keyring,
    committed: tokio::sync::Notify,
}

impl Store {
    /// Opens (or creates) the service's database and brings its schema up to date.
    ///
    /// # Errors
    /// When it cannot be opened, or a migration fails or was changed after it was applied.
    pub async fn open(
        databases: &Databases,
        name: &'static str,
        keyring: Keyring,
        migrations: &[(&str, &[Migration])],
    ) -> Result<Self, StoreError> {
        migrate_all(databases, name, migrations).await?;
        let engine = databases.engine(name).await?;
        Ok(Self { name, engine, databases: databases.clone(), keyring, committed: tokio::sync::Notify::new() })
    }

    /// The status of each migration in a service's database. Applies none.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub async fn migration_status(
        databases: &Databases,
        name: &str,
        migrations: Migrations,
    ) -> Result<Vec<MigrationStatus>, StoreError> {
        if !databases.exists(name).await? {
            return Ok(migrations.iter().flat_map(|(component, migrations)| migrate::pending(component, migrations)).collect());
        }
        let session = databases.session(name).await?;
        let mut all = Vec::new();
        for (component, migrations) in migrations {
            all.extend(migrate::status(&session, component, migrations).await?);
        }
        Ok(all)
    }

    /// Applies the pending migrations of a service's database.
    ///
    /// # Errors
    /// When it cannot be opened, or a migration fails or was changed after it was applied.
    pub async fn migrate(databases: &Databases, name: &str, migrations: Migrations) -> Result<(), StoreError> {
        migrate_all(databases, name, migrations).await
    }

    /// Records the current checksum of every migration whose file changed after it was applied, and returns the names
    /// of these files. [`Store::migration_status`] lists them beforehand.
    ///
    /// # Errors
    /// When the database cannot be opened or written.
    pub async fn repair(databases: &Databases, name: &str, migrations: Migrations) -> Result<Vec<String>, StoreError> {
        if !databases.exists(name).await? {
            return Ok(Vec::new());
        }
        let session = databases.session(name).await?;
        let mut repaired = Vec::new();
        for (component, migrations) in migrations {
            repaired.extend(migrate::repair(&session, component, migrations).await?);
        }
        Ok(repaired)
    }

    /// Opens a separate session on the database's server, for a lock that the session holds until it ends. `None`
    /// where the database is embedded.
    async fn session(&self) -> Result<Option<Session>, Problem> {
        self.databases.server_session(self.name).await.map_err(|error| {
            tracing::warn!(%error, "cannot open a database session for the leader's lock");
            Problem::unavailable("The database does not respond.")
        })
    }

    /// The service whose database this is.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The keyring that encrypts values at rest.
    #[must_use]
    pub fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    /// Reads outside of any transaction. On an embedded database, a read runs on the calling thread: it is to be
    /// short, as one by an index is. Whole tables are read by [`copy::Snapshot`].
    #[must_use]
    pub fn read(&self) -> Reader<'_> {
        Reader::of_store(&self.engine)
    }

    /// Begins a transaction that may write. It is rolled back unless committed. Do nothing slow while
    /// it is open: a service has one writer at a time, on either engine.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn begin(&self) -> Result<Transaction<'_>, Problem> {
        let tx = Transaction::begin(self, &self.engine).await?;
        lease::fence(&tx).await?;
        Ok(tx)
    }

    /// Waits for a commit. A commit since the last call resolves it at once.
    pub async fn committed(&self) {
        self.committed.notified().await;
    }

    /// Moves the write-ahead log of an embedded database into its file and empties the log, so that erased data is
    /// left in neither. Does nothing on `PostgreSQL`.
    pub async fn scrub(&self) {
        if let Engine::Embedded(embedded) = &self.engine
            && let Err(cause) = embedded.checkpoint().await
        {
            tracing::warn!(service = self.name, %cause, "the write-ahead log could not be emptied; it is overwritten later");
        }
    }

    /// Whether the database responds, on a connection of the pool where there is one.
    pub async fn is_ready(&self) -> bool {
        self.report_connection_metrics();
        match &self.engine {
            Engine::Embedded(embedded) => {
                embedded.read(|connection| embedded::query(connection, "SELECT 1", &[], 1, |_| Ok(()))).is_ok()
            }
            Engine::Server(pool) => server::query(pool, "SELECT 1".into(), Vec::new(), true, |_| Ok(())).await.is_ok(),
        }
    }

    /// Sets the gauges of used connections and of their maximum.
    pub fn report_connection_metrics(&self) {
        let (used, max) = match &self.engine {
            Engine::Embedded(embedded) => embedded.connections(),
            Engine::Server(pool) => {
                let used = (pool.size() as usize).saturating_sub(pool.num_idle());
                (used, pool.options().get_max_connections() as usize)
            }
        };
        metrics::gauge!("capsule_database_connections_used", "service" => self.name).set(used as f64);
        metrics::gauge!("capsule_database_connections_max", "service" => self.name).set(max as f64);
    }
}

/// Brings a schema up to date. On `PostgreSQL`, one process at a time does so.
async fn migrate_all(databases: &Databases, name: &str, migrations: &[(&str, &[Migration])]) -> Result<(), StoreError> {
    let failed = |cause: Failure| StoreError(format!("{name}: cannot lock the migrations: {cause}"));
    let session = databases.session(name).await?;
    if let Session::Server(_) = session {
        session.run_plain(MIGRATION_LOCK).await.map_err(failed)?;
    }
    for (component, migrations) in migrations {
        migrate::run(&session, component, migrations).await?;
    }
    session.close().await.map_err(failed)
}

/// Why a database could not be opened.
#[derive(Debug)]
pub struct StoreError(pub String);

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StoreError {}

#[cfg(test)]
mod tests {
    use super::{Databases, Keyring, Migration, Store, unscoped};

    const FIRST: Migration = Migration { version: 1, name: "create_things", sql: "CREATE TABLE things (id BIGINT PRIMARY KEY);" };

    async fn open(directory: &std::path::Path, migrations: &[Migration]) -> Result<Store, super::StoreError> {
        let keyring = Keyring::open(&directory.join("key")).expect("keyring");
        Store::open(&Databases::Embedded(directory.into()), "test", keyring, &[("test", migrations)]).await
    }

    #[tokio::test]
    async fn a_dropped_transaction_is_rolled_back() {
        let directory = tempfile::tempdir().expect("tempdir");
        let store = open(directory.path(), &[FIRST]).await.expect("opens");
        let tx = store.begin().await.expect("begins");
        tx.run(unscoped!("test", "INSERT INTO things (id) VALUES (:id)", id = 1_i64)).await.expect("inserts");
        drop(tx);
        let count = unscoped!("test", "SELECT COUNT(*) FROM things");
        assert_eq!(store.read().value::<i64>(count).await.expect("reads"), Some(0));
    }

    #[tokio::test]
    async fn a_unique_violation_is_a_conflict() {
        let directory = tempfile::tempdir().expect("tempdir");
        let store = open(directory.path(), &[FIRST]).await.expect("opens");
        let insert = || unscoped!("test", "INSERT INTO things (id) VALUES (:id)", id = 1_i64);
        let tx = store.begin().await.expect("begins");
        tx.run(insert()).await.expect("inserts");
        assert_eq!(tx.run(insert()).await.expect_err("twice").code, "conflict");
    }

    #[tokio::test]
    async fn a_migration_changed_after_it_was_applied_is_refused() {
        let directory = tempfile::tempdir().expect("tempdir");
        drop(open(directory.path(), &[FIRST]).await.expect("opens"));
        let changed = Migration { sql: "CREATE TABLE things (id TEXT PRIMARY KEY);", ..FIRST };
        let error = open(directory.path(), &[changed]).await.expect_err("refused").to_string();
        assert!(error.contains("V001__create_things.sql"), "{error}");
        assert!(error.contains("changed"), "{error}");
    }

    #[tokio::test]
    async fn a_repair_accepts_a_changed_migration() {
        let directory = tempfile::tempdir().expect("tempdir");
        drop(open(directory.path(), &[FIRST]).await.expect("opens"));
        const CHANGED: Migration = Migration {
            version: 1,
            name: "create_things",
            sql: "-- Commented since.\nCREATE TABLE things (id BIGINT PRIMARY KEY);",
        };
        let databases = Databases::Embedded(directory.path().into());
        let repaired = Store::repair(&databases, "test", &[("test", &[CHANGED])]).await.expect("repairs");
        assert_eq!(repaired, ["V001__create_things.sql"]);
        open(directory.path(), &[CHANGED]).await.expect("opens");
    }

    #[tokio::test]
    async fn a_migration_that_comes_before_an_applied_one_is_refused() {
        let directory = tempfile::tempdir().expect("tempdir");
        let third = Migration { version: 3, name: "third", sql: "CREATE TABLE third (id BIGINT);" };
        drop(open(directory.path(), &[FIRST, third]).await.expect("opens"));
        let second = Migration { version: 2, name: "second", sql: "CREATE TABLE second (id BIGINT);" };
        let error = open(directory.path(), &[FIRST, second, third]).await.expect_err("refused").to_string();
        assert!(error.contains("V002__second.sql") && error.contains("later migration"), "{error}");
    }

    #[tokio::test]
    async fn a_failing_migration_is_rolled_back_and_its_line_is_shown() {
        let directory = tempfile::tempdir().expect("tempdir");
        let broken = Migration { version: 2, name: "break", sql: "CREATE TABLE more (id BIGINT);\nCREATE TALBE oops;" };
        let error = open(directory.path(), &[FIRST, broken]).await.expect_err("fails").to_string();
        assert!(error.contains("V002__break.sql:2: ") && error.contains("in: CREATE TALBE oops"), "{error}");
        let store = open(directory.path(), &[FIRST]).await.expect("opens");
        let tables = unscoped!("test", "SELECT COUNT(*) FROM sqlite_master WHERE name = 'more'");
        assert_eq!(store.read().value::<i64>(tables).await.expect("reads"), Some(0));
    }
}
