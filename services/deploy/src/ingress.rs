//! The ingress process: found again if it runs, started if it does not.

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

/// How long the ingress may take to come up.
const START: Duration = Duration::from_secs(10);

/// The ingress as the control plane sees it.
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
    /// Not looked for yet.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        Self {
            client: Client::new(&options.data.join("run/ingress.sock")),
            // It is soon started again, and found again as soon.
            guard: Guard::new(Policy { retries: 1, rest: Duration::from_secs(1), ..Policy::new("The ingress") }),
            program: options.program.clone(),
            data: options.data.clone(),
            listen: options.listen,
            port: AtomicU16::new(options.listen.port()),
        }
    }

    /// Who it is.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn hello(&self) -> Result<Hello, Problem> {
        self.guard.call(|| self.client.hello()).await
    }

    /// Puts a table in force; returns the revision in force then.
    ///
    /// # Errors
    /// When it does not answer, or cannot keep the table.
    pub async fn apply(&self, table: &Table) -> Result<u64, Problem> {
        self.guard.call(|| self.client.apply(table.clone())).await
    }

    /// Asks an instance for `path` as visitors do; the HTTP status it answered, or why not.
    ///
    /// # Errors
    /// When the ingress does not answer.
    pub async fn probe(&self, instance: &str, path: &str) -> Result<Result<u16, String>, Problem> {
        self.guard.call(|| self.client.probe(instance, path)).await
    }

    /// Waits until an instance is done with its requests, for so many seconds at the most: a deadline of its own.
    ///
    /// # Errors
    /// When the ingress does not answer.
    pub async fn drain(&self, instance: &str, seconds: u64) -> Result<(), Problem> {
        let drained = self.client.drain(vec![instance.to_owned()], seconds).await;
        drained.map(drop).map_err(|error| Problem::unavailable(format!("The ingress does not answer: {error}.")))
    }

    /// The port it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.load(Ordering::Relaxed)
    }

    /// How the ingress that runs differs from the one that would be started now: it outlives the server, its settings
    /// and its binary.
    pub async fn outdated(&self) -> Option<String> {
        self.client.hello().await.ok()?.outdated(self.listen, &capsule_ingress::build())
    }

    /// Makes sure that it runs.
    ///
    /// # Errors
    /// When it does not come up: most often, because something else listens on its address.
    pub async fn ensure(&self) -> std::io::Result<()> {
        if self.find().await {
            return Ok(());
        }
        // Several processes may look for it at once: one of them starts it. Freed with the file.
        let lock = std::fs::File::create(self.data.join("run/ingress.lock"))?;
        let _lock = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock)).await.map_err(std::io::Error::other)??;
        if self.find().await {
            return Ok(());
        }
        std::fs::create_dir_all(self.data.join("logs"))?;
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.data.join("logs/ingress.log"))?;
        // Where any port will do, the one it had before stays its port, so that addresses given out stay true.
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
        let deadline = Instant::now() + START;
        loop {
            if self.find().await {
                tokio::spawn(async move { child.wait().await });
                return Ok(());
            }
            if let Some(status) = child.try_wait()? {
                let log = std::fs::read_to_string(self.data.join("logs/ingress.log")).unwrap_or_default();
                let why = log.lines().last().map_or_else(|| status.to_string(), str::to_owned);
                return Err(std::io::Error::other(why));
            }
            if Instant::now() > deadline {
                return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "it did not come up"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn find(&self) -> bool {
        let Ok(hello) = self.client.hello().await else {
            return false;
        };
        if let Ok(address) = hello.listen.parse::<SocketAddr>() {
            self.port.store(address.port(), Ordering::Relaxed);
        }
        true
    }
}
