//! Quotas of projects. Each check counts in the transaction that creates the resource. A service has one writer at a
//! time, so no other transaction can intervene.

use std::sync::Arc;

use capsule_bus::Call;
use capsule_contracts::quotas::{CountProjectUse, Quantity, QuotaUse, Quotas};
use capsule_contracts::{Problem, Uuid};
use capsule_store::{FromRow, Scope, Statement, Transaction, scoped};

use crate::ProjectService;

fn projects(scope: &impl Scope) -> Statement {
    scoped!(scope, "SELECT COUNT(*) FROM projects WHERE organization_id = :tenant")
}

fn services(scope: &impl Scope) -> Statement {
    scoped!(scope, "SELECT COUNT(*) FROM services WHERE organization_id = :tenant")
}

async fn check_one_more(tx: &Transaction<'_>, quotas: &Quotas, quantity: Quantity, count: Statement) -> Result<(), Problem> {
    let before = tx.read().value::<i64>(count).await?.unwrap_or_default();
    quotas.check(quantity, before, before + 1)
}

/// Checks whether the organization may have another project. Archived ones count as well.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn check_another_project(tx: &Transaction<'_>, scope: &impl Scope, quotas: &Quotas) -> Result<(), Problem> {
    check_one_more(tx, quotas, Quantity::Projects, projects(scope)).await
}

/// Checks whether the organization may have another service.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn check_another_service(tx: &Transaction<'_>, scope: &impl Scope, quotas: &Quotas) -> Result<(), Problem> {
    check_one_more(tx, quotas, Quantity::Services, services(scope)).await
}

/// Checks whether a project may have another environment.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn check_another_environment(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    quotas: &Quotas,
    project: Uuid,
) -> Result<(), Problem> {
    let count =
        scoped!(scope, "SELECT COUNT(*) FROM environments WHERE organization_id = :tenant AND project_id = :project", project);
    check_one_more(tx, quotas, Quantity::EnvironmentsPerProject, count).await
}

/// Usage of variables and secrets of an environment: their number, and the bytes of their names and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VariableUse {
    count: i64,
    bytes: i64,
}

#[derive(FromRow)]
struct Variable {
    name: String,
    value: String,
}

#[derive(FromRow)]
struct Secret {
    name: String,
    bytes: i64,
}

/// Measures an environment. Secrets are measured encrypted, which adds some bytes to each.
pub async fn variables(tx: &Transaction<'_>, scope: &impl Scope, environment: Uuid) -> Result<VariableUse, Problem> {
    let plain = scoped!(
        scope,
        "SELECT name, value FROM variables WHERE organization_id = :tenant AND environment_id = :environment",
        environment
    );
    // `LENGTH` of a text counts characters on both engines; the quota is in bytes.
    let plain = tx.read().all::<Variable>(plain).await?;
    let sealed = scoped!(
        scope,
        "SELECT name, CAST(LENGTH(sealed_value) AS BIGINT) AS bytes FROM secrets \
         WHERE organization_id = :tenant AND environment_id = :environment",
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

/// Checks the usage of an environment after a change, in its transaction, against the quota and the usage `before`.
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
    // Whole KiB, rounded up. Growth within one KiB above the limit still counts as growth.
    let kib = |bytes: i64| bytes.saturating_add(1023) / 1024;
    let grown = if after.bytes > before.bytes { kib(before.bytes).min(kib(after.bytes) - 1) } else { kib(after.bytes) };
    quotas.check(Quantity::VariableKibPerEnvironment, grown, kib(after.bytes))
}

pub async fn count_use(service: Arc<ProjectService>, call: Call<CountProjectUse>) -> Result<QuotaUse, Problem> {
    let grant = call.grant.organization(call.message.organization_id, "what an organization uses is counted");
    let most = scoped!(
        &grant,
        "SELECT COUNT(*) AS environments FROM environments WHERE organization_id = :tenant GROUP BY project_id \
         ORDER BY environments DESC LIMIT 1"
    );
    let mut used = QuotaUse::default();
    for (quantity, count) in [
        (Quantity::Projects, projects(&grant)),
        (Quantity::Services, services(&grant)),
        // The maximum over the projects.
        (Quantity::EnvironmentsPerProject, most),
    ] {
        let count = service.store.read().value::<i64>(count).await?.unwrap_or_default();
        used.used.insert(quantity.name().into(), count);
    }
    Ok(used)
}
