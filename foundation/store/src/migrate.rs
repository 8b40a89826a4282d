//! Versioned migrations, `V001__create_users_table.sql` and so on, applied once and in order.

use capsule_contracts::Timestamp;
use sha2::{Digest, Sha256};

use crate::session::Session;
use crate::{FromRow, StoreError};

/// A migration: one file of SQL.
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

/// A migration and its state in a database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationStatus {
    /// `V001__create_users_table.sql`
    pub file: String,
    /// Which part of the database it belongs to.
    pub component: String,
    pub state: MigrationState,
    /// When it was applied.
    pub applied_at: Option<Timestamp>,
}

/// The state of a migration in a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationState {
    Applied,
    Pending,
    /// Its file changed after it was applied.
    Changed,
    /// It was applied, but is not part of this program.
    Unknown,
    /// It was not applied, but a later one was.
    OutOfOrder,
}

impl MigrationState {
    /// The name shown on the command line.
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

#[derive(FromRow)]
struct Applied {
    version: i32,
    name: String,
    checksum: String,
    applied_at: i64,
}

const CREATE_HISTORY: &str = "CREATE TABLE IF NOT EXISTS schema_history (component TEXT NOT NULL, version INTEGER NOT NULL, \
                       name TEXT NOT NULL, checksum TEXT NOT NULL, applied_at BIGINT NOT NULL, PRIMARY KEY (component, version))";

/// The migrations of a component in a database that does not exist yet: all pending.
pub fn pending<'a>(component: &'a str, migrations: &'a [Migration]) -> impl Iterator<Item = MigrationStatus> + use<'a> {
    migrations.iter().map(|migration| MigrationStatus {
        file: migration.file(),
        component: component.into(),
        state: MigrationState::Pending,
        applied_at: None,
    })
}

/// The status of each migration of a component, including applied ones that are not part of this program.
pub async fn status(session: &Session, component: &str, migrations: &[Migration]) -> Result<Vec<MigrationStatus>, StoreError> {
    let failed = |what: &str, cause: &dyn std::fmt::Display| StoreError(format!("{component}: {what}: {cause}"));
    session.run_plain(CREATE_HISTORY).await.map_err(|cause| failed("cannot prepare the schema history", &cause))?;
    let select = "SELECT version, name, checksum, applied_at FROM schema_history WHERE component = $1 ORDER BY version";
    let applied = session.rows(select, vec![component.into()], Applied::from_row).await;
    let applied = applied.map_err(|cause| failed("cannot read the schema history", &cause))?;
    let known = migrations.iter().map(|migration| {
        let row = applied.iter().find(|row| row.version == migration.version);
        let state = match row {
            None if applied.iter().any(|row| row.version > migration.version) => MigrationState::OutOfOrder,
            None => MigrationState::Pending,
            Some(row) if row.checksum == migration.checksum() => MigrationState::Applied,
            Some(_) => MigrationState::Changed,
        };
        MigrationStatus {
            file: migration.file(),
            component: component.into(),
            state,
            applied_at: row.map(|row| Timestamp(row.applied_at)),
        }
    });
    let unknown =
        applied.iter().filter(|row| migrations.iter().all(|known| known.version != row.version)).map(|row| MigrationStatus {
            file: file(row.version, &row.name),
            component: component.into(),
            state: MigrationState::Unknown,
            applied_at: Some(Timestamp(row.applied_at)),
        });
    Ok(known.chain(unknown).collect())
}

/// Applies the pending migrations, each in its own transaction.
pub async fn run(session: &Session, component: &str, migrations: &[Migration]) -> Result<(), StoreError> {
    let failed = |what: &str, cause: &dyn std::fmt::Display| StoreError(format!("{component}: {what}: {cause}"));
    let statuses = status(session, component, migrations).await?;
    for status in &statuses {
        match status.state {
            MigrationState::Applied | MigrationState::Pending => {}
            MigrationState::Unknown => {
                let why = format!("it has {}; run the newer version, or restore a backup", status.file);
                return Err(failed("the database is newer than this program", &why));
            }
            MigrationState::Changed => {
                let why = "it changed after it was applied; restore the file and put the change into a new migration, or, if \
                           the schema already matches the file, run `capsule migrate repair`";
                return Err(failed(&status.file, &why));
            }
            MigrationState::OutOfOrder => {
                let why = "a later migration was already applied; give this file the next number";
                return Err(failed(&status.file, &why));
            }
        }
    }
    for (migration, status) in migrations.iter().zip(statuses) {
        if status.state == MigrationState::Applied {
            continue;
        }
        if let Err(error) = apply(session, component, migration).await {
            // The session remains usable.
            session.run_plain("ROLLBACK").await.ok();
            return Err(error);
        }
    }
    Ok(())
}

async fn apply(session: &Session, component: &str, migration: &Migration) -> Result<(), StoreError> {
    let file = migration.file();
    let failed = |what: &str, cause: &dyn std::fmt::Display| StoreError(format!("{component}: {what}: {cause}"));
    session.run_plain(session.select("BEGIN IMMEDIATE", "BEGIN")).await.map_err(|cause| failed(&file, &cause))?;
    for (line, statement) in statements(migration.sql) {
        let done = session.run_plain(statement).await;
        done.map_err(|cause| failed(&format!("{file}:{line}"), &format!("{cause}\n  in: {statement}")))?;
    }
    let insert = "INSERT INTO schema_history (component, version, name, checksum, applied_at) VALUES ($1, $2, $3, $4, $5)";
    let values = vec![
        component.into(),
        migration.version.into(),
        migration.name.into(),
        migration.checksum().into(),
        Timestamp::now().0.into(),
    ];
    session.run_each(insert, vec![values]).await.map_err(|cause| failed(&file, &cause))?;
    session.run_plain("COMMIT").await.map_err(|cause| failed(&file, &cause))
}

fn file(version: i32, name: &str) -> String {
    format!("V{version:03}__{name}.sql")
}

/// Records the current checksum of each migration whose file changed after it was applied, and returns the names of
/// these files. Changes nothing else.
pub async fn repair(session: &Session, component: &str, migrations: &[Migration]) -> Result<Vec<String>, StoreError> {
    let mut repaired = Vec::new();
    for (migration, status) in migrations.iter().zip(status(session, component, migrations).await?) {
        if status.state != MigrationState::Changed {
            continue;
        }
        let update = "UPDATE schema_history SET checksum = $1, name = $2 WHERE component = $3 AND version = $4";
        let values = vec![migration.checksum().into(), migration.name.into(), component.into(), migration.version.into()];
        let done = session.run_each(update, vec![values]).await;
        done.map_err(|cause| StoreError(format!("{component}: {}: {cause}", status.file)))?;
        repaired.push(status.file);
    }
    Ok(repaired)
}

/// The statements of a file, each with the number of its first line. Semicolons in string literals, quoted names and
/// `--` comments do not end a statement.
fn statements(sql: &'static str) -> impl Iterator<Item = (usize, &'static str)> {
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

/// The length in bytes of the white space and comments at the start of `text`.
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

/// The length in bytes of the statement at the start of `text`, with its semicolon.
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
    fn a_file_is_split_into_statements_with_line_numbers() {
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
