//! Quotas of organizations. The installation has default limits; its administrators can set others for an
//! organization. The services that enforce quotas receive [`QuotasChanged`] or request them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use capsule_bus::{Call, Context, emit};
use capsule_contracts::list::PageQuery;
use capsule_contracts::quotas::{
    ConfirmQuotas, ConfirmedQuotas, CountDeployUse, CountProjectUse, GetQuotas, InspectOrganizations, InspectQuotas,
    InspectedOrganization, OrganizationQuotas, Quantity, Quota, QuotaUse, Quotas, QuotasChanged, SetQuotas,
};
use capsule_contracts::{Page, Problem, Timestamp, Uuid};
use capsule_store::{FromRow, Scope, Statement, Transaction, page, scoped, unscoped};

use crate::{OrganizationService, organizations};

/// Timeout of requests for usage. Without a reply, quotas are shown without usage.
const COUNT_TIMEOUT: Duration = Duration::from_secs(3);

/// The limits of this installation.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Default quotas of organizations.
    pub quotas: Quotas,
    /// Maximum number of organizations that one user may create, without the personal one.
    pub organizations_per_user: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { quotas: Quotas::defaults(), organizations_per_user: 20 }
    }
}

#[derive(FromRow)]
struct Row {
    quotas: String,
    sequence: i64,
}

/// The quotas set for an organization, and their sequence. `None` if there is no such organization.
fn select_own(organization: Uuid) -> Statement {
    unscoped!(
        "limits are not a tenant's data",
        "SELECT COALESCE(q.quotas, '{}') AS quotas, COALESCE(q.sequence, 0) AS sequence FROM organizations o \
         LEFT JOIN organization_quotas q ON q.organization_id = o.id WHERE o.id = :organization",
        organization
    )
}

async fn own(service: &OrganizationService, organization: Uuid) -> Result<Option<(Quotas, i64)>, Problem> {
    parse_own(service.store.read().first(select_own(organization)).await?)
}

fn parse_own(row: Option<Row>) -> Result<Option<(Quotas, i64)>, Problem> {
    row.map(|row| Ok((serde_json::from_str(&row.quotas).map_err(|_| Problem::internal())?, row.sequence))).transpose()
}

async fn confirmed(service: &OrganizationService, organization: Uuid) -> Result<ConfirmedQuotas, Problem> {
    let (own, sequence) = own(service, organization).await?.ok_or_else(|| Problem::not_found("organization"))?;
    Ok(ConfirmedQuotas { organization_id: organization, quotas: service.limits.quotas.overridden_by(&own), sequence })
}

/// The limits of an organization.
pub async fn of(service: &OrganizationService, organization: Uuid) -> Result<Quotas, Problem> {
    Ok(confirmed(service, organization).await?.quotas)
}

pub async fn confirm_quotas(service: Arc<OrganizationService>, call: Call<ConfirmQuotas>) -> Result<ConfirmedQuotas, Problem> {
    confirmed(&service, call.message.organization_id).await
}

pub async fn get_quotas(service: Arc<OrganizationService>, call: Call<GetQuotas>) -> Result<OrganizationQuotas, Problem> {
    read_view(&service, &call.context, call.grant.organization()).await
}

pub async fn inspect_quotas(service: Arc<OrganizationService>, call: Call<InspectQuotas>) -> Result<OrganizationQuotas, Problem> {
    read_view(&service, &call.context, call.message.id).await
}

