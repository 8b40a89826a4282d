//! A service's database as plain rows: read as a whole at one moment, and written into an empty one, on
//! either engine. Backups and moves are made of it.

use std::fmt::Write;

use capsule_contracts::Uuid;
use sea_orm::{
    ConnectionTrait, DatabaseBackend, DatabaseConnection, DatabaseTransaction, IsolationLevel, QueryResult, Statement,
    TransactionTrait, Value,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Databases, Migrations, StoreError, migrate};

/// Tables that belong to the processes at work, not to what they know.
const PASSING: [&str; 1] = ["leases"];
/// Tables with one row that a migration makes.
const SEEDED: [&str; 2] = ["routing", "user_ids"];
/// Rows read or written at a time.
pub const CHUNK: usize = 500;

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Uuid,
    Text,
    Integer,
    Bigint,
    Boolean,
    Bytes,
}

impl Kind {
    fn of(declared: &str) -> Option<Self> {
        Some(match declared.to_ascii_lowercase().as_str() {
            "uuid" => Self::Uuid,
            "text" => Self::Text,
            "integer" => Self::Integer,
            "bigint" => Self::Bigint,
            "boolean" => Self::Boolean,
            "bytea" => Self::Bytes,
            _ => return None,
        })
    }
}

/// A table, without its rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub name: String,
    pub columns: Vec<(String, Kind)>,
}

/// A row: its values in the order of the table's columns, as JSON; bytes in hexadecimal.
pub type Row = Vec<serde_json::Value>;

/// How many rows a table has, and what they are, in whatever order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub count: u64,
    /// SHA-256, in hexadecimal.
    pub digest: String,
}

/// Summarizes rows.
#[derive(Debug, Default)]
pub struct Summing(Vec<[u8; 32]>);

impl Summing {
    /// Adds a row.
    pub fn add(&mut self, row: &Row) {
        let text = serde_json::to_vec(row).unwrap_or_default();
        self.0.push(Sha256::digest(text).into());
    }

    /// The summary of what was added, whatever the order: engines sort differently.
    #[must_use]
    pub fn end(mut self) -> Summary {
        self.0.sort_unstable();
        let mut all = Sha256::new();
        self.0.iter().for_each(|digest| all.update(digest));
        Summary { count: self.0.len() as u64, digest: hex::encode(all.finalize()) }
    }
}

/// A database as it is at one moment.
pub struct Snapshot {
    transaction: DatabaseTransaction,
    tables: Vec<Table>,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Snapshot({} tables)", self.tables.len())
    }
}

impl Snapshot {
    /// Looks at a service's database; others go on writing to it. `None` where there is none.
    ///
    /// # Errors
    /// When it cannot be read, or has a column of a type that is not known.
    pub async fn take(databases: &Databases, service: &str) -> Result<Option<Self>, StoreError> {
        if !databases.has(service).await? {
            return Ok(None);
        }
        let connection = databases.writer(service).await?;
        let transaction = match connection.get_database_backend() {
            DatabaseBackend::Postgres => connection.begin_with_config(Some(IsolationLevel::RepeatableRead), None).await,
            _ => connection.begin().await,
        };
        let transaction = transaction.map_err(|cause| failed(service, &cause))?;
        let tables = tables(&transaction).await.map_err(|error| failed(service, &error))?;
        Ok(Some(Self { transaction, tables }))
    }

    /// The tables, each after those that it refers to.
    #[must_use]
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// Rows of a table, from the one at this place on: at most [`CHUNK`].
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn rows(&self, table: &Table, from: usize) -> Result<Vec<Row>, StoreError> {
        read(&self.transaction, table, from).await.map_err(|cause| failed(&table.name, &cause))
    }

    /// How many rows there are in which table, and what they are.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn summary(&self, table: &Table) -> Result<Summary, StoreError> {
        let mut summing = Summing::default();
        let mut from = 0;
        loop {
            let rows = self.rows(table, from).await?;
            rows.iter().for_each(|row| summing.add(row));
            from += rows.len();
            if rows.len() < CHUNK {
                return Ok(summing.end());
            }
        }
    }
}

impl Snapshot {
    /// Component and version of each migration that was applied.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn versions(&self) -> Result<Vec<(String, i32)>, StoreError> {
        let sql = "SELECT component, version FROM schema_history ORDER BY component, version";
        let rows = self.transaction.query_all_raw(Statement::from_string(self.transaction.get_database_backend(), sql)).await;
        let rows = rows.map_err(|cause| failed("schema_history", &cause))?;
        let version = |row: &QueryResult| Ok((row.try_get_by_index(0)?, row.try_get_by_index(1)?));
        rows.iter().map(version).collect::<Result<_, sea_orm::DbErr>>().map_err(|cause| failed("schema_history", &cause))
    }

    /// The tables whose rows are told from each other by their summaries.
    async fn summaries(&self) -> Result<Vec<(String, Summary)>, StoreError> {
        let mut all = Vec::new();
        for table in self.tables.iter().filter(|table| table.name != "schema_history") {
            all.push((table.name.clone(), self.summary(table).await?));
        }
        Ok(all)
    }
}

