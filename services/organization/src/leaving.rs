//! A user whose account is erased leaves every organization. Organizations without other members are deleted; others
//! must have another owner.

use std::sync::Arc;

use capsule_bus::{Call, Context, SystemAccess};
use capsule_contracts::organization::{CheckLeaving, CountMemberships, LeaveOrganizations};
use capsule_contracts::{Count, Empty, Problem, Role, Timestamp, Uuid};
use capsule_store::{FromRow, Transaction, unscoped};

use crate::{OrganizationService, deletion, invitations, members, personal};

#[derive(FromRow)]
struct Row {
    id: Uuid,
    name: String,
}

/// The organizations that a user is a member of, except those being deleted.
async fn of(tx: &Transaction<'_>, user: Uuid) -> Result<Vec<Row>, Problem> {
    let rows = unscoped!(
        "a user's own memberships, over all organizations",
        "SELECT o.id, o.name FROM organizations o JOIN members m ON m.organization_id = o.id \
         WHERE m.user_id = :user AND m.role IS NOT NULL AND o.closed_at IS NULL AND o.deleted_at IS NULL ORDER BY o.id",
        user
    );
    tx.read().all(rows).await
}

pub async fn check_leaving(service: Arc<OrganizationService>, call: Call<CheckLeaving>) -> Result<Empty, Problem> {
    let tx = service.store.begin().await?;
    for organization in of(&tx, call.message.user_id).await? {
        let grant = call.grant.organization(organization.id, "a member's account is erased");
        let others: Vec<_> =
            members::of(&tx, &grant).await?.into_iter().filter(|row| row.user_id != call.message.user_id).collect();
        if !others.is_empty() && others.iter().all(|row| row.role != Role::Owner.name()) {
            return Err(Problem::conflict(format!("You are the only owner of {}, and it has other members.", organization.name))
                .hint("Make one of them an owner, or delete the organization."));
        }
    }
    Ok(Empty {})
}

pub async fn leave_organizations(service: Arc<OrganizationService>, call: Call<LeaveOrganizations>) -> Result<Empty, Problem> {
    let tx = service.store.begin().await?;
    leave(&tx, &call.context, &call.grant, call.message.user_id).await?;
    tx.commit().await?;
    Ok(Empty {})
}

/// Whether a user has left all organizations because of the erasure. Their sessions may still send requests meanwhile.
pub async fn has_left(tx: &Transaction<'_>, user: Uuid) -> Result<bool, Problem> {
    tx.read().exists(unscoped!("users belong to no tenant", "SELECT 1 FROM left_users WHERE user_id = :user", user)).await
}

/// Fails if the user's account is being erased.
pub async fn check_not_left(tx: &Transaction<'_>, user: Uuid) -> Result<(), Problem> {
    match has_left(tx, user).await? {
        true => Err(Problem::conflict("This account is being erased.")),
        false => Ok(()),
    }
}

/// Removes a user from every organization for good, and deletes their pending invitations. Idempotent.
pub async fn leave(tx: &Transaction<'_>, context: &Context, system: &SystemAccess, user: Uuid) -> Result<(), Problem> {
    tx.run(unscoped!(
        "users belong to no tenant",
        "INSERT INTO left_users (user_id, left_at) VALUES (:user, :left_at) ON CONFLICT (user_id) DO NOTHING",
        user,
        left_at = Timestamp::now().0
    ))
    .await?;
    for organization in of(tx, user).await? {
        let grant = system.organization(organization.id, "a member's account is erased");
        let others: Vec<_> = members::of(tx, &grant).await?.into_iter().filter(|row| row.user_id != user).collect();
        let Some(oldest) = others.first() else {
            deletion::begin(tx, context, &grant).await?;
            continue;
        };
        // The other owner may have lost the role since `check_leaving`.
        if others.iter().all(|row| row.role != Role::Owner.name()) {
            members::set(tx, context, organization.id, oldest.user_id, Some(Role::Owner)).await?;
        }
        members::set(tx, context, organization.id, user, None).await?;
    }
    invitations::delete_for_user(tx, user).await?;
    personal::detach(tx, user).await
}

/// Counts the organizations that a user is a member of, and those being deleted because the user left.
pub async fn count_memberships(service: Arc<OrganizationService>, call: Call<CountMemberships>) -> Result<Count, Problem> {
    let count = unscoped!(
        "a user's own memberships, over all organizations",
        "SELECT COUNT(*) FROM members WHERE user_id = :user_id AND role IS NOT NULL",
        user_id = call.message.user_id
    );
    let memberships = service.store.read().value::<i64>(count).await?.unwrap_or_default();
    // Deletions begun by leaving have the same correlation id, and end when everything is deleted.
    let deletions = unscoped!(
        "sagas belong to the service",
        "SELECT COUNT(*) FROM sagas WHERE correlation_id = :correlation_id AND ended_at IS NULL",
        correlation_id = call.context.correlation_id
    );
    let deletions = service.store.read().value::<i64>(deletions).await?.unwrap_or_default();
    Ok(Count { count: memberships + deletions })
}
