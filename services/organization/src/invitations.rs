//! Invitations: memberships that the invited user has not accepted yet. They are not rows of `members`, so they grant
//! nothing, are in no cache, and emit no event. Accepting an invitation creates the membership.

use std::sync::Arc;

use capsule_bus::{Call, Tenant};
use capsule_contracts::identity::{GetUsers, INVITATION_SECONDS, InviteUser, InvitedUser, RevokeInvitation};
use capsule_contracts::list::PageQuery;
use capsule_contracts::organization::{
    AcceptInvitation, AddMember, AddedMember, Invitation, ListInvitations, Organization, RejectInvitation, RemoveMember,
};
use capsule_contracts::{Empty, Page, Permission, Problem, Role, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Scope, Transaction, page, scoped, unscoped};

use crate::members::{self, check_owner_change};
use crate::{OrganizationService, leaving, organizations, quotas};

/// Maximum number of open invitations per organization, as each may allow a registration.
const MAX_PENDING: i64 = 100;

#[derive(FromRow)]
struct Pending {
    user_id: Uuid,
    role: String,
}

async fn of(tx: &Transaction<'_>, tenant: &Tenant) -> Result<Vec<Pending>, Problem> {
    let rows = scoped!(
        tenant,
        "SELECT user_id, role FROM invitations WHERE organization_id = :tenant AND expires_at > :now ORDER BY created_at, id",
        now = Timestamp::now().0
    );
    tx.read().all(rows).await
}

/// Invites a user, or changes the role in their invitation. For an address without an account, the reply has a
/// registration token.
pub async fn add_member(service: Arc<OrganizationService>, call: Call<AddMember>) -> Result<AddedMember, Problem> {
    let Call { message, grant, context } = call;
    check_owner_change(&grant, message.role)?;
    let pending = scoped!(
        &grant,
        "SELECT COUNT(*) FROM invitations WHERE organization_id = :tenant AND expires_at > :now",
        now = Timestamp::now().0
    );
    let full = || {
        Problem::conflict(format!("The organization already has {MAX_PENDING} pending members, the maximum."))
            .hint("Remove pending members, or wait: an invitation expires after seven days.")
    };
    if service.store.read().value::<i64>(pending.clone()).await?.unwrap_or_default() >= MAX_PENDING {
        return Err(full());
    }
    let limits = quotas::of(&service, message.id).await?;
    let invite = InviteUser { email: message.email.trim().to_owned(), organization_id: message.id };
    let invited = service.bus.request(&context.as_service("organization"), &invite).await?;
    let (now, tx) = (Timestamp::now(), service.store.begin().await?);
    if members::of(&tx, &grant).await?.iter().any(|row| row.user_id == invited.user_id) {
        return Err(Problem::conflict("This user is already a member.").hint("Change their role instead."));
    }
    let before = of(&tx, &grant).await?.into_iter().find(|row| row.user_id == invited.user_id);
    match before {
        Some(before) => check_owner_change(&grant, before.role.parse()?)?,
        None => {
            // Counts all pending members as members; checked again on acceptance.
            let pending = tx.read().value::<i64>(pending).await?.unwrap_or_default();
            if pending >= MAX_PENDING {
                return Err(full());
            }
            quotas::check_members(&tx, &grant, &limits, pending + 1).await?;
        }
    }
    let expires_at = now.plus_seconds(INVITATION_SECONDS);
    tx.run(scoped!(
        &grant,
        "INSERT INTO invitations (id, organization_id, user_id, role, invited_by, created_at, expires_at) \
         VALUES (:id, :tenant, :user_id, :role, :invited_by, :created_at, :expires_at) \
         ON CONFLICT (organization_id, user_id) DO UPDATE \
         SET role = excluded.role, invited_by = excluded.invited_by, expires_at = excluded.expires_at",
        id = new_id(),
        user_id = invited.user_id,
        role = message.role.name(),
        invited_by = grant.user(),
        created_at = now.0,
        expires_at = expires_at.0
    ))
    .await?;
    tx.commit().await?;
    let InvitedUser { user_id, email, registration_token } = invited;
    Ok(AddedMember { user_id, email, role: message.role, pending: true, expires_at, registration_token })
}

