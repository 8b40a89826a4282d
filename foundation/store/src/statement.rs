//! SQL statements with their values, in two kinds: those on tenant data, which take the proof of
//! authorization, and the few others, which say why they need none.

use capsule_contracts::Uuid;
use sea_orm::{ConnectionTrait, Value};

/// Proof that the caller may touch an organization's data. Only the dispatcher makes such values.
pub trait Scope {
    /// The organization whose rows may be touched.
    fn organization(&self) -> Uuid;
}

/// A statement with its values. Made by [`scoped!`](crate::scoped) or [`unscoped!`](crate::unscoped).
#[derive(Clone, Debug)]
pub struct Statement {
    sql: String,
    values: Vec<Value>,
}

impl Statement {
    /// Called by [`scoped!`](crate::scoped).
    #[doc(hidden)]
    pub fn scoped(scope: &impl Scope, sql: &'static str, mut values: Vec<Value>) -> Self {
        values.push(scope.organization().into());
        Self { sql: sql.replace(":tenant", &format!("${}", values.len())), values }
    }

    /// Called by [`unscoped!`](crate::unscoped).
    #[doc(hidden)]
    #[must_use]
    pub fn unscoped(sql: &'static str, values: Vec<Value>) -> Self {
        Self { sql: sql.into(), values }
    }

    /// A span around its execution, for traces; its values are nobody's business.
    pub(crate) fn span(&self) -> tracing::Span {
        tracing::debug_span!("sql", otel.kind = "client", db.query.text = self.sql)
    }

    pub(crate) fn build(self, connection: &impl ConnectionTrait) -> sea_orm::Statement {
        sea_orm::Statement::from_sql_and_values(connection.get_database_backend(), self.sql, self.values)
    }
}

/// A statement on tenant data: takes the proof of authorization, and does not compile unless it
/// names `:tenant`, for which the organization's id is put.
///
/// ```compile_fail
/// # struct Proof;
/// # impl capsule_store::Scope for Proof {
/// #     fn organization(&self) -> capsule_contracts::Uuid { unimplemented!() }
/// # }
/// capsule_store::scoped!(&Proof, "SELECT name FROM projects WHERE id = $1", 1_i64);
/// ```
#[macro_export]
macro_rules! scoped {
    ($scope:expr, $sql:expr $(, $value:expr)* $(,)?) => {{
        const { assert!($crate::contains_tenant($sql), "a statement on tenant data must name :tenant") };
        $crate::Statement::scoped($scope, $sql, vec![$($crate::Value::from($value)),*])
    }};
}

/// A statement that needs no proof, and why: a table that belongs to no tenant, or the one look-up
/// that finds out whose a thing is.
#[macro_export]
macro_rules! unscoped {
    ($reason:literal, $sql:expr $(, $value:expr)* $(,)?) => {
        $crate::Statement::unscoped($sql, vec![$($crate::Value::from($value)),*])
    };
}

/// Whether `sql` names `:tenant`.
#[doc(hidden)]
#[must_use]
pub const fn contains_tenant(sql: &str) -> bool {
    let (sql, word) = (sql.as_bytes(), b":tenant");
    let mut start = 0;
    while start + word.len() <= sql.len() {
        let mut matched = 0;
        while matched < word.len() && sql[start + matched] == word[matched] {
            matched += 1;
        }
        if matched == word.len() {
            return true;
        }
        start += 1;
    }
    false
}
