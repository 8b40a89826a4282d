//! SQL statements with their values, in two kinds: [`scoped!`](crate::scoped) statements on tenant data require a
//! grant; the few [`unscoped!`](crate::unscoped) ones state why they need none.

use capsule_contracts::Uuid;
use sea_orm::{ConnectionTrait, Value};

/// Permission to access an organization's data. Only the dispatcher creates such values.
pub trait Scope {
    /// The organization whose rows may be read and written.
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

    /// A span around its execution, for traces. Leaves out the values, which may be personal or secret.
    pub(crate) fn span(&self) -> tracing::Span {
        tracing::debug_span!("sql", otel.kind = "client", db.query.text = self.sql)
    }

    pub(crate) fn build(self, connection: &impl ConnectionTrait) -> sea_orm::Statement {
        sea_orm::Statement::from_sql_and_values(connection.get_database_backend(), self.sql, self.values)
    }
}

/// A statement on tenant data. Takes a [`Scope`], and does not compile unless its SQL contains `:tenant`, which is
/// bound to the scope's organization.
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
        const { assert!($crate::contains_tenant($sql), "a statement on tenant data must contain :tenant") };
        $crate::Statement::scoped($scope, $sql, vec![$($crate::Value::from($value)),*])
    }};
}

/// A statement that needs no [`Scope`], with the reason: a table that belongs to no tenant, or the query
/// that finds out which organization owns a resource.
#[macro_export]
macro_rules! unscoped {
    ($reason:literal, $sql:expr $(, $value:expr)* $(,)?) => {
        $crate::Statement::unscoped($sql, vec![$($crate::Value::from($value)),*])
    };
}

/// Whether `sql` contains `:tenant`.
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