/// Copies a service's database into an empty one elsewhere, and compares both by count and digest. One that
/// was copied before is compared only. How many rows there are.
///
/// # Errors
/// When it cannot be read or written, is not empty there, or is not the same afterwards.
pub async fn copy(from: &Databases, to: &Databases, service: &str, migrations: Migrations) -> Result<u64, StoreError> {
    let Some(original) = Snapshot::take(from, service).await? else { return Ok(0) };
    let expected = original.summaries().await?;
    let rows = expected.iter().map(|(_, summary)| summary.count).sum();
    if let Some(there) = Snapshot::take(to, service).await?
        && there.summaries().await? == expected
    {
        return Ok(rows);
    }
    let filling = Filling::begin(to, service, migrations, &original.versions().await?).await?;
    for table in original.tables() {
        let mut from = 0;
        loop {
            let rows = original.rows(table, from).await?;
            filling.write(table, &rows).await?;
            from += rows.len();
            if rows.len() < CHUNK {
                break;
            }
        }
    }
    filling.commit().await?;
    let copied = Snapshot::take(to, service).await?.ok_or_else(|| StoreError(format!("{service}: the copy is not there")))?;
    let copied = copied.summaries().await?;
    match expected.iter().zip(&copied).find(|(one, other)| one != other) {
        None if expected.len() == copied.len() => Ok(rows),
        wrong => Err(StoreError(format!("{service}: the copy differs: {wrong:?}"))),
    }
}

/// A service's database that is being filled; nothing of it is seen before [`Filling::commit`].
pub struct Filling {
    connection: DatabaseConnection,
    transaction: DatabaseTransaction,
    tables: Vec<Table>,
    service: String,
}

impl std::fmt::Debug for Filling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filling({})", self.service)
    }
}

impl Filling {
    /// Makes the database, with its schema as `versions` says (component and version of each migration that
    /// was applied there), and begins to fill it.
    ///
    /// # Errors
    /// When it cannot be made, or is not empty, or a migration is not known here.
    pub async fn begin(
        databases: &Databases,
        service: &str,
        migrations: Migrations,
        versions: &[(String, i32)],
    ) -> Result<Self, StoreError> {
        let connection = databases.writer(service).await?;
        for (component, version) in versions {
            let known = migrations.iter().find(|(name, _)| name == component);
            if known.is_none_or(|(_, known)| known.iter().all(|migration| migration.version != *version)) {
                return Err(StoreError(format!(
                    "{service}: it has the migration V{version:03} of {component}, which is not known here; use the newer version"
                )));
            }
        }
        for (component, known) in migrations {
            let then = |version: i32| versions.iter().any(|(name, applied)| name == component && *applied == version);
            let applied: Vec<_> = known.iter().filter(|migration| then(migration.version)).copied().collect();
            migrate::run(&connection, component, &applied).await?;
        }
        let transaction = connection.begin().await.map_err(|cause| failed(service, &cause))?;
        let tables = tables(&transaction).await.map_err(|error| failed(service, &error))?;
        let is_seeded = |table: &&Table| SEEDED.contains(&table.name.as_str());
        for table in tables.iter().filter(|table| !is_seeded(table) && table.name != "schema_history") {
            let any = Statement::from_string(transaction.get_database_backend(), format!("SELECT 1 FROM {} LIMIT 1", table.name));
            if transaction.query_one_raw(any).await.map_err(|cause| failed(service, &cause))?.is_some() {
                return Err(StoreError(format!("{service}: the database there is not empty: {} has rows", table.name)));
            }
        }
        for table in tables.iter().filter(is_seeded) {
            let empty = format!("DELETE FROM {}", table.name);
            transaction.execute_unprepared(&empty).await.map_err(|cause| failed(service, &cause))?;
        }
        Ok(Self { connection, transaction, tables, service: service.into() })
    }

