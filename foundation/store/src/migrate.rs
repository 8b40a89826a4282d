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
    /// It was not applied here, though a later one was.
    OutOfOrder,
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
            Self::OutOfOrder => "out of order",
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
            None if applied.iter().any(|row| row.version > migration.version) => StepState::OutOfOrder,
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
                let why = "it was changed after it was applied here; restore the file, and put the change into a new migration, \
                           or, if the schema is as the file says now, take it over with `capsule migrate repair`";
                return Err(failed(&step.file, &why));
            }
            StepState::OutOfOrder => {
                let why = "a later one was applied here already; give it the next number";
                return Err(failed(&step.file, &why));
            }
        }
    }
    for (migration, step) in migrations.iter().zip(steps) {
        if step.state == StepState::Applied {
            continue;
        }
        let tx = connection.begin().await.map_err(|cause| failed(&step.file, &cause))?;
        for (line, statement) in statements(migration.sql) {
            let done = tx.execute_unprepared(statement).await;
            done.map_err(|cause| failed(&format!("{}:{line}", step.file), &format!("{cause}\n  in: {statement}")))?;
        }
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

/// Takes the files as they are now for what was applied: for each that was changed since, its new checksum is
/// written down. Nothing else is changed. The files that were taken over.
pub async fn repair(
    connection: &DatabaseConnection,
    component: &str,
    migrations: &[Migration],
) -> Result<Vec<String>, StoreError> {
    let mut repaired = Vec::new();
    for (migration, step) in migrations.iter().zip(steps(connection, component, migrations).await?) {
        if step.state != StepState::Changed {
            continue;
        }
        let update = Statement::from_sql_and_values(
            connection.get_database_backend(),
            "UPDATE schema_history SET checksum = $1, name = $2 WHERE component = $3 AND version = $4",
            [migration.checksum().into(), migration.name.into(), component.into(), migration.version.into()],
        );
        let done = connection.execute_raw(update).await;
        done.map_err(|cause| StoreError(format!("{component}: {}: {cause}", step.file)))?;
        repaired.push(step.file);
    }
    Ok(repaired)
}

/// The statements of a file, each with the line that it begins in. Knows texts, names in quotes and comments.
fn statements(sql: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut rest = 0;
    std::iter::from_fn(move || {
        loop {
            let text = &sql[rest..];
            let begin = rest + skip_blank(text);
            if begin >= sql.len() {
                return None;
            }
            let length = statement_length(&sql[begin..]);
            rest = begin + length;
            let statement = sql[begin..rest].trim_end().trim_end_matches(';');
            if !statement.is_empty() {
                return Some((sql[..begin].matches('\n').count() + 1, statement));
            }
        }
    })
}

/// How many bytes of white space and comments a text begins with.
fn skip_blank(text: &str) -> usize {
    let mut at = 0;
    loop {
        let rest = &text[at..];
        let blank = rest.len() - rest.trim_start().len();
        at += blank;
        if !text[at..].starts_with("--") {
            return at;
        }
        at += text[at..].find('\n').unwrap_or(text.len() - at);
    }
}

/// How many bytes a statement has, its semicolon included.
fn statement_length(text: &str) -> usize {
    let mut quote = None;
    let mut comment = false;
    let mut before = '\0';
    for (at, character) in text.char_indices() {
        match (comment, quote, character) {
            (true, _, '\n') => comment = false,
            (true, ..) => {}
            (_, Some(open), _) if open == character => quote = None,
            (_, Some(_), _) => {}
            (_, None, '\'' | '"') => quote = Some(character),
            (_, None, '-') if before == '-' => comment = true,
            (_, None, ';') => return at + 1,
            _ => {}
        }
        before = character;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::statements;

    #[test]
    fn a_file_is_taken_apart_into_statements_with_their_lines() {
        let sql = "-- One; with a comment\nCREATE TABLE a (\n  id INT -- not; here\n);\n\nINSERT INTO a VALUES ('x;''y');\n\n-- end\n;\nDROP TABLE \"odd;name\"";
        let found: Vec<_> = statements(sql).collect();
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!((found[0].0, found[1].0, found[2].0), (2, 6, 10));
        assert!(found[0].1.starts_with("CREATE TABLE a") && found[0].1.ends_with(')'));
        assert_eq!(found[1].1, "INSERT INTO a VALUES ('x;''y')");
        assert_eq!(found[2].1, "DROP TABLE \"odd;name\"");
        assert_eq!(statements(" \n-- nothing").count(), 0);
    }
}
