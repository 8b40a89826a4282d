//! Retention on a real database.

use std::time::Duration;

use capsule_bus::{Bus, Router, Service, retention};
use capsule_contracts::{Timestamp, Uuid};
use capsule_store::{Store, unscoped};

use crate::open_service;

/// Inserts rows of each kind that expires, with the time `at`.
async fn fill(store: &Store, at: Timestamp) {
    let tx = store.begin().await.expect("begins");
    for n in 0..3 {
        let id = Uuid::from_u128(n + 1);
        for insert in [
            unscoped!(
                "test",
                "INSERT INTO outbox (id, kind, envelope, relayed_at) VALUES (:id, 'k', '{}', :relayed_at)",
                id,
                relayed_at = at.0
            ),
            unscoped!(
                "test",
                "INSERT INTO inbox (id, kind, envelope, state, attempts, next_attempt_at, received_at) \
                 VALUES (:id, 'k', '{}', 'done', 1, 0, :received_at)",
                id,
                received_at = at.0
            ),
            unscoped!("test", "INSERT INTO commands (id, digest, done_at) VALUES (:id, 'd', :done_at)", id, done_at = at.0),
            unscoped!(
                "test",
                "INSERT INTO sagas (id, name, input, correlation_id, state, step, attempts, next_attempt_at, history, \
                 started_at, \
                 ended_at) VALUES (:id, 's', '{}', 'c', 'done', 1, 1, 0, '[]', 0, :ended_at)",
                id,
                ended_at = at.0
            ),
        ] {
            tx.run(insert).await.expect("inserted");
        }
    }
    tx.commit().await.expect("committed");
}

async fn counts(store: &Store) -> [i64; 4] {
    let mut counts = [0; 4];
    for (count, sql) in counts.iter_mut().zip([
        unscoped!("test", "SELECT COUNT(*) FROM outbox"),
        unscoped!("test", "SELECT COUNT(*) FROM inbox"),
        unscoped!("test", "SELECT COUNT(*) FROM commands"),
        unscoped!("test", "SELECT COUNT(*) FROM sagas"),
    ]) {
        *count = store.read().value::<i64>(sql).await.expect("answers").expect("a count");
    }
    counts
}

#[tokio::test]
async fn each_kind_of_row_is_deleted_after_its_retention() {
    let directory = tempfile::tempdir().expect("a folder");
    let service = open_service(directory.path(), &Bus::new(), "test", ()).await;
    let (store, now) = (service.store(), Timestamp::now());
    fill(store, now).await;
    let day = 24 * 3600;
    for (days, left) in [(0, [3, 3, 3, 3]), (2, [3, 3, 0, 3]), (8, [0, 0, 0, 3]), (31, [0, 0, 0, 0])] {
        retention::purge(store, now.plus_seconds(days * day)).await.expect("purged");
        assert_eq!(counts(store).await, left, "after {days} days");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_without_events_purges_expired_rows() {
    let directory = tempfile::tempdir().expect("a folder");
    let bus = Bus::new();
    let service = open_service(directory.path(), &bus, "test", ()).await;
    fill(service.store(), Timestamp::now().plus_seconds(-31 * 24 * 3600)).await;
    Router::new(service.clone()).start();
    bus.start_event_delivery();
    for _ in 0..200 {
        if counts(service.store()).await == [0; 4] {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the rows were not purged: {:?}", counts(service.store()).await);
}
