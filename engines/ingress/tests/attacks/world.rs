//! An ingress in this process, with applications and visitors that are sockets.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use capsule_ingress::{Client, Options, Route, Site, State, Table, Target};
use tempfile::TempDir;

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// An ingress with one application for each host.
pub struct World {
    folder: TempDir,
    pub address: SocketAddr,
    client: Client,
    runtime: tokio::runtime::Runtime,
    table: Table,
    /// The most connections that were being made to one application at a time.
    pub connecting: Arc<AtomicUsize>,
}

impl World {
    /// Starts an ingress with at most so many requests in flight to a backend, which has so long to answer.
    pub fn new(requests: usize, timeout: Duration) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        for name in ["i", "gateways"] {
            std::fs::create_dir(path(name)).expect("made");
        }
        let options = Options {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            control: path("control.sock"),
            instances: path("i"),
            gateways: path("gateways"),
            table: path("table.json"),
            requests,
            timeout,
        };
        let client = Client::new(&options.control);
        std::thread::spawn(move || capsule_ingress::run(options).expect("it runs"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let deadline = Instant::now() + PATIENCE;
        let address = loop {
            match runtime.block_on(client.hello()) {
                Ok(hello) => break hello.listen.parse().expect("an address"),
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let table = Table { revision: 0, base_domain: "test".into(), ..Table::default() };
        Self { folder, address, client, runtime, table, connecting: Arc::default() }
    }

    /// Believes proxies of these networks.
    pub fn trust(&mut self, networks: &[&str]) {
        self.table.trusted_proxies = networks.iter().map(|network| network.parse().expect("a network")).collect();
        self.apply();
    }

    /// Adds an application whose connections are treated so, as `<name>.test`.
    pub fn app(&mut self, name: &'static str, serve: impl Fn(TcpStream) + Send + Sync + 'static) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listens");
        let port = listener.local_addr().expect("an address").port();
        let serve = Arc::new(serve);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serve = serve.clone();
                std::thread::spawn(move || serve(stream));
            }
        });
        self.instance(name, port, move |port| TcpStream::connect(("127.0.0.1", port)));
    }

    /// Adds an instance whose shim connects so, as `<name>.test`.
    pub fn instance(
        &mut self,
        name: &'static str,
        port: u16,
        connect: impl Fn(u16) -> std::io::Result<TcpStream> + Send + Sync + 'static,
    ) {
        let shim = capsule_runtime::listen(&self.folder.path().join("i"), name).expect("listens");
        let connect = Arc::new(connect);
        let (now, most) = (Arc::new(AtomicUsize::new(0)), self.connecting.clone());
        std::thread::spawn(move || {
            for stream in shim.incoming().flatten() {
                let (connect, now, most) = (connect.clone(), now.clone(), most.clone());
                std::thread::spawn(move || {
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    let mut line = String::new();
                    if BufReader::new(&stream).read_line(&mut line).is_ok() {
                        let connected = connect(port);
                        now.fetch_sub(1, Ordering::SeqCst);
                        let _ = capsule_runtime::hand_over(&stream, connected);
                    }
                });
            }
        });
        let target = Target { instance: name.into(), port, weight: 1 };
        let route = Route { state: State::Ready, targets: vec![target], site: None };
        self.table.routes.insert(format!("{name}.test"), route);
        self.apply();
    }

    /// Adds a site, as `<name>.test`.
    pub fn site(&mut self, name: &str, root: &Path) {
        let site = Site { root: root.into(), single_page: false };
        self.table.routes.insert(format!("{name}.test"), Route { state: State::Ready, targets: Vec::new(), site: Some(site) });
        self.apply();
    }

    fn apply(&mut self) {
        self.table.revision += 1;
        self.runtime.block_on(self.client.apply(self.table.clone())).expect("in force");
    }

    /// Sends bytes over a connection of their own, and returns all that is answered until it is closed.
    pub fn send(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes.as_ref()).expect("sent");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// A connection of a visitor.
    pub fn connect(&self) -> TcpStream {
        connect(self.address)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.runtime.block_on(self.client.shutdown());
    }
}

/// A connection of a visitor.
pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream
}

/// A request that closes its connection, with more headers.
pub fn get(host: &str, path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n")
}

/// Reads a head. Nothing if the connection ends first.
pub fn read_head(stream: &mut impl Read) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return None,
        }
    }
    String::from_utf8(head).ok()
}

/// An application that answers each request with the head that it got.
pub fn mirror(mut stream: TcpStream) {
    while let Some(head) = read_head(&mut stream) {
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{head}", head.len());
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}
