//! Reads, and transactions that may write.

use capsule_contracts::Problem;
use sqlx::{PgPool, Postgres};
use tokio::sync::Mutex;
use tracing::Instrument;

use crate::databases::Engine;
use crate::embedded::{self, Embedded, Writing};
use crate::failure::Failure;
use crate::{DecodeError, FromColumn, FromRow, Keyring, Row, Statement, Store, idempotency, server};

/// Waits for the lock that admits one writer at a time to a `PostgreSQL` database. The transaction holds it.
const WRITER_LOCK: &str = "SELECT pg_advisory_xact_lock(7305002)";

/// Reads rows; over a pool or within a transaction.
#[derive(Debug)]
pub struct Reader<'a>(Source<'a>);

#[derive(Debug)]
enum Source<'a> {
    Embedded(&'a Embedded),
    EmbeddedTransaction(&'a Writing),
    Server(&'a PgPool),
    ServerTransaction(&'a Mutex<sqlx::Transaction<'static, Postgres>>),
}

impl<'a> Reader<'a> {
    pub(crate) fn of_store(engine: &'a Engine) -> Self {
        Self(match engine {
            Engine::Embedded(embedded) => Source::Embedded(embedded),
            Engine::Server(pool) => Source::Server(pool),
        })
    }

    /// All rows.
    ///
    /// # Errors
    /// When the statement fails. The cause is logged, not returned.
    pub async fn all<T: FromRow>(&self, statement: Statement) -> Result<Vec<T>, Problem> {
        self.rows(statement, Some(T::COLUMNS), usize::MAX, T::from_row).await
    }

    /// The first row, if any.
    ///
    /// # Errors
    /// As [`Reader::all`].
    pub async fn first<T: FromRow>(&self, statement: Statement) -> Result<Option<T>, Problem> {
        Ok(self.rows(statement, Some(T::COLUMNS), 1, T::from_row).await?.pop())
    }

    /// Whether there is any row.
    ///
    /// # Errors
    /// As [`Reader::all`].
    pub async fn exists(&self, statement: Statement) -> Result<bool, Problem> {
        Ok(!self.rows(statement, None, 1, |_| Ok(())).await?.is_empty())
    }

    /// The first column of the first row, if any.
    ///
    /// # Errors
    /// As [`Reader::all`].
    pub async fn value<T: FromColumn>(&self, statement: Statement) -> Result<Option<T>, Problem> {
        Ok(self.rows(statement, None, 1, |row| row.at(0)).await?.pop())
    }

    /// At most `limit` rows, which is one or all.
    async fn rows<T>(
        &self,
        statement: Statement,
        columns: Option<&'static str>,
        limit: usize,
        decode: fn(&Row<'_>) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, Problem> {
        let span = statement.span();
        let embedded = |connection: &rusqlite::Connection| {
            let text = statement.embedded(columns);
            span.in_scope(|| embedded::query(connection, &text, &statement.values, limit, decode))
        };
        let rows = match &self.0 {
            Source::Embedded(store) => {
                // Nothing is waited for: without this, a task of many reads would keep its thread from all others.
                tokio::task::coop::consume_budget().await;
                store.read(embedded)
            }
            Source::EmbeddedTransaction(transaction) => transaction.run(embedded),
            Source::Server(pool) => {
                let text = statement.server(columns);
                server::query(*pool, text, statement.values, limit == 1, decode).instrument(span).await
            }
            Source::ServerTransaction(transaction) => {
                let text = statement.server(columns);
                let mut transaction = transaction.lock().await;
                server::query(&mut **transaction, text, statement.values, limit == 1, decode).instrument(span).await
            }
        };
        rows.map_err(Failure::into_problem)
    }
}

/// A transaction that may write.
#[derive(Debug)]
pub struct Transaction<'a> {
    inner: Inner,
    store: &'a Store,
}

#[derive(Debug)]
enum Inner {
    Embedded(Writing),
    Server(Mutex<sqlx::Transaction<'static, Postgres>>),
}

impl<'a> Transaction<'a> {
    pub(crate) async fn begin(store: &'a Store, engine: &Engine) -> Result<Self, Problem> {
        let inner = match engine {
            Engine::Embedded(embedded) => embedded.begin().await.map(Inner::Embedded),
            Engine::Server(pool) => begin_on_server(pool).await.map(|transaction| Inner::Server(Mutex::new(transaction))),
        };
        Ok(Self { inner: inner.map_err(Failure::into_problem)?, store })
    }
}

async fn begin_on_server(pool: &PgPool) -> Result<sqlx::Transaction<'static, Postgres>, Failure> {
    let mut transaction = pool.begin().await?;
    // Released with the transaction. With one writer there are no serialization failures to retry.
    server::execute(&mut *transaction, WRITER_LOCK.into(), Vec::new()).await?;
    Ok(transaction)
}

impl Transaction<'_> {
    /// Reads within the transaction.
    #[must_use]
    pub fn read(&self) -> Reader<'_> {
        Reader(match &self.inner {
            Inner::Embedded(transaction) => Source::EmbeddedTransaction(transaction),
            Inner::Server(transaction) => Source::ServerTransaction(transaction),
        })
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
        let done = match &self.inner {
            Inner::Embedded(transaction) => span.in_scope(|| {
                transaction.run(|connection| embedded::execute(connection, &statement.embedded(None), &statement.values))
            }),
            Inner::Server(transaction) => {
                let text = statement.server(None);
                server::execute(&mut **transaction.lock().await, text, statement.values).instrument(span).await
            }
        };
        done.map_err(|failure| match failure {
            failure if failure.is_unique_violation() => Problem::conflict("This name is already in use."),
            failure => failure.into_problem(),
        })
    }

    /// Commits, and resolves [`Store::committed`]. The first commit of a command records the command's id.
    ///
    /// # Errors
    /// When the database cannot commit, or the running command was already executed.
    pub async fn commit(self) -> Result<(), Problem> {
        idempotency::record(&self).await?;
        match self.inner {
            Inner::Embedded(transaction) => transaction.commit().await,
            Inner::Server(transaction) => transaction.into_inner().commit().await.map_err(Into::into),
        }
        .map_err(Failure::into_problem)?;
        self.store.committed.notify_one();
        Ok(())
    }
}
