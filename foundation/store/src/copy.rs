//! Copies of a service's database, independent of the engine: rows are read from a consistent snapshot and written
//! into an empty database. Backups and migrations between engines use it.

use std::fmt::Write;

use capsule_contracts::Uuid;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::failure::Failure;
use crate::session::Session;
use crate::{Databases, DecodeError, Migrations, StoreError, Value, migrate};

/// Tables that are not copied: they describe the processes that use a database, or mark it as the original.
const EPHEMERAL_TABLES: [&str; 2] = ["leases", "restore_marks"];
/// Tables with one row that a migration inserts.
const SEEDED_TABLES: [&str; 2] = ["routing", "user_ids"];
/// Maximum number of rows per read.
pub const CHUNK_ROWS: usize = 500;

/// The type of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColumnType {
    Uuid,
    Text,
    Integer,
    Bigint,
    Boolean,
    Bytes,
}

impl ColumnType {
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
    pub columns: Vec<(String, ColumnType)>,
}

/// A row's values as JSON, in the order of the table's columns. Bytes are in hexadecimal.
pub type Row = Vec<serde_json::Value>;

/// The number of rows of a table, and a digest of their content that does not depend on their order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub count: u64,
    /// SHA-256, in hexadecimal.
    pub digest: String,
}

/// Computes a [`Summary`].
#[derive(Debug, Default)]
pub struct Summarizer(Vec<[u8; 32]>);

impl Summarizer {
    /// Adds a row.
    pub fn add(&mut self, row: &Row) {
        let text = serde_json::to_vec(row).unwrap_or_default();
        self.0.push(Sha256::digest(text).into());
    }

    /// The summary of the added rows. Does not depend on their order, as engines sort differently.
    #[must_use]
    pub fn finish(mut self) -> Summary {
        self.0.sort_unstable();
        let mut all = Sha256::new();
        self.0.iter().for_each(|digest| all.update(digest));
        Summary { count: self.0.len() as u64, digest: hex::encode(all.finalize()) }
    }
}

/// A consistent view of a database at one moment.
pub struct Snapshot {
    session: Session,
    tables: Vec<Table>,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Snapshot({} tables)", self.tables.len())
    }
}

impl Snapshot {
    /// Opens a snapshot of a service's database, which others may go on writing to. `None` if there is no database.
    ///
    /// # Errors
    /// When it cannot be read, or has a column of an unknown type.
    pub async fn take(databases: &Databases, service: &str) -> Result<Option<Self>, StoreError> {
        if !databases.exists(service).await? {
            return Ok(None);
        }
        let session = databases.session(service).await?;
        let begin = session.select("BEGIN", "BEGIN ISOLATION LEVEL REPEATABLE READ");
        session.run_plain(begin).await.map_err(|cause| failed(service, &cause))?;
        let tables = tables(&session).await.map_err(|error| failed(service, &error))?;
        Ok(Some(Self { session, tables }))
    }

    /// The tables, each after the ones its foreign keys refer to.
    #[must_use]
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// At most [`CHUNK_ROWS`] rows of a table, starting at row number `from`.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn rows(&self, table: &Table, from: usize) -> Result<Vec<Row>, StoreError> {
        read(&self.session, table, from).await.map_err(|cause| failed(&table.name, &cause))
    }

    /// The summary of a table.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn summary(&self, table: &Table) -> Result<Summary, StoreError> {
        let mut summarizer = Summarizer::default();
        let mut from = 0;
        loop {
            let rows = self.rows(table, from).await?;
            rows.iter().for_each(|row| summarizer.add(row));
            from += rows.len();
            if rows.len() < CHUNK_ROWS {
                return Ok(summarizer.finish());
            }
        }
    }
}

impl Snapshot {
    /// Component and version of each applied migration.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn versions(&self) -> Result<Vec<(String, i32)>, StoreError> {
        let sql = "SELECT component, version FROM schema_history ORDER BY component, version";
        let versions = self.session.rows(sql, Vec::new(), |row| Ok((row.at(0)?, row.at(1)?))).await;
        versions.map_err(|cause| failed("schema_history", &cause))
    }

    /// The summary of each table except the migration history.
    async fn summaries(&self) -> Result<Vec<(String, Summary)>, StoreError> {
        let mut all = Vec::new();
        for table in self.tables.iter().filter(|table| table.name != "schema_history") {
            all.push((table.name.clone(), self.summary(table).await?));
        }
        Ok(all)
    }
}

