//! Rows of either engine, and the types that their columns are read as.

use capsule_contracts::Uuid;
use rusqlite::types::ValueRef;
use sqlx::postgres::PgRow;
use sqlx::{Column, Row as _, ValueRef as _};

/// A row of a result.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a>(Inner<'a>);

#[derive(Clone, Copy, Debug)]
enum Inner<'a> {
    Embedded(&'a rusqlite::Row<'a>),
    Server(&'a PgRow),
}

/// Why a row cannot be read. Names the column.
#[derive(Debug)]
pub struct DecodeError(String);

impl std::fmt::Display for DecodeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for DecodeError {}

/// A type that a row is read as. `#[derive(FromRow)]` reads each field from the column of its name.
pub trait FromRow: Sized {
    /// The names of the columns, such as `id, name`. They replace `:columns` in a statement.
    const COLUMNS: &'static str;

    /// Reads a row.
    ///
    /// # Errors
    /// When a column is missing, or does not hold a value of the field's type.
    fn from_row(row: &Row<'_>) -> Result<Self, DecodeError>;
}

/// A type that a column is read as: `Option` where it may be `NULL`.
pub trait FromColumn: Sized {
    /// Reads the column at this index.
    ///
    /// # Errors
    /// What is wrong with the column, such as `is NULL`.
    fn from_column(row: &Row<'_>, at: usize) -> Result<Self, String>;
}

impl<'a> Row<'a> {
    pub(crate) fn embedded(row: &'a rusqlite::Row<'a>) -> Self {
        Self(Inner::Embedded(row))
    }

    pub(crate) fn server(row: &'a PgRow) -> Self {
        Self(Inner::Server(row))
    }

    /// Reads the column of this name. The search for it begins at the index `expected`.
    ///
    /// # Errors
    /// When the column is missing, or does not hold a value of the type.
    pub fn column<T: FromColumn>(&self, name: &str, expected: usize) -> Result<T, DecodeError> {
        let at = if self.name(expected) == Some(name) { Some(expected) } else { self.find(name) };
        let at = at.ok_or_else(|| DecodeError(format!("the row has no column {name}")))?;
        T::from_column(self, at).map_err(|why| DecodeError(format!("the column {name} {why}")))
    }

    /// Reads the column at this index.
    ///
    /// # Errors
    /// As [`Row::column`].
    pub fn at<T: FromColumn>(&self, at: usize) -> Result<T, DecodeError> {
        T::from_column(self, at)
            .map_err(|why| DecodeError(format!("the column {} {why}", self.name(at).unwrap_or("that is read"))))
    }

    fn find(&self, name: &str) -> Option<usize> {
        (0..).map_while(|at| self.name(at)).position(|known| known == name)
    }

    fn name(&self, at: usize) -> Option<&str> {
        match self.0 {
            Inner::Embedded(row) => row.as_ref().column_name(at).ok(),
            Inner::Server(row) => row.columns().get(at).map(Column::name),
        }
    }

    fn is_null(&self, at: usize) -> Result<bool, String> {
        match self.0 {
            Inner::Embedded(row) => Ok(matches!(row.get_ref(at).map_err(|cause| cause.to_string())?, ValueRef::Null)),
            Inner::Server(row) => Ok(row.try_get_raw(at).map_err(|cause| cause.to_string())?.is_null()),
        }
    }
}

impl<T: FromColumn> FromColumn for Option<T> {
    fn from_column(row: &Row<'_>, at: usize) -> Result<Self, String> {
        if row.is_null(at)? { Ok(None) } else { T::from_column(row, at).map(Some) }
    }
}

/// Reads the given storage classes of `SQLite`, and what `sqlx` decodes from `PostgreSQL`.
macro_rules! columns {
    ($($type:ty { $($class:pat => $value:expr),+ $(,)? })+) => {$(
        impl FromColumn for $type {
            fn from_column(row: &Row<'_>, at: usize) -> Result<Self, String> {
                match row.0 {
                    Inner::Embedded(row) => match row.get_ref(at).map_err(|cause| cause.to_string())? {
                        $($class => $value,)+
                        other => Err(is_not(other, stringify!($type))),
                    },
                    Inner::Server(row) => match row.try_get::<Option<Self>, _>(at) {
                        Ok(Some(value)) => Ok(value),
                        Ok(None) => Err("is NULL".into()),
                        Err(cause) => Err(format!("is not read: {cause}")),
                    },
                }
            }
        }
    )+};
}

columns! {
    bool { ValueRef::Integer(number) => Ok(number != 0) }
    i32 { ValueRef::Integer(number) => Self::try_from(number).map_err(|_| format!("is {number}, which is no i32")) }
    i64 { ValueRef::Integer(number) => Ok(number) }
    f64 { ValueRef::Real(number) => Ok(number), ValueRef::Integer(number) => Ok(number as Self) }
    String { ValueRef::Text(text) => std::str::from_utf8(text).map(Into::into).map_err(|_| "is not UTF-8".into()) }
    Vec<u8> { ValueRef::Blob(bytes) => Ok(bytes.to_vec()) }
    Uuid { ValueRef::Blob(bytes) => Self::from_slice(bytes).map_err(|_| format!("has {} bytes, which is no UUID", bytes.len())) }
    serde_json::Value { ValueRef::Text(text) => serde_json::from_slice(text).map_err(|cause| format!("is no JSON: {cause}")) }
}

fn is_not(value: ValueRef<'_>, wanted: &str) -> String {
    match value {
        ValueRef::Null => "is NULL".into(),
        other => format!("is {}, not {wanted}", other.data_type()),
    }
}

#[cfg(test)]
mod tests {
    use crate::FromRow;
    use crate::embedded::query;

    #[derive(Debug, FromRow)]
    struct Thing {
        id: i64,
        #[column("name")]
        title: String,
    }

    fn read(sql: &str) -> Result<Vec<Thing>, String> {
        let connection = rusqlite::Connection::open_in_memory().expect("opens");
        query(&connection, sql, &[], usize::MAX, Thing::from_row).map_err(|failure| failure.to_string())
    }

    #[test]
    fn fields_are_read_by_the_names_of_columns() {
        assert_eq!(Thing::COLUMNS, "id, name");
        let things = read("SELECT 'a' AS name, 0 AS more, 7 AS id").expect("reads");
        assert_eq!((things[0].id, things[0].title.as_str()), (7, "a"));
    }

    #[test]
    fn an_error_names_the_column() {
        for (sql, error) in [
            ("SELECT 1 AS id", "the row has no column name"),
            ("SELECT 1 AS id, NULL AS name", "the column name is NULL"),
            ("SELECT 'a' AS id, 'a' AS name", "the column id is Text, not i64"),
        ] {
            assert_eq!(read(sql).expect_err("refused"), error);
        }
    }
}
