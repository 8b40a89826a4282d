//! Errors of statements, and the problems that callers receive.

use capsule_contracts::Problem;
use rusqlite::ErrorCode;

use crate::DecodeError;

/// Why a statement failed.
#[derive(Debug)]
pub enum Failure {
    /// No connection, or `SQLite`'s lock, was available in time.
    Exhausted(String),
    /// `SQLite` has rolled the transaction back, as it does when the disk is full.
    RolledBack,
    Decode(DecodeError),
    Embedded(rusqlite::Error),
    Server(sqlx::Error),
}

/// Extended result codes of `SQLite`: <https://www.sqlite.org/rescode.html>.
const SQLITE_CONSTRAINT_PRIMARYKEY: i32 = 1555;
const SQLITE_CONSTRAINT_UNIQUE: i32 = 2067;

impl Failure {
    pub fn is_unique_violation(&self) -> bool {
        match self {
            Self::Embedded(rusqlite::Error::SqliteFailure(cause, _)) => {
                [SQLITE_CONSTRAINT_PRIMARYKEY, SQLITE_CONSTRAINT_UNIQUE].contains(&cause.extended_code)
            }
            Self::Server(sqlx::Error::Database(cause)) => cause.is_unique_violation(),
            _ => false,
        }
    }

    /// Whether another connection holds the lock.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Embedded(cause) if cause.sqlite_error_code() == Some(ErrorCode::DatabaseBusy))
    }

    /// Logs the failure and returns a problem that does not show it.
    pub fn into_problem(self) -> Problem {
        let cause = self;
        if matches!(cause, Self::Exhausted(_)) || cause.is_busy() {
            metrics::counter!("capsule_database_exhausted_total").increment(1);
            tracing::error!(%cause, "no database connection was available");
            return Problem::unavailable("The database does not respond, or is overloaded.");
        }
        tracing::error!(%cause, "database statement failed");
        Problem::internal()
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exhausted(why) => f.write_str(why),
            Self::RolledBack => f.write_str("the transaction was rolled back after an earlier error"),
            Self::Decode(cause) => cause.fmt(f),
            Self::Embedded(cause) => cause.fmt(f),
            Self::Server(cause) => cause.fmt(f),
        }
    }
}

impl From<DecodeError> for Failure {
    fn from(cause: DecodeError) -> Self {
        Self::Decode(cause)
    }
}

impl From<rusqlite::Error> for Failure {
    fn from(cause: rusqlite::Error) -> Self {
        Self::Embedded(cause)
    }
}

impl From<sqlx::Error> for Failure {
    fn from(cause: sqlx::Error) -> Self {
        match cause {
            sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => Self::Exhausted(cause.to_string()),
            cause => Self::Server(cause),
        }
    }
}
