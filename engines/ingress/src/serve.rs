//! The ingress process: its listeners, and its life.

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
    /// Where the gateways' sockets lie, one or more.
    pub gateways: PathBuf,
    /// Where the table is kept.
    pub table: PathBuf,
    /// The most requests in flight to one backend.
    pub requests: usize,
    /// How long a backend may take to begin its response.
    pub timeout: Duration,
}

/// Runs the ingress until it is told to end. One thread accepts connections and answers the control
/// plane; each core has a thread of its own that carries visitors, and shares only the table.
///
/// # Errors
/// When it cannot listen.
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

    let balancer = Arc::new(Balancer::new(options.requests));
    balancer.apply(Table::load(&options.table));
    let connector = Connector { instances: options.instances, gateways: options.gateways };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let carriers: Vec<Carrier> = (0..cores)
        .map(|_| Carrier::start(balancer.clone(), connector.clone(), options.timeout))
        .collect::<std::io::Result<_>>()?;
    let control = Arc::new(Control {
        balancer,
        probes: Pool::new(connector, options.timeout),
        listen: address.to_string(),
        build: crate::build(),
        file: options.table,
        shutdown: tokio::sync::Notify::new(),
    });

    let mut turn = 0;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted.and_then(|(stream, peer)| Ok((stream.into_std()?, peer.ip()))) {
                Ok(visitor) => {
                    turn = (turn + 1) % carriers.len();
                    let _ = carriers[turn].visitors.send(visitor);
                }
                // Out of descriptors, most likely: others will be closed soon.
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
    // The answer to the one who said so goes out meanwhile.
    tokio::task::spawn_blocking(move || carriers.into_iter().for_each(Carrier::end)).await.map_err(std::io::Error::other)
}

/// A thread that carries visitors: their connections, and those to instances that it made for them.
struct Carrier {
    visitors: mpsc::UnboundedSender<(std::net::TcpStream, IpAddr)>,
    thread: JoinHandle<()>,
}

impl Carrier {
    fn start(balancer: Arc<Balancer>, connector: Connector, timeout: Duration) -> std::io::Result<Self> {
        let runtime = single_threaded()?;
        let (visitors, arriving) = mpsc::unbounded_channel();
        let work = move || runtime.block_on(carry(arriving, balancer, connector, timeout));
        let thread = std::thread::Builder::new().name("carrier".into()).spawn(work)?;
        Ok(Self { visitors, thread })
    }

    /// Takes no more visitors, and ends when those that are there are served.
    fn end(self) {
        drop(self.visitors);
        let _ = self.thread.join();
    }
}

async fn carry(
    mut arriving: mpsc::UnboundedReceiver<(std::net::TcpStream, IpAddr)>,
    balancer: Arc<Balancer>,
    connector: Connector,
    timeout: Duration,
) {
    let proxy = Arc::new(Proxy { balancer, pool: Pool::new(connector, timeout), sites: Sites::default() });
    let (served, ending) = (TaskTracker::new(), CancellationToken::new());
    while let Some((stream, peer)) = arriving.recv().await {
        let _ = stream.set_nodelay(true);
        let Ok(stream) = TcpStream::from_std(stream) else { continue };
        let (proxy, ending) = (proxy.clone(), ending.clone());
        served.spawn(async move {
            let stream = VisitorStream::new(stream, VisitorGuard::default());
            let visitor = Arc::new(Visitor { peer, heads: stream.guard().heads() });
            let service = service_fn(move |request| {
                let (proxy, visitor) = (proxy.clone(), visitor.clone());
                async move { Ok::<_, std::convert::Infallible>(proxy.handle(request, &visitor).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .max_buf_size(MAX_HEAD_BYTES)
                .max_header_size(MAX_HEAD_BYTES)
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
    ending.cancel();
    served.close();
    let _ = tokio::time::timeout(GOODBYE, served.wait()).await;
}
