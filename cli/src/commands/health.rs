//! `capsule server health`: whether the server of a data directory can do its work.

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::server::data;
use crate::terminal::{Failure, Terminal};

/// A process that does not answer within this time is not healthy.
const ANSWER: Duration = Duration::from_secs(5);

/// Asks the processes of this host that use the data directory, or the one at an address, and no other.
pub fn health(directory: &Path, at: Option<&str>, terminal: Terminal) -> anyhow::Result<()> {
    let addresses = match at {
        Some(at) => vec![at.to_owned()],
        None => own(directory)?,
    };
    let mut all = Map::new();
    for address in addresses {
        all.insert(address.clone(), ask(&address)?);
    }
    // One process is told as it tells of itself.
    let shown = if all.len() == 1 { all.values().next().cloned().unwrap_or_default() } else { json!(all) };
    terminal.show(&shown, |_| "Everything it needs is there.".into())
}

/// Where the processes of this host with the data directory tell their health.
fn own(directory: &Path) -> anyhow::Result<Vec<String>> {
    data::accessible(directory, "server health")?;
    let here = data::host();
    let processes = data::running(directory).into_iter().filter(|process| process.host == here);
    let addresses: Vec<String> = processes.map(|process| process.private).collect();
    if addresses.is_empty() {
        let shown = directory.display();
        return Err(Failure::new("server_not_running", format!("No server runs here with the data directory {shown}."))
            .hint(format!("Start it: capsule server --data {shown}\nOr name a process's private address with --at."))
            .into());
    }
    Ok(addresses)
}

fn ask(address: &str) -> anyhow::Result<Value> {
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_global(Some(ANSWER)).http_status_as_error(false).proxy(None).build().into();
    // Of every address of the host, this one is reached from here.
    let reached = address.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:");
    let not_healthy = |why: String| Failure::new("not_healthy", format!("{address}: {why}"));
    let mut answer =
        agent.get(format!("http://{reached}/health/ready")).call().map_err(|error| not_healthy(error.to_string()))?;
    let told: Value = answer.body_mut().read_json().map_err(|error| not_healthy(error.to_string()))?;
    if answer.status() == 200 {
        return Ok(told);
    }
    let dependencies = told["dependencies"].as_object().into_iter().flatten();
    let missing: Vec<&str> = dependencies.filter(|(_, state)| *state != "ok").map(|(name, _)| name.as_str()).collect();
    Err(Failure::new("not_ready", format!("{address} is not ready; missing: {}", missing.join(", "))).into())
}