pub async fn set_quotas(service: Arc<OrganizationService>, call: Call<SetQuotas>) -> Result<OrganizationQuotas, Problem> {
    let Call { message, grant, context } = call;
    let used = used(&service, &context, message.id).await?;
    let tx = service.store.begin().await?;
    let current = parse_own(tx.read().first(select_own(message.id)).await?)?;
    let (current, _) = current.ok_or_else(|| Problem::not_found("organization"))?;
    context.check_if_match(&view(&service, message.id, &current, &used))?;
    let own = Quotas(message.quotas);
    tx.run(unscoped!(
        "an administrator of the installation sets limits for any organization",
        "INSERT INTO organization_quotas (organization_id, quotas, sequence) VALUES (:organization_id, :quotas, 1) \
         ON CONFLICT (organization_id) DO UPDATE SET quotas = excluded.quotas, sequence = organization_quotas.sequence + 1",
        organization_id = message.id,
        quotas = serde_json::to_string(&own).map_err(|_| Problem::internal())?
    ))
    .await?;
    let sequence = unscoped!(
        "as above",
        "SELECT sequence FROM organization_quotas WHERE organization_id = :organization_id",
        organization_id = message.id
    );
    let sequence = tx.read().value::<i64>(sequence).await?.ok_or_else(Problem::internal)?;
    let confirmed = ConfirmedQuotas { organization_id: message.id, quotas: service.limits.quotas.overridden_by(&own), sequence };
    emit(&tx, &context, &QuotasChanged { confirmed }).await?;
    tx.commit().await?;
    tracing::info!(organization = %message.id, administrator = %grant.user(), quotas = ?own.0, "quotas were set");
    Ok(view(&service, message.id, &own, &used))
}

/// The quotas of an organization, with their usage as far as it is known.
async fn read_view(service: &OrganizationService, context: &Context, organization: Uuid) -> Result<OrganizationQuotas, Problem> {
    let (own, _) = own(service, organization).await?.ok_or_else(|| Problem::not_found("organization"))?;
    Ok(view(service, organization, &own, &used(service, context, organization).await?))
}

fn view(service: &OrganizationService, organization: Uuid, own: &Quotas, used: &BTreeMap<String, i64>) -> OrganizationQuotas {
    let quotas = service.limits.quotas.overridden_by(own);
    let items = Quantity::ALL.into_iter().map(|quantity| Quota {
        name: quantity.name().into(),
        description: quantity.description().into(),
        limit: quotas.limit(quantity),
        used: used.get(quantity.name()).copied(),
        own: own.0.contains_key(quantity.name()),
    });
    OrganizationQuotas { organization_id: organization, items: items.collect() }
}

async fn used(service: &OrganizationService, context: &Context, organization_id: Uuid) -> Result<BTreeMap<String, i64>, Problem> {
    let context = context.as_service("organization");
    let (projects, deploys) = (CountProjectUse { organization_id }, CountDeployUse { organization_id });
    let (projects, deploys) = tokio::join!(
        tokio::time::timeout(COUNT_TIMEOUT, service.bus.request(&context, &projects)),
        tokio::time::timeout(COUNT_TIMEOUT, service.bus.request(&context, &deploys)),
    );
    let mut used = BTreeMap::new();
    for answer in [projects, deploys] {
        match answer {
            Ok(Ok(QuotaUse { used: counted })) => used.extend(counted),
            Ok(Err(problem)) => tracing::warn!(%problem, "cannot count the usage of an organization"),
            Err(_) => tracing::warn!("timeout while counting the usage of an organization"),
        }
    }
    let members = unscoped!(
        "limits are not a tenant's data",
        "SELECT COUNT(*) FROM members WHERE organization_id = :organization_id AND role IS NOT NULL",
        organization_id
    );
    let members = service.store.read().value::<i64>(members).await?.unwrap_or_default();
    used.insert(Quantity::Members.name().into(), members);
    Ok(used)
}

/// Checks the quota of members in the transaction that adds `more`. Rows without a role do not count.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn check_members(tx: &Transaction<'_>, scope: &impl Scope, quotas: &Quotas, more: i64) -> Result<(), Problem> {
    let members = scoped!(scope, "SELECT COUNT(*) FROM members WHERE organization_id = :tenant AND role IS NOT NULL");
    let members = tx.read().value::<i64>(members).await?.unwrap_or_default();
    quotas.check(Quantity::Members, members, members + more)
}

