//! What the control plane tells the ingress, over its Unix socket: one line of JSON each way.

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

/// How long a probe waits for an answer.
const PROBE: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Command {
    /// Who are you?
    Hello,
    /// Put this table in force, unless a newer one is.
    Apply { table: Table },
    /// Ask an instance of the table for a path, as a visitor would.
    Probe { instance: String, path: String },
    /// Wait until none of these instances is busy, at most so long.
    Drain { instances: Vec<String>, seconds: u64 },
    /// Finish what is under way and end.
    Shutdown,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    #[serde(default)]
    pub pid: u32,
    #[serde(default)]
    pub listen: String,
    /// See [`crate::build`].
    #[serde(default)]
    pub build: String,
    /// The revision in force.
    #[serde(default)]
    pub revision: u64,
    /// The status a probe was answered with.
    #[serde(default)]
    pub status: Option<u16>,
    /// How many requests are still under way after a drain.
    #[serde(default)]
    pub busy: usize,
    #[serde(default)]
    pub error: Option<String>,
}

/// What the control socket works on.
pub struct Control {
    pub balancer: Arc<Balancer>,
    pub probes: Arc<Pool>,
    pub listen: String,
    pub build: String,
    pub file: std::path::PathBuf,
    pub shutdown: tokio::sync::Notify,
}

impl Control {
    /// Answers the one request of a connection.
    pub async fn serve(&self, stream: UnixStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        (&mut stream).take(256 << 20).read_line(&mut line).await?;
        let reply = match serde_json::from_str(&line) {
            Ok(request) => self.answer(request).await,
            Err(error) => Reply { error: Some(format!("not understood: {error}")), ..Reply::default() },
        };
        let mut reply = serde_json::to_vec(&reply)?;
        reply.push(b'\n');
        stream.get_mut().write_all(&reply).await
    }

    async fn answer(&self, request: Command) -> Reply {
        let mut reply = Reply {
            pid: std::process::id(),
            listen: self.listen.clone(),
            build: self.build.clone(),
            revision: self.balancer.revision(),
            ..Reply::default()
        };
        match request {
            Command::Hello => {}
            Command::Shutdown => self.shutdown.notify_one(),
            Command::Apply { table } => match self.apply(table, &self.file) {
                Ok(revision) => reply.revision = revision,
                Err(error) => reply.error = Some(format!("the table cannot be kept: {error}")),
            },
            Command::Probe { instance, path } => match self.probe(&instance, &path).await {
                Ok(status) => reply.status = Some(status),
                Err(error) => reply.error = Some(error),
            },
            Command::Drain { instances, seconds } => {
                let busy = || instances.iter().map(|instance| self.balancer.in_flight(instance)).sum::<usize>();
                let deadline = Instant::now() + Duration::from_secs(seconds);
                while busy() > 0 && Instant::now() < deadline {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                reply.busy = busy();
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
        let path: PathAndQuery = path.parse().map_err(|error| format!("{path} is no path: {error}"))?;
        let mut request = Request::new(Outgoing::Empty);
        *request.uri_mut() = Uri::from(path);
        request.headers_mut().insert(header::HOST, HeaderValue::from_static("localhost"));
        request.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static("capsule-health-check"));
        // Over a connection of its own: it must find out whether one can be made.
        match tokio::time::timeout(PROBE, self.probes.send_afresh(request, &instance, None)).await {
            Ok(Ok((response, _))) => Ok(response.status().as_u16()),
            Ok(Err(failure)) => Err(failure.to_string()),
            Err(_) => Err(format!("no answer within {} s", PROBE.as_secs())),
        }
    }
}
