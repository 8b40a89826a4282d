//! The host's disk: layers of instances that are gone are deleted, and a reserve of free space is kept.
//!
//! When the free space falls below the reserve, uploads and builds are refused and build caches are deleted. If that is
//! not enough, instances are evicted one at a time, the largest first, as Kubernetes does under disk pressure.

use std::collections::HashSet;

use capsule_builder::DiskReserve;
use capsule_contracts::Problem;

use crate::{DeployService, instances};

/// Instances that use less disk are not evicted.
const MIN_EVICTABLE_BYTES: u64 = 16 << 20;

/// Fails while the free disk space is below the reserve.
pub fn check_reserve(service: &DeployService) -> Result<(), Problem> {
    reserve(service).check().map_err(|error| Problem::insufficient_storage(error.to_string()))
}

/// The reserve of the disk with the data directory.
pub fn reserve(service: &DeployService) -> DiskReserve {
    DiskReserve::new(&service.options.data, service.options.disk_reserve_bytes)
}

fn is_below_reserve(service: &DeployService) -> bool {
    reserve(service).check().is_err()
}

/// Frees disk space while it is below the reserve: build caches first, then the largest instance or build step.
pub async fn keep_reserve(service: &DeployService) {
    if !is_below_reserve(service) {
        return;
    }
    let caches = service.options.data.join("cache");
    let _ = tokio::task::spawn_blocking(move || capsule_builder::evict(&caches, 0)).await;
    if !is_below_reserve(service) {
        return;
    }
    let mut used = Vec::new();
    for name in service.runtime.list().unwrap_or_default() {
        if let Some(disk) = service.runtime.status(&name).await.and_then(|status| status.disk) {
            used.push((disk.usage.bytes, name));
        }
    }
    let reserve = service.options.disk_reserve_bytes >> 20;
    for (bytes, name) in eviction_candidates(used) {
        let reason = format!("used {} MiB of disk while the server had less than {reserve} MiB free", bytes >> 20);
        match service.runtime.evict(&name, &reason).await {
            Ok(true) => {
                tracing::warn!(instance = name, bytes, "free disk space is below disk.reserve_mib; an instance was evicted");
                return;
            }
            // It is stopping or gone: evict the next one.
            Ok(false) => {}
            Err(error) => tracing::warn!(instance = name, %error, "cannot evict an instance"),
        }
    }
}

/// The instances that use at least [`MIN_EVICTABLE_BYTES`], the largest first.
fn eviction_candidates(mut used: Vec<(u64, String)>) -> Vec<(u64, String)> {
    used.retain(|(bytes, _)| *bytes >= MIN_EVICTABLE_BYTES);
    used.sort_unstable();
    used.reverse();
    used
}

/// Deletes the layers of instances that are gone, and of build steps whose shim is gone.
pub async fn remove_layers(service: &DeployService) -> Result<(), Problem> {
    // The directory is read first: a row is written before its instance has layers.
    let Ok(entries) = std::fs::read_dir(&service.builder.layers) else { return Ok(()) };
    let names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    if names.is_empty() {
        return Ok(());
    }
    let live: HashSet<String> = instances::live(service).await?.into_iter().map(|instance| instance.id).collect();
    for name in names.into_iter().filter(|name| !live.contains(name)) {
        // A shim that answers uses the layers; that of a new build step may not answer yet.
        let socket = service.runtime.run_directory().join(format!("{name}.sock"));
        if service.runtime.status(&name).await.is_some() || socket.exists() || is_new(service, &name) {
            continue;
        }
        let path = service.builder.layers.join(&name);
        let removed = tokio::task::spawn_blocking(move || capsule_builder::trees::remove(&path)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(instance = name, %error, "cannot delete the layers of an instance that is gone; trying again");
        }
    }
    Ok(())
}

/// Whether the layers of a build step were created within the last minute: its shim may still be starting.
fn is_new(service: &DeployService, name: &str) -> bool {
    let created = std::fs::metadata(service.builder.layers.join(name)).and_then(|metadata| metadata.modified());
    name.starts_with('b') && created.is_ok_and(|created| created.elapsed().is_ok_and(|age| age.as_secs() < 60))
}

#[cfg(test)]
mod tests {
    use super::eviction_candidates;

    #[test]
    fn the_largest_instance_is_evicted_first_and_small_ones_are_not() {
        let evicted = |all: &[(u64, &str)]| {
            let candidates = eviction_candidates(all.iter().map(|(mib, name)| (mib << 20, (*name).to_owned())).collect());
            candidates.into_iter().map(|(_, name)| name).collect::<Vec<_>>()
        };
        assert_eq!(evicted(&[(20, "small"), (700, "large"), (30, "other")]), ["large", "other", "small"]);
        assert_eq!(evicted(&[(700, "only"), (3, "small")]), ["only"]);
        assert!(evicted(&[(1, "small"), (15, "other")]).is_empty());
        assert!(evicted(&[]).is_empty());
    }
}
