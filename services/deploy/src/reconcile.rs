//! The reconciler: makes the actual state match the stored one. It runs on a signal and periodically.
//!
//! It restarts dead instances, retires those of stopped and removed services, drains and stops retiring instances, stops
//! orphans, deletes the files of removed services, and publishes the routing table to a restarted ingress.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use capsule_bus::SystemAccess;
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::{FromRow, Statement, Store, lease, scoped, unscoped};

use crate::service_environments::{self, ServiceEnvironment};
use crate::{DeployService, disk, hosts, instances, quotas, removal, routes, uploads};

/// The interval between passes without a signal.
pub const PERIOD: Duration = Duration::from_secs(3);
/// The number of releases kept for rollbacks for each service in an environment, beside the active one.
const KEPT_RELEASES: usize = 5;
/// The number of build logs kept for each service in an environment.
const KEPT_BUILD_LOGS: usize = 100;
/// The number of instances that are gone whose logs are kept.
const KEPT_GONE_INSTANCES: usize = 10;

/// Reconciles while this process is the leader.
pub async fn run(service: &Arc<DeployService>, system: &SystemAccess) {
    loop {
        if let Err(problem) = reconcile(service, system).await {
            tracing::warn!(%problem, "reconciliation failed; trying again");
        }
        let _ = tokio::time::timeout(PERIOD, service.controller.reconcile_requested()).await;
    }
}

/// Runs one pass, which is idempotent.
pub async fn reconcile(service: &Arc<DeployService>, system: &SystemAccess) -> Result<(), Problem> {
    service.ingress.ensure().await.map_err(|error| Problem::unavailable(format!("The ingress cannot be started: {error}.")))?;
    retire_unwanted(service).await?;
    routes::publish_if_behind(service).await?;
    let live = instances::live(service).await?;
    for instance in live.iter().filter(|instance| instance.role == "serving") {
        // The instance may have been retired since the list was read.
        if service.runtime.status(&instance.id).await.is_none() && instances::is_serving(service, &instance.id).await? {
            tracing::info!(instance = instance.id, "an instance is gone; starting it again");
            let grant = system.organization(instance.organization_id, "an instance is started");
            if let Err(problem) = instances::start(service, &grant, instance).await {
                tracing::warn!(instance = instance.id, %problem, "cannot start an instance");
            }
        }
    }
    for instance in live.iter().filter(|instance| instance.role == "retiring") {
        retire(service, instance);
    }
    stop_orphans(service).await?;
    disk::remove_layers(service).await?;
    disk::keep_reserve(service).await;
    remove_files(service, system).await?;
    uploads::expire(service, Timestamp::now()).await?;
    hosts::prune(&service.store).await?;
    quotas::prune(&service.store).await
}

/// Drains a retiring instance and stops it, in a task of its own: its requests can take until the drain timeout.
fn retire(service: &Arc<DeployService>, instance: &instances::Row) {
    let Some(guard) = service.controller.retire(&instance.id) else { return };
    let (service, id) = (service.clone(), instance.id.clone());
    lease::spawn(async move {
        if let Err(problem) = drain_and_stop(&service, &id).await {
            tracing::warn!(instance = id, %problem, "cannot retire an instance; trying again");
        }
        drop(guard);
        service.controller.reconcile();
    });
}

async fn drain_and_stop(service: &DeployService, id: &str) -> Result<(), Problem> {
    // Without its route, the instance gets no new requests, so draining ends.
    routes::publish_if_behind(service).await?;
    service.ingress.drain(id, service.options.drain_seconds).await?;
    service.runtime.stop(id).await.map_err(|error| Problem::unavailable(error.to_string()))?;
    instances::set_gone(service, id).await
}

