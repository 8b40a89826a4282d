//! Databases: one per service, with migrations, encrypted columns, and statements that cannot
//! forget the tenant.
//!
//! Embedded, a service's database is one `SQLite` file: WAL, `synchronous=FULL`, one writer and a
//! pool of readers. Statements are written in the subset of SQL that `PostgreSQL` takes as well.

mod keyring;
mod migrate;
mod statement;

use std::path::Path;
use std::time::Duration;

use capsule_contracts::Problem;
use sea_orm::sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous};
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DatabaseTransaction, FromQueryResult, SqliteTransactionMode,
    TransactionOptions, TransactionTrait,
};

pub use keyring::Keyring;
pub use migrate::Migration;
pub use sea_orm::Value;
pub use statement::{Scope, Statement, contains_tenant};

/// Readers that a service's database has beside its one writer.
const READERS: u32 = 3;

/// A service's database.
#[derive(Debug)]
pub struct Store {
    name: &'static str,
    readers: DatabaseConnection,
    writer: DatabaseConnection,
    keyring: Keyring,
    committed: tokio::sync::Notify,
}

impl Store {
    /// Opens (or creates) `<directory>/<name>.db` and brings its schema up to date.
    ///
    /// # Errors
    /// When the file cannot be opened, or a migration fails or was changed after it was applied.
    pub async fn open(
        directory: &Path,
        name: &'static str,
        keyring: Keyring,
        migrations: &[(&str, &[Migration])],
    ) -> Result<Self, StoreError> {
        let file = directory.join(format!("{name}.db"));
        let writer = connect(&file, 1).await?;
        for (component, migrations) in migrations {
            migrate::run(&writer, component, migrations).await?;
        }
        let readers = connect(&file, READERS).await?;
        Ok(Self { name, readers, writer, keyring, committed: tokio::sync::Notify::new() })
    }

    /// The service whose database this is.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Encrypts and decrypts what must not rest in the clear.
    #[must_use]
    pub fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    /// Reads outside of any transaction.
    #[must_use]
    pub fn read(&self) -> Reader<'_, DatabaseConnection> {
        Reader { connection: &self.readers }
    }

    /// Begins a transaction that may write. It is undone unless committed. Do nothing slow while
    /// it is open: there is one writer.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn begin(&self) -> Result<Transaction<'_>, Problem> {
        let options = TransactionOptions {
            sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
            ..TransactionOptions::default()
        };
        let inner = self.writer.begin_with_options(options).await.map_err(broken)?;
        Ok(Transaction { inner, store: self })
    }

    /// Resolves once something was committed after the last time it resolved.
    pub async fn committed(&self) {
        self.committed.notified().await;
    }

    /// Whether the database answers.
    pub async fn is_ready(&self) -> bool {
        self.readers.execute_unprepared("SELECT 1").await.is_ok()
    }
}

async fn connect(file: &Path, connections: u32) -> Result<DatabaseConnection, StoreError> {
    let mut options = ConnectOptions::new(format!("sqlite://{}?mode=rwc", file.display()));
    options
        .max_connections(connections)
        .min_connections(0)
        .sqlx_logging(false)
        .acquire_timeout(Duration::from_secs(10))
        .idle_timeout(Duration::from_secs(60))
        .map_sqlx_sqlite_opts(|options| {
            options
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
                .foreign_keys(true)
                .busy_timeout(Duration::from_secs(10))
                .pragma("cache_size", "-512")
        });
    Database::connect(options).await.map_err(|cause| StoreError(format!("cannot open the database {}: {cause}", file.display())))
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
    /// When the statement fails, which is logged, never shown.
    pub async fn all<T: FromQueryResult>(&self, statement: Statement) -> Result<Vec<T>, Problem> {
        let rows = self.connection.query_all_raw(statement.build(self.connection)).await.map_err(broken)?;
        rows.iter().map(|row| T::from_query_result(row, "").map_err(broken)).collect()
    }

    /// The first row, if any.
    ///
    /// # Errors
    /// As [`Reader::all`].
    pub async fn first<T: FromQueryResult>(&self, statement: Statement) -> Result<Option<T>, Problem> {
        let row = self.connection.query_one_raw(statement.build(self.connection)).await.map_err(broken)?;
        row.map(|row| T::from_query_result(&row, "").map_err(broken)).transpose()
    }

    /// The first column of the first row, if any.
    ///
    /// # Errors
    /// As [`Reader::all`].
    pub async fn value<T: sea_orm::TryGetable>(&self, statement: Statement) -> Result<Option<T>, Problem> {
        let row = self.connection.query_one_raw(statement.build(self.connection)).await.map_err(broken)?;
        row.map(|row| row.try_get_by_index::<T>(0).map_err(broken)).transpose()
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

    /// Runs a statement that changes rows; tells how many.
    ///
    /// # Errors
    /// [`Problem::conflict`] where a unique row exists already, otherwise as [`Reader::all`].
    pub async fn run(&self, statement: Statement) -> Result<u64, Problem> {
        match self.inner.execute_raw(statement.build(&self.inner)).await {
            Ok(done) => Ok(done.rows_affected()),
            Err(cause) if is_unique_violation(&cause) => Err(Problem::conflict("Something of this name exists already.")),
            Err(cause) => Err(broken(cause)),
        }
    }

    /// Makes the transaction's changes last, and wakes who waits for them.
    ///
    /// # Errors
    /// When the database cannot commit.
    pub async fn commit(self) -> Result<(), Problem> {
        self.inner.commit().await.map_err(broken)?;
        self.store.committed.notify_one();
        Ok(())
    }
}

fn is_unique_violation(cause: &sea_orm::DbErr) -> bool {
    matches!(cause.sql_err(), Some(sea_orm::SqlErr::UniqueConstraintViolation(_)))
}

/// Logs what the database said and gives the caller a problem that does not show it.
#[expect(clippy::needless_pass_by_value, reason = "used as an error mapper")]
fn broken(cause: sea_orm::DbErr) -> Problem {
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
    use super::{Keyring, Migration, Store, unscoped};

    const FIRST: Migration = Migration { version: 1, name: "create_things", sql: "CREATE TABLE things (id BIGINT PRIMARY KEY);" };

    async fn open(directory: &std::path::Path, migrations: &[Migration]) -> Result<Store, super::StoreError> {
        let keyring = Keyring::open(&directory.join("key")).expect("keyring");
        Store::open(directory, "test", keyring, &[("test", migrations)]).await
    }

    #[tokio::test]
    async fn a_transaction_that_is_dropped_leaves_nothing() {
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
    async fn a_failing_migration_leaves_the_database_as_it_was_and_is_named() {
        let directory = tempfile::tempdir().expect("tempdir");
        let broken = Migration { version: 2, name: "break", sql: "CREATE TABLE more (id BIGINT);\nCREATE TALBE oops;" };
        let error = open(directory.path(), &[FIRST, broken]).await.expect_err("fails").to_string();
        assert!(error.contains("V002__break.sql"), "{error}");
        let store = open(directory.path(), &[FIRST]).await.expect("opens");
        let tables = unscoped!("test", "SELECT COUNT(*) FROM sqlite_master WHERE name = 'more'");
        assert_eq!(store.read().value::<i64>(tables).await.expect("reads"), Some(0));
    }
}
