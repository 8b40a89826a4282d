//! Organizations: create, list, get, rename, delete.

use std::sync::Arc;

use capsule_bus::{Call, Context, Tenant, emit};
use capsule_contracts::identity::{GetUsers, Reauthenticate};
use capsule_contracts::list::{PageQuery, SortKey};
use capsule_contracts::message::to_label;
use capsule_contracts::organization::{
    CreateOrganization, DeleteOrganization, GetOrganization, ListOrganizations, Organization, OrganizationCreated,
    UpdateOrganization,
};
use capsule_contracts::{Empty, Page, Problem, Role, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Statement, Transaction, page, scoped, unscoped};

use crate::{OrganizationService, deletion, leaving, members, personal, quotas};

#[derive(FromRow)]
struct Row {
    id: Uuid,
    name: String,
    slug: String,
    personal: bool,
    created_at: i64,
    role: String,
}

impl TryFrom<Row> for Organization {
    type Error = Problem;

    fn try_from(row: Row) -> Result<Self, Problem> {
        Ok(Self {
            id: row.id,
            name: row.name,
            slug: row.slug,
            personal: row.personal,
            created_at: Timestamp(row.created_at),
            role: row.role.parse()?,
        })
    }
}

pub async fn list_organizations(
    service: Arc<OrganizationService>,
    call: Call<ListOrganizations>,
) -> Result<Page<Organization>, Problem> {
    let user = call.grant.user();
    if !list(&service, user).await?.is_empty() {
        return list_page(&service, user, call.message).await;
    }
    // The registration event may not have arrived yet.
    let ask = GetUsers { ids: vec![user] };
    let users = service.bus.request(&call.context.as_service("organization"), &ask).await?;
    let tx = service.store.begin().await?;
    for user in &users.items {
        personal::create_if_missing(&tx, user).await?;
    }
    tx.commit().await?;
    list_page(&service, user, call.message).await
}

async fn list_page(service: &OrganizationService, user: Uuid, message: ListOrganizations) -> Result<Page<Organization>, Problem> {
    let query = PageQuery::of(&message)?;
    let rows = page!(
        query,
        unscoped "a user's own memberships, over all organizations",
        "SELECT o.id, o.name, o.slug, o.personal_of IS NOT NULL AS personal, o.created_at, m.role \
         FROM organizations o JOIN members m ON m.organization_id = o.id \
         WHERE m.user_id = :user AND m.role IS NOT NULL AND o.closed_at IS NULL AND o.deleted_at IS NULL \
         AND substr(o.name, 1, length(:name_prefix)) = :name_prefix",
        "o.id" uuid,
        ["created_at" => "o.created_at" integer, "name" => "o.name" text, "slug" => "o.slug" text],
        user = user,
        name_prefix = message.name_prefix.unwrap_or_default()
    );
    let rows = service.store.read().all::<Row>(rows?).await?;
    let page = query.page(rows, |row| (sort_key(&query, &row.name, &row.slug, row.created_at), row.id));
    page.try_map(TryInto::try_into)
}

/// An organization's value of the sort field of a list.
pub fn sort_key(query: &PageQuery, name: &str, slug: &str, created_at: i64) -> SortKey {
    match query.sort() {
        "name" => name.into(),
        "slug" => slug.into(),
        _ => created_at.into(),
    }
}

async fn list(service: &OrganizationService, user: Uuid) -> Result<Vec<Organization>, Problem> {
    let rows = unscoped!(
        "a user's own memberships, over all organizations",
        "SELECT o.id, o.name, o.slug, o.personal_of IS NOT NULL AS personal, o.created_at, m.role \
         FROM organizations o JOIN members m ON m.organization_id = o.id \
         WHERE m.user_id = :user AND m.role IS NOT NULL AND o.closed_at IS NULL AND o.deleted_at IS NULL \
         ORDER BY o.created_at, o.id",
        user
    );
    service.store.read().all::<Row>(rows).await?.into_iter().map(TryInto::try_into).collect()
}

/// One of a user's own organizations.
pub async fn of_user(service: &OrganizationService, user: Uuid, id: Uuid) -> Result<Organization, Problem> {
    let mine = list(service, user).await?;
    mine.into_iter().find(|organization| organization.id == id).ok_or_else(|| Problem::not_found("organization"))
}

/// An organization to create.
pub struct NewOrganization {
    pub name: String,
    pub slug: String,
    pub owner: Uuid,
    pub personal: bool,
}

