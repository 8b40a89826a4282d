//! Every kind of endpoint through a real gateway and bus: in one process, and over RabbitMQ with a service in another
//! bus client. The service is one of the test's own, because no service of the platform has a WebSocket yet.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::http::Method;
use capsule_blob::Blobs;
use capsule_bus::{Bus, Call, Duplex, Frame, Router, Service};
use capsule_cache::{Cache, Rate};
use capsule_contracts::identity::{CheckSessions, LiveSessions, TokenStatus, ValidateToken};
use capsule_contracts::project::Location;
use capsule_contracts::{Download, DuplexMessage, Problem, Redirect, Target, Uuid, message};
use capsule_gateway::rows::Row;
use capsule_gateway::{Limits, Options};
use capsule_rabbitmq::RabbitMq;
use capsule_store::{Databases, Keyring, Store};
use futures_util::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message as WsMessage};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};
use utoipa::ToSchema;

const USER: Uuid = Uuid::from_u128(1);
const SESSION: Uuid = Uuid::from_u128(2);

/// Sends every frame back.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
struct Echo {
    /// Sent first.
    greeting: String,
}
message!(Echo, query "test.echo", SignedIn => Echoed);
impl DuplexMessage for Echo {
    type Input = Echoed;
}

/// A frame.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
struct Echoed {}

/// Returns a file.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
struct GetFile {
    name: String,
}
message!(GetFile, query "test.get_file", SignedIn => Download);

/// Redirects.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
struct FindFile {
    name: String,
}
message!(FindFile, query "test.find_file", SignedIn => Redirect);

/// A text that can be read and replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
struct Text {
    text: String,
}

/// Returns the text.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
struct GetText {}
message!(GetText, query "test.get_text", SignedIn => Text);

/// Replaces the text.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
struct ReplaceText {
    text: String,
}
message!(ReplaceText, command "test.replace_text", SignedIn => Text);

struct TestService {
    text: Mutex<Text>,
    store: Arc<Store>,
    bus: Bus,
    /// Whether the session is live.
    live: AtomicBool,
    /// Whether the handler of the last connection has ended.
    ended: AtomicBool,
}

impl Service for TestService {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }
    fn bus(&self) -> &Bus {
        &self.bus
    }
    async fn locate(&self, _: &Target) -> Result<Option<Location>, Problem> {
        Ok(None)
    }
}

/// Sets the flag when it is dropped.
struct Ended(Arc<TestService>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::SeqCst);
    }
}

async fn echo(service: Arc<TestService>, call: Call<Echo>, mut duplex: Duplex) -> Result<(), Problem> {
    let _ended = Ended(service);
    duplex.send(Frame::Text(call.message.greeting)).await;
    while let Some(frame) = duplex.receive().await {
        let last = frame == Frame::Text("end".into());
        duplex.send(frame).await;
        if last {
            break;
        }
    }
    Ok(())
}

async fn validate(_: Arc<TestService>, call: Call<ValidateToken>) -> Result<TokenStatus, Problem> {
    let active = call.message.token == "valid";
    Ok(TokenStatus { active, user_id: Some(USER), session_id: Some(SESSION), platform_admin: false, expires_at: None })
}

async fn check_sessions(service: Arc<TestService>, call: Call<CheckSessions>) -> Result<LiveSessions, Problem> {
    let live = service.live.load(Ordering::SeqCst);
    Ok(LiveSessions { ids: if live { call.message.ids } else { Vec::new() }, platform_admins: Vec::new() })
}

fn rows() -> &'static [Row] {
    Box::leak(Box::new([
        Row::duplex::<Echo>("/echo"),
        Row::download::<GetFile>("/files/{name}"),
        Row::redirect::<FindFile>("/find/{name}"),
        Row::json::<GetText>(Method::GET, "/text"),
        Row::json::<ReplaceText>(Method::PUT, "/text"),
    ]))
}

/// A gateway on one bus client and the test's service on another, which is the same client without a broker.
struct World {
    service: Arc<TestService>,
    address: String,
}

