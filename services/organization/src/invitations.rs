//! Invitations: memberships that wait for their person's answer. They are no rows of `members`, so they give no right,
//! are in no cache, and nobody is told of them; only what is accepted becomes a membership.

use std::sync::Arc;

use capsule_bus::{Call, SystemGrant, Tenant};
use capsule_contracts::identity::{GetUsers, INVITATION_SECONDS, InviteUser, InvitedUser, RevokeInvitation};
use capsule_contracts::organization::{
    AcceptInvitation, AddMember, AddedMember, Invitation, ListInvitations, Organization, RejectInvitation, RemoveMember,
};
use capsule_contracts::{Empty, Page, Permission, Problem, Role, Timestamp, Uuid, new_id};
use capsule_store::{Scope, Statement, Transaction, scoped, unscoped};
use sea_orm::FromQueryResult;

use crate::members::{self, guard_owners};
use crate::{Organizations, leaving, organizations, quotas};

/// The most that one organization has open at a time: each may be a registration.
const MAX_PENDING: i64 = 100;

#[derive(FromQueryResult)]
pub struct Pending {
    pub user_id: Uuid,
    pub role: String,
    pub created_at: i64,
}

/// The pending members of an organization, as a statement.
pub fn rows(tenant: &Tenant) -> Statement {
    scoped!(
        tenant,
        "SELECT user_id, role, created_at FROM invitations WHERE organization_id = :tenant AND expires_at > $1 ORDER BY created_at, id",
        Timestamp::now().0
    )
}

async fn of(tx: &Transaction<'_>, tenant: &Tenant) -> Result<Vec<Pending>, Problem> {
    tx.read().all(rows(tenant)).await
}

/// Invites a person, or again with another role. For an address without an account there is a registration token.
pub async fn add_member(service: Arc<Organizations>, call: Call<AddMember>) -> Result<AddedMember, Problem> {
    let Call { message, proof, context } = call;
    guard_owners(&proof, message.role)?;
    let pending = scoped!(
        &proof,
        "SELECT COUNT(*) FROM invitations WHERE organization_id = :tenant AND expires_at > $1",
        Timestamp::now().0
    );
    let full = || {
        Problem::conflict(format!("The organization has {MAX_PENDING} pending members already."))
            .hint("Remove those who will not accept, or wait: an invitation ends after seven days.")
    };
    if service.store.read().value::<i64>(pending.clone()).await?.unwrap_or_default() >= MAX_PENDING {
        return Err(full());
    }
    let limits = quotas::of(&service, message.id).await?;
    let invite = InviteUser { email: message.email.trim().to_owned(), organization_id: message.id };
    let invited = service.bus.request(&context.on_behalf("organization"), &invite).await?;
    let (now, tx) = (Timestamp::now(), service.store.begin().await?);
    if members::of(&tx, &proof).await?.iter().any(|row| row.user_id == invited.user_id) {
        return Err(Problem::conflict("This user is a member already.").hint("Change their role instead."));
    }
    let before = of(&tx, &proof).await?.into_iter().find(|row| row.user_id == invited.user_id);
    match before {
        Some(before) => guard_owners(&proof, before.role.parse()?)?,
        None => {
            // Counted as if all had accepted; counted again when one does.
            let pending = tx.read().value::<i64>(pending).await?.unwrap_or_default();
            if pending >= MAX_PENDING {
                return Err(full());
            }
            quotas::check_members(&tx, &proof, &limits, pending + 1).await?;
        }
    }
    let expires_at = now.plus_seconds(INVITATION_SECONDS);
    tx.run(scoped!(
        &proof,
        "INSERT INTO invitations (id, organization_id, user_id, role, invited_by, created_at, expires_at) \
         VALUES ($1, :tenant, $2, $3, $4, $5, $6) ON CONFLICT (organization_id, user_id) DO UPDATE \
         SET role = excluded.role, invited_by = excluded.invited_by, expires_at = excluded.expires_at",
        new_id(),
        invited.user_id,
        message.role.name(),
        proof.user(),
        now.0,
        expires_at.0
    ))
    .await?;
    tx.commit().await?;
    let InvitedUser { user_id, email, registration_token } = invited;
    Ok(AddedMember { user_id, email, role: message.role, pending: true, expires_at, registration_token })
}

/// Whether a member of this role may invite somebody to be `invited`.
fn may_invite(role: Option<Role>, invited: Role) -> bool {
    role.is_some_and(|role| role.allows(Permission::OrgManage) && (invited != Role::Owner || role == Role::Owner))
}

/// Voids what a member has invited and could not in this role: they do not come back through somebody else.
pub async fn void(tx: &Transaction<'_>, organization: Uuid, inviter: Uuid, role: Option<Role>) -> Result<(), Problem> {
    for invited in Role::ALL.into_iter().filter(|invited| !may_invite(role, *invited)) {
        tx.run(unscoped!(
            "the callers hold the proof, or make the tenant",
            "DELETE FROM invitations WHERE organization_id = $1 AND invited_by = $2 AND role = $3",
            organization,
            inviter,
            invited.name()
        ))
        .await?;
    }
    Ok(())
}

/// Changes the role of a pending member, who is invited by whoever does so from then on. `false` where there is none.
pub async fn change_role(tx: &Transaction<'_>, tenant: &Tenant, user: Uuid, role: Role) -> Result<bool, Problem> {
    let Some(present) = of(tx, tenant).await?.into_iter().find(|row| row.user_id == user) else { return Ok(false) };
    guard_owners(tenant, present.role.parse()?)?;
    let change = scoped!(
        tenant,
        "UPDATE invitations SET role = $1, invited_by = $2 WHERE organization_id = :tenant AND user_id = $3",
        role.name(),
        tenant.user(),
        user
    );
    Ok(tx.run(change).await? == 1)
}

