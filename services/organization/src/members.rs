//! Members and their roles. Only an owner makes or unmakes owners, and one owner always stays.

use std::sync::Arc;

use capsule_bus::{Call, Context, Tenant, emit};
use capsule_contracts::identity::{FindUser, GetUsers};
use capsule_contracts::organization::{
    AddMember, ChangeRole, GetMembership, ListMembers, ListPermissions, Member, Membership, MembershipChanged, RemoveMember,
    RolePermissions,
};
use capsule_contracts::{Empty, Page, Permission, Problem, Role, Timestamp, Uuid};
use capsule_store::{Scope, Transaction, scoped, unscoped};
use sea_orm::FromQueryResult;

use crate::{Organizations, quotas};

/// Gives a user a role in an organization, or takes it, and tells of it.
pub async fn set(
    tx: &Transaction<'_>,
    context: &Context,
    organization: Uuid,
    user: Uuid,
    role: Option<Role>,
) -> Result<(), Problem> {
    tx.run(unscoped!(
        "the callers hold the proof, or make the tenant",
        "INSERT INTO members (organization_id, user_id, role, sequence, joined_at) VALUES ($1, $2, $3, 1, $4) \
         ON CONFLICT (organization_id, user_id) DO UPDATE SET role = excluded.role, sequence = members.sequence + 1",
        organization,
        user,
        role.map(|role| role.name().to_owned()),
        Timestamp::now().0
    ))
    .await?;
    let sequence =
        unscoped!("as above", "SELECT sequence FROM members WHERE organization_id = $1 AND user_id = $2", organization, user);
    let sequence = tx.read().value::<i64>(sequence).await?.ok_or_else(Problem::internal)?;
    let membership = Membership { organization_id: organization, user_id: user, role, sequence };
    emit(tx, context, &MembershipChanged { membership }).await
}

#[derive(FromQueryResult)]
pub struct MemberRow {
    pub user_id: Uuid,
    pub role: String,
    pub joined_at: i64,
}

/// The members of the organization that the proof is for.
pub async fn of(tx: &Transaction<'_>, tenant: &Tenant) -> Result<Vec<MemberRow>, Problem> {
    all_of(tx, tenant).await
}

/// As [`of`], for whatever gives leave; who joined first comes first.
pub async fn all_of(tx: &Transaction<'_>, tenant: &impl Scope) -> Result<Vec<MemberRow>, Problem> {
    tx.read()
        .all(scoped!(
            tenant,
            "SELECT user_id, role, joined_at FROM members WHERE organization_id = :tenant AND role IS NOT NULL ORDER BY joined_at, user_id"
        ))
        .await
}

pub async fn list_members(service: Arc<Organizations>, call: Call<ListMembers>) -> Result<Page<Member>, Problem> {
    let rows = scoped!(
        &call.proof,
        "SELECT user_id, role, joined_at FROM members WHERE organization_id = :tenant AND role IS NOT NULL ORDER BY joined_at, user_id"
    );
    let rows = service.store.read().all::<MemberRow>(rows).await?;
    let ask = GetUsers { ids: rows.iter().map(|row| row.user_id).collect() };
    let users = service.bus.request(&call.context.on_behalf("organization"), &ask).await?;
    let mut members = Vec::with_capacity(rows.len());
    for row in rows {
        if let Some(user) = users.items.iter().find(|user| user.id == row.user_id) {
            members.push(Member {
                user_id: row.user_id,
                email: user.email.clone(),
                name: user.name.clone(),
                role: row.role.parse()?,
                joined_at: Timestamp(row.joined_at),
            });
        }
    }
    Ok(Page::whole(members))
}

