//! Variables and secrets of an environment. Secrets are stored encrypted and are never returned by the API; only
//! deployments receive them.

use std::collections::BTreeMap;
use std::sync::Arc;

use capsule_bus::Call;
use capsule_contracts::project::{ChangeVariables, DeleteSecret, GetVariables, PutSecret, ReplaceVariables, Variables};
use capsule_contracts::{Empty, Problem, Uuid};
use capsule_store::{FromRow, Scope, Statement, Transaction, scoped};

use crate::{ProjectService, quotas};

#[derive(FromRow)]
struct VariableRow {
    name: String,
    value: String,
}

#[derive(FromRow)]
struct SecretRow {
    name: String,
    sealed_value: Vec<u8>,
}

/// Variables and decrypted secrets, for a deployment, and the names of the secrets. A secret overrides a variable of
/// the same name.
pub async fn decrypt_all(
    projects: &ProjectService,
    scope: &impl Scope,
    environment: Uuid,
) -> Result<(BTreeMap<String, String>, Vec<String>), Problem> {
    let read = projects.store.read();
    let (mut all, mut names) = (by_name(read.all(select_variables(scope, environment)).await?), Vec::new());
    for secret in read.all::<SecretRow>(select_secrets(scope, environment)).await? {
        let value = projects.store.keyring().open_sealed(&context(environment, &secret.name), &secret.sealed_value)?;
        all.insert(secret.name.clone(), String::from_utf8(value).map_err(|_| Problem::internal())?);
        names.push(secret.name);
    }
    Ok((all, names))
}

fn select_variables(scope: &impl Scope, environment: Uuid) -> Statement {
    scoped!(
        scope,
        "SELECT name, value FROM variables WHERE organization_id = :tenant AND environment_id = :environment",
        environment
    )
}

fn select_secrets(scope: &impl Scope, environment: Uuid) -> Statement {
    scoped!(
        scope,
        "SELECT name, sealed_value FROM secrets WHERE organization_id = :tenant AND environment_id = :environment ORDER BY name",
        environment
    )
}

fn by_name(rows: Vec<VariableRow>) -> BTreeMap<String, String> {
    rows.into_iter().map(|row| (row.name, row.value)).collect()
}

fn context(environment: Uuid, name: &str) -> String {
    format!("secrets/{environment}/{name}")
}

fn view(variables: Vec<VariableRow>, secrets: Vec<SecretRow>) -> Variables {
    Variables { variables: by_name(variables), secrets: secrets.into_iter().map(|row| row.name).collect() }
}

/// As [`get_variables`], in a transaction.
async fn current(tx: &Transaction<'_>, scope: &impl Scope, environment: Uuid) -> Result<Variables, Problem> {
    let variables = tx.read().all(select_variables(scope, environment)).await?;
    Ok(view(variables, tx.read().all(select_secrets(scope, environment)).await?))
}

pub async fn get_variables(projects: Arc<ProjectService>, call: Call<GetVariables>) -> Result<Variables, Problem> {
    let (read, environment) = (projects.store.read(), call.message.id);
    let variables = read.all(select_variables(&call.grant, environment)).await?;
    Ok(view(variables, read.all(select_secrets(&call.grant, environment)).await?))
}

async fn put(tx: &Transaction<'_>, scope: &impl Scope, environment: Uuid, name: &str, value: &str) -> Result<(), Problem> {
    tx.run(scoped!(
        scope,
        "INSERT INTO variables (environment_id, organization_id, name, value) VALUES (:environment, :tenant, :name, :value) \
         ON CONFLICT (environment_id, name) DO UPDATE SET value = excluded.value",
        environment,
        name,
        value
    ))
    .await?;
    Ok(())
}

pub async fn replace_variables(projects: Arc<ProjectService>, call: Call<ReplaceVariables>) -> Result<Variables, Problem> {
    let limits = capsule_bus::quotas(&*projects, call.grant.organization()).await?;
    let tx = projects.store.begin().await?;
    call.context.check_if_match(&current(&tx, &call.grant, call.message.id).await?)?;
    let before = quotas::variables(&tx, &call.grant, call.message.id).await?;
    tx.run(scoped!(
        &call.grant,
        "DELETE FROM variables WHERE organization_id = :tenant AND environment_id = :environment_id",
        environment_id = call.message.id
    ))
    .await?;
    for (name, value) in &call.message.variables {
        put(&tx, &call.grant, call.message.id, name, value).await?;
    }
    quotas::check_variables(&tx, &call.grant, &limits, call.message.id, before).await?;
    let changed = current(&tx, &call.grant, call.message.id).await?;
    tx.commit().await?;
    Ok(changed)
}

pub async fn change_variables(projects: Arc<ProjectService>, call: Call<ChangeVariables>) -> Result<Variables, Problem> {
    let limits = capsule_bus::quotas(&*projects, call.grant.organization()).await?;
    let tx = projects.store.begin().await?;
    call.context.check_if_match(&current(&tx, &call.grant, call.message.id).await?)?;
    let before = quotas::variables(&tx, &call.grant, call.message.id).await?;
    for (name, value) in &call.message.variables {
        match value {
            Some(value) => put(&tx, &call.grant, call.message.id, name, value).await?,
            None => {
                let delete = scoped!(
                    &call.grant,
                    "DELETE FROM variables WHERE organization_id = :tenant AND environment_id = :environment_id AND name = :name",
                    environment_id = call.message.id,
                    name = name.as_str()
                );
                tx.run(delete).await?;
            }
        }
    }
    quotas::check_variables(&tx, &call.grant, &limits, call.message.id, before).await?;
    let changed = current(&tx, &call.grant, call.message.id).await?;
    tx.commit().await?;
    Ok(changed)
}

pub async fn put_secret(projects: Arc<ProjectService>, call: Call<PutSecret>) -> Result<Empty, Problem> {
    let message = call.message;
    let sealed = projects.store.keyring().seal(&context(message.id, &message.name), message.value.as_bytes())?;
    let limits = capsule_bus::quotas(&*projects, call.grant.organization()).await?;
    let tx = projects.store.begin().await?;
    let before = quotas::variables(&tx, &call.grant, message.id).await?;
    tx.run(scoped!(
        &call.grant,
        "INSERT INTO secrets (environment_id, organization_id, name, sealed_value) \
         VALUES (:environment_id, :tenant, :name, :sealed) \
         ON CONFLICT (environment_id, name) DO UPDATE SET sealed_value = excluded.sealed_value",
        environment_id = message.id,
        name = message.name,
        sealed
    ))
    .await?;
    quotas::check_variables(&tx, &call.grant, &limits, message.id, before).await?;
    tx.commit().await?;
    Ok(Empty {})
}

pub async fn delete_secret(projects: Arc<ProjectService>, call: Call<DeleteSecret>) -> Result<Empty, Problem> {
    let tx = projects.store.begin().await?;
    let gone = tx
        .run(scoped!(
            &call.grant,
            "DELETE FROM secrets WHERE organization_id = :tenant AND environment_id = :environment_id AND name = :name",
            environment_id = call.message.id,
            name = call.message.name.as_str()
        ))
        .await?;
    tx.commit().await?;
    if gone == 0 { Err(Problem::not_found("secret")) } else { Ok(Empty {}) }
}
