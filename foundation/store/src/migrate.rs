//! Versioned migrations, `V001__create_users_table.sql` and so on, applied once and in order.

use capsule_contracts::Timestamp;
use sea_orm::{ConnectionTrait, DatabaseConnection, FromQueryResult, Statement, TransactionTrait};
use sha2::{Digest, Sha256};

use crate::StoreError;

/// One step of a schema's history.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    pub version: i32,
    /// The file's name between `V001__` and `.sql`.
    pub name: &'static str,
    pub sql: &'static str,
}

impl Migration {
    fn file(&self) -> String {
        format!("V{:03}__{}.sql", self.version, self.name)
    }

    fn checksum(&self) -> String {
        hex::encode(Sha256::digest(self.sql.as_bytes()))
    }
}

/// Lists migration files: `migrations!["V001__create_users_table.sql"]` from the crate's
/// `migrations/` folder.
#[macro_export]
macro_rules! migrations {
    ($($version:literal $name:literal),+ $(,)?) => {
        &[$($crate::Migration {
            version: $version,
            name: $name,
            sql: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/V00", stringify!($version), "__", $name, ".sql")),
        }),+]
    };
}

#[derive(FromQueryResult)]
struct Applied {
    version: i32,
    checksum: String,
}

/// Applies what is missing, each migration in a transaction of its own.
pub async fn run(connection: &DatabaseConnection, component: &str, migrations: &[Migration]) -> Result<(), StoreError> {
    let failed = |what: &str, cause: &dyn std::fmt::Display| StoreError(format!("{component}: {what}: {cause}"));
    connection
        .execute_unprepared(
            "CREATE TABLE IF NOT EXISTS schema_history (component TEXT NOT NULL, version INTEGER NOT NULL, \
             name TEXT NOT NULL, checksum TEXT NOT NULL, applied_at BIGINT NOT NULL, PRIMARY KEY (component, version))",
        )
        .await
        .map_err(|cause| failed("cannot prepare the schema history", &cause))?;
    let backend = connection.get_database_backend();
    let applied = connection
        .query_all_raw(Statement::from_sql_and_values(
            backend,
            "SELECT version, checksum FROM schema_history WHERE component = $1 ORDER BY version",
            [component.into()],
        ))
        .await
        .and_then(|rows| rows.iter().map(|row| Applied::from_query_result(row, "")).collect::<Result<Vec<_>, _>>())
        .map_err(|cause| failed("cannot read the schema history", &cause))?;
    if let Some(newer) = applied.iter().find(|row| migrations.iter().all(|m| m.version != row.version)) {
        return Err(failed(
            "the database is newer than this program",
            &format!("it has migration {} which is not known here; run the newer version, or restore a backup", newer.version),
        ));
    }
    for migration in migrations {
        match applied.iter().find(|row| row.version == migration.version) {
            Some(row) if row.checksum == migration.checksum() => continue,
            Some(_) => {
                return Err(failed(
                    &migration.file(),
                    &"it was changed after it was applied here; restore the file, and put the change into a new migration",
                ));
            }
            None => {}
        }
        let tx = connection.begin().await.map_err(|cause| failed(&migration.file(), &cause))?;
        tx.execute_unprepared(migration.sql).await.map_err(|cause| failed(&migration.file(), &cause))?;
        tx.execute_raw(Statement::from_sql_and_values(
            backend,
            "INSERT INTO schema_history (component, version, name, checksum, applied_at) VALUES ($1, $2, $3, $4, $5)",
            [
                component.into(),
                migration.version.into(),
                migration.name.into(),
                migration.checksum().into(),
                Timestamp::now().0.into(),
            ],
        ))
        .await
        .map_err(|cause| failed(&migration.file(), &cause))?;
        tx.commit().await.map_err(|cause| failed(&migration.file(), &cause))?;
    }
    Ok(())
}