impl World {
    async fn new(folder: &Path, broker: Option<&str>) -> Self {
        let keyring = Keyring::open(&folder.join("key")).expect("a key");
        let (gateway_bus, service_bus) = match broker {
            None => {
                let bus = Bus::new();
                (bus.clone(), bus)
            }
            Some(url) => {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
                let address = listener.local_addr().expect("bound").to_string();
                let connect = |name: &str, address: String| {
                    Bus::with_transport(Arc::new(RabbitMq::connect(url, name, &[])), &keyring, address)
                };
                let service_bus = connect("service", address);
                tokio::spawn(axum::serve(listener, service_bus.stream_routes()).into_future());
                (connect("gateway", "127.0.0.1:1".into()), service_bus)
            }
        };
        let databases = Databases::Embedded(folder.into());
        let migrations = &[("bus", capsule_bus::MIGRATIONS)];
        let store = Store::open(&databases, "test", keyring.clone(), migrations).await.expect("opens");
        let service = Arc::new(TestService {
            text: Mutex::new(Text { text: "short".into() }),
            store: Arc::new(store),
            bus: service_bus,
            live: AtomicBool::new(true),
            ended: AtomicBool::new(false),
        });
        Router::new(service.clone())
            .handle(validate)
            .handle(check_sessions)
            .handle(|_, call: Call<GetFile>| async move {
                Ok(Download { media_type: "text/plain".into(), file_name: call.message.name, content: b"a file".to_vec() })
            })
            .handle(|_, call: Call<FindFile>| async move {
                Ok(Redirect { location: format!("/api/v1/files/{}", call.message.name) })
            })
            .handle(|service, _: Call<GetText>| async move { Ok(service.text.lock().expect("alive").clone()) })
            .handle(|service, call: Call<ReplaceText>| async move {
                let mut text = service.text.lock().expect("alive");
                call.context.check_if_match(&*text)?;
                text.text = call.message.text;
                Ok(text.clone())
            })
            .duplex(echo)
            .start();
        let rate = Rate(0);
        let limits = Limits { requests: rate, sign_ins: rate, account: rate, concurrent_uploads: 2, concurrent_streams: 2 };
        let options = Options {
            bus: gateway_bus,
            blobs: Blobs::open(&folder.join("blobs")).expect("opens"),
            keyring,
            cache: Cache::none(),
            limits,
            upload_bytes: 1 << 20,
            upload_bytes_per_second: 1,
            upload_deadline: Duration::from_secs(60),
            allowed_origins: vec!["https://console.example.com".parse().expect("a header")],
        };
        let gateway = capsule_gateway::router_of(options, Vec::new(), rows());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound").to_string();
        tokio::spawn(axum::serve(listener, gateway).into_future());
        Self { service, address }
    }

    async fn connect(&self, token: &str) -> Result<WebSocketStream<MaybeTlsStream<TcpStream>>, Error> {
        let url = format!("ws://{}/api/v1/echo?greeting=hello", self.address);
        let mut request = url.into_client_request().expect("a request");
        request.headers_mut().insert("authorization", format!("Bearer {token}").parse().expect("a header"));
        connect_async(request).await.map(|(socket, _)| socket)
    }

