//! The connections that a thread keeps to its backends, and the sending of requests over them.
//!
//! A connection belongs to one request at a time, so what it reads is known to belong to the response to it.

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

/// Idle connections to instances are given up before common servers (5 s) close them themselves.
const IDLE: Duration = Duration::from_secs(3);
/// The most idle connections to one backend.
const MOST_IDLE: usize = 256;
/// The gateway has deadlines of its own, one for each part of a request; together they are shorter than so many times
/// that of an application.
const GATEWAY_FACTOR: u32 = 5;
/// A visitor who sends less than this in the time that a backend has to answer is given up.
const LEAST_UPLOAD: u64 = 4 << 10;

/// Why there is no response.
#[derive(Debug)]
pub enum Failure {
    /// No connection can be made at the moment.
    Saturated,
    /// The backend is not there.
    Unreachable(std::io::Error),
    /// It did not answer in time.
    Timeout,
    /// It did not answer as HTTP wants it.
    Malformed(hyper::Error),
    /// It switched to another protocol, which nobody had asked for.
    Unasked,
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
            Self::Saturated => f.write_str("it does not accept connections"),
            Self::Unreachable(error) => error.fmt(f),
            Self::Timeout => f.write_str("it did not answer in time"),
            Self::Unasked => f.write_str("it switched protocols unasked"),
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

/// A pool of connections.
#[derive(Debug)]
pub struct Pool {
    connector: Connector,
    timeout: Duration,
    idle: Mutex<Idle>,
}

#[derive(Debug, Default)]
struct Idle {
    kept: HashMap<Arc<str>, Vec<Kept>>,
    /// Whether a task removes what is idle too long.
    is_swept: bool,
}

#[derive(Debug)]
struct Kept {
    connection: Connection,
    since: Instant,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Outgoing>,
    exchange: Arc<Exchange>,
}

/// The connection that a response comes over; kept for the next request when it is done.
#[derive(Debug)]
pub struct Lease {
    connection: Connection,
    backend: Arc<str>,
    pool: Arc<Pool>,
}

impl Pool {
    /// A pool without connections. A backend has `timeout` to answer.
    pub fn new(connector: Connector, timeout: Duration) -> Arc<Self> {
        Arc::new(Self { connector, timeout, idle: Mutex::default() })
    }

    /// Sends a request. A kept connection may turn out to have been closed by its other end just now:
    /// then a request that was not sent, or may be sent twice (RFC 9110, section 9.2.2), is sent over a new one.
    pub async fn send(
        self: &Arc<Self>,
        request: Request<Outgoing>,
        backend: &InFlightGuard,
        upload: Option<&Upload>,
    ) -> Result<(Response<Incoming>, Lease), Failure> {
        let Some(mut kept) = self.take(&backend.instance) else {
            return self.send_afresh(request, backend, upload).await;
        };
        let copy = (request.method().is_idempotent() && request.body().is_end_stream()).then(|| {
            let mut copy = Request::new(Outgoing::Empty);
            *copy.method_mut() = request.method().clone();
            *copy.uri_mut() = request.uri().clone();
            *copy.headers_mut() = request.headers().clone();
            copy
        });
        match self.send_over(&mut kept, request, upload, backend.is_gateway()).await {
            Ok(response) => Ok((response, self.lease(kept, backend))),
            Err((failure, unsent)) => match unsent.or(copy) {
                Some(request) if matches!(failure, Failure::Malformed(_)) && kept.exchange.is_untouched() => {
                    self.send_afresh(request, backend, upload).await
                }
                _ => Err(failure),
            },
        }
    }

    /// Sends a request over a connection of its own.
    pub async fn send_afresh(
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
        let timeout = self.timeout * if is_gateway { GATEWAY_FACTOR } else { 1 };
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
                // The time to answer begins when the request has been sent.
                Err(_) if upload.is_some_and(|upload| upload.bytes() - uploaded >= LEAST_UPLOAD) => {}
                Err(_) => return Err((Failure::Timeout, None)),
            }
        }
    }

    fn lease(self: &Arc<Self>, connection: Connection, backend: &InFlightGuard) -> Lease {
        Lease { connection, backend: backend.instance.clone(), pool: self.clone() }
    }

    fn take(&self, backend: &str) -> Option<Connection> {
        let mut idle = self.idle();
        let kept = idle.kept.get_mut(backend)?;
        while let Some(Kept { connection, since }) = kept.pop() {
            if connection.sender.is_ready() && since.elapsed() < IDLE {
                return Some(connection);
            }
        }
        None
    }

    fn put(self: &Arc<Self>, backend: Arc<str>, connection: Connection) {
        let mut idle = self.idle();
        let kept = idle.kept.entry(backend).or_default();
        if kept.len() < MOST_IDLE {
            kept.push(Kept { connection, since: Instant::now() });
        }
        if !std::mem::replace(&mut idle.is_swept, true) {
            tokio::spawn(sweep(Arc::downgrade(self)));
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes what is idle too long, until nothing is idle.
async fn sweep(pool: std::sync::Weak<Pool>) {
    loop {
        tokio::time::sleep(IDLE / 3).await;
        let Some(pool) = pool.upgrade() else { return };
        let mut idle = pool.idle();
        idle.kept.retain(|_, kept| {
            kept.retain(|kept| kept.since.elapsed() < IDLE && !kept.connection.sender.is_closed());
            !kept.is_empty()
        });
        if idle.kept.is_empty() {
            idle.is_swept = false;
            return;
        }
    }
}

impl Lease {
    /// The response was read to its end: the connection is free for another request.
    pub fn release(self) {
        let Self { mut connection, backend, pool } = self;
        if connection.sender.is_ready() {
            pool.put(backend, connection);
        } else if !connection.sender.is_closed() && tokio::runtime::Handle::try_current().is_ok() {
            tokio::spawn(async move {
                if let Ok(Ok(())) = tokio::time::timeout(IDLE, connection.sender.ready()).await {
                    pool.put(backend, connection);
                }
            });
        }
    }
}
