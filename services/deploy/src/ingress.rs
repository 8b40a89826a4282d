//! The ingress process: starts it unless it runs, and sends requests to it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use capsule_contracts::Problem;
use capsule_ingress::{Client, Hello, Table};
use capsule_resilience::{Guard, Policy};
use tokio::process::Command;

use crate::Options;

/// The time for the ingress to start.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of the ingress process, which also starts it.
#[derive(Debug)]
pub struct Ingress {
    client: Client,
    guard: Guard,
    program: PathBuf,
    data: PathBuf,
    listen: SocketAddr,
    port: AtomicU16,
}

impl Ingress {
    /// Creates a client. Connects to nothing yet.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        Self {
            client: Client::new(&options.data.join("run/ingress.sock")),
            // The reconciler soon restarts an ingress that ended, so the circuit breaker closes soon.
            guard: Guard::new(Policy { retries: 1, open_duration: Duration::from_secs(1), ..Policy::new("The ingress") }),
            program: options.program.clone(),
            data: options.data.clone(),
            listen: options.listen,
            port: AtomicU16::new(options.listen.port()),
        }
    }

    /// The address, build and table revision of the running ingress.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn hello(&self) -> Result<Hello, Problem> {
        self.guard.call(|| self.client.hello()).await
    }

    /// Applies a routing table. Returns the revision that is then in force.
    ///
    /// # Errors
    /// If it does not answer, or cannot store the table.
    pub async fn apply(&self, table: &Table) -> Result<u64, Problem> {
        self.guard.call(|| self.client.apply(table.clone())).await
    }

    /// Sends a GET request for `path` to an instance, as visitors do. Returns its HTTP status, or why there is none.
    ///
    /// # Errors
    /// If the ingress does not answer.
    pub async fn probe(&self, instance: &str, path: &str) -> Result<Result<u16, String>, Problem> {
        self.guard.call(|| self.client.probe(instance, path)).await
    }

    /// Waits until an instance has no in-flight requests, for at most `seconds`. The guard's deadline does not apply.
    ///
    /// # Errors
    /// If the ingress does not answer.
    pub async fn drain(&self, instance: &str, seconds: u64) -> Result<(), Problem> {
        let drained = self.client.drain(vec![instance.to_owned()], seconds).await;
        drained.map(drop).map_err(|error| Problem::unavailable(format!("The ingress does not answer: {error}.")))
    }

    /// The port on which the ingress listens.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.load(Ordering::Relaxed)
    }

    /// How the running ingress differs from the one that would be started now: it outlives the server that started it, with
    /// its settings and binary.
    pub async fn outdated(&self) -> Option<String> {
        self.client.hello().await.ok()?.outdated_reason(self.listen, &capsule_ingress::build_id())
    }

    /// Starts the ingress unless it runs.
    ///
    /// # Errors
    /// If it does not start: most often, because another program listens on its address.
    pub async fn ensure(&self) -> std::io::Result<()> {
        if self.is_running().await {
            return Ok(());
        }
        // One of several processes starts it. Closing the file releases the lock.
        let lock = std::fs::File::create(self.data.join("run/ingress.lock"))?;
        let _lock = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock)).await.map_err(std::io::Error::other)??;
        if self.is_running().await {
            return Ok(());
        }
        std::fs::create_dir_all(self.data.join("logs"))?;
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.data.join("logs/ingress.log"))?;
        // With port 0, a restarted ingress keeps its port, so that URLs stay valid.
        let listen = if self.listen.port() == 0 { SocketAddr::new(self.listen.ip(), self.port()) } else { self.listen };
        let mut child = Command::new(&self.program)
            .arg("ingress")
            .arg("--data")
            .arg(&self.data)
            .arg("--listen")
            .arg(listen.to_string())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()?;
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if self.is_running().await {
                tokio::spawn(async move { child.wait().await });
                return Ok(());
            }
            if let Some(status) = child.try_wait()? {
                let log = std::fs::read_to_string(self.data.join("logs/ingress.log")).unwrap_or_default();
                let why = log.lines().last().map_or_else(|| status.to_string(), str::to_owned);
                return Err(std::io::Error::other(why));
            }
            if Instant::now() > deadline {
                return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "it did not start in time"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn is_running(&self) -> bool {
        let Ok(hello) = self.client.hello().await else {
            return false;
        };
        if let Ok(address) = hello.listen.parse::<SocketAddr>() {
            self.port.store(address.port(), Ordering::Relaxed);
        }
        true
    }
}
