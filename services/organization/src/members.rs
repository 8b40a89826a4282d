//! Members and their roles. Only an owner can grant or revoke the owner role, and the last owner cannot be removed.

use std::sync::Arc;

use capsule_bus::{Call, Context, Tenant, emit};
use capsule_contracts::identity::GetUsers;
use capsule_contracts::list::PageQuery;
use capsule_contracts::organization::{
    ChangeRole, GetMembership, GetMemberships, LeaveOrganization, ListMembers, ListPermissions, Member, Membership,
    MembershipChanged, RemoveMember, RolePermissions,
};
use capsule_contracts::{Empty, Page, Permission, Problem, Role, Timestamp, Uuid};
use capsule_store::{FromRow, Scope, Transaction, page, scoped, unscoped};

use crate::{OrganizationService, invitations};

/// Sets or removes a user's role in an organization and emits [`MembershipChanged`]. Revokes the user's invitations that
/// the new role does not allow.
pub async fn set(
    tx: &Transaction<'_>,
    context: &Context,
    organization: Uuid,
    user: Uuid,
    role: Option<Role>,
) -> Result<(), Problem> {
    tx.run(unscoped!(
        "the callers hold the proof, or make the tenant",
        "INSERT INTO members (organization_id, user_id, role, sequence, joined_at) \
         VALUES (:organization, :user, :role, 1, :joined_at) \
         ON CONFLICT (organization_id, user_id) DO UPDATE SET role = excluded.role, sequence = members.sequence + 1",
        organization,
        user,
        role = role.map(|role| role.name().to_owned()),
        joined_at = Timestamp::now().0
    ))
    .await?;
    invitations::revoke_unauthorized(tx, organization, user, role).await?;
    let sequence = unscoped!(
        "as above",
        "SELECT sequence FROM members WHERE organization_id = :organization AND user_id = :user",
        organization,
        user
    );
    let sequence = tx.read().value::<i64>(sequence).await?.ok_or_else(Problem::internal)?;
    let membership = Membership { organization_id: organization, user_id: user, role, sequence };
    emit(tx, context, &MembershipChanged { membership }).await
}

#[derive(FromRow)]
pub struct MemberRow {
    pub user_id: Uuid,
    pub role: String,
}

/// The members of an organization, in the order in which they joined.
pub async fn of(tx: &Transaction<'_>, scope: &impl Scope) -> Result<Vec<MemberRow>, Problem> {
    let rows = scoped!(
        scope,
        "SELECT user_id, role FROM members WHERE organization_id = :tenant AND role IS NOT NULL ORDER BY joined_at, user_id"
    );
    tx.read().all(rows).await
}

/// A member or a pending member.
#[derive(FromRow)]
struct ListedMember {
    user_id: Uuid,
    role: String,
    pending: bool,
    joined_at: i64,
}

pub async fn list_members(service: Arc<OrganizationService>, call: Call<ListMembers>) -> Result<Page<Member>, Problem> {
    let query = PageQuery::of(&call.message)?;
    let rows = page!(
        query,
        scoped &call.grant,
        "SELECT user_id, role, pending, joined_at FROM ( \
             SELECT user_id, role, FALSE AS pending, joined_at FROM members WHERE organization_id = :tenant AND role IS NOT NULL \
             UNION ALL \
             SELECT user_id, role, TRUE AS pending, created_at AS joined_at FROM invitations \
             WHERE organization_id = :tenant AND expires_at > :now \
         ) AS m WHERE (:role = '' OR role = :role) AND (:any OR pending = :pending)",
        "user_id" uuid,
        ["joined_at" => "joined_at" integer],
        now = Timestamp::now().0,
        role = call.message.role.map_or("", Role::name),
        any = call.message.pending.is_none(),
        pending = call.message.pending.unwrap_or_default()
    );
    let rows = service.store.read().all::<ListedMember>(rows?).await?;
    let page = query.page(rows, |row| (row.joined_at.into(), row.user_id));
    let ask = GetUsers { ids: page.items.iter().map(|row| row.user_id).collect() };
    let users = service.bus.request(&call.context.as_service("organization"), &ask).await?;
    let mut members = Vec::with_capacity(page.items.len());
    for row in page.items {
        if let Some(user) = users.items.iter().find(|user| user.id == row.user_id) {
            members.push(Member {
                user_id: row.user_id,
                email: user.email.clone(),
                // A pending member has not agreed to show their name.
                name: if row.pending { String::new() } else { user.name.clone() },
                role: row.role.parse()?,
                pending: row.pending,
                joined_at: Timestamp(row.joined_at),
            });
        }
    }
    Ok(Page { items: members, next_cursor: page.next_cursor })
}

pub async fn change_role(service: Arc<OrganizationService>, call: Call<ChangeRole>) -> Result<Empty, Problem> {
    check_owner_change(&call.grant, call.message.role)?;
    let tx = service.store.begin().await?;
    if invitations::change_role(&tx, &call.grant, call.message.user_id, call.message.role).await? {
        tx.commit().await?;
        return Ok(Empty {});
    }
    drop(tx);
    replace(&service, &call.context, &call.grant, (call.message.id, call.message.user_id), Some(call.message.role)).await
}

