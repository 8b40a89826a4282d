//! The user ids of applications: each service in an environment has one of its own, which no other ever gets, not even
//! after it was removed. Keyrings, files and message queues that outlive an application belong to nobody else.

use capsule_contracts::Problem;
use capsule_store::{Transaction, unscoped};

/// User ids from here on belong to applications; the migration that makes the counter begins with it.
const FIRST: i32 = 200_000;
/// The last of them: from 524288 on, systemd gives ids to containers.
const LAST: i32 = 524_287;

/// Takes the next user id, in the transaction that uses it.
///
/// # Errors
/// When all have been given out.
pub async fn next(tx: &Transaction<'_>) -> Result<i32, Problem> {
    let grow = unscoped!(
        "user ids are unique over all tenants",
        "UPDATE user_ids SET next = next + 1 WHERE id = 1 AND next <= $1",
        LAST
    );
    if tx.run(grow).await? != 1 {
        return Err(exhausted());
    }
    let taken = unscoped!("user ids are unique over all tenants", "SELECT next - 1 FROM user_ids WHERE id = 1");
    tx.read().value::<i32>(taken).await?.filter(|uid| *uid >= FIRST).ok_or_else(Problem::internal)
}

fn exhausted() -> Problem {
    Problem::conflict(format!(
        "No user id is left for another service in an environment: this installation has given out {FIRST} to {LAST}, \
         and none is used twice. Deploy to an existing service, or set up another installation."
    ))
}

#[cfg(test)]
mod tests {
    use capsule_store::{Databases, Keyring, Store, unscoped};

    use super::{FIRST, LAST};

    #[tokio::test]
    async fn a_user_id_is_given_out_once_and_the_last_is_an_error_that_says_so() {
        let folder = tempfile::tempdir().expect("a folder");
        let keyring = Keyring::open(&folder.path().join("key")).expect("a key");
        let databases = Databases::Embedded(folder.path().into());
        let store = Store::open(&databases, crate::NAME, keyring, crate::MIGRATIONS).await.expect("opened");
        let take = async || {
            let tx = store.begin().await.expect("begun");
            let taken = super::next(&tx).await;
            tx.commit().await.expect("committed");
            taken
        };
        assert_eq!(take().await, Ok(FIRST));
        assert_eq!(take().await, Ok(FIRST + 1));
        let tx = store.begin().await.expect("begun");
        tx.run(unscoped!("a test", "UPDATE user_ids SET next = $1", LAST)).await.expect("set");
        tx.commit().await.expect("committed");
        assert_eq!(take().await, Ok(LAST));
        for _ in 0..2 {
            let exhausted = take().await.expect_err("none is left");
            assert!(exhausted.to_string().contains("No user id is left"), "{exhausted}");
        }
    }
}
