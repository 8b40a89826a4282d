//! The host's disk: what instances leave on it is removed, and a reserve of it is never given away.
//!
//! When the free space falls below the reserve, uploads and builds are refused, caches of builds are removed,
//! and whoever holds the most is evicted first, one at a time, as Kubernetes does under disk pressure.

use std::collections::HashSet;

use capsule_builder::DiskReserve;
use capsule_contracts::Problem;

use crate::{Deploys, instances};

/// Who holds less is not evicted: that would free nothing to speak of.
const WORTH_EVICTING: u64 = 16 << 20;

/// Refuses what would take room while the disk has less free than the reserve.
pub fn check_reserve(deploys: &Deploys) -> Result<(), Problem> {
    reserve(deploys).check().map_err(|error| Problem::insufficient_storage(error.to_string()))
}

/// The reserve of the disk that holds this server's data.
pub fn reserve(deploys: &Deploys) -> DiskReserve {
    DiskReserve::new(&deploys.options.data, deploys.options.disk_reserve_bytes)
}

fn is_short(deploys: &Deploys) -> bool {
    reserve(deploys).check().is_err()
}

/// Frees room while the disk has less free than the reserve: caches first, then whoever holds the most.
pub async fn keep_reserve(deploys: &Deploys) {
    if !is_short(deploys) {
        return;
    }
    let caches = deploys.options.data.join("cache");
    let _ = tokio::task::spawn_blocking(move || capsule_builder::evict(&caches, 0)).await;
    if !is_short(deploys) {
        return;
    }
    let mut held = Vec::new();
    for name in deploys.runtime.list().unwrap_or_default() {
        if let Some(disk) = deploys.runtime.status(&name).await.and_then(|status| status.disk) {
            held.push((disk.usage.bytes, name));
        }
    }
    let reserve = deploys.options.disk_reserve_bytes >> 20;
    for (bytes, name) in biggest_offenders(held) {
        let reason = format!("held {} MiB while the server had less than {reserve} MiB of disk free", bytes >> 20);
        match deploys.runtime.evict(&name, &reason).await {
            Ok(true) => {
                tracing::warn!(instance = name, bytes, "the disk has less free than disk.reserve_mib: an instance was evicted");
                return;
            }
            // It ends already, or ended: the next one is evicted.
            Ok(false) => {}
            Err(error) => tracing::warn!(instance = name, %error, "it could not be evicted"),
        }
    }
}

/// Whoever holds enough to be worth an eviction, the most first.
fn biggest_offenders(mut held: Vec<(u64, String)>) -> Vec<(u64, String)> {
    held.retain(|(bytes, _)| *bytes >= WORTH_EVICTING);
    held.sort_unstable();
    held.reverse();
    held
}

/// Removes the layers of instances that are gone, and of build steps whose shim is.
pub async fn remove_layers(deploys: &Deploys) -> Result<(), Problem> {
    // The folder is read first: a row is written before its instance has layers.
    let Ok(entries) = std::fs::read_dir(&deploys.builder.layers) else { return Ok(()) };
    let names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    if names.is_empty() {
        return Ok(());
    }
    let live: HashSet<String> = instances::live(deploys).await?.into_iter().map(|instance| instance.id).collect();
    for name in names.into_iter().filter(|name| !live.contains(name)) {
        // A shim that still answers uses them; one of a build step may not answer yet.
        let socket = deploys.runtime.run_directory().join(format!("{name}.sock"));
        if deploys.runtime.status(&name).await.is_some() || socket.exists() || is_new(deploys, &name) {
            continue;
        }
        let path = deploys.builder.layers.join(&name);
        let removed = tokio::task::spawn_blocking(move || capsule_builder::trees::remove(&path)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(instance = name, %error, "the layers of an instance that is gone cannot be removed; trying again");
        }
    }
    Ok(())
}

/// Whether a folder of layers was made within the last minute: its shim may still be starting.
fn is_new(deploys: &Deploys, name: &str) -> bool {
    let made = std::fs::metadata(deploys.builder.layers.join(name)).and_then(|folder| folder.modified());
    name.starts_with('b') && made.is_ok_and(|made| made.elapsed().is_ok_and(|age| age.as_secs() < 60))
}

#[cfg(test)]
mod tests {
    use super::biggest_offenders;

    #[test]
    fn whoever_holds_the_most_is_evicted_first_and_nobody_for_a_trifle() {
        let held = |all: &[(u64, &str)]| {
            let offenders = biggest_offenders(all.iter().map(|(mib, name)| (mib << 20, (*name).to_owned())).collect());
            offenders.into_iter().map(|(_, name)| name).collect::<Vec<_>>()
        };
        assert_eq!(held(&[(20, "small"), (700, "large"), (30, "other")]), ["large", "other", "small"]);
        assert_eq!(held(&[(700, "only"), (3, "small")]), ["only"]);
        assert!(held(&[(1, "small"), (15, "other")]).is_empty());
        assert!(held(&[]).is_empty());
    }
}
