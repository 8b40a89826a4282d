//! SQL statements with their values. A statement on tenant data takes the grant of an authorized caller; any
//! other states why it needs none.

use std::borrow::Cow;
use std::sync::OnceLock;

use capsule_contracts::Uuid;

use crate::{Value, sql};

/// The grant to touch an organization's data. Only the dispatcher makes such values.
pub trait Scope {
    /// The organization whose rows may be touched.
    fn organization(&self) -> Uuid;
}

/// Permission to access a user's own rows. Made by the dispatcher, and by the identity service for a user whose credential
/// it has verified.
pub trait UserScope {
    /// The user whose rows may be read and written.
    fn user(&self) -> Uuid;
}

/// The text of a statement: one for each place in the program that makes it.
#[derive(Debug)]
pub struct Query {
    source: &'static str,
    embedded: Text,
    server: Text,
}

/// A text in which only `:columns` may be left to fill.
#[derive(Debug)]
struct Text {
    template: &'static str,
    /// The columns that it was filled with first, and what came of it.
    filled: OnceLock<(&'static str, String)>,
}

impl Query {
    /// Called by [`scoped!`](crate::scoped) and [`unscoped!`](crate::unscoped).
    #[doc(hidden)]
    #[must_use]
    pub const fn new(source: &'static str, embedded: &'static str, server: &'static str) -> Self {
        Self { source, embedded: Text::new(embedded), server: Text::new(server) }
    }
}

impl Text {
    const fn new(template: &'static str) -> Self {
        Self { template, filled: OnceLock::new() }
    }

    fn select(&'static self, columns: Option<&'static str>) -> Cow<'static, str> {
        let Some(columns) = columns.filter(|_| self.template.contains(sql::COLUMNS)) else { return self.template.into() };
        let fill = || self.template.replace(sql::COLUMNS, columns);
        let (first, text) = self.filled.get_or_init(|| (columns, fill()));
        // One place may make a statement for several row types.
        if *first == columns { text.as_str().into() } else { fill().into() }
    }
}

/// A statement with its values. Made by [`scoped!`](crate::scoped) or [`unscoped!`](crate::unscoped).
#[derive(Clone, Debug)]
pub struct Statement {
    query: &'static Query,
    pub(crate) values: Vec<Value>,
}

impl Statement {
    /// Called by [`scoped!`](crate::scoped), for which the organization is the last value.
    #[doc(hidden)]
    #[must_use]
    pub fn scoped(scope: &impl Scope, query: &'static Query, mut values: Vec<Value>) -> Self {
        values.push(scope.organization().into());
        Self { query, values }
    }

    /// Called by [`user_scoped!`](crate::user_scoped), for which the user is the last value.
    #[doc(hidden)]
    #[must_use]
    pub fn user_scoped(scope: &impl UserScope, query: &'static Query, mut values: Vec<Value>) -> Self {
        values.push(scope.user().into());
        Self { query, values }
    }

    /// Called by [`unscoped!`](crate::unscoped).
    #[doc(hidden)]
    #[must_use]
    pub fn unscoped(query: &'static Query, values: Vec<Value>) -> Self {
        Self { query, values }
    }

    /// A span around its execution, for traces. It has the text, never the values.
    pub(crate) fn span(&self) -> tracing::Span {
        tracing::debug_span!("sql", otel.kind = "client", db.query.text = self.query.source)
    }