/// Copies a service's database into an empty one elsewhere, compares both by count and digest, and returns the number
/// of rows. If the destination already equals the source, copies nothing.
///
/// # Errors
/// When a database cannot be read or written, the destination is not empty, or the copy differs.
pub async fn copy(from: &Databases, to: &Databases, service: &str, migrations: Migrations) -> Result<u64, StoreError> {
    let Some(original) = Snapshot::take(from, service).await? else { return Ok(0) };
    let expected = original.summaries().await?;
    let rows = expected.iter().map(|(_, summary)| summary.count).sum();
    if let Some(there) = Snapshot::take(to, service).await?
        && there.summaries().await? == expected
    {
        return Ok(rows);
    }
    let import = DatabaseImport::begin(to, service, migrations, &original.versions().await?).await?;
    for table in original.tables() {
        let mut from = 0;
        loop {
            let rows = original.rows(table, from).await?;
            import.write(table, &rows).await?;
            from += rows.len();
            if rows.len() < CHUNK_ROWS {
                break;
            }
        }
    }
    import.commit().await?;
    let copied = Snapshot::take(to, service).await?.ok_or_else(|| StoreError(format!("{service}: the copy is missing")))?;
    let copied = copied.summaries().await?;
    match expected.iter().zip(&copied).find(|(one, other)| one != other) {
        None if expected.len() == copied.len() => Ok(rows),
        wrong => Err(StoreError(format!("{service}: the copy differs: {wrong:?}"))),
    }
}

/// A transaction that fills a service's database. Nothing is visible to others before [`DatabaseImport::commit`].
pub struct DatabaseImport {
    session: Session,
    tables: Vec<Table>,
    service: String,
}

impl std::fmt::Debug for DatabaseImport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DatabaseImport({})", self.service)
    }
}

impl DatabaseImport {
    /// Creates the database with the migrations in `versions` (component and version), and begins a transaction.
    ///
    /// # Errors
    /// When it cannot be created, is not empty, or a migration is not part of this program.
    pub async fn begin(
        databases: &Databases,
        service: &str,
        migrations: Migrations,
        versions: &[(String, i32)],
    ) -> Result<Self, StoreError> {
        let session = databases.session(service).await?;
        for (component, version) in versions {
            let known = migrations.iter().find(|(name, _)| name == component);
            if known.is_none_or(|(_, known)| known.iter().all(|migration| migration.version != *version)) {
                return Err(StoreError(format!(
                    "{service}: the migration V{version:03} of {component} is from a newer version of Capsule; use that version"
                )));
            }
        }
        for (component, known) in migrations {
            let then = |version: i32| versions.iter().any(|(name, applied)| name == component && *applied == version);
            let applied: Vec<_> = known.iter().filter(|migration| then(migration.version)).copied().collect();
            migrate::run(&session, component, &applied).await?;
        }
        let begin = session.select("BEGIN IMMEDIATE", "BEGIN");
        session.run_plain(begin).await.map_err(|cause| failed(service, &cause))?;
        let tables = tables(&session).await.map_err(|error| failed(service, &error))?;
        let is_seeded = |table: &&Table| SEEDED_TABLES.contains(&table.name.as_str());
        for table in tables.iter().filter(|table| !is_seeded(table) && table.name != "schema_history") {
            let any = session.rows(format!("SELECT 1 FROM {} LIMIT 1", table.name), Vec::new(), |_| Ok(())).await;
            if !any.map_err(|cause| failed(service, &cause))?.is_empty() {
                return Err(StoreError(format!("{service}: the destination database is not empty: {} has rows", table.name)));
            }
        }
        for table in tables.iter().filter(is_seeded) {
            let empty = format!("DELETE FROM {}", table.name);
            session.run_plain(empty).await.map_err(|cause| failed(service, &cause))?;
        }
        Ok(Self { session, tables, service: service.into() })
    }

