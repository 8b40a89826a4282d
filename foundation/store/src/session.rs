//! A separate connection to a service's database, for migrations, copies and locks.

use std::borrow::Cow;
use std::path::Path;
use std::sync::{Arc, Mutex};

use sqlx::{Connection, PgConnection};

use crate::embedded::{self, blocking};
use crate::failure::Failure;
use crate::{DecodeError, Row, Value, server};

/// A separate connection. Dropping it closes it, rolls its transaction back and releases its locks.
#[derive(Debug)]
pub enum Session {
    Embedded(Arc<Mutex<rusqlite::Connection>>),
    Server(Box<tokio::sync::Mutex<PgConnection>>),
}

impl Session {
    /// Opens a file, which must exist.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn embedded(file: &Path) -> Result<Self, Failure> {
        Ok(Self::Embedded(Arc::new(Mutex::new(embedded::connect(file)?))))
    }

    pub fn server(connection: PgConnection) -> Self {
        Self::Server(Box::new(tokio::sync::Mutex::new(connection)))
    }

    /// The text for the engine of this session.
    pub fn select(&self, embedded: &'static str, server: &'static str) -> &'static str {
        match self {
            Self::Embedded(_) => embedded,
            Self::Server(_) => server,
        }
    }

    /// Runs a statement without values.
    ///
    /// # Errors
    /// When it fails.
    pub async fn run_plain(&self, sql: impl Into<Cow<'static, str>>) -> Result<(), Failure> {
        let sql = sql.into();
        match self {
            Self::Embedded(connection) => {
                let connection = connection.clone();
                blocking(move || Ok(embedded::lock(&connection).execute_batch(&sql)?)).await
            }
            Self::Server(connection) => {
                sqlx::raw_sql(server::text(sql)).execute(&mut *connection.lock().await).await?;
                Ok(())
            }
        }
    }

    /// Runs a statement once for each list of values (`$1` and so on), and returns the number of changed rows.
    ///
    /// # Errors
    /// When it fails.
    pub async fn run_each(&self, sql: impl Into<Cow<'static, str>>, lists: Vec<Vec<Value>>) -> Result<u64, Failure> {
        let sql = sql.into();
        match self {
            Self::Embedded(connection) => {
                let connection = connection.clone();
                blocking(move || {
                    let (connection, sql) = (embedded::lock(&connection), numbered(&sql));
                    lists.iter().map(|values| embedded::execute(&connection, &sql, values)).sum()
                })
                .await
            }
            Self::Server(connection) => {
                let mut connection = connection.lock().await;
                let mut changed = 0;
                for values in lists {
                    changed += server::execute(&mut *connection, sql.clone(), values).await?;
                }
                Ok(changed)
            }
        }
    }

    /// All rows of a statement with values (`$1` and so on).
    ///
    /// # Errors
    /// When it fails, or a row cannot be read.
    pub async fn rows<T: Send + 'static>(
        &self,
        sql: impl Into<Cow<'static, str>>,
        values: Vec<Value>,
        decode: impl Fn(&Row<'_>) -> Result<T, DecodeError> + Send + 'static,
    ) -> Result<Vec<T>, Failure> {
        let sql = sql.into();
        match self {
            Self::Embedded(connection) => {
                let connection = connection.clone();
                blocking(move || embedded::query(&embedded::lock(&connection), &numbered(&sql), &values, usize::MAX, decode))
                    .await
            }
            Self::Server(connection) => server::query(&mut *connection.lock().await, sql, values, false, decode).await,
        }
    }

    /// Closes the connection.
    ///
    /// # Errors
    /// When the server does not respond.
    pub async fn close(self) -> Result<(), Failure> {
        match self {
            Self::Embedded(connection) => {
                blocking(move || {
                    drop(connection);
                    Ok(())
                })
                .await
            }
            Self::Server(connection) => Ok(connection.into_inner().close().await?),
        }
    }
}

/// `SQLite` counts `$1` by its position in the text; only `?1` has a number.
fn numbered(sql: &str) -> String {
    sql.replace('$', "?")
}
