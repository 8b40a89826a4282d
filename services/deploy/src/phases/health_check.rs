//! Asks each candidate through the ingress, as a visitor would, until it answers well. Processes
//! that take no requests are well when they have run for a moment.

use std::time::{Duration, Instant};

use capsule_builder::say;
use capsule_runtime::logs::Reader;
use capsule_runtime::{ShimState, ShimStatus};

use super::Failure;
use crate::deployments::Row;
use crate::instances::WEB;
use crate::placements::Placement;
use crate::{Deploys, instances};

/// A process that takes no requests has to run this long.
const STEADY: Duration = Duration::from_secs(1);
/// After this many ends by itself, an instance is not waited for any longer.
const MOST_RESTARTS: u32 = 2;

pub async fn run(deploys: &Deploys, placement: &Placement, row: &Row) -> Result<(), Failure> {
    let path = row.plan()?.networking.health_check;
    for candidate in instances::candidates(deploys, placement, row).await? {
        let outcome = wait_for(deploys, &candidate, path.as_deref()).await?;
        if let Err(why) = outcome {
            show_output(deploys, row, &candidate);
            return Err(Failure::Failed(format!("the {} process did not become healthy: {why}", candidate.process)));
        }
    }
    Ok(())
}

async fn wait_for(deploys: &Deploys, candidate: &instances::Row, path: Option<&str>) -> Result<Result<(), String>, Failure> {
    let deadline = Instant::now() + Duration::from_secs(deploys.options.health_seconds);
    let mut pause = Duration::from_millis(20);
    let mut last = String::from("it did not answer");
    loop {
        let Some(status) = deploys.runtime.status(&candidate.id).await else {
            instances::start(deploys, candidate).await?;
            continue;
        };
        if status.restarts > MOST_RESTARTS {
            return Ok(Err(format!("it {} again and again", status.last_exit.unwrap_or_else(|| "ended".into()))));
        }
        if candidate.process == WEB {
            match deploys.ingress.probe(&candidate.id, path.unwrap_or("/")).await {
                // A path that was named must be answered well; otherwise any answer but a failure will do.
                Ok(Ok(code)) if code < 400 || (path.is_none() && code < 500) => return Ok(Ok(())),
                Ok(Ok(code)) => last = format!("{} was answered with status {code}", path.unwrap_or("/")),
                Ok(Err(why)) => last = format!("port {}: {why}", candidate.port),
                Err(error) => last = error.detail,
            }
        } else if is_steady(&status) {
            return Ok(Ok(()));
        }
        if Instant::now() > deadline {
            let hint = if candidate.process == WEB { "; it must listen on the port in the variable PORT" } else { "" };
            return Ok(Err(format!("{last}, for {} s{hint}", deploys.options.health_seconds)));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

fn is_steady(status: &ShimStatus) -> bool {
    let now = capsule_contracts::Timestamp::now().0;
    status.state == ShimState::Running && now - status.started_at >= i64::try_from(STEADY.as_micros()).unwrap_or(i64::MAX)
}

/// Puts the last of what a candidate said into the deployment's log, where its user looks.
fn show_output(deploys: &Deploys, row: &Row, candidate: &instances::Row) {
    let lines = Reader::new(&deploys.instance_log(&candidate.id)).read(10_000).unwrap_or_default();
    let log = deploys.build_log(row.id);
    for line in lines.iter().skip(lines.len().saturating_sub(20)) {
        let _ = say(&log, &format!("{}: {}", candidate.process, line.text));
    }
}
