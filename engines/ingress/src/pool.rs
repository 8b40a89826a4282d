//! The idle connections of a thread to its backends, and the sending of requests over them.
//!
//! A connection carries one request at a time, so all bytes that it reads belong to the response to that request.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::{Request, Response};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;

use crate::balance::InFlightGuard;
use crate::body::Outgoing;
use crate::stream::MAX_HEAD_BYTES;
use crate::upstream::{ConnectError, Connector, Exchange};
use crate::visitor::Upload;

/// How long a connection stays idle. Shorter than the keep-alive timeout of common servers (5 s).
const IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// The most idle connections to one backend.
const MAX_IDLE_CONNECTIONS: usize = 256;
/// The response timeout of the gateway is this many times that of an application: the gateway has its own deadlines for
/// each part of a request, which are shorter together.
const GATEWAY_TIMEOUT_FACTOR: u32 = 5;
/// The bytes of a request's body that a visitor must send within each response timeout.
const MIN_UPLOAD_BYTES: u64 = 4 << 10;

/// Why there is no response.
#[derive(Debug)]
pub enum Failure {
    /// The backend accepts no connections at the moment.
    Saturated,
    /// The backend does not exist or refuses connections.
    Unreachable(std::io::Error),
    /// The backend did not send a response in time.
    Timeout,
    /// The backend's response is not valid HTTP.
    Malformed(hyper::Error),
    /// The backend switched protocols without an upgrade request.
    UnexpectedUpgrade,
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Saturated => Self::Saturated,
            ConnectError::Io(error) => Self::Unreachable(error),
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Saturated => f.write_str("the instance does not accept connections"),
            Self::Unreachable(error) => error.fmt(f),
            Self::Timeout => f.write_str("the instance did not respond in time"),
            Self::UnexpectedUpgrade => f.write_str("the instance switched protocols without an upgrade request"),
            Self::Malformed(error) => {
                let mut cause: &dyn std::error::Error = error;
                while let Some(deeper) = cause.source() {
                    cause = deeper;
                }
                write!(f, "{cause}")
            }
        }
    }
}

/// The connections of one thread to its backends.
#[derive(Debug)]
pub struct Pool {
    connector: Connector,
    timeout: Duration,
    idle: Mutex<Idle>,
}

#[derive(Debug, Default)]
struct Idle {
    connections: HashMap<Arc<str>, Vec<IdleConnection>>,
    /// Whether a task runs that closes expired connections.
    is_swept: bool,
}

#[derive(Debug)]
struct IdleConnection {
    connection: Connection,
    since: Instant,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Outgoing>,
    exchange: Arc<Exchange>,
}

/// The connection that carries a response. [`Lease::release`] returns it to the pool.
#[derive(Debug)]
pub struct Lease {
    connection: Connection,
    backend: Arc<str>,
    pool: Arc<Pool>,
}

impl Pool {
    /// Creates an empty pool. A backend must send the head of a response within `timeout`.
    pub fn new(connector: Connector, timeout: Duration) -> Arc<Self> {
        Arc::new(Self { connector, timeout, idle: Mutex::default() })
    }

    /// Sends a request, over an idle connection if there is one. If the backend has closed that connection meanwhile, a
    /// request that was not sent, or that is idempotent (RFC 9110, section 9.2.2), is sent again over a new one.
    pub async fn send(
        self: &Arc<Self>,
        request: Request<Outgoing>,
        backend: &InFlightGuard,
        upload: Option<&Upload>,
    ) -> Result<(Response<Incoming>, Lease), Failure> {
        let Some(mut connection) = self.take(&backend.instance) else {
            return self.send_over_new_connection(request, backend, upload).await;
        };
        let copy = (request.method().is_idempotent() && request.body().is_end_stream()).then(|| {
            let mut copy = Request::new(Outgoing::Empty);
            *copy.method_mut() = request.method().clone();
            *copy.uri_mut() = request.uri().clone();
            *copy.headers_mut() = request.headers().clone();
            copy
        });
        match self.send_over(&mut connection, request, upload, backend.is_gateway()).await {
            Ok(response) => Ok((response, self.lease(connection, backend))),
            Err((failure, unsent)) => match unsent.or(copy) {
                Some(request) if matches!(failure, Failure::Malformed(_)) && connection.exchange.is_untouched() => {
                    self.send_over_new_connection(request, backend, upload).await
                }
                _ => Err(failure),
            },
        }
    }

