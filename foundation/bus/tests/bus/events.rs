//! Delivery of events within one process.

use std::time::Duration;

use capsule_bus::{Bus, Context, Router, emit};
use capsule_contracts::Uuid;
use capsule_contracts::organization::OrganizationDeleted;
use capsule_store::unscoped;

use crate::open_service;

#[tokio::test(flavor = "multi_thread")]
async fn events_are_delivered_only_once_every_service_is_registered() {
    let directory = tempfile::tempdir().expect("a folder");
    let bus = Bus::new();
    let first = open_service(directory.path(), &bus, "first", ()).await;
    // An event that an earlier process left in the outbox.
    let tx = first.store.begin().await.expect("begins");
    let event = OrganizationDeleted { organization_id: Uuid::from_u128(7) };
    emit(&tx, &Context::background("first"), &event).await.expect("written");
    tx.commit().await.expect("committed");
    Router::new(first.clone()).start();
    tokio::time::sleep(Duration::from_millis(300)).await;

    let second = open_service(directory.path(), &bus, "second", ()).await;
    Router::new(second.clone()).consume::<OrganizationDeleted>(|_, _, _| Box::pin(async { Ok(()) })).start();
    bus.start_event_delivery();
    let handled =
        || unscoped!("test", "SELECT COUNT(*) FROM inbox WHERE state = 'done' AND kind = 'organization.organization_deleted'");
    for _ in 0..200 {
        if second.store.read().value::<i64>(handled()).await.expect("answers") == Some(1) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the event was relayed before its consumer was registered");
}
