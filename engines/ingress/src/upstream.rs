//! Connections to what lies behind the ingress: instances, by their shims, and the gateway.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use http::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;

/// The host part of a URI that leads to the gateway.
pub const GATEWAY: &str = "gateway";

/// Makes connections: a URI's host is an instance's name, or [`GATEWAY`].
#[derive(Clone, Debug)]
pub struct Connector {
    /// Where the shims' sockets lie.
    pub instances: PathBuf,
    /// Where the gateways' sockets lie.
    pub gateways: PathBuf,
}

/// A connection to an instance or to the gateway.
#[derive(Debug)]
pub struct Upstream {
    stream: TokioIo<Either<TcpStream, UnixStream>>,
    served: Served,
}

impl Upstream {
    fn new(stream: Either<TcpStream, UnixStream>) -> Self {
        Self { stream: TokioIo::new(stream), served: Served::default() }
    }
}

/// Whether a connection has served a request; travels with responses and errors.
#[derive(Clone, Debug, Default)]
pub struct Served(Arc<AtomicBool>);

impl Served {
    pub fn mark(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_marked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl tower::Service<Uri> for Connector {
    type Response = Upstream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Upstream>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let Self { instances, gateways } = self.clone();
        Box::pin(async move {
            let host = uri.host().unwrap_or_default().to_owned();
            if host == GATEWAY {
                return Ok(Upstream::new(Either::Right(any(&gateways).await?)));
            }
            let port = uri.port_u16().unwrap_or(80);
            let connect = move || capsule_runtime::connect(&instances, &host, port);
            let stream = tokio::task::spawn_blocking(connect).await.map_err(io::Error::other)??;
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            Ok(Upstream::new(Either::Left(TcpStream::from_std(stream)?)))
        })
    }
}

/// Connects to any gateway that answers, to each as often as to the others.
async fn any(gateways: &Path) -> io::Result<UnixStream> {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    let mut sockets: Vec<PathBuf> = std::fs::read_dir(gateways)?.flatten().map(|entry| entry.path()).collect();
    sockets.sort();
    let turn = TURN.fetch_add(1, Ordering::Relaxed) % sockets.len().max(1);
    sockets.rotate_left(turn);
    for socket in sockets {
        // One that was killed leaves its socket behind.
        if let Ok(stream) = UnixStream::connect(socket).await {
            return Ok(stream);
        }
    }
    Err(io::ErrorKind::NotConnected.into())
}

impl Connection for Upstream {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.served.clone())
    }
}

impl Read for Upstream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl Write for Upstream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
}
