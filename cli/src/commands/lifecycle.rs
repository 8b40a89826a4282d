//! A service's instances replaced, stopped, started, taken back.

use std::process::ExitCode;

use anyhow::bail;
use capsule_contracts::deploy::Deployment;
use serde_json::json;

use super::deploy::follow;
use super::service;
use crate::arguments::At;
use crate::client::Client;
use crate::folder;
use crate::terminal::Terminal;

pub fn restart(client: Client, at: &At, terminal: Terminal) -> anyhow::Result<ExitCode> {
    run_anew(client, at, "restart", terminal)
}

pub fn start(client: Client, at: &At, terminal: Terminal) -> anyhow::Result<ExitCode> {
    run_anew(client, at, "start", terminal)
}

/// Tells the server to run a service's release anew, and shows the deployment that this makes.
fn run_anew(mut client: Client, at: &At, verb: &str, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let found = service::find(&mut client, &folder::known(at)?, terminal)?;
    found.announce(&client, terminal);
    found.tell(&mut client, verb)?;
    match found.deployments(&mut client, 1)?.first() {
        Some(deployment) => follow(&mut client, deployment, terminal),
        None => bail!("{} was never deployed to {}", found.service.name, found.environment),
    }
}

pub fn stop(mut client: Client, at: &At, terminal: Terminal) -> anyhow::Result<()> {
    let found = service::find(&mut client, &folder::known(at)?, terminal)?;
    found.announce(&client, terminal);
    let state = found.tell(&mut client, "stop")?;
    terminal.show(&state, |_| format!("Stopped {} in {}.", found.service.name, found.environment))
}

pub fn rollback(mut client: Client, at: &At, number: Option<i64>, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let found = service::find(&mut client, &folder::known(at)?, terminal)?;
    found.announce(&client, terminal);
    let body = json!({"environment": found.environment, "number": number});
    let deployment: Deployment = client.post(&format!("/services/{}/rollback", found.service.id), &body)?;
    follow(&mut client, &deployment, terminal)
}
