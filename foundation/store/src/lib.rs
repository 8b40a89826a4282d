//! Databases: one per service, with migrations, encrypted columns, and statements that do not compile
//! without a tenant filter.
//!
//! An embedded database is one `SQLite` file: WAL, `synchronous=FULL`, one writer and a pool of readers.
//! The alternative is a `PostgreSQL` database. Both take the same migrations and statements, which use the
//! subset of SQL that the two engines share.

pub mod copy;
mod databases;
pub mod idempotency;
mod keyring;
pub mod lease;
mod migrate;
mod statement;

use capsule_contracts::Problem;
use sea_orm::{
    ConnectionTrait, DatabaseBackend, DatabaseConnection, DatabaseTransaction, FromQueryResult, SqliteTransactionMode,
    TransactionOptions, TransactionTrait,
};
use tracing::Instrument;

pub use databases::Databases;
pub use keyring::{DerivedKey, Keyring, create_secret_file};
pub use migrate::{Migration, MigrationState, MigrationStatus, Migrations};
pub use sea_orm::Value;
pub use statement::{Scope, Statement, contains_tenant};

/// Waits for the lock that admits one writer at a time to a `PostgreSQL` database. The transaction holds it.
const WRITER_LOCK: &str = "SELECT pg_advisory_xact_lock(7305002)";

/// Waits for the lock that admits one migrating process at a time to a `PostgreSQL` database. The session holds it.
const MIGRATION_LOCK: &str = "SELECT pg_advisory_lock(7305001)";

/// A service's database.
#[derive(Debug)]
pub struct Store {
    name: &'static str,
    readers: DatabaseConnection,
    writer: DatabaseConnection,
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
        let writer = databases.writer(name).await?;
        migrate_all(databases, name, &writer, migrations).await?;
        let readers = databases.readers(name, &writer).await?;
        Ok(Self { name, readers, writer, databases: databases.clone(), keyring, committed: tokio::sync::Notify::new() })
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
        let connection = databases.writer(name).await?;
        let mut all = Vec::new();
        for (component, migrations) in migrations {
            all.extend(migrate::status(&connection, component, migrations).await?);
        }
        Ok(all)
    }

    /// Applies the pending migrations of a service's database.
    ///
    /// # Errors
    /// When it cannot be opened, or a migration fails or was changed after it was applied.
    pub async fn migrate(databases: &Databases, name: &str, migrations: Migrations) -> Result<(), StoreError> {
        let connection = databases.writer(name).await?;
        migrate_all(databases, name, &connection, migrations).await
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
        let connection = databases.writer(name).await?;
        let mut repaired = Vec::new();
        for (component, migrations) in migrations {
            repaired.extend(migrate::repair(&connection, component, migrations).await?);
        }
        Ok(repaired)
    }

    /// Opens a separate session on the database's server, for a lock that the session holds until it ends. `None`
    /// where the database is embedded.
    async fn session(&self) -> Result<Option<DatabaseConnection>, Problem> {
        self.databases.session(self.name).await.map_err(|error| {
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

    /// Reads outside of any transaction.
    #[must_use]
    pub fn read(&self) -> Reader<'_, DatabaseConnection> {
        Reader { connection: &self.readers }
    }

    /// Begins a transaction that may write. It is rolled back unless committed. Do nothing slow while
    /// it is open: a service has one writer at a time, on either engine.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn begin(&self) -> Result<Transaction<'_>, Problem> {
        let options = TransactionOptions {
            sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
            ..TransactionOptions::default()
        };
        let inner = self.writer.begin_with_options(options).await.map_err(database_problem)?;
        if inner.get_database_backend() == DatabaseBackend::Postgres {
            // Released with the transaction. With one writer there are no serialization failures to retry.
            inner.execute_unprepared(WRITER_LOCK).await.map_err(database_problem)?;
        }
        let tx = Transaction { inner, store: self };
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
        if self.writer.get_database_backend() == DatabaseBackend::Sqlite
            && let Err(cause) = self.writer.execute_unprepared("PRAGMA wal_checkpoint(TRUNCATE)").await
        {
            tracing::warn!(service = self.name, %cause, "the write-ahead log could not be emptied; it is overwritten later");
        }
    }

    /// Whether the pool has a free connection and the database responds on it.
    pub async fn is_ready(&self) -> bool {
        self.report_connection_metrics();
        self.readers.execute_unprepared("SELECT 1").await.is_ok()
    }

    /// Sets the gauges of used connections and of their maximum.
    pub fn report_connection_metrics(&self) {
        let (size, idle, max) = match self.readers.get_database_backend() {
            DatabaseBackend::Postgres => {
                let pool = self.readers.get_postgres_connection_pool();
                (pool.size(), pool.num_idle(), pool.options().get_max_connections())
            }
            _ => {
                let pool = self.readers.get_sqlite_connection_pool();
                (pool.size(), pool.num_idle(), pool.options().get_max_connections())
            }
        };
        let used = f64::from(size) - idle as f64;
        metrics::gauge!("capsule_database_connections_used", "service" => self.name).set(used);
        metrics::gauge!("capsule_database_connections_max", "service" => self.name).set(f64::from(max));
    }
}

/// Reads rows; over a pool or within a transaction.
#[derive(Debug)]
pub struct Reader<'a, C> {
    connection: &'a C,
}

