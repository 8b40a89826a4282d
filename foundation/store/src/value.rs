//! The values of statements, and their encoding for each engine.

use capsule_contracts::Uuid;
use rusqlite::ToSql;
use rusqlite::types::{ToSqlOutput, ValueRef};
use sqlx::Arguments;
use sqlx::postgres::PgArguments;

/// A value of a statement, or a `NULL` with its type, which `PostgreSQL` requires.
///
/// `SQLite` stores a UUID as a blob of 16 bytes, a boolean as the integer 0 or 1, and JSON as text.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Bool(Option<bool>),
    /// 32 bits: `INTEGER`
    Int(Option<i32>),
    /// 64 bits: `BIGINT`
    BigInt(Option<i64>),
    Double(Option<f64>),
    Text(Option<String>),
    Bytes(Option<Vec<u8>>),
    Uuid(Option<Uuid>),
    Json(Option<serde_json::Value>),
}

/// The types that a [`Value`] holds.
pub trait ValueType: Into<Value> {
    /// The `NULL` of this type.
    const NULL: Value;
}

macro_rules! value_types {
    ($($type:ty => $variant:ident),+ $(,)?) => {$(
        impl From<$type> for Value {
            fn from(value: $type) -> Self {
                Self::$variant(Some(value.into()))
            }
        }
        impl ValueType for $type {
            const NULL: Value = Value::$variant(None);
        }
    )+};
}

value_types! {
    bool => Bool,
    i32 => Int,
    i64 => BigInt,
    f64 => Double,
    &str => Text,
    &String => Text,
    String => Text,
    &[u8] => Bytes,
    Vec<u8> => Bytes,
    Uuid => Uuid,
    serde_json::Value => Json,
}

impl<T: ValueType> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(T::NULL, Into::into)
    }
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        let value = match self {
            Self::Bool(value) => value.map(|truth| ValueRef::Integer(truth.into())),
            Self::Int(value) => value.map(|number| ValueRef::Integer(number.into())),
            Self::BigInt(value) => value.map(ValueRef::Integer),
            Self::Double(value) => value.map(ValueRef::Real),
            Self::Text(value) => value.as_ref().map(|text| ValueRef::Text(text.as_bytes())),
            Self::Bytes(value) => value.as_ref().map(|bytes| ValueRef::Blob(bytes)),
            Self::Uuid(value) => value.as_ref().map(|id| ValueRef::Blob(id.as_bytes())),
            Self::Json(Some(json)) => return Ok(ToSqlOutput::Owned(json.to_string().into())),
            Self::Json(None) => None,
        };
        Ok(ToSqlOutput::Borrowed(value.unwrap_or(ValueRef::Null)))
    }
}

/// The values as `PostgreSQL` takes them.
///
/// # Errors
/// When one cannot be encoded.
pub fn arguments(values: Vec<Value>) -> Result<PgArguments, sqlx::Error> {
    let mut arguments = PgArguments::default();
    for value in values {
        match value {
            Value::Bool(value) => arguments.add(value),
            Value::Int(value) => arguments.add(value),
            Value::BigInt(value) => arguments.add(value),
            Value::Double(value) => arguments.add(value),
            Value::Text(value) => arguments.add(value),
            Value::Bytes(value) => arguments.add(value),
            Value::Uuid(value) => arguments.add(value),
            Value::Json(value) => arguments.add(value),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}
