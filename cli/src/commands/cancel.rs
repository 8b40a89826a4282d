//! `capsule cancel`: a deployment that is under way ends; what ran before keeps running.

use std::time::{Duration, Instant};

use capsule_contracts::deploy::{Deployment, Status};
use serde_json::json;

use super::service;
use crate::arguments::At;
use crate::client::Client;
use crate::folder;
use crate::terminal::{Failure, Terminal};

/// A build step is killed, so the end is near.
const END: Duration = Duration::from_secs(15);

pub fn cancel(mut client: Client, at: &At, number: Option<i64>, terminal: Terminal) -> anyhow::Result<()> {
    let found = service::find(&mut client, &folder::known(at)?, terminal)?;
    let deployment = match number {
        Some(number) => service::deployment(&mut client, &found, number)?,
        None => {
            let under_way = found.deployments(&mut client, 100)?.into_iter().find(|known| !known.status.is_settled());
            under_way.ok_or_else(|| {
                let text = format!("No deployment of {} to {} is under way.", found.service.name, found.environment);
                Failure::new("nothing_under_way", text).hint("`capsule status` lists the deployments.")
            })?
        }
    };
    found.announce(&client, terminal);
    let mut now: Deployment = client.post(&format!("/deployments/{}/cancel", deployment.id), &json!({}))?;
    let deadline = Instant::now() + END;
    while !now.status.is_settled() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
        now = client.get(&format!("/deployments/{}", deployment.id))?;
    }
    terminal.show(&now, |now| match now.status {
        Status::Cancelled => format!("Cancelled deployment {}. An earlier version, if there is one, is still live.", now.number),
        status if status.is_settled() => {
            format!("Deployment {} could not be cancelled: it is already {}.", now.number, status.name())
        }
        _ => format!("Deployment {} is being cancelled.", now.number),
    })
}
