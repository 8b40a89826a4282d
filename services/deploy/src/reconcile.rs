//! Puts right what is not as it ought to be: by a signal and a timer, over stored state only.
//!
//! Dead instances are started again, those of stopped and removed placements retire, retiring ones are drained and
//! stopped, strangers are stopped, removed placements lose their files, and a restarted ingress gets its table.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::{Statement, Store, lease, scoped, unscoped};
use sea_orm::FromQueryResult;

use crate::placements::{self, Placement};
use crate::{Deploys, disk, hosts, instances, quotas, removal, routes, uploads};

/// Looks this often even if nobody signals.
pub const PERIOD: Duration = Duration::from_secs(3);
/// So many releases of a placement are kept to return to, beside the one that serves.
const RELEASES: usize = 5;
/// The logs of so many builds of a placement are kept.
const BUILD_LOGS: usize = 100;
/// So many instances that are gone are kept for their logs.
const GONE: usize = 10;

/// Reconciles for as long as this process leads.
pub async fn run(deploys: &Arc<Deploys>) {
    loop {
        if let Err(problem) = once(deploys).await {
            tracing::warn!(%problem, "reconciliation could not be finished; trying again");
        }
        let _ = tokio::time::timeout(PERIOD, deploys.controller.to_reconcile()).await;
    }
}

/// One pass. May be run at any time and any number of times.
pub async fn once(deploys: &Arc<Deploys>) -> Result<(), Problem> {
    deploys.ingress.ensure().await.map_err(|error| Problem::unavailable(format!("The ingress cannot be started: {error}.")))?;
    enforce(deploys).await?;
    routes::publish_if_behind(deploys).await?;
    let live = instances::live(deploys).await?;
    for instance in live.iter().filter(|instance| instance.role == "serving") {
        // It may have been stopped since the list was read.
        if deploys.runtime.status(&instance.id).await.is_none() && instances::serves(deploys, &instance.id).await? {
            tracing::info!(instance = instance.id, "an instance is gone and is started again");
            if let Err(problem) = instances::start(deploys, instance).await {
                tracing::warn!(instance = instance.id, %problem, "it could not be started");
            }
        }
    }
    for instance in live.iter().filter(|instance| instance.role == "retiring") {
        retire(deploys, instance);
    }
    stop_strangers(deploys).await?;
    disk::remove_layers(deploys).await?;
    disk::keep_reserve(deploys).await;
    remove_files(deploys).await?;
    uploads::expire(deploys, Timestamp::now()).await?;
    hosts::prune(&deploys.store).await?;
    quotas::prune(&deploys.store).await
}

/// Waits until a retiring instance is done with its requests, then stops it; beside everything else,
/// for it may take as long as its application likes.
fn retire(deploys: &Arc<Deploys>, instance: &instances::Row) {
    let Some(mark) = deploys.controller.retire(&instance.id) else { return };
    let (deploys, id) = (deploys.clone(), instance.id.clone());
    lease::spawn(async move {
        if let Err(problem) = drain_and_stop(&deploys, &id).await {
            tracing::warn!(instance = id, %problem, "an instance could not be retired; trying again");
        }
        drop(mark);
        deploys.controller.reconcile();
    });
}

async fn drain_and_stop(deploys: &Deploys, id: &str) -> Result<(), Problem> {
    // Only once the table without it is in force is "no requests under way" final.
    routes::publish_if_behind(deploys).await?;
    deploys.ingress.drain(id, deploys.options.drain_seconds).await?;
    deploys.runtime.stop(id).await.map_err(|error| Problem::unavailable(error.to_string()))?;
    instances::set_gone(deploys, id).await
}

/// Stops what answers in the run directory but is no instance on record.
async fn stop_strangers(deploys: &Deploys) -> Result<(), Problem> {
    // The directory is read first: a row is always written before its socket appears.
    let names = deploys.runtime.list().unwrap_or_default();
    let known: HashSet<String> = instances::live(deploys).await?.into_iter().map(|instance| instance.id).collect();
    for name in names.iter().filter(|name| name.starts_with('i') && !known.contains(*name)) {
        tracing::info!(instance = name, "a stranger is stopped");
        let _ = deploys.runtime.stop(name).await;
    }
    // A build step's shim ends with the process that wanted it; its socket may stay behind.
    for name in names.iter().filter(|name| name.starts_with('b')) {
        if deploys.runtime.status(name).await.is_none() {
            let _ = std::fs::remove_file(deploys.runtime.run_directory().join(format!("{name}.sock")));
        }
    }
    Ok(())
}

