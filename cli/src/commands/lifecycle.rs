//! `capsule restart`, `stop`, `start` and `rollback`.

use std::process::ExitCode;

use anyhow::bail;
use capsule_contracts::deploy::Deployment;
use serde_json::json;

use super::deploy::follow;
use super::service;
use crate::arguments::ServiceArgs;
use crate::client::Client;
use crate::folder;
use crate::terminal::Terminal;

pub fn restart(client: Client, args: &ServiceArgs, terminal: Terminal) -> anyhow::Result<ExitCode> {
    deploy_again(client, args, "restart", terminal)
}

pub fn start(client: Client, args: &ServiceArgs, terminal: Terminal) -> anyhow::Result<ExitCode> {
    deploy_again(client, args, "start", terminal)
}

/// Runs an action that deploys the service's release again, and follows that deployment.
fn deploy_again(mut client: Client, args: &ServiceArgs, action: &str, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let found = service::find(&mut client, &folder::resolve(args)?, terminal)?;
    found.announce(&client, terminal);
    found.act(&mut client, action)?;
    match found.deployments(&mut client, 1)?.first() {
        Some(deployment) => follow(&mut client, deployment, terminal),
        None => bail!("{} was never deployed to {}. Deploy it first: capsule deploy", found.service.name, found.environment),
    }
}

pub fn stop(mut client: Client, args: &ServiceArgs, terminal: Terminal) -> anyhow::Result<()> {
    let found = service::find(&mut client, &folder::resolve(args)?, terminal)?;
    found.announce(&client, terminal);
    let state = found.act(&mut client, "stop")?;
    terminal.show(&state, |_| format!("Stopped {} in {}.", found.service.name, found.environment))
}

pub fn rollback(mut client: Client, args: &ServiceArgs, number: Option<i64>, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let found = service::find(&mut client, &folder::resolve(args)?, terminal)?;
    found.announce(&client, terminal);
    let body = json!({"environment": found.environment, "number": number});
    let deployment: Deployment = client.post(&format!("/services/{}/rollback", found.service.id), &body)?;
    follow(&mut client, &deployment, terminal)
}