    /// Writes rows of a table.
    ///
    /// # Errors
    /// When there is no such table here, or they do not fit it.
    pub async fn write(&self, table: &Table, rows: &[Row]) -> Result<(), StoreError> {
        // Written by the migrations already.
        if table.name == "schema_history" {
            return Ok(());
        }
        let wrong = |what: &str| StoreError(format!("{}: {}: {what}", self.service, table.name));
        if !self.tables.contains(table) {
            return Err(wrong("there is no such table, or it has other columns here"));
        }
        let names: Vec<&str> = table.columns.iter().map(|(name, _)| name.as_str()).collect();
        let mut sql = format!("INSERT INTO {} ({}) VALUES (", table.name, names.join(", "));
        for place in 1..=names.len() {
            let _ = write!(sql, "{}${place}", if place == 1 { "" } else { ", " });
        }
        sql.push(')');
        for row in rows {
            let values: Option<Vec<Value>> = if row.len() == names.len() {
                row.iter().zip(&table.columns).map(|(value, (_, kind))| bind(value, *kind)).collect()
            } else {
                None
            };
            let values = values.ok_or_else(|| wrong("a row does not fit its columns"))?;
            let insert = Statement::from_sql_and_values(self.transaction.get_database_backend(), &sql, values);
            self.transaction.execute_raw(insert).await.map_err(|cause| wrong(&cause.to_string()))?;
        }
        Ok(())
    }

    /// Makes it last.
    ///
    /// # Errors
    /// When it cannot.
    pub async fn commit(self) -> Result<(), StoreError> {
        let service = self.service.clone();
        self.transaction.commit().await.map_err(|cause| failed(&service, &cause))?;
        self.connection.close().await.map_err(|cause| failed(&service, &cause))
    }
}

fn failed(what: &str, cause: &dyn std::fmt::Display) -> StoreError {
    StoreError(format!("{what}: {cause}"))
}

/// The tables in the order in which they were made, which is that of what refers to what.
async fn tables(connection: &DatabaseTransaction) -> Result<Vec<Table>, StoreError> {
    let backend = connection.get_database_backend();
    let (tables, columns) = match backend {
        DatabaseBackend::Postgres => (
            "SELECT relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind = 'r' AND n.nspname = 'public' ORDER BY c.oid",
            "SELECT column_name::text, data_type::text FROM information_schema.columns \
             WHERE table_schema = 'public' AND table_name = $1 ORDER BY column_name",
        ),
        _ => (
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY rowid",
            "SELECT name, type FROM pragma_table_info($1) ORDER BY name",
        ),
    };
    let text = |row: &QueryResult, at: usize| row.try_get_by_index::<String>(at).map_err(|cause| failed("the catalogue", &cause));
    let mut all = Vec::new();
    let names = connection
        .query_all_raw(Statement::from_string(backend, tables))
        .await
        .map_err(|cause| failed("the catalogue", &cause))?;
    for row in names {
        let name = text(&row, 0)?;
        if PASSING.contains(&name.as_str()) {
            continue;
        }
        let ask = Statement::from_sql_and_values(backend, columns, [name.as_str().into()]);
        let rows = connection.query_all_raw(ask).await.map_err(|cause| failed(&name, &cause))?;
        let columns = rows.iter().map(|row| {
            let (column, declared) = (text(row, 0)?, text(row, 1)?);
            let kind =
                Kind::of(&declared).ok_or_else(|| failed(&name, &format!("the column {column} has the type {declared}")))?;
            Ok((column, kind))
        });
        all.push(Table { columns: columns.collect::<Result<_, StoreError>>()?, name });
    }
    Ok(all)
}

async fn read(connection: &DatabaseTransaction, table: &Table, from: usize) -> Result<Vec<Row>, sea_orm::DbErr> {
    let names: Vec<&str> = table.columns.iter().map(|(name, _)| name.as_str()).collect();
    // Any order will do, if it is the same for each chunk: all columns tell rows apart.
    let sql = format!("SELECT {0} FROM {1} ORDER BY {0} LIMIT {CHUNK} OFFSET {from}", names.join(", "), table.name);
    let rows = connection.query_all_raw(Statement::from_string(connection.get_database_backend(), sql)).await?;
    rows.iter().map(|row| table.columns.iter().enumerate().map(|(at, (_, kind))| value(row, at, *kind)).collect()).collect()
}

fn value(row: &QueryResult, at: usize, kind: Kind) -> Result<serde_json::Value, sea_orm::DbErr> {
    Ok(match kind {
        Kind::Uuid => row.try_get_by_index::<Option<Uuid>>(at)?.map(|id| id.to_string()).into(),
        Kind::Text => row.try_get_by_index::<Option<String>>(at)?.into(),
        Kind::Integer => row.try_get_by_index::<Option<i32>>(at)?.into(),
        Kind::Bigint => row.try_get_by_index::<Option<i64>>(at)?.into(),
        Kind::Boolean => row.try_get_by_index::<Option<bool>>(at)?.into(),
        Kind::Bytes => row.try_get_by_index::<Option<Vec<u8>>>(at)?.map(hex::encode).into(),
    })
}

