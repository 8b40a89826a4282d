//! `capsule status`: the state of a service in an environment.

use capsule_contracts::Timestamp;
use capsule_contracts::deploy::{Deployment, DiskUsage, ServiceState};
use capsule_contracts::quotas::OrganizationQuotas;
use serde_json::json;

use super::quotas::nearly_used_up;
use super::service;
use crate::arguments::ServiceArgs;
use crate::client::Client;
use crate::folder;
use crate::server::outdated_ingress;
use crate::terminal::{Terminal, table};

pub fn status(mut client: Client, args: &ServiceArgs, terminal: Terminal) -> anyhow::Result<()> {
    let found = service::find(&mut client, &folder::resolve(args)?, terminal)?;
    let state = found.state(&mut client)?;
    let deployments = found.deployments(&mut client, 5)?;
    // Only a user who can read the data directory can replace the ingress.
    let warnings: Vec<String> = client.directory().and_then(outdated_ingress).into_iter().collect();
    for warning in &warnings {
        crate::terminal::warn(warning);
    }
    // A server of an earlier version has no quotas. The status is shown without them.
    let quotas = client.get::<OrganizationQuotas>(&format!("/organizations/{}/quotas", found.service.organization_id));
    let quotas = quotas.map(|quotas| quotas.items).unwrap_or_default();
    let shown = json!({
        "service": found.service, "state": state, "deployments": deployments, "quotas": quotas, "warnings": warnings,
    });
    terminal.show(&shown, |_| {
        let warnings: String = state.warnings.iter().map(|warning| format!("warning: {warning}\n")).collect();
        let rest = tables(&state, &deployments);
        let mut text =
            format!("{} in {}: {}\n{}\n{warnings}{rest}", found.service.name, found.environment, state.state, state.url);
        let near = nearly_used_up(&quotas);
        if !near.is_empty() {
            text += &format!("\n\n{}\nShow all quotas: capsule quotas", near.join("\n"));
        }
        text
    })
}

fn tables(state: &ServiceState, deployments: &[Deployment]) -> String {
    let mut sections = Vec::new();
    if !state.instances.is_empty() {
        let rows: Vec<_> = state
            .instances
            .iter()
            .map(|instance| {
                vec![
                    instance.id.clone(),
                    instance.process.clone(),
                    instance.state.clone(),
                    instance.pid.map_or_else(String::new, |pid| pid.to_string()),
                    instance.memory_bytes.map_or_else(String::new, |bytes| format!("{} MiB", bytes >> 20)),
                    instance.disk.as_ref().map_or_else(String::new, |disk| format!("{} MiB", disk.bytes >> 20)),
                    instance.restarts.to_string(),
                    instance.started_at.map_or_else(String::new, age),
                ]
            })
            .collect();
        sections.push(table(&["INSTANCE", "PROCESS", "STATE", "PID", "MEMORY", "DISK", "RESTARTS", "AGE"], &rows));
        let exits = state
            .instances
            .iter()
            .filter_map(|instance| Some(format!("{} {} {}", instance.process, instance.id, instance.last_exit.as_ref()?)));
        sections.extend(exits);
        sections.extend(state.instances.iter().find_map(|instance| instance.disk.as_ref()).map(disk_limit));
        let mut warnings: Vec<&String> = state.instances.iter().flat_map(|instance| &instance.warnings).collect();
        warnings.sort();
        warnings.dedup();
        sections.extend(warnings.into_iter().map(|warning| format!("warning: {warning}")));
    }
    if !deployments.is_empty() {
        let rows: Vec<_> = deployments
            .iter()
            .map(|deployment| {
                let error = deployment.error.as_deref().unwrap_or_default().lines().next().unwrap_or_default().to_owned();
                vec![
                    deployment.number.to_string(),
                    deployment.status.name().into(),
                    deployment.trigger.clone(),
                    age(deployment.created_at),
                    error,
                ]
            })
            .collect();
        sections.push(table(&["DEPLOYMENT", "STATUS", "TRIGGER", "AGE", "ERROR"], &rows));
    }
    if sections.is_empty() { String::new() } else { format!("\n{}", sections.join("\n\n")) }
}

/// The disk limit of an instance, and how it is enforced.
fn disk_limit(disk: &DiskUsage) -> String {
    let how = match disk.enforcement.as_str() {
        "measured" => "measured: an instance that exceeds it is stopped".to_owned(),
        other => format!("by {other}"),
    };
    format!("disk limit of an instance: {} MiB, {} files and folders ({how})", disk.limit_bytes >> 20, disk.limit_inodes)
}

/// The time since `at`: `12s`, `5m`, `3h`, `2d`.
fn age(at: Timestamp) -> String {
    let seconds = (Timestamp::now().0 - at.0).max(0) / 1_000_000;
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}
