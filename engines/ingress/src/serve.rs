//! The ingress process: its listeners, and its life.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::task::TaskTracker;

use crate::balance::Balancer;
use crate::control::Control;
use crate::proxy::Proxy;
use crate::table::Table;
use crate::upstream::Connector;

/// Idle connections to instances are given up before common servers (5 s) close them themselves.
const IDLE: Duration = Duration::from_secs(3);
/// How long a visitor may take to send a request's headers.
const HEADERS: Duration = Duration::from_secs(30);
/// How long requests under way may take when the ingress is told to end.
const GOODBYE: Duration = Duration::from_secs(30);

/// Where the ingress listens and what it talks to.
#[derive(Clone, Debug)]
pub struct Options {
    /// The public address.
    pub listen: SocketAddr,
    /// The control socket.
    pub control: PathBuf,
    /// Where the shims' sockets lie.
    pub instances: PathBuf,
    /// The gateway's socket.
    pub gateway: PathBuf,
    /// Where the table is kept.
    pub table: PathBuf,
}

/// Runs the ingress until it is told to end.
///
/// # Errors
/// When it cannot listen.
pub async fn run(options: Options) -> std::io::Result<()> {
    let listener = TcpListener::bind(options.listen)
        .await
        .map_err(|error| std::io::Error::new(error.kind(), format!("cannot listen on {}: {error}", options.listen)))?;
    let address = listener.local_addr()?;
    let _ = std::fs::remove_file(&options.control);
    let commands = UnixListener::bind(&options.control)?;

    let balancer = Arc::new(Balancer::default());
    balancer.apply(Table::load(&options.table));
    let connector = Connector { instances: options.instances, gateway: options.gateway };
    let mut builder = hyper_util::client::legacy::Client::builder(TokioExecutor::new());
    builder.pool_timer(TokioTimer::new()).pool_idle_timeout(IDLE).pool_max_idle_per_host(256);
    let client = builder.build(connector.clone());
    let fresh = builder.pool_max_idle_per_host(0).build(connector);
    let proxy = Arc::new(Proxy { balancer: balancer.clone(), client, fresh: fresh.clone() });
    // A probe takes a connection of its own: it must find out whether one can be made.
    let probes = fresh;
    let control = Arc::new(Control {
        balancer,
        probes,
        listen: address.to_string(),
        file: options.table,
        shutdown: tokio::sync::Notify::new(),
    });

    let served = TaskTracker::new();
    let ending = tokio_util::sync::CancellationToken::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, peer)) = accepted else {
                    // Out of descriptors, most likely: others will be closed soon.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let _ = stream.set_nodelay(true);
                let (proxy, ending) = (proxy.clone(), ending.clone());
                served.spawn(async move {
                    let service = service_fn(move |request| {
                        let proxy = proxy.clone();
                        async move { Ok::<_, std::convert::Infallible>(proxy.handle(request, peer.ip()).await) }
                    });
                    let connection = hyper::server::conn::http1::Builder::new()
                        .timer(TokioTimer::new())
                        .header_read_timeout(HEADERS)
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades();
                    let mut connection = std::pin::pin!(connection);
                    tokio::select! {
                        _ = connection.as_mut() => {}
                        () = ending.cancelled() => {
                            connection.as_mut().graceful_shutdown();
                            let _ = connection.await;
                        }
                    }
                });
            }
            accepted = commands.accept() => {
                if let Ok((stream, _)) = accepted {
                    let control = control.clone();
                    tokio::spawn(async move { control.serve(stream).await });
                }
            }
            () = control.shutdown.notified() => break,
        }
    }
    drop(listener);
    let _ = std::fs::remove_file(&options.control);
    ending.cancel();
    served.close();
    let _ = tokio::time::timeout(GOODBYE, served.wait()).await;
    Ok(())
}
