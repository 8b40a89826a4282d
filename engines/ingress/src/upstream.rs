//! Connections to backends: to instances, through their shims, and to the gateway.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;

use crate::balance::InFlightGuard;
use crate::stream::{GuardedStream, StreamGuard};

/// The name of the gateway among the backends. No instance has this name.
pub const GATEWAY: &str = "";

/// How long a request waits for a permit to connect.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The most bytes of a response up to the end of its final head, informational (1xx) responses included.
const MAX_PRE_BODY_BYTES: usize = 256 << 10;
/// The most informational (1xx) responses to one request.
const MAX_INFORMATIONAL: usize = 16;

/// Connects to backends.
#[derive(Clone, Debug)]
pub struct Connector {
    /// The directory of the shims' sockets.
    pub instances: PathBuf,
    /// The directory of the gateways' sockets.
    pub gateways: PathBuf,
}

/// Why the connection to a backend failed.
#[derive(Debug)]
pub enum ConnectError {
    /// The backend does not accept connections in time, or too many requests wait to connect to it.
    Saturated,
    /// The backend does not exist or refuses the connection.
    Io(io::Error),
}

impl std::fmt::Display for ConnectError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Saturated => f.write_str("the backend does not accept connections"),
            Self::Io(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ConnectError {}

impl Connector {
    /// Connects to the backend of a request. The number of simultaneous attempts per backend is limited.
    pub async fn connect(&self, backend: &InFlightGuard) -> Result<Upstream, ConnectError> {
        let permit = tokio::time::timeout(PERMIT_TIMEOUT, backend.permit_to_connect()).await;
        let Ok(Ok(permit)) = permit else { return Err(ConnectError::Saturated) };
        let (connector, instance, port) = (self.clone(), backend.instance.clone(), backend.port);
        // In a task of its own: the attempt occupies the shim, and must hold its permit, even after the visitor has left.
        let connecting = tokio::spawn(async move {
            let _permit = permit;
            let connected = async {
                let stream = if &*instance == GATEWAY {
                    Either::Right(connect_gateway(&connector.gateways).await.map_err(ConnectError::Io)?)
                } else {
                    Either::Left(connector.instance(&instance, port).await?)
                };
                Ok(Upstream::new(stream, Arc::default()))
            };
            tokio::time::timeout(CONNECT_TIMEOUT, connected).await.unwrap_or(Err(ConnectError::Saturated))
        });
        connecting.await.unwrap_or_else(|error| Err(ConnectError::Io(io::Error::other(error))))
    }

    async fn instance(&self, name: &str, port: u16) -> Result<TcpStream, ConnectError> {
        let made = async {
            let stream = capsule_runtime::connect(&self.instances, name, port).await?;
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            TcpStream::from_std(stream)
        };
        made.await.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => ConnectError::Saturated,
            _ => ConnectError::Io(error),
        })
    }
}

/// Connects to a gateway that accepts, round robin.
async fn connect_gateway(gateways: &Path) -> io::Result<UnixStream> {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    let mut sockets: Vec<PathBuf> = std::fs::read_dir(gateways)?.flatten().map(|entry| entry.path()).collect();
    sockets.sort();
    let turn = TURN.fetch_add(1, Ordering::Relaxed) % sockets.len().max(1);
    sockets.rotate_left(turn);
    for socket in sockets {
        // A gateway that was killed leaves its socket behind.
        if let Ok(stream) = UnixStream::connect(socket).await {
            return Ok(stream);
        }
    }
    Err(io::ErrorKind::NotConnected.into())
}

/// Limits what a connection reads before the final head of the present response is complete.
#[derive(Debug, Default)]
pub struct Exchange {
    awaits_head: AtomicBool,
    bytes: AtomicUsize,
    informational: AtomicUsize,
}

impl Exchange {
    /// Resets the counters: a request is about to be sent.
    pub fn begin(&self) {
        self.bytes.store(0, Ordering::Relaxed);
        self.informational.store(0, Ordering::Relaxed);
        self.awaits_head.store(true, Ordering::Relaxed);
    }

    /// Counts an informational (1xx) response.
    pub fn count_informational(&self) {
        self.informational.fetch_add(1, Ordering::Relaxed);
    }

    /// Stops counting: the final head was read.
    pub fn end_of_head(&self) {
        self.awaits_head.store(false, Ordering::Relaxed);
    }

    /// Whether no byte of a response has been read.
    pub fn is_untouched(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) == 0
    }

    /// Whether the backend has reached a limit before the final head.
    fn is_exceeded(&self) -> bool {
        self.awaits_head.load(Ordering::Relaxed)
            && (self.bytes.load(Ordering::Relaxed) >= MAX_PRE_BODY_BYTES
                || self.informational.load(Ordering::Relaxed) > MAX_INFORMATIONAL)
    }
}

impl StreamGuard for Arc<Exchange> {
    fn check_read(&self) -> io::Result<()> {
        if self.is_exceeded() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the backend sent too many bytes before the final response head",
            ));
        }
        Ok(())
    }

    fn record_read(&mut self, bytes: &[u8]) {
        if self.awaits_head.load(Ordering::Relaxed) {
            self.bytes.fetch_add(bytes.len(), Ordering::Relaxed);
        }
    }
}

/// A connection to an instance or to the gateway. Its guard is shared with the task that sends requests over it.
pub type Upstream = GuardedStream<Either<TcpStream, UnixStream>, Arc<Exchange>>;
