//! Idempotent commands. A command arrives twice when a broker redelivers it or a client repeats its request.
//!
//! The first transaction that a command commits also records the command's id. A second delivery finds the record,
//! or, if both run at once, fails to commit.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use capsule_contracts::{Problem, Timestamp, Uuid};

use crate::{FromRow, Store, Transaction, unscoped};

/// How long commands and their replies are kept.
const RETENTION_SECONDS: i64 = 24 * 3600;

/// The problem code of a second run of a command that has already committed.
pub const REPEATED: &str = "repeated_command";

tokio::task_local! {
    static COMMAND: Arc<RunningCommand>;
}

#[derive(Debug)]
struct RunningCommand {
    service: &'static str,
    id: Uuid,
    digest: String,
    written: AtomicBool,
}

/// A command that has committed.
#[derive(Debug, FromRow)]
pub struct CommandRecord {
    /// The digest of its body, to reject a different body with the same id.
    pub digest: String,
    /// Its encrypted reply; see [`open_reply`]. `None` until it is stored.
    pub reply: Option<Vec<u8>>,
}

/// Finds the record of a command. `None` if it has not committed anything.
///
/// # Errors
/// When the database does not answer.
pub async fn find(store: &Store, id: Uuid) -> Result<Option<CommandRecord>, Problem> {
    let row = unscoped!("commands belong to the service", "SELECT digest, reply FROM commands WHERE id = :id", id);
    store.read().first(row).await
}

/// Runs a command and records its id with its first commit. Returns the result, and whether anything was committed.
pub async fn run<T>(store: &Store, id: Uuid, digest: &str, command: impl Future<Output = T>) -> (T, bool) {
    let running = Arc::new(RunningCommand { service: store.name(), id, digest: digest.into(), written: AtomicBool::new(false) });
    let result = COMMAND.scope(running.clone(), command).await;
    (result, running.written.load(Ordering::Relaxed))
}

/// Stores the reply of a command, for repeated deliveries.
///
/// # Errors
/// When it cannot be written.
pub async fn store_reply(store: &Store, id: Uuid, reply: &[u8]) -> Result<(), Problem> {
    let sealed = store.keyring().seal(&context(id), reply)?;
    let tx = store.begin().await?;
    tx.run(unscoped!("commands belong to the service", "UPDATE commands SET reply = :sealed WHERE id = :id", sealed, id)).await?;
    tx.commit().await
}

/// Decrypts a stored reply.
///
/// # Errors
/// When it was encrypted with another key, or is damaged.
pub fn open_reply(store: &Store, id: Uuid, reply: &[u8]) -> Result<Vec<u8>, Problem> {
    store.keyring().open_sealed(&context(id), reply)
}

fn context(id: Uuid) -> String {
    format!("commands/{id}")
}

/// Deletes commands whose retention is over at `now`.
///
/// # Errors
/// When the database does not answer.
pub async fn prune(tx: &Transaction<'_>, now: Timestamp) -> Result<(), Problem> {
    let old = now.plus_seconds(-RETENTION_SECONDS).0;
    tx.run(unscoped!("commands belong to the service", "DELETE FROM commands WHERE done_at < :old", old)).await?;
    Ok(())
}

#[derive(FromRow)]
struct StoredReply {
    id: Uuid,
    reply: Vec<u8>,
}

/// Deletes the stored replies that contain the id of an erased user. The records stay, so their commands do not run
/// again.
///
/// # Errors
/// When the database does not answer.
pub async fn erase(tx: &Transaction<'_>, user: Uuid) -> Result<(), Problem> {
    let user = user.to_string();
    let kept = unscoped!("commands belong to the service", "SELECT id, reply FROM commands WHERE reply IS NOT NULL");
    for kept in tx.read().all::<StoredReply>(kept).await? {
        // A reply that cannot be decrypted is useless; delete it too.
        let contains_user = match tx.keyring().open_sealed(&context(kept.id), &kept.reply) {
            Ok(reply) => reply.windows(user.len()).any(|window| window == user.as_bytes()),
            Err(_) => true,
        };
        if contains_user {
            tx.run(unscoped!("commands belong to the service", "UPDATE commands SET reply = NULL WHERE id = :id", id = kept.id))
                .await?;
        }
    }
    Ok(())
}

/// Records the id of the running command, if there is one, in the transaction that is about to commit. Later commits
/// of the same command record nothing.
pub(crate) async fn record(tx: &Transaction<'_>) -> Result<(), Problem> {
    let Ok(running) = COMMAND.try_with(Arc::clone) else { return Ok(()) };
    if running.service != tx.name() || running.written.load(Ordering::Relaxed) {
        return Ok(());
    }
    let written = tx
        .run(unscoped!(
            "commands belong to the service",
            "INSERT INTO commands (id, digest, done_at) VALUES (:id, :digest, :done_at)",
            id = running.id,
            digest = running.digest.as_str(),
            done_at = Timestamp::now().0
        ))
        .await;
    match written {
        Ok(_) => {
            running.written.store(true, Ordering::Relaxed);
            Ok(())
        }
        Err(problem) if problem.code == "conflict" => {
            Err(Problem { code: REPEATED.into(), ..Problem::conflict("This command was already executed.") })
        }
        Err(problem) => Err(problem),
    }
}

#[cfg(test)]
mod tests {
    use super::{REPEATED, find, open_reply, run, store_reply};
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
    async fn a_command_that_runs_twice_has_one_effect() {
        let directory = tempfile::tempdir().expect("tempdir");
        let keyring = Keyring::open(&directory.path().join("key")).expect("keyring");
        let databases = Databases::Embedded(directory.path().into());
        let store = Store::open(&databases, "test", keyring, &[("test", &[TABLES])]).await.expect("opens");
        let id = Uuid::from_u128(1);
        assert!(find(&store, id).await.expect("answers").is_none());
        let (done, committed) = run(&store, id, "digest", add(&store, 2)).await;
        assert!(done.is_ok() && committed, "it may commit more than once");
        let (again, _) = run(&store, id, "digest", add(&store, 1)).await;
        assert_eq!(again.expect_err("it was done").code, REPEATED);
        let count = unscoped!("test", "SELECT COUNT(*) FROM things");
        assert_eq!(store.read().value::<i64>(count).await.expect("reads"), Some(2));

        store_reply(&store, id, b"the reply").await.expect("kept");
        let known = find(&store, id).await.expect("answers").expect("known");
        let reply = known.reply.expect("kept");
        assert!(!reply.windows(5).any(|window| window == b"reply"), "it is stored encrypted");
        assert_eq!((known.digest.as_str(), open_reply(&store, id, &reply).expect("opens")), ("digest", b"the reply".to_vec()));
        let (_, committed) = run(&store, Uuid::from_u128(2), "digest", async {}).await;
        assert!(!committed);
    }
}
