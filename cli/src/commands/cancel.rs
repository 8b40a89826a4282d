//! `capsule cancel`: cancels a deployment in progress. The previous version stays live.

use std::time::{Duration, Instant};

use capsule_contracts::deploy::{Deployment, Status};
use serde_json::json;

use super::service;
use crate::arguments::ServiceArgs;
use crate::client::Client;
use crate::folder;
use crate::terminal::{Failure, Terminal};

/// How long to wait for the deployment to finish. A build step is killed, so this is short.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(15);

pub fn cancel(mut client: Client, args: &ServiceArgs, number: Option<i64>, terminal: Terminal) -> anyhow::Result<()> {
    let found = service::find(&mut client, &folder::resolve(args)?, terminal)?;
    let deployment = match number {
        Some(number) => service::deployment(&mut client, &found, number)?,
        None => {
            let in_progress = found.deployments(&mut client, 100)?.into_iter().find(|known| !known.status.is_settled());
            in_progress.ok_or_else(|| {
                let text = format!("No deployment of {} to {} is in progress.", found.service.name, found.environment);
                Failure::new("nothing_under_way", text).hint("`capsule status` lists the latest deployments.")
            })?
        }
    };
    found.announce(&client, terminal);
    let mut current: Deployment = client.post(&format!("/deployments/{}/cancel", deployment.id), &json!({}))?;
    let deadline = Instant::now() + CANCEL_TIMEOUT;
    while !current.status.is_settled() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
        current = client.get(&format!("/deployments/{}", deployment.id))?;
    }
    terminal.show(&current, |current| match current.status {
        Status::Cancelled => format!("Cancelled deployment {}. The previous version, if any, is still live.", current.number),
        status if status.is_settled() => {
            format!("Cannot cancel deployment {}: it is already {}.", current.number, status.name())
        }
        _ => format!("Cancelling deployment {}. `capsule status` shows when it has ended.", current.number),
    })
}
