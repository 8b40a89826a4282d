//! The fixture of these tests: an ingress in this process, with applications and visitors that are plain sockets.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use capsule_ingress::{Client, Endpoint, Options, Route, Site, State, Table};
use tempfile::TempDir;

/// How long a test waits for anything before it fails.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(30);

/// An ingress with one route per application.
pub struct World {
    folder: TempDir,
    pub address: SocketAddr,
    client: Client,
    runtime: tokio::runtime::Runtime,
    table: Table,
    /// The most simultaneous connection attempts to one application.
    pub max_connecting: Arc<AtomicUsize>,
}

impl World {
    /// Starts an ingress with at most `max_in_flight` requests to a backend, which must respond within `timeout`.
    pub fn new(max_in_flight: usize, timeout: Duration) -> Self {
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
            max_in_flight,
            response_timeout: timeout,
        };
        let client = Client::new(&options.control);
        std::thread::spawn(move || capsule_ingress::run(options).expect("it runs"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let deadline = Instant::now() + TEST_TIMEOUT;
        let address = loop {
            match runtime.block_on(client.hello()) {
                Ok(hello) => break hello.listen.parse().expect("an address"),
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let table = Table { revision: 0, base_domain: "test".into(), ..Table::default() };
        Self { folder, address, client, runtime, table, max_connecting: Arc::default() }
    }

    /// Trusts proxies in these networks.
    pub fn trust(&mut self, networks: &[&str]) {
        self.table.trusted_proxies = networks.iter().map(|network| network.parse().expect("a network")).collect();
        self.apply();
    }

    /// Adds an application at `<name>.test` that handles each connection with `serve`.
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

    /// Adds an instance at `<name>.test` whose shim connects with `connect`.
    pub fn instance(
        &mut self,
        name: &'static str,
        port: u16,
        connect: impl Fn(u16) -> std::io::Result<TcpStream> + Send + Sync + 'static,
    ) {
        let shim = capsule_runtime::listen(&self.folder.path().join("i"), name).expect("listens");
        let connect = Arc::new(connect);
        let (now, max_connecting) = (Arc::new(AtomicUsize::new(0)), self.max_connecting.clone());
        std::thread::spawn(move || {
            for stream in shim.incoming().flatten() {
                let (connect, now, max_connecting) = (connect.clone(), now.clone(), max_connecting.clone());
                std::thread::spawn(move || {
                    max_connecting.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    let mut line = String::new();
                    if BufReader::new(&stream).read_line(&mut line).is_ok() {
                        let connected = connect(port);
                        now.fetch_sub(1, Ordering::SeqCst);
                        let _ = capsule_runtime::send_connection(&stream, connected);
                    }
                });
            }
        });
        let endpoint = Endpoint { instance: name.into(), port, weight: 1 };
        let route = Route { state: State::Ready, endpoints: vec![endpoint], site: None };
        self.table.routes.insert(format!("{name}.test"), route);
        self.apply();
    }

    /// Adds a site at `<name>.test`.
    pub fn site(&mut self, name: &str, root: &Path) {
        let site = Site { root: root.into(), single_page: false };
        self.table.routes.insert(format!("{name}.test"), Route { state: State::Ready, endpoints: Vec::new(), site: Some(site) });
        self.apply();
    }

    fn apply(&mut self) {
        self.table.revision += 1;
        self.runtime.block_on(self.client.apply(self.table.clone())).expect("in force");
    }

    /// Sends bytes over a new connection, and returns everything received until it is closed.
    pub fn send(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes.as_ref()).expect("sent");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Connects as a visitor.
    pub fn connect(&self) -> TcpStream {
        connect(self.address)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.runtime.block_on(self.client.shutdown());
    }
}

/// Connects as a visitor.
pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connects");
    stream.set_read_timeout(Some(TEST_TIMEOUT)).expect("set");
    stream
}

/// A request with `Connection: close` and these headers.
pub fn get(host: &str, path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n")
}

/// Reads the head of a message. `None` if the connection ends first.
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

/// An application that responds to each request with the head that it received.
pub fn echo_head(mut stream: TcpStream) {
    while let Some(head) = read_head(&mut stream) {
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{head}", head.len());
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}