/// Retires what must not run: everything of removed services, what serves of stopped ones, and candidates whose
/// deployment is settled without them.
pub async fn enforce(deploys: &Deploys) -> Result<(), Problem> {
    let wrong = unscoped!(
        "the platform's own work",
        "SELECT i.id FROM instances i \
         LEFT JOIN placements p ON p.service_id = i.service_id AND p.environment_id = i.environment_id \
         LEFT JOIN deployments d ON d.id = i.deployment_id \
         WHERE (i.role IN ('candidate', 'serving') AND p.wanted = 'removed') OR (i.role = 'serving' AND p.wanted = 'stopped') \
         OR (i.role = 'candidate' AND d.finished_at IS NOT NULL)"
    );
    if !deploys.store.read().exists(wrong).await? {
        return Ok(());
    }
    let tx = deploys.store.begin().await?;
    let retired = tx
        .run(unscoped!(
            "the platform's own work",
            "UPDATE instances SET role = 'retiring' WHERE \
             (role IN ('candidate', 'serving') AND EXISTS (SELECT 1 FROM placements p WHERE p.service_id = instances.service_id \
             AND p.environment_id = instances.environment_id AND p.wanted = 'removed')) \
             OR (role = 'serving' AND EXISTS (SELECT 1 FROM placements p WHERE p.service_id = instances.service_id \
             AND p.environment_id = instances.environment_id AND p.wanted = 'stopped')) \
             OR (role = 'candidate' AND EXISTS (SELECT 1 FROM deployments d WHERE d.id = instances.deployment_id \
             AND d.finished_at IS NOT NULL))"
        ))
        .await?;
    tracing::info!(retired, "instances that must not run are retired");
    routes::raise(&tx).await?;
    tx.commit().await
}

#[derive(FromQueryResult)]
struct Release {
    id: Uuid,
    release_id: Uuid,
    upload_digest: String,
}

/// Forgets removed placements of which nothing runs any more, with all their files.
async fn remove_files(deploys: &Deploys) -> Result<(), Problem> {
    for placement in placements::all(deploys).await?.into_iter().filter(|placement| placement.wanted == "removed") {
        let rows = instances::of(deploys, &placement).await?;
        let unsettled = unscoped!(
            "the platform's own work",
            "SELECT 1 FROM deployments WHERE service_id = $1 AND environment_id = $2 AND finished_at IS NULL",
            placement.service_id,
            placement.environment_id
        );
        if rows.iter().any(|row| row.role != "gone") || deploys.store.read().exists(unsettled).await? {
            continue;
        }
        let releases = releases(deploys, &placement).await?;
        let mut directories: Vec<_> = releases.iter().map(|release| deploys.release_directory(release.release_id)).collect();
        directories.extend(releases.iter().map(|release| deploys.build_log(release.id)));
        directories.extend(rows.iter().map(|row| deploys.instance_log(&row.id)));
        // Its organization may have the host again; the folder is that one's then.
        let host = placement.former_host.as_ref().unwrap_or(&placement.host);
        if placement.former_host.is_none() || !placements::has_host(deploys, host).await? {
            directories.push(deploys.options.data.join("apps").join(host));
        }
        remove_all(directories).await;
        let cache = deploys.options.data.join("cache").join(placement.service_id.to_string());
        let own = cache.join(placement.environment_id.to_string());
        let removed = tokio::task::spawn_blocking(move || {
            capsule_builder::remove_cache(&own);
            // Stays where the service has other environments.
            let _ = std::fs::remove_dir(cache);
        });
        let _ = removed.await;
        let grant = capsule_bus::SystemGrant::new(placement.organization_id, "the service was removed");
        let tx = deploys.store.begin().await?;
        let (service, environment) = (placement.service_id, placement.environment_id);
        tx.run(scoped!(
            &grant,
            "DELETE FROM instances WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2",
            service,
            environment
        ))
        .await?;
        tx.run(scoped!(
            &grant,
            "DELETE FROM deployments WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2",
            service,
            environment
        ))
        .await?;
        tx.run(scoped!(
            &grant,
            // Where the service stays in other environments, one may be about to be deployed there.
            "DELETE FROM uploads WHERE organization_id = :tenant AND service_id = $1 AND digest IS NOT NULL \
             AND NOT EXISTS (SELECT 1 FROM placements WHERE service_id = $2 AND environment_id <> $3)",
            service,
            service,
            environment
        ))
        .await?;
        if placement.former_host.is_none() {
            // Marked by an earlier version, which kept no quarantine.
            hosts::quarantine(&tx, &grant, &placement.host, deploys.options.host_quarantine_days).await?;
        }
        tx.run(scoped!(
            &grant,
            "DELETE FROM placements WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 AND wanted = 'removed'",
            service,
            environment
        ))
        .await?;
        tx.commit().await?;
        for release in releases {
            uploads::forget_blob(deploys, &release.upload_digest).await?;
        }
    }
    Ok(())
}

