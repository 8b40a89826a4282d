//! The user ids of applications. Each service in an environment has its own; an id is never reused, not even after the
//! service was deleted, because keyrings, files and message queues can outlive an application.
//!
//! A restored database has the counter of the backup. The row in `restore_marks` is left out of backups and copies:
//! where it is missing, the counter first skips the ids that may have been given out since the backup.

use capsule_contracts::{Problem, Timestamp};
use capsule_store::{Transaction, unscoped};

/// The first id of an application; the migration that creates the counter starts with it.
const FIRST: i32 = 200_000;
/// The last id of an application: systemd gives the ids from 524288 on to containers.
const LAST: i32 = 524_287;
/// How many ids are skipped after a restore: more than an installation gives out between two backups.
const SKIP: i32 = 10_000;

/// Takes the next user id, in the transaction that uses it.
///
/// # Errors
/// If all ids have been given out.
pub async fn next(tx: &Transaction<'_>) -> Result<i32, Problem> {
    skip_after_restore(tx).await?;
    let increment = unscoped!(
        "user ids are unique over all tenants",
        "UPDATE user_ids SET next = next + 1 WHERE id = 1 AND next <= :next",
        next = LAST
    );
    if tx.run(increment).await? != 1 {
        return Err(exhausted());
    }
    let taken = unscoped!("user ids are unique over all tenants", "SELECT next - 1 FROM user_ids WHERE id = 1");
    tx.read().value::<i32>(taken).await?.filter(|uid| *uid >= FIRST).ok_or_else(Problem::internal)
}

/// Skips ids once in each database: [`SKIP`], and one for each minute since the newest deployment on record, up to half
/// of the ids that are left. The minutes keep two restores of the same backup apart. A new database skips ids, too: it
/// looks like the restored backup of one that was new.
async fn skip_after_restore(tx: &Transaction<'_>) -> Result<(), Problem> {
    let mark = unscoped!(
        "user ids are unique over all tenants",
        "INSERT INTO restore_marks (id) VALUES (1) ON CONFLICT (id) DO NOTHING"
    );
    if tx.run(mark).await? == 0 {
        return Ok(());
    }
    let next = unscoped!("user ids are unique over all tenants", "SELECT next FROM user_ids WHERE id = 1");
    let next = tx.read().value::<i32>(next).await?.ok_or_else(Problem::internal)?;
    let now = Timestamp::now().0;
    let newest =
        unscoped!("user ids are unique over all tenants", "SELECT COALESCE(MAX(created_at), :now) FROM deployments", now);
    let age = now - tx.read().value::<i64>(newest).await?.unwrap_or(now);
    let left = (LAST + 1 - next).max(0);
    let minutes = i32::try_from(age / 60_000_000).unwrap_or(i32::MAX).clamp(0, left / 2);
    let skipped = SKIP.saturating_add(minutes).min(left);
    tx.run(unscoped!("user ids are unique over all tenants", "UPDATE user_ids SET next = next + :skipped WHERE id = 1", skipped))
        .await?;
    Ok(())
}

