//! A service's cache of quotas.

use std::sync::Arc;

use capsule_bus::{Bus, Call, Router};
use capsule_contracts::quotas::{ConfirmQuotas, ConfirmedQuotas, Quantity, Quotas};
use capsule_contracts::{Problem, Uuid};
use capsule_store::unscoped;

use crate::{TestService, open_service};

async fn confirm(_: Arc<TestService>, call: Call<ConfirmQuotas>) -> Result<ConfirmedQuotas, Problem> {
    let quotas = Quotas([("projects".to_owned(), 7)].into());
    Ok(ConfirmedQuotas { organization_id: call.message.organization_id, quotas, sequence: 1 })
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_are_requested_once_and_cached_ones_are_used_while_the_owner_is_unavailable() {
    let directory = tempfile::tempdir().expect("a folder");
    let (bus, without_owner) = (Bus::new(), Bus::new());
    let organization = Uuid::from_u128(7);
    let owner = open_service(directory.path(), &bus, "owner", ()).await;
    Router::new(owner).handle(confirm).start();
    let reachable = open_service(directory.path(), &bus, "counts", ()).await;
    let store = reachable.store.clone();
    let unreachable = TestService { store: store.clone(), bus: without_owner, state: () };

    let problem = capsule_bus::quotas(&unreachable, organization).await.expect_err("the owner is unavailable");
    assert_eq!(problem.code, "unavailable");
    let quotas = capsule_bus::quotas(&*reachable, organization).await.expect("the owner replies");
    assert_eq!(quotas.limit(Quantity::Projects), 7);

    // Recently confirmed quotas are not requested again; outdated ones are used while the owner is unavailable.
    for confirmed_at in [None, Some(0)] {
        if let Some(at) = confirmed_at {
            let tx = store.begin().await.expect("begins");
            tx.run(unscoped!("test", "UPDATE known_quotas SET confirmed_at = :at", at)).await.expect("set");
            tx.commit().await.expect("committed");
        }
        let quotas = capsule_bus::quotas(&unreachable, organization).await.expect("cached");
        assert_eq!(quotas.limit(Quantity::Projects), 7);
    }
    // The cache has no entry for another organization.
    capsule_bus::quotas(&unreachable, Uuid::from_u128(8)).await.expect_err("the owner is unavailable");
}