pub async fn remove_member(service: Arc<OrganizationService>, call: Call<RemoveMember>) -> Result<Empty, Problem> {
    if invitations::remove(&service, &call).await? {
        return Ok(Empty {});
    }
    replace(&service, &call.context, &call.grant, (call.message.id, call.message.user_id), None).await
}

pub async fn leave_organization(service: Arc<OrganizationService>, call: Call<LeaveOrganization>) -> Result<Empty, Problem> {
    replace(&service, &call.context, &call.grant, (call.message.id, call.grant.user()), None).await
}

async fn replace(
    service: &OrganizationService,
    context: &Context,
    tenant: &Tenant,
    (organization, user): (Uuid, Uuid),
    role: Option<Role>,
) -> Result<Empty, Problem> {
    let tx = service.store.begin().await?;
    let members = of(&tx, tenant).await?;
    let present = members.iter().find(|row| row.user_id == user).ok_or_else(|| Problem::not_found("member"))?;
    check_owner_change(tenant, present.role.parse()?)?;
    let owners = members.iter().filter(|row| row.role == Role::Owner.name()).count();
    if present.role == Role::Owner.name() && role != Some(Role::Owner) && owners == 1 {
        return Err(Problem::conflict("The last owner of an organization cannot lose the role.")
            .hint("Make another member an owner first."));
    }
    set(&tx, context, organization, user, role).await?;
    tx.commit().await?;
    Ok(Empty {})
}

/// Fails if the role is owner and the caller is not.
pub fn check_owner_change(tenant: &Tenant, role: Role) -> Result<(), Problem> {
    if role == Role::Owner && tenant.role() != Role::Owner {
        return Err(Problem::forbidden("Only an owner can grant or revoke the owner role."));
    }
    Ok(())
}

#[derive(FromRow)]
struct MembershipRow {
    role: Option<String>,
    sequence: i64,
}

/// A user's membership in an organization. Its sequence is 0 if there never was one. It has no role while the
/// organization is being deleted.
pub async fn membership(service: &OrganizationService, organization_id: Uuid, user_id: Uuid) -> Result<Membership, Problem> {
    let row = unscoped!(
        "decides who may act for a tenant",
        "SELECT CASE WHEN o.closed_at IS NULL THEN m.role END AS role, m.sequence \
         FROM members m JOIN organizations o ON o.id = m.organization_id WHERE m.organization_id = :organization_id \
         AND m.user_id = :user_id",
        organization_id,
        user_id
    );
    let row = service.store.read().first::<MembershipRow>(row).await?;
    let (role, sequence) = row.map_or((None, 0), |row| (row.role, row.sequence));
    Ok(Membership { organization_id, user_id, role: role.map(|role| role.parse()).transpose()?, sequence })
}

pub async fn get_membership(service: Arc<OrganizationService>, call: Call<GetMembership>) -> Result<Membership, Problem> {
    membership(&service, call.message.organization_id, call.message.user_id).await
}

pub async fn get_memberships(service: Arc<OrganizationService>, call: Call<GetMemberships>) -> Result<Page<Membership>, Problem> {
    let mut known = Vec::with_capacity(call.message.wanted.len());
    for wanted in call.message.wanted {
        known.push(membership(&service, wanted.organization_id, wanted.user_id).await?);
    }
    Ok(Page::whole(known))
}

/// Emits [`MembershipChanged`] for every member after the organization was closed or reopened.
pub async fn publish_all(tx: &Transaction<'_>, context: &Context, scope: &impl Scope, closed: bool) -> Result<(), Problem> {
    tx.run(scoped!(scope, "UPDATE members SET sequence = sequence + 1 WHERE organization_id = :tenant AND role IS NOT NULL"))
        .await?;
    let rows = scoped!(scope, "SELECT user_id, role, sequence FROM members WHERE organization_id = :tenant AND role IS NOT NULL");
    for row in tx.read().all::<PublishedRow>(rows).await? {
        let role = if closed { None } else { Some(row.role.parse()?) };
        let membership = Membership { organization_id: scope.organization(), user_id: row.user_id, role, sequence: row.sequence };
        emit(tx, context, &MembershipChanged { membership }).await?;
    }
    Ok(())
}

#[derive(FromRow)]
struct PublishedRow {
    user_id: Uuid,
    role: String,
    sequence: i64,
}

pub async fn list_permissions(_: Arc<OrganizationService>, _: Call<ListPermissions>) -> Result<Page<RolePermissions>, Problem> {
    let roles = Role::ALL.into_iter().map(|role| RolePermissions {
        role,
        permissions: Permission::ALL.into_iter().filter(|permission| role.allows(*permission)).collect(),
    });
    Ok(Page::whole(roles.collect()))
}
