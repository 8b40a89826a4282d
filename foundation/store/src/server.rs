//! `PostgreSQL`: statements over a pool of connections, a transaction or a session.

use std::borrow::Cow;

use sqlx::postgres::PgExecutor;
use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};

use crate::failure::Failure;
use crate::value::arguments;
use crate::{DecodeError, Row, Value};

/// Runs a statement that returns rows, and reads all of them, or only the first.
///
/// # Errors
/// When it fails, or a row cannot be read.
pub async fn query<T>(
    executor: impl PgExecutor<'_>,
    sql: Cow<'static, str>,
    values: Vec<Value>,
    only_first: bool,
    decode: impl Fn(&Row<'_>) -> Result<T, DecodeError>,
) -> Result<Vec<T>, Failure> {
    let query = sqlx::query_with(text(sql), arguments(values)?);
    let rows =
        if only_first { query.fetch_optional(executor).await?.into_iter().collect() } else { query.fetch_all(executor).await? };
    rows.iter().map(|row| decode(&Row::server(row)).map_err(Into::into)).collect()
}

/// Runs a statement that changes rows, and returns how many it changed.
///
/// # Errors
/// When it fails.
pub async fn execute(executor: impl PgExecutor<'_>, sql: Cow<'static, str>, values: Vec<Value>) -> Result<u64, Failure> {
    Ok(sqlx::query_with(text(sql), arguments(values)?).execute(executor).await?.rows_affected())
}

/// Statements are constants, or contain the names of tables and columns; never a value.
pub fn text(sql: Cow<'static, str>) -> SqlStr {
    match sql {
        Cow::Borrowed(sql) => sql.into_sql_str(),
        Cow::Owned(sql) => AssertSqlSafe(sql).into_sql_str(),
    }
}
