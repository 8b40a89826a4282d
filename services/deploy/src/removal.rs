//! What ceased to be: a service, an environment, a project, an organization. Its placements are
//! marked; the reconciler stops what runs of them and removes their files.

use std::sync::Arc;

use capsule_bus::{Call, SystemGrant};
use capsule_contracts::deploy::CountPlacements;
use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::project::ServicesRemoved;
use capsule_contracts::{Count, Problem};
use capsule_store::{Transaction, scoped};

use crate::{Deploys, placements, routes};

pub async fn services(deploys: &Deploys, tx: &Transaction<'_>, event: ServicesRemoved) -> Result<(), Problem> {
    let grant = SystemGrant::new(event.organization_id, "services were removed");
    placements::remove(deploys, tx, &grant, |placement| match (event.service_id, event.environment_id) {
        (Some(service), _) => placement.service_id == service,
        (None, Some(environment)) => placement.environment_id == environment,
        (None, None) => placement.project_id == event.project_id,
    })
    .await?;
    routes::raise(tx).await?;
    deploys.controller.reconcile();
    Ok(())
}

pub async fn organization(deploys: &Deploys, tx: &Transaction<'_>, event: OrganizationDeleted) -> Result<(), Problem> {
    let grant = SystemGrant::new(event.organization_id, "the organization was deleted");
    placements::remove(deploys, tx, &grant, |_| true).await?;
    routes::raise(tx).await?;
    deploys.controller.reconcile();
    Ok(())
}

pub async fn count_placements(deploys: Arc<Deploys>, call: Call<CountPlacements>) -> Result<Count, Problem> {
    let grant = SystemGrant::new(call.message.organization_id, "the organization is being deleted");
    let count = scoped!(&grant, "SELECT COUNT(*) FROM placements WHERE organization_id = :tenant");
    Ok(Count { count: deploys.store.read().value::<i64>(count).await?.unwrap_or_default() })
}
