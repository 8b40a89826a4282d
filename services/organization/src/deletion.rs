//! The deletion of an organization, with everything in it. It is closed at once; then its projects are
//! archived, so that nothing new is deployed meanwhile; then there is no return: its members leave,
//! whoever keeps something of it is told, and it is waited until nothing is left.

use std::time::Duration;

use capsule_bus::SystemGrant;
use capsule_bus::saga::{Run, Saga, Step};
use capsule_contracts::deploy::CountPlacements;
use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::project::{ArchiveOrganization, CountProjects};
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::Transaction;
use capsule_store::scoped;
use serde::{Deserialize, Serialize};

use crate::{Organizations, members};

#[derive(Serialize, Deserialize)]
struct Input {
    organization_id: Uuid,
}

pub static DELETION: Saga<Organizations> = Saga {
    name: "organization_deletion",
    patience: Duration::from_secs(600),
    steps: &[
        Step {
            name: "close",
            act: |organizations, run| Box::pin(close(organizations, run)),
            undo: Some(|organizations, run| Box::pin(reopen(organizations, run))),
        },
        Step {
            name: "archive_projects",
            act: |organizations, run| Box::pin(archive(organizations, run, true)),
            undo: Some(|organizations, run| Box::pin(archive(organizations, run, false))),
        },
        Step { name: "remove", act: |organizations, run| Box::pin(remove(organizations, run)), undo: None },
        Step { name: "wait_until_gone", act: |organizations, run| Box::pin(wait(organizations, run)), undo: None },
    ],
};

/// Closes an organization and begins its deletion, in one transaction.
pub async fn begin(tx: &Transaction<'_>, context: &capsule_bus::Context, organization_id: Uuid) -> Result<(), Problem> {
    set_closed(tx, context, organization_id, Some(Timestamp::now().0)).await?;
    capsule_bus::saga::begin(tx, context, &DELETION, &Input { organization_id }).await?;
    Ok(())
}

/// Closes an organization or opens it again. Its members have no role in a closed one, here and in every cache.
async fn set_closed(
    tx: &Transaction<'_>,
    context: &capsule_bus::Context,
    organization: Uuid,
    at: Option<i64>,
) -> Result<(), Problem> {
    let grant = SystemGrant::new(organization, "the organization is deleted");
    let change = match at {
        Some(at) => scoped!(
            &grant,
            "UPDATE organizations SET closed_at = $1 WHERE id = :tenant AND closed_at IS NULL AND deleted_at IS NULL",
            at
        ),
        None => scoped!(
            &grant,
            "UPDATE organizations SET closed_at = NULL WHERE id = :tenant AND closed_at IS NOT NULL AND deleted_at IS NULL"
        ),
    };
    if tx.run(change).await? == 1 {
        members::announce_all(tx, context, &grant, at.is_some()).await?;
    }
    Ok(())
}

async fn close(organizations: &Organizations, run: &Run) -> Result<(), Problem> {
    let input: Input = run.input()?;
    let tx = organizations.store.begin().await?;
    set_closed(&tx, &run.context(), input.organization_id, Some(Timestamp::now().0)).await?;
    tx.commit().await
}

async fn reopen(organizations: &Organizations, run: &Run) -> Result<(), Problem> {
    let input: Input = run.input()?;
    let tx = organizations.store.begin().await?;
    set_closed(&tx, &run.context(), input.organization_id, None).await?;
    tx.commit().await
}

async fn archive(organizations: &Organizations, run: &Run, archived: bool) -> Result<(), Problem> {
    let Input { organization_id } = run.input()?;
    organizations.bus.request(&run.command(), &ArchiveOrganization { organization_id, archived }).await?;
    Ok(())
}

async fn remove(organizations: &Organizations, run: &Run) -> Result<(), Problem> {
    let Input { organization_id } = run.input()?;
    let grant = SystemGrant::new(organization_id, "the organization is deleted");
    let context = run.context();
    let tx = organizations.store.begin().await?;
    // Its row is kept for what still refers to it, without a name: that may be a person's.
    let gone = scoped!(
        &grant,
        "UPDATE organizations SET deleted_at = $1, personal_of = NULL, name = 'deleted', slug = 'deleted' \
         WHERE id = :tenant AND deleted_at IS NULL",
        Timestamp::now().0
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

async fn wait(organizations: &Organizations, run: &Run) -> Result<(), Problem> {
    let Input { organization_id } = run.input()?;
    let projects = organizations.bus.request(&run.context(), &CountProjects { organization_id }).await?.count;
    let placements = organizations.bus.request(&run.context(), &CountPlacements { organization_id }).await?.count;
    if projects + placements == 0 {
        return Ok(());
    }
    Err(Problem::unavailable(format!("{projects} projects and {placements} deployed services are still there.")))
}
