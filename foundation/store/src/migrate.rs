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
        file(self.version, self.name)
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

/// The migrations of a service's database: those of each component in it, in their order.
pub type Migrations = &'static [(&'static str, &'static [Migration])];

/// A migration, and how a database stands to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// `V001__create_users_table.sql`
    pub file: String,
    /// Which part of the database it belongs to.
    pub component: String,
    pub state: StepState,
    /// When it was applied.
    pub applied_at: Option<Timestamp>,
}

/// How a database stands to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepState {
    Applied,
    Pending,
    /// It was changed after it was applied here.
    Changed,
    /// It was applied here, but this program does not know it.
    Unknown,
}

impl StepState {
    /// The name that the command line shows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Pending => "pending",
            Self::Changed => "changed",
            Self::Unknown => "unknown",
        }
    }
}

#[derive(FromQueryResult)]
struct Applied {
    version: i32,
    name: String,
    checksum: String,
    applied_at: i64,
}

const HISTORY: &str = "CREATE TABLE IF NOT EXISTS schema_history (component TEXT NOT NULL, version INTEGER NOT NULL, \
                       name TEXT NOT NULL, checksum TEXT NOT NULL, applied_at BIGINT NOT NULL, PRIMARY KEY (component, version))";

/// The migrations of a component, for a database that is not there yet.
pub fn pending<'a>(component: &'a str, migrations: &'a [Migration]) -> impl Iterator<Item = Step> + use<'a> {
    migrations.iter().map(|migration| Step {
        file: migration.file(),
        component: component.into(),
        state: StepState::Pending,
        applied_at: None,
    })
}

/// How a database stands to each migration of a component, known or not.
pub async fn steps(connection: &DatabaseConnection, component: &str, migrations: &[Migration]) -> Result<Vec<Step>, StoreError> {
    let failed = |what: &str, cause: &dyn std::fmt::Display| StoreError(format!("{component}: {what}: {cause}"));
    connection.execute_unprepared(HISTORY).await.map_err(|cause| failed("cannot prepare the schema history", &cause))?;
    let applied = connection
        .query_all_raw(Statement::from_sql_and_values(
            connection.get_database_backend(),
            "SELECT version, name, checksum, applied_at FROM schema_history WHERE component = $1 ORDER BY version",
            [component.into()],
        ))
        .await
        .and_then(|rows| rows.iter().map(|row| Applied::from_query_result(row, "")).collect::<Result<Vec<_>, _>>())
        .map_err(|cause| failed("cannot read the schema history", &cause))?;
    let known = migrations.iter().map(|migration| {
        let row = applied.iter().find(|row| row.version == migration.version);
        let state = match row {
            None => StepState::Pending,
            Some(row) if row.checksum == migration.checksum() => StepState::Applied,
            Some(_) => StepState::Changed,
        };
        Step { file: migration.file(), component: component.into(), state, applied_at: row.map(|row| Timestamp(row.applied_at)) }
    });
    let strangers = applied.iter().filter(|row| migrations.iter().all(|known| known.version != row.version)).map(|row| Step {
        file: file(row.version, &row.name),
        component: component.into(),
        state: StepState::Unknown,
        applied_at: Some(Timestamp(row.applied_at)),
    });
    Ok(known.chain(strangers).collect())
}

/// Applies what is missing, each migration in a transaction of its own.
pub async fn run(connection: &DatabaseConnection, component: &str, migrations: &[Migration]) -> Result<(), StoreError> {
    let failed = |what: &str, cause: &dyn std::fmt::Display| StoreError(format!("{component}: {what}: {cause}"));
    let steps = steps(connection, component, migrations).await?;
    for step in &steps {
        match step.state {
            StepState::Applied | StepState::Pending => {}
            StepState::Unknown => {
                let why = format!("it has {} which is not known here; run the newer version, or restore a backup", step.file);
                return Err(failed("the database is newer than this program", &why));
            }
            StepState::Changed => {
                let why = "it was changed after it was applied here; restore the file, and put the change into a new migration";
                return Err(failed(&step.file, &why));
            }
        }
    }
    for (migration, step) in migrations.iter().zip(steps) {
        if step.state == StepState::Applied {
            continue;
        }
        let tx = connection.begin().await.map_err(|cause| failed(&step.file, &cause))?;
        tx.execute_unprepared(migration.sql).await.map_err(|cause| failed(&step.file, &cause))?;
        tx.execute_raw(Statement::from_sql_and_values(
            connection.get_database_backend(),
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
        .map_err(|cause| failed(&step.file, &cause))?;
        tx.commit().await.map_err(|cause| failed(&step.file, &cause))?;
    }
    Ok(())
}

fn file(version: i32, name: &str) -> String {
    format!("V{version:03}__{name}.sql")
}