    /// Writes rows of a table.
    ///
    /// # Errors
    /// When the table does not exist, or the rows do not match its columns.
    pub async fn write(&self, table: &Table, rows: &[Row]) -> Result<(), StoreError> {
        // Already written by the migrations.
        if table.name == "schema_history" {
            return Ok(());
        }
        let wrong = |what: &str| StoreError(format!("{}: {}: {what}", self.service, table.name));
        if !self.tables.contains(table) {
            return Err(wrong("the table does not exist, or has other columns"));
        }
        let names: Vec<&str> = table.columns.iter().map(|(name, _)| name.as_str()).collect();
        let mut sql = format!("INSERT INTO {} ({}) VALUES (", table.name, names.join(", "));
        for number in 1..=names.len() {
            let _ = write!(sql, "{}${number}", if number == 1 { "" } else { ", " });
        }
        sql.push(')');
        let values = |row: &Row| -> Option<Vec<Value>> {
            let columns = (row.len() == names.len()).then_some(&table.columns)?;
            row.iter().zip(columns).map(|(value, (_, column_type))| bind(value, *column_type)).collect()
        };
        let rows: Option<Vec<_>> = rows.iter().map(values).collect();
        let rows = rows.ok_or_else(|| wrong("a row does not match its columns"))?;
        self.session.run_each(sql, rows).await.map_err(|cause| wrong(&cause.to_string()))?;
        Ok(())
    }

    /// Commits the transaction.
    ///
    /// # Errors
    /// When the database cannot commit.
    pub async fn commit(self) -> Result<(), StoreError> {
        let service = self.service.clone();
        self.session.run_plain("COMMIT").await.map_err(|cause| failed(&service, &cause))?;
        self.session.close().await.map_err(|cause| failed(&service, &cause))
    }
}

fn failed(what: &str, cause: &dyn std::fmt::Display) -> StoreError {
    StoreError(format!("{what}: {cause}"))
}

/// The tables in the order of their creation, so that each follows the ones it refers to.
async fn tables(session: &Session) -> Result<Vec<Table>, StoreError> {
    let tables = session.select(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY rowid",
        "SELECT relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind = 'r' AND n.nspname = 'public' ORDER BY c.oid",
    );
    let columns = session.select(
        "SELECT name, type FROM pragma_table_info($1) ORDER BY name",
        "SELECT column_name::text, data_type::text FROM information_schema.columns \
         WHERE table_schema = 'public' AND table_name = $1 ORDER BY column_name",
    );
    let mut all = Vec::new();
    let names = session.rows(tables, Vec::new(), |row| row.at::<String>(0)).await;
    for name in names.map_err(|cause| failed("the catalogue", &cause))? {
        if EPHEMERAL_TABLES.contains(&name.as_str()) {
            continue;
        }
        let declared = session.rows(columns, vec![name.as_str().into()], |row| Ok((row.at(0)?, row.at(1)?))).await;
        let declared: Vec<(String, String)> = declared.map_err(|cause| failed(&name, &cause))?;
        let columns = declared.into_iter().map(|(column, declared)| {
            let column_type = ColumnType::of(&declared)
                .ok_or_else(|| failed(&name, &format!("the column {column} has the type {declared}")))?;
            Ok((column, column_type))
        });
        all.push(Table { columns: columns.collect::<Result<_, StoreError>>()?, name });
    }
    Ok(all)
}

async fn read(session: &Session, table: &Table, from: usize) -> Result<Vec<Row>, Failure> {
    let (names, types): (Vec<&str>, Vec<ColumnType>) = table.columns.iter().map(|(name, kind)| (name.as_str(), *kind)).unzip();
    // Any order works if it is the same for each chunk. Ordering by all columns is total but for equal rows.
    let sql = format!("SELECT {0} FROM {1} ORDER BY {0} LIMIT {CHUNK_ROWS} OFFSET {from}", names.join(", "), table.name);
    let decode = move |row: &crate::Row<'_>| types.iter().enumerate().map(|(at, kind)| value(row, at, *kind)).collect();
    session.rows(sql, Vec::new(), decode).await
}

