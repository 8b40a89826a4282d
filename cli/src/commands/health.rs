//! `capsule server health`: whether the processes of a server are ready.

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::server::data;
use crate::terminal::{Failure, Terminal};

/// A process that does not answer within this time is not healthy.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Shows the health of the processes on this host that use the data directory, or of the one at an address.
///
/// # Errors
/// When a process is not ready or does not answer.
pub fn health(directory: &Path, at: Option<&str>, terminal: Terminal) -> anyhow::Result<()> {
    let addresses = match at {
        Some(at) => vec![at.to_owned()],
        None => local_addresses(directory)?,
    };
    let mut all = Map::new();
    for address in addresses {
        all.insert(address.clone(), fetch(&address)?);
    }
    // The health of a single process is shown as the process reports it.
    let shown = if all.len() == 1 { all.values().next().cloned().unwrap_or_default() } else { json!(all) };
    terminal.show(&shown, |_| "Healthy: every dependency is available.".into())
}

/// The private addresses of the processes on this host that use the data directory.
fn local_addresses(directory: &Path) -> anyhow::Result<Vec<String>> {
    data::accessible(directory, "server health")?;
    let host = data::host();
    let processes = data::running(directory).into_iter().filter(|process| process.host == host);
    let addresses: Vec<String> = processes.map(|process| process.private).collect();
    if addresses.is_empty() {
        let shown = directory.display();
        return Err(Failure::new(
            "server_not_running",
            format!("No server is running on this host with the data directory {shown}."),
        )
        .hint(format!("Start it: capsule server --data {shown}\nTo check another process, give its private address with --at."))
        .into());
    }
    Ok(addresses)
}

fn fetch(address: &str) -> anyhow::Result<Value> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(REQUEST_TIMEOUT))
        .http_status_as_error(false)
        .proxy(None)
        .build()
        .into();
    // An unspecified address is reached through loopback.
    let target = address.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:");
    let not_healthy = |why: String| Failure::new("not_healthy", format!("{address} is not healthy: {why}"));
    let mut response =
        agent.get(format!("http://{target}/health/ready")).call().map_err(|error| not_healthy(error.to_string()))?;
    let health: Value = response.body_mut().read_json().map_err(|error| not_healthy(error.to_string()))?;
    if response.status() == 200 {
        return Ok(health);
    }
    let dependencies = health["dependencies"].as_object().into_iter().flatten();
    let missing: Vec<&str> = dependencies.filter(|(_, state)| *state != "ok").map(|(name, _)| name.as_str()).collect();
    Err(Failure::new("not_ready", format!("{address} is not ready. Unavailable: {}.", missing.join(", "))).into())
}