    async fn check(&self) {
        // A broker may need a moment to connect.
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut socket = loop {
            match self.connect("valid").await {
                Ok(socket) => break socket,
                Err(error) if Instant::now() > deadline => panic!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        };
        let large = WsMessage::Binary(vec![7; 500_000].into());
        assert_eq!(receive(&mut socket).await, Some(WsMessage::text("hello")));
        for message in [WsMessage::text("ä"), large, WsMessage::text("end")] {
            socket.send(message.clone()).await.expect("sent");
            assert_eq!(receive(&mut socket).await, Some(message));
        }
        assert_eq!(receive(&mut socket).await, None, "the handler has ended");
        self.wait_for_end().await;

        // Authentication, and the limit of open connections.
        match self.connect("forged").await {
            Err(Error::Http(response)) => assert_eq!(response.status(), 401),
            other => panic!("{other:?}"),
        }
        let (one, _two) = (self.connect("valid").await.expect("one"), self.connect("valid").await.expect("two"));
        match self.connect("valid").await {
            Err(Error::Http(response)) => {
                assert_eq!(response.status(), 429);
                assert!(response.headers().contains_key("x-correlation-id"));
            }
            other => panic!("{other:?}"),
        }

        // The handler ends with its client.
        self.service.ended.store(false, Ordering::SeqCst);
        drop(one);
        self.wait_for_end().await;

        // The connection ends with its session.
        let mut socket = loop {
            // The permit of the closed connection is released in a moment.
            match self.connect("valid").await {
                Ok(socket) => break socket,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        assert_eq!(receive(&mut socket).await, Some(WsMessage::text("hello")));
        let revoked = Instant::now();
        self.service.live.store(false, Ordering::SeqCst);
        assert_eq!(receive(&mut socket).await, None);
        assert!(revoked.elapsed() < Duration::from_secs(2), "{:?}", revoked.elapsed());
    }

    async fn wait_for_end(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.service.ended.load(Ordering::SeqCst) {
            assert!(Instant::now() < deadline, "the handler has not ended");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// The next frame that is not a ping; `None` at the end.
async fn receive(socket: &mut WebSocketStream<MaybeTlsStream<TcpStream>>) -> Option<WsMessage> {
    loop {
        let message = tokio::time::timeout(Duration::from_secs(10), socket.next()).await.expect("in time")?;
        match message.ok()? {
            WsMessage::Ping(_) | WsMessage::Pong(_) => {}
            WsMessage::Close(_) => return None,
            message => return Some(message),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_carries_frames_in_both_directions_and_ends_with_its_session() {
    let folder = tempfile::tempdir().expect("a folder");
    World::new(folder.path(), None).await.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_over_a_broker_does_the_same() {
    if !capsule_tests::RabbitMq::is_installed() {
        return;
    }
    let server = tokio::task::spawn_blocking(capsule_tests::RabbitMq::start).await.expect("starts");
    let folder = tempfile::tempdir().expect("a folder");
    World::new(folder.path(), Some(&server.url())).await.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_and_a_redirect_are_replies() {
    let folder = tempfile::tempdir().expect("a folder");
    let world = World::new(folder.path(), None).await;
    let work = tokio::task::spawn_blocking(move || {
        let agent = ureq::Agent::config_builder().max_redirects(0).http_status_as_error(false).build().new_agent();
        let get = |path: &str| {
            let url = format!("http://{}/api/v1{path}", world.address);
            agent.get(&url).header("authorization", "Bearer valid").call().expect("a response")
        };
        let mut file = get("/files/notes.txt");
        assert_eq!(file.headers()["content-type"], "text/plain");
        assert_eq!(file.headers()["content-disposition"], "attachment; filename=\"notes.txt\"; filename*=UTF-8''notes.txt");
        assert_eq!(file.body_mut().read_to_string().expect("text"), "a file");
        let redirect = get("/find/notes.txt");
        assert_eq!(
            (redirect.status().as_u16(), &redirect.headers()["location"]),
            (303, &"/api/v1/files/notes.txt".parse().expect("a header"))
        );
        assert_eq!(get("/echo?greeting=hello").status(), 400, "no WebSocket");
    });
    work.await.expect("no panic");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_representation_has_an_entity_tag_and_is_compressed_where_that_pays() {
    let folder = tempfile::tempdir().expect("a folder");
    let world = World::new(folder.path(), None).await;
    let work = tokio::task::spawn_blocking(move || {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        let send = |method: &str, headers: &[(&str, &str)], body: Option<&str>| {
            let url = format!("http://{}/api/v1/text", world.address);
            let mut request = ureq::http::Request::builder().method(method).uri(url).header("authorization", "Bearer valid");
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let body = body.map(|text| format!("{{\"text\":\"{text}\"}}")).unwrap_or_default();
            let request = request.header("content-type", "application/json").body(body).expect("a request");
            let mut response = agent.run(request).expect("a response");
            let body = response.body_mut().read_to_vec().expect("a body");
            (response.status().as_u16(), response.headers().clone(), body)
        };
        let tag_of = |headers: &ureq::http::HeaderMap| headers["etag"].to_str().expect("text").to_owned();

        let (status, headers, short) = send("GET", &[("accept-encoding", "gzip")], None);
        assert_eq!((status, short.as_slice()), (200, br#"{"text":"short"}"#.as_slice()));
        assert!(!headers.contains_key("content-encoding"));
        let first = tag_of(&headers);
        let (status, headers, body) = send("GET", &[("if-none-match", &first)], None);
        assert_eq!((status, tag_of(&headers), body.len()), (304, first.clone(), 0));
        assert_eq!(send("GET", &[("if-none-match", "\"other\"")], None).0, 200);

        // An update with the current tag succeeds, and the next one with the same tag is refused.
        let long = "long".repeat(1000);
        let (status, headers, _) = send("PUT", &[("if-match", &first)], Some(&long));
        let second = tag_of(&headers);
        assert!(status == 200 && first != second);
        let (status, headers, body) = send("PUT", &[("if-match", &first)], Some("lost"));
        let problem: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!((status, tag_of(&headers), problem["etag"].as_str()), (412, second.clone(), Some(second.as_str())));
        assert_eq!(problem["current"]["text"], long);

        let (_, headers, compressed) = send("GET", &[("accept-encoding", "gzip")], None);
        assert_eq!(
            (&headers["content-encoding"], &headers["vary"]),
            (&"gzip".parse().expect("a header"), &"accept-encoding".parse().expect("a header"))
        );
        assert!(compressed.len() < 1000, "{}", compressed.len());
        let mut text = String::new();
        std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&compressed[..]), &mut text).expect("gzip");
        assert_eq!(serde_json::from_str::<Text>(&text).expect("JSON").text, long);
        // The tag of the compressed representation differs, and works in both preconditions.
        let compressed_tag = tag_of(&headers);
        assert_ne!(compressed_tag, second);
        assert_eq!(send("GET", &[("if-none-match", &compressed_tag)], None).0, 304);
        assert_eq!(send("PUT", &[("if-match", &compressed_tag)], Some("new")).0, 200);

        for (origin, allowed) in [("https://console.example.com", true), ("https://evil.example.com", false)] {
            let (_, headers, _) = send("GET", &[("origin", origin)], None);
            let value = headers.get("access-control-allow-origin");
            assert_eq!(value.map(|value| value.to_str().expect("text")), allowed.then_some(origin));
        }
    });
    work.await.expect("no panic");
}
