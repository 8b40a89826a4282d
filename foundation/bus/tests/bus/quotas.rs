//! Quotas as a service keeps them: confirmed by their owner, and never taken for granted.

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
async fn quotas_that_are_not_known_are_asked_for_and_without_an_answer_nothing_is_allowed() {
    let directory = tempfile::tempdir().expect("a folder");
    let (bus, without_owner) = (Bus::new(), Bus::new());
    let organization = Uuid::from_u128(7);
    let owner = open_service(directory.path(), &bus, "owner", ()).await;
    Router::new(owner).handle(confirm).start();
    let reachable = open_service(directory.path(), &bus, "counts", ()).await;
    let store = reachable.store.clone();
    let unreachable = TestService { store: store.clone(), bus: without_owner, state: () };

    let refused = capsule_bus::quotas(&unreachable, organization).await.expect_err("nobody answers");
    assert_eq!(refused.code, "unavailable");
    let known = capsule_bus::quotas(&*reachable, organization).await.expect("the owner answers");
    assert_eq!(known.limit(Quantity::Projects), 7);

    // Confirmed lately, it is not asked for; long ago, it holds on while nobody answers.
    for confirmed_at in [None, Some(0)] {
        if let Some(at) = confirmed_at {
            let tx = store.begin().await.expect("begins");
            tx.run(unscoped!("test", "UPDATE known_quotas SET confirmed_at = $1", at)).await.expect("set");
            tx.commit().await.expect("committed");
        }
        let known = capsule_bus::quotas(&unreachable, organization).await.expect("known");
        assert_eq!(known.limit(Quantity::Projects), 7);
    }
    // Of what only another organization has, nothing is known.
    capsule_bus::quotas(&unreachable, Uuid::from_u128(8)).await.expect_err("nobody answers");
}