/// Stops orphans: shims in the run directory without a row.
async fn stop_orphans(service: &DeployService) -> Result<(), Problem> {
    // The directory is read first: a row is written before its socket appears.
    let names = service.runtime.list().unwrap_or_default();
    let known: HashSet<String> = instances::live(service).await?.into_iter().map(|instance| instance.id).collect();
    for name in names.iter().filter(|name| name.starts_with('i') && !known.contains(*name)) {
        tracing::info!(instance = name, "stopping an orphaned instance");
        let _ = service.runtime.stop(name).await;
    }
    // The shim of a build step ends with the process that started it; its socket can remain.
    for name in names.iter().filter(|name| name.starts_with('b')) {
        if service.runtime.status(name).await.is_none() {
            let _ = std::fs::remove_file(service.runtime.run_directory().join(format!("{name}.sock")));
        }
    }
    Ok(())
}

/// Retires the instances that must not run: all of removed services, the serving ones of stopped services, and the
/// candidates of settled deployments.
pub async fn retire_unwanted(service: &DeployService) -> Result<(), Problem> {
    let unwanted = unscoped!(
        "the platform's own work",
        "SELECT i.id FROM instances i \
         LEFT JOIN placements p ON p.service_id = i.service_id AND p.environment_id = i.environment_id \
         LEFT JOIN deployments d ON d.id = i.deployment_id \
         WHERE (i.role IN ('candidate', 'serving') AND p.wanted = 'removed') OR (i.role = 'serving' AND p.wanted = 'stopped') \
         OR (i.role = 'candidate' AND d.finished_at IS NOT NULL)"
    );
    if !service.store.read().exists(unwanted).await? {
        return Ok(());
    }
    let tx = service.store.begin().await?;
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
    tracing::info!(retired, "instances that must not run retire");
    routes::bump_revision(&tx).await?;
    tx.commit().await
}

#[derive(FromRow)]
struct Release {
    id: Uuid,
    release_id: Uuid,
    upload_digest: String,
}

/// Deletes the rows and files of removed services once none of their instances is live.
async fn remove_files(service: &DeployService, system: &SystemAccess) -> Result<(), Problem> {
    for service_environment in service_environments::all(service)
        .await?
        .into_iter()
        .filter(|service_environment| service_environment.desired_state == "removed")
    {
        let rows = instances::of(service, &service_environment).await?;
        let unsettled = unscoped!(
            "the platform's own work",
            "SELECT 1 FROM deployments WHERE service_id = :service_id AND environment_id = :environment_id \
             AND finished_at IS NULL",
            service_id = service_environment.service_id,
            environment_id = service_environment.environment_id
        );
        if rows.iter().any(|row| row.role != "gone") || service.store.read().exists(unsettled).await? {
            continue;
        }
        let releases = releases(service, &service_environment).await?;
        let mut directories: Vec<_> = releases.iter().map(|release| service.release_directory(release.release_id)).collect();
        directories.extend(releases.iter().map(|release| service.build_log(release.id)));
        directories.extend(rows.iter().map(|row| service.instance_log(&row.id)));
        // If the organization has taken the host again, the directory belongs to the new owner of the host.
        let host = service_environment.former_host.as_ref().unwrap_or(&service_environment.host);
        if service_environment.former_host.is_none() || !service_environments::has_host(service, host).await? {
            directories.push(service.options.data.join("apps").join(host));
        }
        remove_all(directories).await;
        let cache = service.options.data.join("cache").join(service_environment.service_id.to_string());
        let own = cache.join(service_environment.environment_id.to_string());
        let removed = tokio::task::spawn_blocking(move || {
            capsule_builder::remove_cache(&own);
            // Fails while the service has caches of other environments.
            let _ = std::fs::remove_dir(cache);
        });
        let _ = removed.await;
        let grant = system.organization(service_environment.organization_id, "the service was removed");
        let tx = service.store.begin().await?;
        let (service_id, environment_id) = (service_environment.service_id, service_environment.environment_id);
        tx.run(scoped!(
            &grant,
            "DELETE FROM instances WHERE organization_id = :tenant AND service_id = :service_id \
             AND environment_id = :environment_id",
            service_id,
            environment_id
        ))
        .await?;
        tx.run(scoped!(
            &grant,
            "DELETE FROM deployments WHERE organization_id = :tenant AND service_id = :service_id \
             AND environment_id = :environment_id",
            service_id,
            environment_id
        ))
        .await?;
        tx.run(scoped!(
            &grant,
            // If the service has other environments, an upload may be deployed there.
            "DELETE FROM uploads WHERE organization_id = :tenant AND service_id = :service_id AND digest IS NOT NULL \
             AND NOT EXISTS (SELECT 1 FROM placements WHERE service_id = :service_id AND environment_id <> :environment_id)",
            service_id,
            environment_id
        ))
        .await?;
        if service_environment.former_host.is_none() {
            // An earlier version marked the removal, and did not quarantine the host.
            hosts::quarantine(&tx, &grant, &service_environment.host, service.options.host_quarantine_days).await?;
        }
        tx.run(scoped!(
            &grant,
            "DELETE FROM placements WHERE organization_id = :tenant AND service_id = :service_id \
             AND environment_id = :environment_id AND wanted = 'removed'",
            service_id,
            environment_id
        ))
        .await?;
        tx.commit().await?;
        for release in releases {
            uploads::remove_unused_blob(service, &release.upload_digest).await?;
        }
    }
    Ok(())
}