/// Checks the limit of organizations per user, in the transaction that creates another. Counts those that are not
/// completely deleted, and all created in the last 24 hours: as each organization has its own quotas, creating and
/// deleting organizations would otherwise circumvent them.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn check_organizations(service: &OrganizationService, tx: &Transaction<'_>, user: Uuid) -> Result<(), Problem> {
    let made = unscoped!(
        "what one user has made, over all organizations",
        "SELECT COUNT(*) FROM organizations WHERE created_by = :user AND personal_of IS NULL AND (deleted_at IS NULL \
         OR created_at > :since)",
        user,
        since = Timestamp::now().plus_seconds(-24 * 3600).0
    );
    let made = tx.read().value::<i64>(made).await?.unwrap_or_default();
    let max = service.limits.organizations_per_user;
    if made < i64::from(max) {
        return Ok(());
    }
    Err(Problem::quota_exceeded(format!("You have created {made} organizations; the limit is {max} per user.")).hint(
        "Delete an organization that you do not need (those created within the last 24 hours still count), or ask \
         an administrator of the installation to raise limits.organizations_per_user.",
    ))
}

#[derive(FromRow)]
struct Inspected {
    id: Uuid,
    name: String,
    slug: String,
    personal: bool,
    created_at: i64,
    members: i64,
}

pub async fn inspect_organizations(
    service: Arc<OrganizationService>,
    call: Call<InspectOrganizations>,
) -> Result<Page<InspectedOrganization>, Problem> {
    let query = PageQuery::of(&call.message)?;
    let rows = page!(
        query,
        unscoped "an administrator of the installation sees every organization, not what is in it",
        "SELECT o.id, o.name, o.slug, o.personal_of IS NOT NULL AS personal, o.created_at, \
         (SELECT COUNT(*) FROM members m WHERE m.organization_id = o.id AND m.role IS NOT NULL) AS members \
         FROM organizations o WHERE o.deleted_at IS NULL AND (:slug = '' OR o.slug = :slug) \
         AND substr(o.name, 1, length(:name_prefix)) = :name_prefix",
        "o.id" uuid,
        ["slug" => "o.slug" text, "name" => "o.name" text, "created_at" => "o.created_at" integer],
        slug = call.message.slug.unwrap_or_default(),
        name_prefix = call.message.name_prefix.unwrap_or_default()
    );
    let rows = service.store.read().all::<Inspected>(rows?).await?;
    let page = query.page(rows, |row| (organizations::sort_key(&query, &row.name, &row.slug, row.created_at), row.id));
    Ok(page.map(|row| InspectedOrganization {
        id: row.id,
        name: row.name,
        slug: row.slug,
        personal: row.personal,
        created_at: Timestamp(row.created_at),
        members: row.members,
    }))
}

#[cfg(test)]
mod tests {
    use crate::tests::TestScope;
    use capsule_contracts::Uuid;
    use capsule_contracts::quotas::Quotas;
    use capsule_store::{Databases, Keyring, Store, unscoped};

    #[tokio::test]
    async fn members_with_a_role_count() {
        let folder = tempfile::tempdir().expect("a folder");
        let keyring = Keyring::open(&folder.path().join("key")).expect("a key");
        let databases = Databases::Embedded(folder.path().into());
        let store = Store::open(&databases, crate::NAME, keyring, crate::MIGRATIONS).await.expect("opens");
        let organization = Uuid::from_u128(7);
        let tx = store.begin().await.expect("begins");
        let make = unscoped!(
            "test",
            "INSERT INTO organizations (id, name, slug, created_at) VALUES (:organization, 'A', 'a', 1)",
            organization
        );
        tx.run(make).await.expect("made");
        // One left.
        for (user, role) in [(1, Some("owner")), (2, Some("viewer")), (3, None)] {
            tx.run(unscoped!(
                "test",
                "INSERT INTO members (organization_id, user_id, role, sequence, joined_at) \
                 VALUES (:organization, :user_id, :role, 1, 1)",
                organization,
                user_id = Uuid::from_u128(user),
                role = role.map(str::to_owned)
            ))
            .await
            .expect("made");
        }
        let grant = TestScope(organization);
        let quotas = |limit| Quotas([("members".to_owned(), limit)].into());
        super::check_members(&tx, &grant, &quotas(3), 1).await.expect("a third may join");
        let problem = super::check_members(&tx, &grant, &quotas(2), 1).await.expect_err("refused");
        assert!(problem.code == "quota_exceeded" && problem.detail.contains("2 of 2 members"), "{problem}");
    }
}
