//! Commands that may arrive twice: by a broker's redelivery, or a client that asks again.
//!
//! The first transaction that a command commits writes the command's id down as well. A second
//! arrival finds it there, or, if both run at once, fails to commit.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use capsule_contracts::{Problem, Timestamp, Uuid};
use sea_orm::FromQueryResult;

use crate::{Store, Transaction, unscoped};

/// A command's reply is kept so long, in seconds.
const KEPT_SECONDS: i64 = 24 * 3600;

/// The code of the problem that a command's second run ends with where the first has committed.
pub const REPEATED: &str = "repeated_command";

tokio::task_local! {
    static COMMAND: Arc<Mark>;
}

#[derive(Debug)]
struct Mark {
    service: &'static str,
    id: Uuid,
    digest: String,
    written: AtomicBool,
}

/// What is known of a command.
#[derive(Debug, FromQueryResult)]
pub struct Known {
    /// The digest of its body: another body under the same id is another command.
    pub digest: String,
    /// Its sealed reply, once it has one.
    pub reply: Option<Vec<u8>>,
}

/// What is known of a command, if it has had an effect.
///
/// # Errors
/// When the database does not answer.
pub async fn look_up(store: &Store, id: Uuid) -> Result<Option<Known>, Problem> {
    let row = unscoped!("commands belong to the service", "SELECT digest, reply FROM commands WHERE id = $1", id);
    store.read().first(row).await
}

/// Runs a command: what it commits first is committed with its id. Tells whether it committed anything.
pub async fn run<T>(store: &Store, id: Uuid, digest: &str, command: impl Future<Output = T>) -> (T, bool) {
    let mark = Arc::new(Mark { service: store.name(), id, digest: digest.into(), written: AtomicBool::new(false) });
    let result = COMMAND.scope(mark.clone(), command).await;
    (result, mark.written.load(Ordering::Relaxed))
}

/// Keeps the reply of a command for those who send it again.
///
/// # Errors
/// When it cannot be written.
pub async fn keep(store: &Store, id: Uuid, reply: &[u8]) -> Result<(), Problem> {
    let sealed = store.keyring().seal(&context(id), reply)?;
    let tx = store.begin().await?;
    tx.run(unscoped!("commands belong to the service", "UPDATE commands SET reply = $1 WHERE id = $2", sealed, id)).await?;
    tx.commit().await
}

/// A reply as it was given.
///
/// # Errors
/// When it does not open.
pub fn open(store: &Store, id: Uuid, reply: &[u8]) -> Result<Vec<u8>, Problem> {
    store.keyring().open_sealed(&context(id), reply)
}

fn context(id: Uuid) -> String {
    format!("commands/{id}")
}

/// Forgets commands that nobody will send again at `now`.
///
/// # Errors
/// When the database does not answer.
pub async fn forget_old(tx: &Transaction<'_>, now: Timestamp) -> Result<(), Problem> {
    let old = now.plus_seconds(-KEPT_SECONDS).0;
    tx.run(unscoped!("commands belong to the service", "DELETE FROM commands WHERE done_at < $1", old)).await?;
    Ok(())
}

#[derive(FromQueryResult)]
struct Kept {
    id: Uuid,
    reply: Vec<u8>,
}

/// Drops the replies that name a user who is erased; their commands are not carried out again.
///
/// # Errors
/// When the database does not answer.
pub async fn erase(tx: &Transaction<'_>, user: Uuid) -> Result<(), Problem> {
    let name = user.to_string();
    let kept = unscoped!("commands belong to the service", "SELECT id, reply FROM commands WHERE reply IS NOT NULL");
    for kept in tx.read().all::<Kept>(kept).await? {
        // One that does not open helps nobody either.
        let names = match tx.keyring().open_sealed(&context(kept.id), &kept.reply) {
            Ok(reply) => reply.windows(name.len()).any(|window| window == name.as_bytes()),
            Err(_) => true,
        };
        if names {
            tx.run(unscoped!("commands belong to the service", "UPDATE commands SET reply = NULL WHERE id = $1", kept.id))
                .await?;
        }
    }
    Ok(())
}

/// Writes the id of the command that runs, if one does and it is not written yet, in the transaction
/// that is about to be committed.
pub(crate) async fn mark(tx: &Transaction<'_>) -> Result<(), Problem> {
    let Ok(mark) = COMMAND.try_with(Arc::clone) else { return Ok(()) };
    if mark.service != tx.name() || mark.written.load(Ordering::Relaxed) {
        return Ok(());
    }
    let written = tx
        .run(unscoped!(
            "commands belong to the service",
            "INSERT INTO commands (id, digest, done_at) VALUES ($1, $2, $3)",
            mark.id,
            mark.digest.as_str(),
            Timestamp::now().0
        ))
        .await;
    match written {
        Ok(_) => {
            mark.written.store(true, Ordering::Relaxed);
            Ok(())
        }
        Err(problem) if problem.code == "conflict" => {
            Err(Problem { code: REPEATED.into(), ..Problem::conflict("This command was carried out before.") })
        }
        Err(problem) => Err(problem),
    }
}

#[cfg(test)]
mod tests {
    use super::{REPEATED, keep, look_up, open, run};
    use crate::{Databases, Keyring, Migration, Store, unscoped};
    use capsule_contracts::{Problem, Uuid};

    const TABLES: Migration = Migration {
        version: 1,
        name: "create_commands",
        sql: "CREATE TABLE commands (id UUID PRIMARY KEY NOT NULL, digest TEXT NOT NULL, reply BYTEA, done_at BIGINT NOT NULL); \
              CREATE TABLE things (name TEXT);",
    };

    async fn add(store: &Store, times: usize) -> Result<(), Problem> {
        for _ in 0..times {
            let tx = store.begin().await?;
            tx.run(unscoped!("test", "INSERT INTO things (name) VALUES ('a')")).await?;
            tx.commit().await?;
        }
        Ok(())
    }

    #[tokio::test]
    async fn a_command_that_runs_twice_takes_effect_once() {
        let directory = tempfile::tempdir().expect("tempdir");
        let keyring = Keyring::open(&directory.path().join("key")).expect("keyring");
        let databases = Databases::Embedded(directory.path().into());
        let store = Store::open(&databases, "test", keyring, &[("test", &[TABLES])]).await.expect("opens");
        let id = Uuid::from_u128(1);
        assert!(look_up(&store, id).await.expect("answers").is_none());
        let (done, committed) = run(&store, id, "digest", add(&store, 2)).await;
        assert!(done.is_ok() && committed, "it may commit more than once");
        let (again, _) = run(&store, id, "digest", add(&store, 1)).await;
        assert_eq!(again.expect_err("it was done").code, REPEATED);
        let count = unscoped!("test", "SELECT COUNT(*) FROM things");
        assert_eq!(store.read().value::<i64>(count).await.expect("reads"), Some(2));

        keep(&store, id, b"the reply").await.expect("kept");
        let known = look_up(&store, id).await.expect("answers").expect("known");
        let reply = known.reply.expect("kept");
        assert!(!reply.windows(5).any(|window| window == b"reply"), "it rests sealed");
        assert_eq!((known.digest.as_str(), open(&store, id, &reply).expect("opens")), ("digest", b"the reply".to_vec()));
        let (_, committed) = run(&store, Uuid::from_u128(2), "digest", async {}).await;
        assert!(!committed);
    }
}