/// Removes a pending member, and voids what they could have registered with. `false` where there is none.
pub async fn remove(service: &Organizations, call: &Call<RemoveMember>) -> Result<bool, Problem> {
    let (user, tenant) = (call.message.user_id, &call.proof);
    let present = scoped!(
        tenant,
        "SELECT user_id, role, created_at FROM invitations WHERE organization_id = :tenant AND user_id = $1",
        user
    );
    let Some(present) = service.store.read().first::<Pending>(present).await? else { return Ok(false) };
    guard_owners(tenant, present.role.parse()?)?;
    // First: if the rest fails, somebody is invited who cannot register, not the other way round.
    let revoke = RevokeInvitation { user_id: user, organization_id: tenant.organization() };
    service.bus.request(&call.context.on_behalf("organization"), &revoke).await?;
    let tx = service.store.begin().await?;
    let gone = tx.run(scoped!(tenant, "DELETE FROM invitations WHERE organization_id = :tenant AND user_id = $1", user)).await?;
    if gone == 0 {
        // They have accepted meanwhile.
        return Ok(false);
    }
    tx.commit().await?;
    Ok(true)
}

#[derive(FromQueryResult)]
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

pub async fn list_invitations(service: Arc<Organizations>, call: Call<ListInvitations>) -> Result<Page<Invitation>, Problem> {
    let rows = unscoped!(
        "a user's own invitations, over all organizations",
        "SELECT i.id, i.organization_id, o.name, o.slug, i.role, i.invited_by, i.created_at, i.expires_at \
         FROM invitations i JOIN organizations o ON o.id = i.organization_id \
         WHERE i.user_id = $1 AND i.expires_at > $2 AND o.closed_at IS NULL AND o.deleted_at IS NULL ORDER BY i.id",
        call.proof.user(),
        Timestamp::now().0
    );
    let rows = service.store.read().all::<Row>(rows).await?;
    let inviters = match rows.is_empty() {
        true => Vec::new(),
        false => {
            let ask = GetUsers { ids: rows.iter().map(|row| row.invited_by).collect() };
            service.bus.request(&call.context.on_behalf("organization"), &ask).await?.items
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
    Ok(Page::whole(invitations))
}

#[derive(FromQueryResult)]
struct Accepted {
    organization_id: Uuid,
    role: String,
    invited_by: Uuid,
}

pub async fn accept_invitation(service: Arc<Organizations>, call: Call<AcceptInvitation>) -> Result<Organization, Problem> {
    let (id, user) = (call.message.id, call.proof.user());
    let organization =
        unscoped!("a user's own invitation", "SELECT organization_id FROM invitations WHERE id = $1 AND user_id = $2", id, user);
    let organization = service.store.read().value::<Uuid>(organization).await?;
    let limits = quotas::of(&service, organization.ok_or_else(|| Problem::not_found("invitation"))?).await?;
    let tx = service.store.begin().await?;
    let row = unscoped!(
        "a user's own invitation",
        "SELECT i.organization_id, i.role, i.invited_by FROM invitations i JOIN organizations o ON o.id = i.organization_id \
         WHERE i.id = $1 AND i.user_id = $2 AND i.expires_at > $3 AND o.closed_at IS NULL AND o.deleted_at IS NULL",
        id,
        user,
        Timestamp::now().0
    );
    let row = tx.read().first::<Accepted>(row).await?.ok_or_else(|| Problem::not_found("invitation"))?;
    let role: Role = row.role.parse()?;
    leaving::check_present(&tx, user).await?;
    take(&tx, id, user).await?;
    let grant = SystemGrant::new(row.organization_id, "an invitation is accepted");
    let present = members::of(&tx, &grant).await?;
    if present.iter().any(|member| member.user_id == user) {
        return Err(Problem::conflict("You are a member already."));
    }
    // They may have lost that right since, or while they invited.
    let inviter = present.iter().find(|member| member.user_id == row.invited_by);
    let inviter = inviter.map(|member| member.role.parse::<Role>()).transpose()?;
    if !may_invite(inviter, role) {
        return Err(Problem::conflict("This invitation is void: whoever made it may not invite you any more.")
            .hint("Ask a member of the organization to add you again."));
    }
    quotas::check_members(&tx, &grant, &limits, 1).await?;
    members::set(&tx, &call.context, row.organization_id, user, Some(role)).await?;
    tx.commit().await?;
    organizations::of_user(&service, user, row.organization_id).await
}

pub async fn reject_invitation(service: Arc<Organizations>, call: Call<RejectInvitation>) -> Result<Empty, Problem> {
    let tx = service.store.begin().await?;
    take(&tx, call.message.id, call.proof.user()).await?;
    tx.commit().await?;
    Ok(Empty {})
}

/// Takes an invitation away from its user; it is answered once.
async fn take(tx: &Transaction<'_>, id: Uuid, user: Uuid) -> Result<(), Problem> {
    let taken = unscoped!("a user's own invitation", "DELETE FROM invitations WHERE id = $1 AND user_id = $2", id, user);
    if tx.run(taken).await? == 1 { Ok(()) } else { Err(Problem::not_found("invitation")) }
}

/// Forgets that a user was ever invited.
pub async fn forget_user(tx: &Transaction<'_>, user: Uuid) -> Result<(), Problem> {
    tx.run(unscoped!("a user's own invitations", "DELETE FROM invitations WHERE user_id = $1", user)).await?;
    Ok(())
}
