//! What quotas allow in a project: each function counts in the transaction that uses what it counts. Writers of a
//! service come one after the other, so nothing comes between counting and using.

use std::sync::Arc;

use capsule_bus::{Call, SystemGrant};
use capsule_contracts::quotas::{CountProjectUse, Quantity, QuotaUse, Quotas};
use capsule_contracts::{Problem, Uuid};
use capsule_store::{Scope, Statement, Transaction, scoped};
use sea_orm::FromQueryResult;

use crate::Projects;

fn projects(scope: &impl Scope) -> Statement {
    scoped!(scope, "SELECT COUNT(*) FROM projects WHERE organization_id = :tenant")
}

fn services(scope: &impl Scope) -> Statement {
    scoped!(scope, "SELECT COUNT(*) FROM services WHERE organization_id = :tenant")
}

async fn one_more(tx: &Transaction<'_>, quotas: &Quotas, quantity: Quantity, count: Statement) -> Result<(), Problem> {
    let before = tx.read().value::<i64>(count).await?.unwrap_or_default();
    quotas.check(quantity, before, before + 1)
}

/// Counts another project of the organization; archived ones count as well.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn another_project(tx: &Transaction<'_>, scope: &impl Scope, quotas: &Quotas) -> Result<(), Problem> {
    one_more(tx, quotas, Quantity::Projects, projects(scope)).await
}

/// Counts another service of the organization.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn another_service(tx: &Transaction<'_>, scope: &impl Scope, quotas: &Quotas) -> Result<(), Problem> {
    one_more(tx, quotas, Quantity::Services, services(scope)).await
}

/// Counts another environment of a project.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn another_environment(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    quotas: &Quotas,
    project: Uuid,
) -> Result<(), Problem> {
    let count = scoped!(scope, "SELECT COUNT(*) FROM environments WHERE organization_id = :tenant AND project_id = $1", project);
    one_more(tx, quotas, Quantity::EnvironmentsPerProject, count).await
}

/// Variables and secrets of an environment: how many, and how many bytes their names and values have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VariableUse {
    count: i64,
    bytes: i64,
}

#[derive(FromQueryResult)]
struct Variable {
    name: String,
    value: String,
}

#[derive(FromQueryResult)]
struct Secret {
    name: String,
    bytes: i64,
}

/// What an environment has now. Secrets are measured as they rest, which is a few bytes more than they have.
pub async fn variables(tx: &Transaction<'_>, scope: &impl Scope, environment: Uuid) -> Result<VariableUse, Problem> {
    let plain =
        scoped!(scope, "SELECT name, value FROM variables WHERE organization_id = :tenant AND environment_id = $1", environment);
    // `LENGTH` of a text counts characters on either engine: bytes are counted here.
    let plain = tx.read().all::<Variable>(plain).await?;
    let sealed = scoped!(
        scope,
        "SELECT name, CAST(LENGTH(sealed_value) AS BIGINT) AS bytes FROM secrets \
         WHERE organization_id = :tenant AND environment_id = $1",
        environment
    );
    let sealed = tx.read().all::<Secret>(sealed).await?;
    let bytes = plain.iter().map(|row| row.name.len() + row.value.len()).sum::<usize>();
    let sealed_bytes = sealed.iter().map(|row| row.name.len() as i64 + row.bytes).sum::<i64>();
    Ok(VariableUse {
        count: (plain.len() + sealed.len()) as i64,
        bytes: i64::try_from(bytes).unwrap_or(i64::MAX).saturating_add(sealed_bytes),
    })
}

/// Compares what an environment has after a change, in its transaction, with what it had `before`.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn check_variables(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    quotas: &Quotas,
    environment: Uuid,
    before: VariableUse,
) -> Result<(), Problem> {
    let after = variables(tx, scope, environment).await?;
    quotas.check(Quantity::VariablesPerEnvironment, before.count, after.count)?;
    // Whole KiB, rounded up; a change within one that is above the limit is still a growth.
    let kib = |bytes: i64| bytes.saturating_add(1023) / 1024;
    let grown = if after.bytes > before.bytes { kib(before.bytes).min(kib(after.bytes) - 1) } else { kib(after.bytes) };
    quotas.check(Quantity::VariableKibPerEnvironment, grown, kib(after.bytes))
}

pub async fn count_use(service: Arc<Projects>, call: Call<CountProjectUse>) -> Result<QuotaUse, Problem> {
    let grant = SystemGrant::new(call.message.organization_id, "what an organization uses is counted");
    let most = scoped!(
        &grant,
        "SELECT COUNT(*) AS environments FROM environments WHERE organization_id = :tenant GROUP BY project_id \
         ORDER BY environments DESC LIMIT 1"
    );
    let mut used = QuotaUse::default();
    for (quantity, count) in [
        (Quantity::Projects, projects(&grant)),
        (Quantity::Services, services(&grant)),
        // Of the project that has the most.
        (Quantity::EnvironmentsPerProject, most),
    ] {
        let count = service.store.read().value::<i64>(count).await?.unwrap_or_default();
        used.used.insert(quantity.name().into(), count);
    }
    Ok(used)
}
