//! `capsule server down`: stops the server, the instances and the ingress of a data directory.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use capsule_runtime::ProcessRuntime;
use rustix::process::{Pid, Signal, kill_process};

use super::data;
use crate::terminal::Failure;

/// How long a server may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Stops every process of a data directory. The data is kept. Returns the number of stopped instances.
///
/// # Errors
/// When a process cannot be signalled, or the server does not stop in time.
pub fn down(directory: &Path) -> anyhow::Result<usize> {
    data::accessible(directory, "server down")?;
    let directory =
        directory.canonicalize().with_context(|| format!("cannot open the data directory {}", directory.display()))?;
    for process in data::running(&directory).into_iter().filter(|process| process.host == data::host()) {
        let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw).context("the server's process id is malformed")?;
        let signalled = kill_process(pid, Signal::TERM);
        if signalled == Err(rustix::io::Errno::SRCH) {
            continue;
        }
        signalled.map_err(|error| {
            Failure::new("not_your_server", format!("Cannot stop process {}: {error}.", process.pid)).hint(format!(
                "It runs as another user. Stop it as root: sudo capsule server down --data {}",
                directory.display()
            ))
        })?;
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    while data::is_claimed(&directory) {
        if Instant::now() > deadline {
            bail!(
                "The server did not stop within 20 seconds. Check its log, or kill it with SIGKILL: applications keep running, and the next start continues from there."
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let runtime = ProcessRuntime::new(directory.join("run/i"), std::env::current_exe()?)?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let names = runtime.list()?;
        let mut stopping = tokio::task::JoinSet::new();
        for name in &names {
            let (runtime, name) = (runtime.clone(), name.clone());
            stopping.spawn(async move { runtime.stop(&name).await });
        }
        while let Some(stopped) = stopping.join_next().await {
            stopped??;
        }
        let ingress = capsule_ingress::Client::new(&directory.join("run/ingress.sock"));
        // An error means that no ingress is running.
        let _ = ingress.shutdown().await;
        Ok(names.len())
    })
}