/// A value to be written. `None` where it is not of this kind.
fn bind(value: &serde_json::Value, kind: Kind) -> Option<Value> {
    use serde_json::Value as Json;
    Some(match (kind, value) {
        (Kind::Uuid, Json::Null) => Value::Uuid(None),
        (Kind::Uuid, Json::String(text)) => text.parse::<Uuid>().ok()?.into(),
        (Kind::Text, Json::Null) => Value::String(None),
        (Kind::Text, Json::String(text)) => text.clone().into(),
        (Kind::Integer, Json::Null) => Value::Int(None),
        (Kind::Integer, number) => i32::try_from(number.as_i64()?).ok()?.into(),
        (Kind::Bigint, Json::Null) => Value::BigInt(None),
        (Kind::Bigint, number) => number.as_i64()?.into(),
        (Kind::Boolean, Json::Null) => Value::Bool(None),
        (Kind::Boolean, Json::Bool(truth)) => (*truth).into(),
        (Kind::Bytes, Json::Null) => Value::Bytes(None),
        (Kind::Bytes, Json::String(text)) => hex::decode(text).ok()?.into(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::{Filling, Snapshot};
    use crate::{Databases, Keyring, Migration, Migrations, Store, unscoped};
    use capsule_contracts::Uuid;

    const MIGRATIONS: Migrations = &[(
        "test",
        &[
            Migration {
                version: 1,
                name: "create_things",
                sql: "CREATE TABLE things (id UUID PRIMARY KEY NOT NULL, name TEXT, small INTEGER, large BIGINT, yes BOOLEAN, raw BYTEA);",
            },
            Migration { version: 2, name: "create_more", sql: "CREATE TABLE more (thing UUID REFERENCES things (id));" },
        ],
    )];

    async fn open(directory: &std::path::Path) -> (Databases, Store) {
        let keyring = Keyring::open(&directory.join("key")).expect("keyring");
        let databases = Databases::Embedded(directory.into());
        let store = Store::open(&databases, "test", keyring, MIGRATIONS).await.expect("opens");
        (databases, store)
    }

    #[tokio::test]
    async fn a_copy_is_what_the_original_was() {
        let (one, two) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
        let (from, store) = open(one.path()).await;
        let tx = store.begin().await.expect("begins");
        for n in 0..1200_i64 {
            let id = Uuid::from_u128(n as u128 + 1);
            let (name, raw) = ((n % 3 != 0).then(|| format!("näme {n}")), (n % 5 != 0).then(|| vec![0_u8, n as u8, 255]));
            let insert = "INSERT INTO things (id, name, small, large, yes, raw) VALUES ($1, $2, $3, $4, $5, $6)";
            tx.run(unscoped!("test", insert, id, name, n as i32, i64::MAX - n, n % 2 == 0, raw)).await.expect("inserts");
            tx.run(unscoped!("test", "INSERT INTO more (thing) VALUES ($1)", id)).await.expect("inserts");
        }
        tx.commit().await.expect("commits");
        let to = Databases::Embedded(two.path().into());
        let snapshot = Snapshot::take(&from, "test").await.expect("reads").expect("is there");
        let filling =
            Filling::begin(&to, "test", MIGRATIONS, &[("test".into(), 1), ("test".into(), 2)]).await.expect("an empty one");
        for table in snapshot.tables() {
            let mut from = 0;
            loop {
                let rows = snapshot.rows(table, from).await.expect("reads");
                if rows.is_empty() {
                    break;
                }
                from += rows.len();
                filling.write(table, &rows).await.expect("writes");
            }
        }
        filling.commit().await.expect("commits");
        let copy = Snapshot::take(&to, "test").await.expect("reads").expect("is there");
        for table in snapshot.tables().iter().filter(|table| table.name != "schema_history") {
            let (original, copied) = (snapshot.summary(table).await.expect("sums"), copy.summary(table).await.expect("sums"));
            assert_eq!(original.count, 1200);
            assert_eq!(original, copied, "{}", table.name);
        }
        let again = Filling::begin(&to, "test", MIGRATIONS, &[("test".into(), 1), ("test".into(), 2)]).await;
        assert!(again.expect_err("refused").0.contains("not empty"));
    }

    #[tokio::test]
    async fn what_is_newer_than_this_program_is_refused() {
        let directory = tempfile::tempdir().expect("tempdir");
        let to = Databases::Embedded(directory.path().into());
        let newer = Filling::begin(&to, "test", MIGRATIONS, &[("test".into(), 3)]).await;
        assert!(newer.expect_err("refused").0.contains("V003 of test"));
    }
}