    /// Sends a request over a new connection.
    pub async fn send_over_new_connection(
        self: &Arc<Self>,
        request: Request<Outgoing>,
        backend: &InFlightGuard,
        upload: Option<&Upload>,
    ) -> Result<(Response<Incoming>, Lease), Failure> {
        let upstream = self.connector.connect(backend).await?;
        let exchange = upstream.guard().clone();
        let (sender, connection) = hyper::client::conn::http1::Builder::new()
            .max_buf_size(MAX_HEAD_BYTES)
            .max_header_size(MAX_HEAD_BYTES)
            .handshake(TokioIo::new(upstream))
            .await
            .map_err(Failure::Malformed)?;
        tokio::spawn(connection.with_upgrades());
        let mut connection = Connection { sender, exchange };
        connection.sender.ready().await.map_err(Failure::Malformed)?;
        match self.send_over(&mut connection, request, upload, backend.is_gateway()).await {
            Ok(response) => Ok((response, self.lease(connection, backend))),
            Err((failure, _)) => Err(failure),
        }
    }

    async fn send_over(
        &self,
        connection: &mut Connection,
        mut request: Request<Outgoing>,
        upload: Option<&Upload>,
        is_gateway: bool,
    ) -> Result<Response<Incoming>, (Failure, Option<Request<Outgoing>>)> {
        let Connection { sender, exchange } = connection;
        exchange.begin();
        let counted = exchange.clone();
        hyper::ext::on_informational(&mut request, move |_| counted.count_informational());
        let timeout = self.timeout * if is_gateway { GATEWAY_TIMEOUT_FACTOR } else { 1 };
        let mut sent = std::pin::pin!(sender.try_send_request(request));
        loop {
            let uploaded = upload.map_or(0, Upload::bytes);
            match tokio::time::timeout(timeout, sent.as_mut()).await {
                Ok(Ok(response)) => {
                    exchange.end_of_head();
                    return Ok(response);
                }
                Ok(Err(mut error)) => {
                    let unsent = error.take_message();
                    return Err((Failure::Malformed(error.into_error()), unsent));
                }
                // The timeout begins again while the visitor still sends the request.
                Err(_) if upload.is_some_and(|upload| upload.bytes() - uploaded >= MIN_UPLOAD_BYTES) => {}
                Err(_) => return Err((Failure::Timeout, None)),
            }
        }
    }

    fn lease(self: &Arc<Self>, connection: Connection, backend: &InFlightGuard) -> Lease {
        Lease { connection, backend: backend.instance.clone(), pool: self.clone() }
    }

    fn take(&self, backend: &str) -> Option<Connection> {
        let mut idle = self.idle();
        let connections = idle.connections.get_mut(backend)?;
        while let Some(IdleConnection { connection, since }) = connections.pop() {
            if connection.sender.is_ready() && since.elapsed() < IDLE_TIMEOUT {
                return Some(connection);
            }
        }
        None
    }

    fn put(self: &Arc<Self>, backend: Arc<str>, connection: Connection) {
        let mut idle = self.idle();
        let connections = idle.connections.entry(backend).or_default();
        if connections.len() < MAX_IDLE_CONNECTIONS {
            connections.push(IdleConnection { connection, since: Instant::now() });
        }
        if !std::mem::replace(&mut idle.is_swept, true) {
            tokio::spawn(sweep(Arc::downgrade(self)));
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes expired connections, until none is idle.
async fn sweep(pool: std::sync::Weak<Pool>) {
    loop {
        tokio::time::sleep(IDLE_TIMEOUT / 3).await;
        let Some(pool) = pool.upgrade() else { return };
        let mut idle = pool.idle();
        idle.connections.retain(|_, connections| {
            connections.retain(|idle| idle.since.elapsed() < IDLE_TIMEOUT && !idle.connection.sender.is_closed());
            !connections.is_empty()
        });
        if idle.connections.is_empty() {
            idle.is_swept = false;
            return;
        }
    }
}

impl Lease {
    /// Returns the connection to the pool. The response must have been read to its end.
    pub fn release(self) {
        let Self { mut connection, backend, pool } = self;
        if connection.sender.is_ready() {
            pool.put(backend, connection);
        } else if !connection.sender.is_closed() && tokio::runtime::Handle::try_current().is_ok() {
            tokio::spawn(async move {
                if let Ok(Ok(())) = tokio::time::timeout(IDLE_TIMEOUT, connection.sender.ready()).await {
                    pool.put(backend, connection);
                }
            });
        }
    }
}