    /// Its text for `SQLite`, with these columns where it says `:columns`.
    pub(crate) fn embedded(&self, columns: Option<&'static str>) -> Cow<'static, str> {
        self.query.embedded.select(columns)
    }

    /// Its text for `PostgreSQL`, with these columns where it says `:columns`.
    pub(crate) fn server(&self, columns: Option<&'static str>) -> Cow<'static, str> {
        self.query.server.select(columns)
    }
}

/// A statement on tenant data: takes the grant of the caller, and the statement's values by their names. It does
/// not compile unless the statement names `:tenant`, for which it puts the organization's id. `name` is short for
/// `name = name`.
///
/// ```
/// # struct Grant;
/// # impl capsule_store::Scope for Grant {
/// #     fn organization(&self) -> capsule_contracts::Uuid { capsule_contracts::Uuid::nil() }
/// # }
/// # let id = 1_i64;
/// capsule_store::scoped!(&Grant, "UPDATE projects SET name = :name WHERE id = :id AND organization_id = :tenant", id, name = "a");
/// ```
///
/// ```compile_fail
/// # struct Grant;
/// # impl capsule_store::Scope for Grant {
/// #     fn organization(&self) -> capsule_contracts::Uuid { capsule_contracts::Uuid::nil() }
/// # }
/// // Without `:tenant`.
/// capsule_store::scoped!(&Grant, "SELECT name FROM projects WHERE id = :id", id = 1_i64);
/// ```
#[macro_export]
macro_rules! scoped {
    ($scope:expr, $sql:expr $(, $name:ident $(= $value:expr)?)* $(,)?) => {{
        static QUERY: $crate::Query = $crate::query!($sql, [$($name,)* tenant]);
        $crate::Statement::scoped($scope, &QUERY, vec![$($crate::named!($name $(= $value)?)),*])
    }};
}

/// A statement on a user's rows. Takes a [`UserScope`], and does not compile unless its SQL contains `:user`, which is
/// bound to the scope's user. Values are given as to [`scoped!`](crate::scoped).
///
/// ```
/// # struct Grant;
/// # impl capsule_store::UserScope for Grant {
/// #     fn user(&self) -> capsule_contracts::Uuid { capsule_contracts::Uuid::nil() }
/// # }
/// capsule_store::user_scoped!(&Grant, "SELECT id FROM sessions WHERE user_id = :user AND revoked_at IS NULL");
/// ```
///
/// ```compile_fail
/// # struct Grant;
/// # impl capsule_store::UserScope for Grant {
/// #     fn user(&self) -> capsule_contracts::Uuid { capsule_contracts::Uuid::nil() }
/// # }
/// // Without `:user`.
/// capsule_store::user_scoped!(&Grant, "SELECT id FROM sessions WHERE revoked_at IS NULL");
/// ```
#[macro_export]
macro_rules! user_scoped {
    ($scope:expr, $sql:expr $(, $name:ident $(= $value:expr)?)* $(,)?) => {{
        static QUERY: $crate::Query = $crate::query!($sql, [$($name,)* user]);
        $crate::Statement::user_scoped($scope, &QUERY, vec![$($crate::named!($name $(= $value)?)),*])
    }};
}

/// A statement that needs no grant, and why: a table that belongs to no tenant, or the one look-up that finds out
/// whose a row is. Values are given as to [`scoped!`](crate::scoped).
///
/// ```
/// let id = 1_i64;
/// capsule_store::unscoped!("users belong to no tenant", "SELECT name FROM users WHERE id = :id AND age > :age", id, age = 2);
/// ```
///
/// ```compile_fail
/// // `:age` is not given.
/// capsule_store::unscoped!("users belong to no tenant", "SELECT name FROM users WHERE id = :id AND age > :age", id = 1_i64);
/// ```
///
/// ```compile_fail
/// // There is no `:age`.
/// capsule_store::unscoped!("users belong to no tenant", "SELECT name FROM users WHERE id = :id", id = 1_i64, age = 2);
/// ```
#[macro_export]
macro_rules! unscoped {
    ($reason:literal, $sql:expr $(, $name:ident $(= $value:expr)?)* $(,)?) => {{
        static QUERY: $crate::Query = $crate::query!($sql, [$($name),*]);
        $crate::Statement::unscoped(&QUERY, vec![$($crate::named!($name $(= $value)?)),*])
    }};
}

/// The text of a statement, with its names checked and numbered.
#[doc(hidden)]
#[macro_export]
macro_rules! query {
    ($sql:expr, [$($name:ident),*]) => {{
        const SQL: &str = $sql;
        const NAMES: &[&str] = &[$(stringify!($name)),*];
        const LENGTH: usize = $crate::sql::length(SQL, NAMES);
        const EMBEDDED: [u8; LENGTH] = $crate::sql::number(b'?', SQL, NAMES);
        const SERVER: [u8; LENGTH] = $crate::sql::number(b'$', SQL, NAMES);
        $crate::Query::new(SQL, $crate::sql::text(&EMBEDDED), $crate::sql::text(&SERVER))
    }};
}

/// A value by its name.
#[doc(hidden)]
#[macro_export]
macro_rules! named {
    ($name:ident = $value:expr) => {
        $crate::Value::from($value)
    };
    ($name:ident) => {
        $crate::Value::from($name)
    };
}

/// A statement that reads one page of a list, in the order that a [`PageQuery`](capsule_contracts::list::PageQuery)
/// gives: a [`scoped!`](crate::scoped) or [`unscoped!`](crate::unscoped) `SELECT` that ends with its `WHERE` clause, the
/// column that is unique among items with an equal sort value (`uuid` or `text`), and the column of each sort field
/// (`integer`, `text` or `uuid`). The statement's own values follow by
/// name; `first_page`, `after`, `after_tie` and `rows` are taken.
///
/// The expression is a `Result`: a cursor can have a value of another type.
#[macro_export]
macro_rules! page {
    ($query:expr, scoped $scope:expr, $sql:literal, $tie:literal $tie_type:ident, [$($name:literal => $column:literal $type:ident),+] $(, $value_name:ident = $value:expr)* $(,)?) => {
        $crate::page!(@match $query, (scoped, $scope), $sql, $tie, $tie_type, [$($name, $column, $type);+], [$($value_name = $value),*])
    };
    ($query:expr, unscoped $reason:literal, $sql:literal, $tie:literal $tie_type:ident, [$($name:literal => $column:literal $type:ident),+] $(, $value_name:ident = $value:expr)* $(,)?) => {
        $crate::page!(@match $query, (unscoped, $reason), $sql, $tie, $tie_type, [$($name, $column, $type);+], [$($value_name = $value),*])
    };
    (@match $query:expr, $how:tt, $sql:literal, $tie:literal, $tie_type:ident, [$($name:literal, $column:literal, $type:ident);+], $values:tt) => {{
        let query: &capsule_contracts::list::PageQuery = &$query;
        let statement: Result<$crate::Statement, capsule_contracts::Problem> = match (query.sort(), query.descending()) {
            $(
                ($name, false) => query.$type().and_then(|key| Ok($crate::page!(
                    @statement $how, query, key, $crate::page!(@tie query $tie_type)?, $values,
                    concat!($sql, " AND (:first_page OR (", $column, ", ", $tie, ") > (:after, :after_tie)) ORDER BY ", $column, ", ", $tie, " LIMIT :rows")
                ))),
                ($name, true) => query.$type().and_then(|key| Ok($crate::page!(
                    @statement $how, query, key, $crate::page!(@tie query $tie_type)?, $values,
                    concat!($sql, " AND (:first_page OR (", $column, ", ", $tie, ") < (:after, :after_tie)) ORDER BY ", $column, " DESC, ", $tie, " DESC LIMIT :rows")
                ))),
            )+
            // A sort field of the message without a column here.
            _ => Err(capsule_contracts::Problem::internal()),
        };
        statement
    }};
    (@tie $query:ident uuid) => { $query.tie_uuid() };
    (@tie $query:ident text) => { $query.tie_text() };
    (@statement (scoped, $scope:expr), $query:ident, $key:ident, $tie:expr, [$($value_name:ident = $value:expr),*], $sql:expr) => {
        $crate::scoped!(
            $scope, $sql, first_page = $query.is_first(), after = $key, after_tie = $tie, rows = $query.rows() $(, $value_name = $value)*
        )
    };
    (@statement (unscoped, $reason:literal), $query:ident, $key:ident, $tie:expr, [$($value_name:ident = $value:expr),*], $sql:expr) => {
        $crate::unscoped!(
            $reason, $sql, first_page = $query.is_first(), after = $key, after_tie = $tie, rows = $query.rows() $(, $value_name = $value)*
        )
    };
}

#[cfg(test)]
mod tests {
    use super::{Query, Text};

    #[test]
    fn columns_are_those_of_the_row_type_that_is_asked_for() {
        static TEXT: Text = Text::new("SELECT :columns FROM t");
        for columns in ["a, b", "c", "a, b"] {
            assert_eq!(TEXT.select(Some(columns)), format!("SELECT {columns} FROM t"));
        }
        assert_eq!(TEXT.select(None), "SELECT :columns FROM t");
        static PLAIN: Query = crate::query!("SELECT 1 WHERE a = :a", [a]);
        assert_eq!(
            (&*PLAIN.embedded.select(Some("a")), &*PLAIN.server.select(None)),
            ("SELECT 1 WHERE a = ?1", "SELECT 1 WHERE a = $1")
        );
    }
}