pub async fn add_member(service: Arc<Organizations>, call: Call<AddMember>) -> Result<Member, Problem> {
    guard_owners(&call.proof, call.message.role)?;
    let ask = FindUser { email: call.message.email.clone() };
    let user = service.bus.request(&call.context.on_behalf("organization"), &ask).await.map_err(|problem| {
        if problem.code == "not_found" {
            Problem::invalid_field("email", "nobody is registered here with this address").hint("Ask them to register first.")
        } else {
            problem
        }
    })?;
    let organization = call.message.id;
    if membership(&service, organization, user.id).await?.role.is_some() {
        return Err(Problem::conflict("This user is a member already.").hint("Change their role instead."));
    }
    let limits = quotas::of(&service, organization).await?;
    let tx = service.store.begin().await?;
    quotas::check_members(&tx, &call.proof, &limits, 1).await?;
    set(&tx, &call.context, organization, user.id, Some(call.message.role)).await?;
    tx.commit().await?;
    Ok(Member { user_id: user.id, email: user.email, name: user.name, role: call.message.role, joined_at: Timestamp::now() })
}

pub async fn change_role(service: Arc<Organizations>, call: Call<ChangeRole>) -> Result<Empty, Problem> {
    guard_owners(&call.proof, call.message.role)?;
    replace(&service, &call.context, &call.proof, (call.message.id, call.message.user_id), Some(call.message.role)).await
}

pub async fn remove_member(service: Arc<Organizations>, call: Call<RemoveMember>) -> Result<Empty, Problem> {
    replace(&service, &call.context, &call.proof, (call.message.id, call.message.user_id), None).await
}

async fn replace(
    service: &Organizations,
    context: &Context,
    tenant: &Tenant,
    (organization, user): (Uuid, Uuid),
    role: Option<Role>,
) -> Result<Empty, Problem> {
    let tx = service.store.begin().await?;
    let members = of(&tx, tenant).await?;
    let present = members.iter().find(|row| row.user_id == user).ok_or_else(|| Problem::not_found("member"))?;
    guard_owners(tenant, present.role.parse()?)?;
    let owners = members.iter().filter(|row| row.role == Role::Owner.name()).count();
    if present.role == Role::Owner.name() && role != Some(Role::Owner) && owners == 1 {
        return Err(
            Problem::conflict("The last owner of an organization stays its owner.").hint("Make somebody else an owner first.")
        );
    }
    set(&tx, context, organization, user, role).await?;
    tx.commit().await?;
    Ok(Empty {})
}

fn guard_owners(tenant: &Tenant, role: Role) -> Result<(), Problem> {
    if role == Role::Owner && tenant.role() != Role::Owner {
        return Err(Problem::forbidden("Only an owner makes or unmakes owners."));
    }
    Ok(())
}

#[derive(FromQueryResult)]
struct MembershipRow {
    role: Option<String>,
    sequence: i64,
}

/// A user's place in an organization. Sequence 0 where there never was one.
pub async fn membership(service: &Organizations, organization_id: Uuid, user_id: Uuid) -> Result<Membership, Problem> {
    let row = unscoped!(
        "decides who may act for a tenant",
        "SELECT role, sequence FROM members WHERE organization_id = $1 AND user_id = $2",
        organization_id,
        user_id
    );
    let row = service.store.read().first::<MembershipRow>(row).await?;
    let (role, sequence) = row.map_or((None, 0), |row| (row.role, row.sequence));
    Ok(Membership { organization_id, user_id, role: role.map(|role| role.parse()).transpose()?, sequence })
}

pub async fn get_membership(service: Arc<Organizations>, call: Call<GetMembership>) -> Result<Membership, Problem> {
    membership(&service, call.message.organization_id, call.message.user_id).await
}

pub async fn list_permissions(_: Arc<Organizations>, _: Call<ListPermissions>) -> Result<Page<RolePermissions>, Problem> {
    let roles = Role::ALL.into_iter().map(|role| RolePermissions {
        role,
        permissions: Permission::ALL.into_iter().filter(|permission| role.allows(*permission)).collect(),
    });
    Ok(Page::whole(roles.collect()))
}