async fn releases(service: &DeployService, service_environment: &ServiceEnvironment) -> Result<Vec<Release>, Problem> {
    let rows = unscoped!(
        "the platform's own work",
        "SELECT id, release_id, upload_digest FROM deployments WHERE service_id = :service_id \
         AND environment_id = :environment_id ORDER BY number DESC",
        service_id = service_environment.service_id,
        environment_id = service_environment.environment_id
    );
    service.store.read().all(rows).await
}

/// Deletes old releases, their sources, and the logs of old builds and instances of a service in an environment.
pub async fn prune(service: &DeployService, service_environment: &ServiceEnvironment) -> Result<(), Problem> {
    let mut kept = HashSet::new();
    let mut directories = Vec::new();
    let mut sources = Vec::new();
    for (n, release) in releases(service, service_environment).await?.into_iter().enumerate() {
        if n >= KEPT_BUILD_LOGS {
            directories.push(service.build_log(release.id));
        }
        let directory = service.release_directory(release.release_id);
        if kept.contains(&release.release_id) || !directory.exists() {
            continue;
        }
        if kept.len() <= KEPT_RELEASES || service_environment.active_deployment_id == Some(release.id) {
            kept.insert(release.release_id);
        } else {
            directories.push(directory);
            sources.push(release.upload_digest);
        }
    }
    let gone: Vec<_> = instances::of(service, service_environment).await?.into_iter().filter(|row| row.role == "gone").collect();
    let old = &gone[..gone.len().saturating_sub(KEPT_GONE_INSTANCES)];
    directories.extend(old.iter().map(|row| service.instance_log(&row.id)));
    directories.retain(|directory| directory.exists());
    remove_all(directories).await;
    if !old.is_empty() {
        let tx = service.store.begin().await?;
        for row in old {
            tx.run(unscoped!(
                "the platform's own work",
                "DELETE FROM instances WHERE id = :id AND role = 'gone'",
                id = row.id.as_str()
            ))
            .await?;
        }
        tx.commit().await?;
    }
    for digest in sources {
        uploads::remove_unused_blob(service, &digest).await?;
    }
    Ok(())
}

/// Deletes everything whose retention is over at `now`.
pub async fn purge(service: &DeployService, now: Timestamp) -> Result<(), Problem> {
    uploads::expire(service, now).await?;
    removal::purge(service, now).await?;
    for service_environment in service_environments::all(service).await? {
        prune(service, &service_environment).await?;
    }
    uploads::remove_orphans(service, now).await
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