/// Whether a member with `role` may invite others with the role `invited`.
fn may_invite(role: Option<Role>, invited: Role) -> bool {
    role.is_some_and(|role| role.allows(Permission::OrgManage) && (invited != Role::Owner || role == Role::Owner))
}

/// Revokes the invitations of a member that `role` does not allow, so that a removed member cannot return by one.
pub async fn revoke_unauthorized(
    tx: &Transaction<'_>,
    organization: Uuid,
    inviter: Uuid,
    role: Option<Role>,
) -> Result<(), Problem> {
    for invited in Role::ALL.into_iter().filter(|invited| !may_invite(role, *invited)) {
        tx.run(unscoped!(
            "the callers hold the proof, or make the tenant",
            "DELETE FROM invitations WHERE organization_id = :organization AND invited_by = :inviter AND role = :role",
            organization,
            inviter,
            role = invited.name()
        ))
        .await?;
    }
    Ok(())
}

/// Changes the role of a pending member and makes the caller the inviter. `false` if there is no such pending member.
pub async fn change_role(tx: &Transaction<'_>, tenant: &Tenant, user: Uuid, role: Role) -> Result<bool, Problem> {
    let Some(present) = of(tx, tenant).await?.into_iter().find(|row| row.user_id == user) else { return Ok(false) };
    check_owner_change(tenant, present.role.parse()?)?;
    let change = scoped!(
        tenant,
        "UPDATE invitations SET role = :role, invited_by = :invited_by WHERE organization_id = :tenant AND user_id = :user",
        role = role.name(),
        invited_by = tenant.user(),
        user
    );
    Ok(tx.run(change).await? == 1)
}

/// Removes a pending member and revokes their registration token. `false` if there is no such pending member.
pub async fn remove(service: &OrganizationService, call: &Call<RemoveMember>) -> Result<bool, Problem> {
    let (user, tenant) = (call.message.user_id, &call.grant);
    let present = scoped!(
        tenant,
        "SELECT user_id, role, created_at FROM invitations WHERE organization_id = :tenant AND user_id = :user",
        user
    );
    let Some(present) = service.store.read().first::<Pending>(present).await? else { return Ok(false) };
    check_owner_change(tenant, present.role.parse()?)?;
    // First, so that a failure of the rest leaves an invitation without a token, not a token without an invitation.
    let revoke = RevokeInvitation { user_id: user, organization_id: tenant.organization() };
    service.bus.request(&call.context.as_service("organization"), &revoke).await?;
    let tx = service.store.begin().await?;
    let gone =
        tx.run(scoped!(tenant, "DELETE FROM invitations WHERE organization_id = :tenant AND user_id = :user", user)).await?;
    if gone == 0 {
        // The invitation was accepted meanwhile.
        return Ok(false);
    }
    tx.commit().await?;
    Ok(true)
}

#[derive(FromRow)]
struct Row {
    id: Uuid,
    organization_id: Uuid,
    name: String,
    slug: String,
    role: String,
    invited_by: Uuid,
    created_at: i64,
    expires_at: i64,
}

pub async fn list_invitations(
    service: Arc<OrganizationService>,
    call: Call<ListInvitations>,
) -> Result<Page<Invitation>, Problem> {
    let query = PageQuery::of(&call.message)?;
    let rows = page!(
        query,
        unscoped "a user's own invitations, over all organizations",
        "SELECT i.id, i.organization_id, o.name, o.slug, i.role, i.invited_by, i.created_at, i.expires_at \
         FROM invitations i JOIN organizations o ON o.id = i.organization_id \
         WHERE i.user_id = :user AND i.expires_at > :now AND o.closed_at IS NULL AND o.deleted_at IS NULL",
        "i.id" uuid,
        ["created_at" => "i.created_at" integer],
        user = call.grant.user(),
        now = Timestamp::now().0
    );
    let rows = service.store.read().all::<Row>(rows?).await?;
    let Page { items: rows, next_cursor } = query.page(rows, |row| (row.created_at.into(), row.id));
    let inviters = match rows.is_empty() {
        true => Vec::new(),
        false => {
            let ask = GetUsers { ids: rows.iter().map(|row| row.invited_by).collect() };
            service.bus.request(&call.context.as_service("organization"), &ask).await?.items
        }
    };
    let mut invitations = Vec::with_capacity(rows.len());
    for row in rows {
        invitations.push(Invitation {
            id: row.id,
            organization_id: row.organization_id,
            organization_name: row.name,
            organization_slug: row.slug,
            role: row.role.parse()?,
            invited_by: inviters.iter().find(|user| user.id == row.invited_by).map(|user| user.email.clone()),
            created_at: Timestamp(row.created_at),
            expires_at: Timestamp(row.expires_at),
        });
    }
    Ok(Page { items: invitations, next_cursor })
}