async fn releases(deploys: &Deploys, placement: &Placement) -> Result<Vec<Release>, Problem> {
    let rows = unscoped!(
        "the platform's own work",
        "SELECT id, release_id, upload_digest FROM deployments WHERE service_id = $1 AND environment_id = $2 ORDER BY number DESC",
        placement.service_id,
        placement.environment_id
    );
    deploys.store.read().all(rows).await
}

/// Removes what a placement needs no more: old releases, old sources, logs of old builds and of instances long gone.
pub async fn prune(deploys: &Deploys, placement: &Placement) -> Result<(), Problem> {
    let mut kept = HashSet::new();
    let mut directories = Vec::new();
    let mut sources = Vec::new();
    for (n, release) in releases(deploys, placement).await?.into_iter().enumerate() {
        if n >= BUILD_LOGS {
            directories.push(deploys.build_log(release.id));
        }
        let directory = deploys.release_directory(release.release_id);
        if kept.contains(&release.release_id) || !directory.exists() {
            continue;
        }
        if kept.len() <= RELEASES || placement.active_deployment_id == Some(release.id) {
            kept.insert(release.release_id);
        } else {
            directories.push(directory);
            sources.push(release.upload_digest);
        }
    }
    let gone: Vec<_> = instances::of(deploys, placement).await?.into_iter().filter(|row| row.role == "gone").collect();
    let old = &gone[..gone.len().saturating_sub(GONE)];
    directories.extend(old.iter().map(|row| deploys.instance_log(&row.id)));
    directories.retain(|directory| directory.exists());
    remove_all(directories).await;
    if !old.is_empty() {
        let tx = deploys.store.begin().await?;
        for row in old {
            tx.run(unscoped!(
                "the platform's own work",
                "DELETE FROM instances WHERE id = $1 AND role = 'gone'",
                row.id.as_str()
            ))
            .await?;
        }
        tx.commit().await?;
    }
    for digest in sources {
        uploads::forget_blob(deploys, &digest).await?;
    }
    Ok(())
}

/// Removes what is kept only for a while, whether or not anything is deployed.
pub async fn purge(deploys: &Deploys, now: Timestamp) -> Result<(), Problem> {
    uploads::expire(deploys, now).await?;
    removal::purge(deploys, now).await?;
    for placement in placements::all(deploys).await? {
        prune(deploys, &placement).await?;
    }
    uploads::sweep(deploys, now).await
}

/// Runs `delete` in a transaction if `exists` finds a row: most passes find none, and begin no transaction.
///
/// # Errors
/// If the database does not answer.
pub async fn delete_if_any(store: &Store, exists: Statement, delete: Statement) -> Result<(), Problem> {
    if store.read().exists(exists).await? {
        let tx = store.begin().await?;
        tx.run(delete).await?;
        tx.commit().await?;
    }
    Ok(())
}

async fn remove_all(directories: Vec<std::path::PathBuf>) {
    let _ = tokio::task::spawn_blocking(move || {
        for directory in directories {
            let _ = capsule_builder::trees::remove(&directory);
        }
    })
    .await;
}
