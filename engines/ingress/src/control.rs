//! The control protocol of the ingress: over its Unix socket, one line of JSON in each direction.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Uri, header};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::balance::Balancer;
use crate::body::Outgoing;
use crate::pool::Pool;
use crate::table::Table;

/// How long a probe waits for a response.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Command {
    /// Report the process and its table.
    Hello,
    /// Replace the routing table, unless a newer one is in force.
    Apply { table: Table },
    /// Send a GET request for a path to an instance of the table.
    Probe { instance: String, path: String },
    /// Wait until no request to these instances is in flight, at most this long.
    Drain { instances: Vec<String>, seconds: u64 },
    /// Finish the requests in flight and exit.
    Shutdown,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    #[serde(default)]
    pub pid: u32,
    #[serde(default)]
    pub listen: String,
    /// See [`crate::build_id`].
    #[serde(default)]
    pub build: String,
    /// The revision in force.
    #[serde(default)]
    pub revision: u64,
    /// The HTTP status of a probe's response.
    #[serde(default)]
    pub status: Option<u16>,
    /// The requests still in flight after a drain.
    #[serde(default, rename = "busy")]
    pub in_flight: usize,
    #[serde(default)]
    pub error: Option<String>,
}

/// The server side of the control socket.
pub struct Control {
    pub balancer: Arc<Balancer>,
    pub probes: Arc<Pool>,
    pub listen: String,
    pub build: String,
    /// The file that the routing table is saved to.
    pub file: std::path::PathBuf,
    pub shutdown: tokio::sync::Notify,
}

impl Control {
    /// Handles the one command of a connection.
    pub async fn serve(&self, stream: UnixStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        (&mut stream).take(256 << 20).read_line(&mut line).await?;
        let reply = match serde_json::from_str(&line) {
            Ok(command) => self.handle(command).await,
            Err(error) => Reply { error: Some(format!("invalid command: {error}")), ..Reply::default() },
        };
        let mut reply = serde_json::to_vec(&reply)?;
        reply.push(b'\n');
        stream.get_mut().write_all(&reply).await
    }

    async fn handle(&self, command: Command) -> Reply {
        let mut reply = Reply {
            pid: std::process::id(),
            listen: self.listen.clone(),
            build: self.build.clone(),
            revision: self.balancer.revision(),
            ..Reply::default()
        };
        match command {
            Command::Hello => {}
            Command::Shutdown => self.shutdown.notify_one(),
            Command::Apply { table } => match self.apply(table, &self.file) {
                Ok(revision) => reply.revision = revision,
                Err(error) => reply.error = Some(format!("cannot save the routing table to {}: {error}", self.file.display())),
            },
            Command::Probe { instance, path } => match self.probe(&instance, &path).await {
                Ok(status) => reply.status = Some(status),
                Err(error) => reply.error = Some(error),
            },
            Command::Drain { instances, seconds } => {
                let in_flight = || instances.iter().map(|instance| self.balancer.in_flight(instance)).sum::<usize>();
                let deadline = Instant::now() + Duration::from_secs(seconds);
                while in_flight() > 0 && Instant::now() < deadline {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                reply.in_flight = in_flight();
            }
        }
        reply
    }

    fn apply(&self, table: Table, file: &Path) -> std::io::Result<u64> {
        if table.revision > self.balancer.revision() {
            table.save(file)?;
            self.balancer.apply(table);
        }
        Ok(self.balancer.revision())
    }

    async fn probe(&self, instance: &str, path: &str) -> Result<u16, String> {
        let instance = self.balancer.instance(instance).ok_or("the instance is not in the routing table")?;
        let path: PathAndQuery = path.parse().map_err(|error| format!("invalid path {path:?}: {error}"))?;
        let mut request = Request::new(Outgoing::Empty);
        *request.uri_mut() = Uri::from(path);
        request.headers_mut().insert(header::HOST, HeaderValue::from_static("localhost"));
        request.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static("capsule-health-check"));
        // A new connection, since a probe also has to find out whether the instance accepts one.
        match tokio::time::timeout(PROBE_TIMEOUT, self.probes.send_over_new_connection(request, &instance, None)).await {
            Ok(Ok((response, _))) => Ok(response.status().as_u16()),
            Ok(Err(failure)) => Err(failure.to_string()),
            Err(_) => Err(format!("no response within {} s", PROBE_TIMEOUT.as_secs())),
        }
    }
}