fn value(row: &crate::Row<'_>, at: usize, column_type: ColumnType) -> Result<serde_json::Value, DecodeError> {
    Ok(match column_type {
        ColumnType::Uuid => row.at::<Option<Uuid>>(at)?.map(|id| id.to_string()).into(),
        ColumnType::Text => row.at::<Option<String>>(at)?.into(),
        ColumnType::Integer => row.at::<Option<i32>>(at)?.into(),
        ColumnType::Bigint => row.at::<Option<i64>>(at)?.into(),
        ColumnType::Boolean => row.at::<Option<bool>>(at)?.into(),
        ColumnType::Bytes => row.at::<Option<Vec<u8>>>(at)?.map(hex::encode).into(),
    })
}

/// Converts a value to a parameter. `None` if it does not match the column's type.
fn bind(value: &serde_json::Value, column_type: ColumnType) -> Option<Value> {
    use serde_json::Value as Json;
    Some(match (column_type, value) {
        (ColumnType::Uuid, Json::Null) => Value::Uuid(None),
        (ColumnType::Uuid, Json::String(text)) => text.parse::<Uuid>().ok()?.into(),
        (ColumnType::Text, Json::Null) => Value::Text(None),
        (ColumnType::Text, Json::String(text)) => text.clone().into(),
        (ColumnType::Integer, Json::Null) => Value::Int(None),
        (ColumnType::Integer, number) => i32::try_from(number.as_i64()?).ok()?.into(),
        (ColumnType::Bigint, Json::Null) => Value::BigInt(None),
        (ColumnType::Bigint, number) => number.as_i64()?.into(),
        (ColumnType::Boolean, Json::Null) => Value::Bool(None),
        (ColumnType::Boolean, Json::Bool(truth)) => (*truth).into(),
        (ColumnType::Bytes, Json::Null) => Value::Bytes(None),
        (ColumnType::Bytes, Json::String(text)) => hex::decode(text).ok()?.into(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::{DatabaseImport, Snapshot};
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
    async fn a_copy_equals_the_original() {
        let (one, two) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
        let (from, store) = open(one.path()).await;
        let tx = store.begin().await.expect("begins");
        for n in 0..1200_i64 {
            let id = Uuid::from_u128(n as u128 + 1);
            let (name, raw) = ((n % 3 != 0).then(|| format!("näme {n}")), (n % 5 != 0).then(|| vec![0_u8, n as u8, 255]));
            let insert = unscoped!(
                "test",
                "INSERT INTO things (id, name, small, large, yes, raw) VALUES (:id, :name, :small, :large, :yes, :raw)",
                id,
                name,
                small = n as i32,
                large = i64::MAX - n,
                yes = n % 2 == 0,
                raw
            );
            tx.run(insert).await.expect("inserts");
            tx.run(unscoped!("test", "INSERT INTO more (thing) VALUES (:id)", id)).await.expect("inserts");
        }
        tx.commit().await.expect("commits");
        let to = Databases::Embedded(two.path().into());
        let snapshot = Snapshot::take(&from, "test").await.expect("reads").expect("is there");
        let import = DatabaseImport::begin(&to, "test", MIGRATIONS, &[("test".into(), 1), ("test".into(), 2)])
            .await
            .expect("an empty one");
        for table in snapshot.tables() {
            let mut from = 0;
            loop {
                let rows = snapshot.rows(table, from).await.expect("reads");
                if rows.is_empty() {
                    break;
                }
                from += rows.len();
                import.write(table, &rows).await.expect("writes");
            }
        }
        import.commit().await.expect("commits");
        let copy = Snapshot::take(&to, "test").await.expect("reads").expect("is there");
        for table in snapshot.tables().iter().filter(|table| table.name != "schema_history") {
            let (original, copied) = (snapshot.summary(table).await.expect("sums"), copy.summary(table).await.expect("sums"));
            assert_eq!(original.count, 1200);
            assert_eq!(original, copied, "{}", table.name);
        }
        let again = DatabaseImport::begin(&to, "test", MIGRATIONS, &[("test".into(), 1), ("test".into(), 2)]).await;
        assert!(again.expect_err("refused").0.contains("not empty"));
    }

    #[tokio::test]
    async fn a_database_of_a_newer_version_is_refused() {
        let directory = tempfile::tempdir().expect("tempdir");
        let to = Databases::Embedded(directory.path().into());
        let newer = DatabaseImport::begin(&to, "test", MIGRATIONS, &[("test".into(), 3)]).await;
        assert!(newer.expect_err("refused").0.contains("V003 of test"));
    }
}
