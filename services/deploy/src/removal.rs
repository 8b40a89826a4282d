//! What ceased to be: a service, an environment, a project, an organization. Its placements are
//! marked; the reconciler stops what runs of them and removes their files.

use capsule_bus::SystemGrant;
use capsule_contracts::Problem;
use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::project::ServicesRemoved;
use capsule_store::{Transaction, scoped};

use crate::{Deploys, routes};

pub async fn services(deploys: &Deploys, tx: &Transaction<'_>, event: ServicesRemoved) -> Result<(), Problem> {
    let grant = SystemGrant::new(event.organization_id, "services were removed");
    let mark = match (event.service_id, event.environment_id) {
        (Some(service), _) => {
            scoped!(
                &grant,
                "UPDATE placements SET wanted = 'removed' WHERE organization_id = :tenant AND service_id = $1",
                service
            )
        }
        (None, Some(environment)) => {
            scoped!(
                &grant,
                "UPDATE placements SET wanted = 'removed' WHERE organization_id = :tenant AND environment_id = $1",
                environment
            )
        }
        (None, None) => {
            scoped!(
                &grant,
                "UPDATE placements SET wanted = 'removed' WHERE organization_id = :tenant AND project_id = $1",
                event.project_id
            )
        }
    };
    tx.run(mark).await?;
    routes::raise(tx).await?;
    deploys.controller.reconcile();
    Ok(())
}

pub async fn organization(deploys: &Deploys, tx: &Transaction<'_>, event: OrganizationDeleted) -> Result<(), Problem> {
    let grant = SystemGrant::new(event.organization_id, "the organization was deleted");
    tx.run(scoped!(&grant, "UPDATE placements SET wanted = 'removed' WHERE organization_id = :tenant")).await?;
    routes::raise(tx).await?;
    deploys.controller.reconcile();
    Ok(())
}
