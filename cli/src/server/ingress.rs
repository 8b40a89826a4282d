//! The ingress outlives the server, its settings and its binary. Here it is found out whether it is still the one
//! that the server would start, and it is replaced.

use std::path::Path;
use std::time::{Duration, Instant};

use capsule_ingress::{Client, Hello};
use serde::Serialize;

use super::data::{self, Running};
use crate::terminal::Failure;

/// A new ingress may take this long to come up.
const START: Duration = Duration::from_secs(60);

/// An ingress that ended, and the one that took its place.
#[derive(Debug, Serialize)]
pub struct Replaced {
    /// The process that ended; nothing if none ran.
    pub ended: Option<u32>,
    /// The process that serves now; nothing where no server runs to start one.
    pub pid: Option<u32>,
    pub listen: Option<String>,
}

/// The exact command, and what it does to visitors.
pub fn how_to_replace(directory: &Path) -> String {
    format!(
        "Replace it: capsule server replace-ingress --data {} (requests under way are finished, connections that last \
         longer than 30 s end, and for a few seconds new ones are refused).",
        directory.display()
    )
}

fn client(directory: &Path) -> Client {
    Client::new(&directory.join("run/ingress.sock"))
}

fn block_on<T>(work: impl Future<Output = T>) -> std::io::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work))
}

/// The process that keeps the ingress of a data directory.
fn keeper(directory: &Path) -> Option<Running> {
    data::running(directory).into_iter().find(|process| process.public.is_some())
}

/// How the ingress of a data directory differs from the one that its server would start, and how it is replaced.
pub fn outdated_ingress(directory: &Path) -> Option<String> {
    let keeper = keeper(directory)?;
    let hello = block_on(client(directory).hello()).ok()?.ok()?;
    let outdated = hello.outdated(keeper.listen.parse().ok()?, &keeper.build)?;
    Some(format!("{outdated} {}", how_to_replace(directory)))
}

/// Ends the ingress of a data directory. The server starts another, with its settings and of its build.
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
    if keeper(&directory).is_none() {
        return Ok(Replaced { ended, pid: None, listen: None });
    }
    let now = block_on(another(&client, ended))?.ok_or_else(|| {
        Failure::new("ingress_did_not_start", "The old ingress has ended, and no new one answers.")
            .hint(format!("The server tries every few seconds. Why it fails: {}", directory.join("logs/ingress.log").display()))
    })?;
    Ok(Replaced { ended, pid: Some(now.pid), listen: Some(now.listen) })
}

/// Waits for an ingress that is another process.
async fn another(client: &Client, ended: Option<u32>) -> Option<Hello> {
    let deadline = Instant::now() + START;
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