fn exhausted() -> Problem {
    Problem::conflict(format!(
        "No user id is left for another service in an environment: all ids from {FIRST} to {LAST} have been given out, \
         and ids are not reused. Deploy to an existing service, or set up another installation."
    ))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use capsule_contracts::{Problem, Timestamp, Uuid};
    use capsule_store::{Databases, Keyring, Statement, Store, copy, unscoped};

    use super::{FIRST, LAST, SKIP};

    async fn open(directory: &Path) -> Store {
        let keyring = Keyring::open(&directory.join("key")).expect("a key");
        let databases = Databases::Embedded(directory.into());
        Store::open(&databases, crate::NAME, keyring, crate::MIGRATIONS).await.expect("opens")
    }

    async fn take(store: &Store) -> Result<i32, Problem> {
        let tx = store.begin().await.expect("begins");
        let taken = super::next(&tx).await;
        tx.commit().await.expect("commits");
        taken
    }

    async fn run(store: &Store, statement: Statement) {
        let tx = store.begin().await.expect("begins");
        tx.run(statement).await.expect("runs");
        tx.commit().await.expect("commits");
    }

    /// Copies the database as a backup and its restore do.
    async fn restore(from: &Path) -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().expect("a directory");
        let (from, to) = (Databases::Embedded(from.into()), Databases::Embedded(directory.path().into()));
        copy::copy(&from, &to, crate::NAME, crate::MIGRATIONS).await.expect("copied");
        let store = open(directory.path()).await;
        (directory, store)
    }

    #[tokio::test]
    async fn a_user_id_is_given_out_once_and_there_is_an_error_when_none_is_left() {
        let directory = tempfile::tempdir().expect("a directory");
        let store = open(directory.path()).await;
        assert_eq!(take(&store).await, Ok(FIRST + SKIP));
        assert_eq!(take(&store).await, Ok(FIRST + SKIP + 1));
        run(&store, unscoped!("test", "UPDATE user_ids SET next = :next", next = LAST)).await;
        assert_eq!(take(&store).await, Ok(LAST));
        for _ in 0..2 {
            let exhausted = take(&store).await.expect_err("none is left");
            assert!(exhausted.to_string().contains("No user id is left"), "{exhausted}");
        }
    }

    #[tokio::test]
    async fn a_restore_skips_the_ids_that_may_have_been_given_out_since_the_backup() {
        let directory = tempfile::tempdir().expect("a directory");
        let original = open(directory.path()).await;
        let last = take(&original).await.expect("an id");
        let (restored_directory, restored) = restore(directory.path()).await;
        assert_eq!(take(&restored).await, Ok(last + 1 + SKIP));
        assert_eq!(take(&restored).await, Ok(last + 2 + SKIP), "ids are skipped once");
        let (_directory, restored_again) = restore(restored_directory.path()).await;
        assert_eq!(take(&restored_again).await, Ok(last + 3 + 2 * SKIP));
        assert_eq!(take(&original).await, Ok(last + 1), "the original goes on");
    }

    #[tokio::test]
    async fn the_older_a_backup_is_the_more_ids_its_restore_skips() {
        let directory = tempfile::tempdir().expect("a directory");
        let store = open(directory.path()).await;
        let last = take(&store).await.expect("an id");
        let id = Uuid::from_u128(1);
        let insert = unscoped!(
            "test",
            "INSERT INTO deployments (id, organization_id, service_id, environment_id, number, status, phase, trigger_kind, \
             upload_digest, release_id, sealed_environment, cancelling, created_by, created_at) \
             VALUES (:id, :id, :id, :id, 1, 'running', 'active', 'upload', '', :id, :sealed_environment, FALSE, :id, \
             :created_at)",
            id,
            sealed_environment = Vec::<u8>::new(),
            created_at = Timestamp::now().plus_seconds(-24 * 3600).0
        );
        run(&store, insert).await;
        let (_directory, restored) = restore(directory.path()).await;
        let taken = take(&restored).await.expect("an id");
        assert!((1440..1450).contains(&(taken - last - 1 - SKIP)), "{taken}");
        // However old it is, ids are left.
        run(&store, unscoped!("test", "UPDATE deployments SET created_at = 0")).await;
        let (_directory, restored) = restore(directory.path()).await;
        assert!(take(&restored).await.expect("an id") < LAST - (LAST - FIRST) / 3);
    }

    #[tokio::test]
    async fn a_restore_never_skips_beyond_the_last_id() {
        let directory = tempfile::tempdir().expect("a directory");
        let store = open(directory.path()).await;
        for next in [LAST - SKIP / 2, LAST, LAST + 1] {
            run(&store, unscoped!("test", "UPDATE user_ids SET next = :next", next)).await;
            let (_directory, restored) = restore(directory.path()).await;
            assert!(take(&restored).await.expect_err("none is left").to_string().contains("No user id is left"), "{next}");
        }
    }
}