/// Creates an organization with its owner, and emits the events of both.
pub async fn insert(tx: &Transaction<'_>, context: &Context, new: NewOrganization) -> Result<Organization, Problem> {
    let (id, now) = (new_id(), Timestamp::now());
    tx.run(unscoped!(
        "makes the tenant",
        "INSERT INTO organizations (id, name, slug, personal_of, created_at, created_by) \
         VALUES (:id, :name, :slug, :personal_of, :created_at, :created_by)",
        id,
        name = new.name.as_str(),
        slug = new.slug.as_str(),
        personal_of = new.personal.then_some(new.owner),
        created_at = now.0,
        created_by = new.owner
    ))
    .await?;
    members::set(tx, context, id, new.owner, Some(Role::Owner)).await?;
    let event = OrganizationCreated { organization_id: id, name: new.name.clone(), slug: new.slug.clone(), owner_id: new.owner };
    emit(tx, context, &event).await?;
    Ok(Organization { id, name: new.name, slug: new.slug, personal: new.personal, created_at: now, role: Role::Owner })
}

/// Returns `wanted`, or `wanted-2` and so on if it is taken.
pub async fn free_slug(tx: &Transaction<'_>, wanted: &str) -> Result<String, Problem> {
    for n in 1.. {
        let slug = if n == 1 { wanted.to_owned() } else { format!("{wanted}-{n}") };
        let taken = unscoped!(
            "slugs are unique over all",
            "SELECT 1 FROM organizations WHERE slug = :slug AND deleted_at IS NULL",
            slug = slug.as_str()
        );
        if !tx.read().exists(taken).await? {
            return Ok(slug);
        }
    }
    Err(Problem::internal())
}

pub async fn create_organization(
    service: Arc<OrganizationService>,
    call: Call<CreateOrganization>,
) -> Result<Organization, Problem> {
    let tx = service.store.begin().await?;
    leaving::check_not_left(&tx, call.grant.user()).await?;
    quotas::check_organizations(&service, &tx, call.grant.user()).await?;
    let slug = match call.message.slug {
        Some(slug) => slug,
        None => free_slug(&tx, &to_label(&call.message.name, "organization")).await?,
    };
    let new = NewOrganization { name: call.message.name.trim().to_owned(), slug, owner: call.grant.user(), personal: false };
    let organization = insert(&tx, &call.context, new).await?;
    tx.commit().await?;
    Ok(organization)
}

fn select(tenant: &Tenant) -> Statement {
    scoped!(
        tenant,
        "SELECT o.id, o.name, o.slug, o.personal_of IS NOT NULL AS personal, o.created_at, m.role \
         FROM organizations o JOIN members m ON m.organization_id = o.id \
         WHERE o.id = :tenant AND m.user_id = :user AND o.closed_at IS NULL AND o.deleted_at IS NULL",
        user = tenant.user()
    )
}

fn found(row: Option<Row>) -> Result<Organization, Problem> {
    row.ok_or_else(|| Problem::not_found("organization"))?.try_into()
}

async fn get(service: &OrganizationService, tenant: &Tenant) -> Result<Organization, Problem> {
    found(service.store.read().first(select(tenant)).await?)
}

pub async fn get_organization(service: Arc<OrganizationService>, call: Call<GetOrganization>) -> Result<Organization, Problem> {
    get(&service, &call.grant).await
}

pub async fn update_organization(
    service: Arc<OrganizationService>,
    call: Call<UpdateOrganization>,
) -> Result<Organization, Problem> {
    let tx = service.store.begin().await?;
    let mut organization = found(tx.read().first(select(&call.grant)).await?)?;
    call.context.check_if_match(&organization)?;
    if let Some(name) = &call.message.name {
        name.trim().clone_into(&mut organization.name);
        tx.run(scoped!(
            &call.grant,
            "UPDATE organizations SET name = :name WHERE id = :tenant",
            name = organization.name.as_str()
        ))
        .await?;
        tx.commit().await?;
    }
    Ok(organization)
}

pub async fn delete_organization(service: Arc<OrganizationService>, call: Call<DeleteOrganization>) -> Result<Empty, Problem> {
    if call.grant.role() != Role::Owner {
        return Err(Problem::forbidden("Only an owner may delete an organization."));
    }
    let organization = get(&service, &call.grant).await?;
    if organization.personal {
        return Err(Problem::conflict("A personal organization cannot be deleted; it is deleted with its user's account."));
    }
    let confirm = Reauthenticate { user_id: call.grant.user(), password: call.message.password };
    service.bus.request(&call.context.as_service("organization"), &confirm).await?;
    let tx = service.store.begin().await?;
    deletion::begin(&tx, &call.context, &call.grant).await?;
    tx.commit().await?;
    Ok(Empty {})
}
