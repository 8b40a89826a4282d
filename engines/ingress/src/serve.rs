//! The ingress process: its listeners and its threads.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::balance::Balancer;
use crate::control::Control;
use crate::pool::Pool;
use crate::proxy::{Proxy, Visitor};
use crate::sites::Sites;
use crate::stream::MAX_HEAD_BYTES;
use crate::table::Table;
use crate::upstream::Connector;
use crate::visitor::{VisitorGuard, VisitorStream};

/// How long a visitor may take to send the head of a request.
const REQUEST_HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long in-flight requests may take once the ingress shuts down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

/// The settings of an ingress.
#[derive(Clone, Debug)]
pub struct Options {
    /// The public address.
    pub listen: SocketAddr,
    /// The control socket.
    pub control: PathBuf,
    /// The directory of the shims' sockets.
    pub instances: PathBuf,
    /// The directory of the gateways' sockets, one or more.
    pub gateways: PathBuf,
    /// The file that the routing table is saved to.
    pub table: PathBuf,
    /// The most requests in flight to one backend.
    pub max_in_flight: usize,
    /// How long a backend may take to send the head of a response.
    pub response_timeout: Duration,
}

/// Runs the ingress until it receives a shutdown command. One thread accepts connections and serves the control
/// socket; one worker thread per core serves visitors. The threads share only the routing table.
///
/// # Errors
/// When it cannot listen on its address or its control socket.
pub fn run(options: Options) -> std::io::Result<()> {
    single_threaded()?.block_on(accept(options))
}

fn single_threaded() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

async fn accept(options: Options) -> std::io::Result<()> {
    let listener = TcpListener::bind(options.listen)
        .await
        .map_err(|error| std::io::Error::new(error.kind(), format!("cannot listen on {}: {error}", options.listen)))?;
    let address = listener.local_addr()?;
    let _ = std::fs::remove_file(&options.control);
    let commands = UnixListener::bind(&options.control)?;

    let balancer = Arc::new(Balancer::new(options.max_in_flight));
    balancer.apply(Table::load(&options.table));
    let connector = Connector { instances: options.instances, gateways: options.gateways };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers: Vec<Worker> = (0..cores)
        .map(|_| Worker::start(balancer.clone(), connector.clone(), options.response_timeout))
        .collect::<std::io::Result<_>>()?;
    let control = Arc::new(Control {
        balancer,
        probes: Pool::new(connector, options.response_timeout),
        listen: address.to_string(),
        build: crate::build_id(),
        file: options.table,
        shutdown: tokio::sync::Notify::new(),
    });

    let mut next = 0;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted.and_then(|(stream, peer)| Ok((stream.into_std()?, peer.ip()))) {
                Ok(visitor) => {
                    next = (next + 1) % workers.len();
                    let _ = workers[next].visitors.send(visitor);
                }
                // Most likely out of file descriptors: others will be closed soon.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
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
    // Not on this thread, which still has to send the reply to the shutdown command.
    tokio::task::spawn_blocking(move || workers.into_iter().for_each(Worker::shut_down)).await.map_err(std::io::Error::other)
}

/// A thread that serves visitors. It owns their connections, and its connections to backends.
struct Worker {
    visitors: mpsc::UnboundedSender<(std::net::TcpStream, IpAddr)>,
    thread: JoinHandle<()>,
}

impl Worker {
    fn start(balancer: Arc<Balancer>, connector: Connector, response_timeout: Duration) -> std::io::Result<Self> {
        let runtime = single_threaded()?;
        let (visitors, accepted) = mpsc::unbounded_channel();
        let work = move || runtime.block_on(serve(accepted, balancer, connector, response_timeout));
        let thread = std::thread::Builder::new().name("worker".into()).spawn(work)?;
        Ok(Self { visitors, thread })
    }

    /// Takes no more visitors, and returns once the present ones are served or [`SHUTDOWN_TIMEOUT`] is over.
    fn shut_down(self) {
        drop(self.visitors);
        let _ = self.thread.join();
    }
}

async fn serve(
    mut accepted: mpsc::UnboundedReceiver<(std::net::TcpStream, IpAddr)>,
    balancer: Arc<Balancer>,
    connector: Connector,
    response_timeout: Duration,
) {
    let proxy = Arc::new(Proxy { balancer, pool: Pool::new(connector, response_timeout), sites: Sites::default() });
    let (connections, shutdown) = (TaskTracker::new(), CancellationToken::new());
    while let Some((stream, peer)) = accepted.recv().await {
        let _ = stream.set_nodelay(true);
        let Ok(stream) = TcpStream::from_std(stream) else { continue };
        let (proxy, shutdown) = (proxy.clone(), shutdown.clone());
        connections.spawn(async move {
            let stream = VisitorStream::new(stream, VisitorGuard::default());
            let visitor = Arc::new(Visitor { peer, heads: stream.guard().heads() });
            let service = service_fn(move |request| {
                let (proxy, visitor) = (proxy.clone(), visitor.clone());
                async move { Ok::<_, std::convert::Infallible>(proxy.handle(request, &visitor).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST_HEAD_TIMEOUT)
                .max_buf_size(MAX_HEAD_BYTES)
                .max_header_size(MAX_HEAD_BYTES)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            let mut connection = std::pin::pin!(connection);
            tokio::select! {
                _ = connection.as_mut() => {}
                () = shutdown.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    let _ = connection.await;
                }
            }
        });
    }
    shutdown.cancel();
    connections.close();
    let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, connections.wait()).await;
}
