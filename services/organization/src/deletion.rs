//! The deletion of an organization with everything in it.
//!
//! The organization is closed at once, and its projects are archived, so that nothing new is deployed. From then on
//! the deletion is final: the members are removed, [`OrganizationDeleted`] makes other services delete their data, and
//! the saga waits until nothing is left.

use std::time::Duration;

use capsule_bus::SystemGrant;
use capsule_bus::saga::{Run, Saga, Step};
use capsule_contracts::deploy::CountServiceEnvironments;
use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::project::{ArchiveOrganization, CountProjects};
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::{Scope, Transaction, scoped};
use serde::{Deserialize, Serialize};

use crate::{OrganizationService, members};

#[derive(Serialize, Deserialize)]
struct Input {
    organization_id: Uuid,
}

pub static DELETION: Saga<OrganizationService> = Saga {
    name: "organization_deletion",
    timeout: Duration::from_secs(600),
    steps: &[
        Step {
            name: "close",
            act: |service, run| Box::pin(close(service, run)),
            undo: Some(|service, run| Box::pin(reopen(service, run))),
        },
        Step {
            name: "archive_projects",
            act: |service, run| Box::pin(archive(service, run, true)),
            undo: Some(|service, run| Box::pin(archive(service, run, false))),
        },
        Step { name: "remove", act: |service, run| Box::pin(remove(service, run)), undo: None },
        Step { name: "wait_until_gone", act: |service, run| Box::pin(wait(service, run)), undo: None },
    ],
};

/// Closes an organization and begins its deletion, in one transaction.
pub async fn begin(tx: &Transaction<'_>, context: &capsule_bus::Context, scope: &impl Scope) -> Result<(), Problem> {
    let organization_id = scope.organization();
    set_closed(tx, context, scope, Some(Timestamp::now().0)).await?;
    capsule_bus::saga::begin(tx, context, &DELETION, &Input { organization_id }).await?;
    Ok(())
}

/// Closes an organization or reopens it. Members of a closed organization have no role, here and in every cache.
async fn set_closed(
    tx: &Transaction<'_>,
    context: &capsule_bus::Context,
    scope: &impl Scope,
    at: Option<i64>,
) -> Result<(), Problem> {
    let change = match at {
        Some(at) => scoped!(
            scope,
            "UPDATE organizations SET closed_at = :at WHERE id = :tenant AND closed_at IS NULL AND deleted_at IS NULL",
            at
        ),
        None => scoped!(
            scope,
            "UPDATE organizations SET closed_at = NULL WHERE id = :tenant AND closed_at IS NOT NULL AND deleted_at IS NULL"
        ),
    };
    if tx.run(change).await? == 1 {
        members::publish_all(tx, context, scope, at.is_some()).await?;
    }
    Ok(())
}

/// The grant for the organization that a saga deletes.
fn grant(run: &Run) -> Result<SystemGrant, Problem> {
    let Input { organization_id } = run.input()?;
    Ok(run.system().organization(organization_id, "the organization is deleted"))
}

async fn close(service: &OrganizationService, run: &Run) -> Result<(), Problem> {
    let grant = grant(run)?;
    let tx = service.store.begin().await?;
    set_closed(&tx, &run.context(), &grant, Some(Timestamp::now().0)).await?;
    tx.commit().await
}

async fn reopen(service: &OrganizationService, run: &Run) -> Result<(), Problem> {
    let grant = grant(run)?;
    let tx = service.store.begin().await?;
    set_closed(&tx, &run.context(), &grant, None).await?;
    tx.commit().await
}

async fn archive(service: &OrganizationService, run: &Run, archived: bool) -> Result<(), Problem> {
    let Input { organization_id } = run.input()?;
    service.bus.request(&run.command(), &ArchiveOrganization { organization_id, archived }).await?;
    Ok(())
}

async fn remove(service: &OrganizationService, run: &Run) -> Result<(), Problem> {
    let grant = grant(run)?;
    let organization_id = grant.organization();
    let context = run.context();
    let tx = service.store.begin().await?;
    // The row stays for references to it, without the name, which may be a person's.
    let gone = scoped!(
        &grant,
        "UPDATE organizations SET deleted_at = :deleted_at, personal_of = NULL, name = 'deleted', slug = 'deleted' \
         WHERE id = :tenant AND deleted_at IS NULL",
        deleted_at = Timestamp::now().0
    );
    if tx.run(gone).await? == 0 {
        return Ok(());
    }
    for member in members::of(&tx, &grant).await? {
        members::set(&tx, &context, organization_id, member.user_id, None).await?;
    }
    tx.run(scoped!(&grant, "DELETE FROM invitations WHERE organization_id = :tenant")).await?;
    capsule_bus::emit(&tx, &context, &OrganizationDeleted { organization_id }).await?;
    tx.commit().await
}

async fn wait(service: &OrganizationService, run: &Run) -> Result<(), Problem> {
    let Input { organization_id } = run.input()?;
    let projects = service.bus.request(&run.context(), &CountProjects { organization_id }).await?.count;
    let service_environments = service.bus.request(&run.context(), &CountServiceEnvironments { organization_id }).await?.count;
    if projects + service_environments == 0 {
        return Ok(());
    }
    Err(Problem::unavailable(format!("{projects} projects and {service_environments} deployed services are not deleted yet.")))
}