#[derive(FromRow)]
struct Accepted {
    organization_id: Uuid,
    role: String,
    invited_by: Uuid,
}

/// The organization of a user's own invitation that has not expired.
pub async fn organization_of(service: &OrganizationService, id: Uuid, user: Uuid) -> Result<Option<Uuid>, Problem> {
    let organization = unscoped!(
        "finds out whose it is",
        "SELECT organization_id FROM invitations WHERE id = :id AND user_id = :user AND expires_at > :now",
        id,
        user,
        now = Timestamp::now().0
    );
    service.store.read().value(organization).await
}

pub async fn accept_invitation(service: Arc<OrganizationService>, call: Call<AcceptInvitation>) -> Result<Organization, Problem> {
    let (id, user) = (call.message.id, call.grant.user());
    let limits = quotas::of(&service, call.grant.organization()).await?;
    let tx = service.store.begin().await?;
    let row = scoped!(
        &call.grant,
        "SELECT i.organization_id, i.role, i.invited_by FROM invitations i JOIN organizations o ON o.id = i.organization_id \
         WHERE i.organization_id = :tenant AND i.id = :id AND i.user_id = :user AND i.expires_at > :now \
         AND o.closed_at IS NULL AND o.deleted_at IS NULL",
        id,
        user,
        now = Timestamp::now().0
    );
    let row = tx.read().first::<Accepted>(row).await?.ok_or_else(|| Problem::not_found("invitation"))?;
    let role: Role = row.role.parse()?;
    leaving::check_not_left(&tx, user).await?;
    consume_invitation(&tx, id, user).await?;
    let present = members::of(&tx, &call.grant).await?;
    if present.iter().any(|member| member.user_id == user) {
        return Err(Problem::conflict("You are already a member of this organization."));
    }
    // The inviter may have lost the permission since, or during the invitation.
    let inviter = present.iter().find(|member| member.user_id == row.invited_by);
    let inviter = inviter.map(|member| member.role.parse::<Role>()).transpose()?;
    if !may_invite(inviter, role) {
        return Err(Problem::conflict("This invitation is void: its sender is no longer allowed to invite you.")
            .hint("Ask a member of the organization to add you again."));
    }
    quotas::check_members(&tx, &call.grant, &limits, 1).await?;
    members::set(&tx, &call.context, row.organization_id, user, Some(role)).await?;
    tx.commit().await?;
    organizations::of_user(&service, user, row.organization_id).await
}

pub async fn reject_invitation(service: Arc<OrganizationService>, call: Call<RejectInvitation>) -> Result<Empty, Problem> {
    let tx = service.store.begin().await?;
    consume_invitation(&tx, call.message.id, call.grant.user()).await?;
    tx.commit().await?;
    Ok(Empty {})
}

/// Deletes an invitation that its user accepts or rejects. Fails if there is none.
async fn consume_invitation(tx: &Transaction<'_>, id: Uuid, user: Uuid) -> Result<(), Problem> {
    let taken = unscoped!("a user's own invitation", "DELETE FROM invitations WHERE id = :id AND user_id = :user", id, user);
    if tx.run(taken).await? == 1 { Ok(()) } else { Err(Problem::not_found("invitation")) }
}

/// Deletes all invitations of a user.
pub async fn delete_for_user(tx: &Transaction<'_>, user: Uuid) -> Result<(), Problem> {
    tx.run(unscoped!("a user's own invitations", "DELETE FROM invitations WHERE user_id = :user", user)).await?;
    Ok(())
}