impl<C: ConnectionTrait> Reader<'_, C> {
    /// All rows.
    ///
    /// # Errors
    /// When the statement fails. The cause is logged, not returned.
    pub async fn all<T: FromQueryResult>(&self, statement: Statement) -> Result<Vec<T>, Problem> {
        let span = statement.span();
        let rows =
            self.connection.query_all_raw(statement.build(self.connection)).instrument(span).await.map_err(database_problem)?;
        rows.iter().map(|row| T::from_query_result(row, "").map_err(database_problem)).collect()
    }

    /// The first row, if any.
    ///
    /// # Errors
    /// As [`Reader::all`].
    pub async fn first<T: FromQueryResult>(&self, statement: Statement) -> Result<Option<T>, Problem> {
        self.row(statement).await?.map(|row| T::from_query_result(&row, "").map_err(database_problem)).transpose()
    }

    /// Whether there is any row.
    ///
    /// # Errors
    /// As [`Reader::all`].
    pub async fn exists(&self, statement: Statement) -> Result<bool, Problem> {
        Ok(self.row(statement).await?.is_some())
    }

    /// The first column of the first row, if any.
    ///
    /// # Errors
    /// As [`Reader::all`].
    pub async fn value<T: sea_orm::TryGetable>(&self, statement: Statement) -> Result<Option<T>, Problem> {
        self.row(statement).await?.map(|row| row.try_get_by_index::<T>(0).map_err(database_problem)).transpose()
    }

    async fn row(&self, statement: Statement) -> Result<Option<sea_orm::QueryResult>, Problem> {
        let span = statement.span();
        self.connection.query_one_raw(statement.build(self.connection)).instrument(span).await.map_err(database_problem)
    }
}

/// A transaction that may write.
#[derive(Debug)]
pub struct Transaction<'a> {
    inner: DatabaseTransaction,
    store: &'a Store,
}

impl Transaction<'_> {
    /// Reads within the transaction.
    #[must_use]
    pub fn read(&self) -> Reader<'_, DatabaseTransaction> {
        Reader { connection: &self.inner }
    }

    /// The service's keyring.
    #[must_use]
    pub fn keyring(&self) -> &Keyring {
        &self.store.keyring
    }

    /// The service whose database this is.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.store.name
    }

    /// Runs a statement that changes rows, and returns how many it changed.
    ///
    /// # Errors
    /// [`Problem::conflict`] on a unique violation, otherwise as [`Reader::all`].
    pub async fn run(&self, statement: Statement) -> Result<u64, Problem> {
        let span = statement.span();
        match self.inner.execute_raw(statement.build(&self.inner)).instrument(span).await {
            Ok(done) => Ok(done.rows_affected()),
            Err(cause) if is_unique_violation(&cause) => Err(Problem::conflict("This name is already in use.")),
            Err(cause) => Err(database_problem(cause)),
        }
    }

    /// Commits, and resolves [`Store::committed`]. The first commit of a command records the command's id.
    ///
    /// # Errors
    /// When the database cannot commit, or the running command was already executed.
    pub async fn commit(self) -> Result<(), Problem> {
        idempotency::record(&self).await?;
        self.inner.commit().await.map_err(database_problem)?;
        self.store.committed.notify_one();
        Ok(())
    }
}

/// Brings a schema up to date. On `PostgreSQL`, one process at a time does so.
async fn migrate_all(
    databases: &Databases,
    name: &str,
    connection: &DatabaseConnection,
    migrations: &[(&str, &[Migration])],
) -> Result<(), StoreError> {
    let failed = |cause| StoreError(format!("{name}: cannot lock the migrations: {cause}"));
    let session = databases.session(name).await?;
    if let Some(session) = &session {
        session.execute_unprepared(MIGRATION_LOCK).await.map_err(failed)?;
    }
    for (component, migrations) in migrations {
        migrate::run(connection, component, migrations).await?;
    }
    match session {
        Some(session) => session.close().await.map_err(failed),
        None => Ok(()),
    }
}

fn is_unique_violation(cause: &sea_orm::DbErr) -> bool {
    matches!(cause.sql_err(), Some(sea_orm::SqlErr::UniqueConstraintViolation(_)))
}

/// Logs a database error and returns a problem that does not show it.
#[expect(clippy::needless_pass_by_value, reason = "used as an error mapper")]
fn database_problem(cause: sea_orm::DbErr) -> Problem {
    if matches!(cause, sea_orm::DbErr::ConnectionAcquire(_)) {
        metrics::counter!("capsule_database_exhausted_total").increment(1);
        tracing::error!(%cause, "no database connection was available");
        return Problem::unavailable("The database does not respond, or is overloaded.");
    }
    tracing::error!(%cause, "database statement failed");
    Problem::internal()
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
        tx.run(unscoped!("test", "INSERT INTO things (id) VALUES ($1)", 1_i64)).await.expect("inserts");
        drop(tx);
        let count = unscoped!("test", "SELECT COUNT(*) FROM things");
        assert_eq!(store.read().value::<i64>(count).await.expect("reads"), Some(0));
    }

    #[tokio::test]
    async fn a_unique_violation_is_a_conflict() {
        let directory = tempfile::tempdir().expect("tempdir");
        let store = open(directory.path(), &[FIRST]).await.expect("opens");
        let insert = || unscoped!("test", "INSERT INTO things (id) VALUES ($1)", 1_i64);
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
