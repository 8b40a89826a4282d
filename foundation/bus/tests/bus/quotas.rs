//! Quotas as a service keeps them: confirmed by their owner, and never taken for granted.

use std::sync::Arc;

use capsule_bus::{Bus, Call, Router, Service};
use capsule_contracts::project::Place;
use capsule_contracts::quotas::{ConfirmQuotas, ConfirmedQuotas, Quantity, Quotas};
use capsule_contracts::{Problem, Target, Uuid};
use capsule_store::{Store, unscoped};

use crate::open;

struct Toy {
    store: Arc<Store>,
    bus: Bus,
}

impl Service for Toy {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }
    fn bus(&self) -> &Bus {
        &self.bus
    }
    async fn locate(&self, _: &Target) -> Result<Option<Place>, Problem> {
        Ok(None)
    }
}

async fn confirm(_: Arc<Toy>, call: Call<ConfirmQuotas>) -> Result<ConfirmedQuotas, Problem> {
    let quotas = Quotas([("projects".to_owned(), 7)].into());
    Ok(ConfirmedQuotas { organization_id: call.message.organization_id, quotas, sequence: 1 })
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_that_are_not_known_are_asked_for_and_without_an_answer_nothing_is_allowed() {
    let directory = tempfile::tempdir().expect("a folder");
    let (bus, lonely) = (Bus::new(), Bus::new());
    let organization = Uuid::from_u128(7);
    let toy = |bus: &Bus, store: &Arc<Store>| Toy { store: store.clone(), bus: bus.clone() };
    let owner = Arc::new(Toy { store: open(directory.path(), "owner").await, bus: bus.clone() });
    Router::new(owner).handle(confirm).start();
    let store = open(directory.path(), "counts").await;

    let refused = capsule_bus::quotas(&toy(&lonely, &store), organization).await.expect_err("nobody answers");
    assert_eq!(refused.code, "unavailable");
    let known = capsule_bus::quotas(&toy(&bus, &store), organization).await.expect("the owner answers");
    assert_eq!(known.limit(Quantity::Projects), 7);

    // Confirmed lately, it is not asked for; long ago, it holds on while nobody answers.
    for confirmed_at in [None, Some(0)] {
        if let Some(at) = confirmed_at {
            let tx = store.begin().await.expect("begins");
            tx.run(unscoped!("test", "UPDATE known_quotas SET confirmed_at = $1", at)).await.expect("set");
            tx.commit().await.expect("committed");
        }
        let known = capsule_bus::quotas(&toy(&lonely, &store), organization).await.expect("known");
        assert_eq!(known.limit(Quantity::Projects), 7);
    }
    // Of what only another organization has, nothing is known.
    capsule_bus::quotas(&toy(&lonely, &store), Uuid::from_u128(8)).await.expect_err("nobody answers");
}
