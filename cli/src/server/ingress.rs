//! Detects and replaces an outdated ingress. The ingress outlives the server, so it may have other settings or be of
//! another build than the one that the server would start.

use std::path::Path;
use std::time::{Duration, Instant};

use capsule_ingress::{Client, Hello};
use serde::Serialize;

use super::data::{self, Running};
use crate::terminal::Failure;

/// How long a new ingress may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The ingress that ended, and the one that replaced it.
#[derive(Debug, Serialize)]
pub struct Replaced {
    /// The process that ended; `None` if there was none.
    pub ended: Option<u32>,
    /// The new process; `None` if no server is running to start one.
    pub pid: Option<u32>,
    pub listen: Option<String>,
}

/// The command that replaces the ingress, and its effect on connections.
pub fn how_to_replace(directory: &Path) -> String {
    format!(
        "Replace it: capsule server replace-ingress --data {} (requests in flight finish, connections that last longer \
         than 30 s are closed, and new connections are refused for a few seconds).",
        directory.display()
    )
}

fn client(directory: &Path) -> Client {
    Client::new(&directory.join("run/ingress.sock"))
}

fn block_on<T>(work: impl Future<Output = T>) -> std::io::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work))
}

/// The server process that manages the ingress of a data directory.
fn manager(directory: &Path) -> Option<Running> {
    data::running(directory).into_iter().find(|process| process.public.is_some())
}

/// A warning if the ingress of a data directory differs from the one that its server would start, with the command that
/// replaces it.
pub fn outdated_ingress(directory: &Path) -> Option<String> {
    let manager = manager(directory)?;
    let hello = block_on(client(directory).hello()).ok()?.ok()?;
    let outdated = hello.outdated_reason(manager.listen.parse().ok()?, &manager.build)?;
    Some(format!("{outdated} {}", how_to_replace(directory)))
}

/// Stops the ingress of a data directory and waits until the server has started a new one, with its settings and build.
///
/// # Errors
/// When the ingress cannot be stopped, or the new one does not start in time.
pub fn replace_ingress(directory: &Path) -> anyhow::Result<Replaced> {
    data::accessible(directory, "server replace-ingress")?;
    let directory = directory.canonicalize()?;
    let client = client(&directory);
    let ended = block_on(async {
        let ended = client.hello().await.ok().map(|hello| hello.pid);
        match ended {
            Some(_) => client.shutdown().await.map(|()| ended),
            None => Ok(None),
        }
    })??;
    if manager(&directory).is_none() {
        return Ok(Replaced { ended, pid: None, listen: None });
    }
    let started = block_on(wait_for_other(&client, ended))?.ok_or_else(|| {
        Failure::new("ingress_did_not_start", "The old ingress has ended, but no new one has started.").hint(format!(
            "The server retries every few seconds. See {} for the reason.",
            directory.join("logs/ingress.log").display()
        ))
    })?;
    Ok(Replaced { ended, pid: Some(started.pid), listen: Some(started.listen) })
}

/// Waits for an ingress with another process id than `ended`.
async fn wait_for_other(client: &Client, ended: Option<u32>) -> Option<Hello> {
    let deadline = Instant::now() + START_TIMEOUT;
    while Instant::now() < deadline {
        if let Ok(hello) = client.hello().await
            && Some(hello.pid) != ended
        {
            return Some(hello);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    None
}
