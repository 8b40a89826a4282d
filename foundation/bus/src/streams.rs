//! Streams between processes. The request for a stream goes over the broker; the reply has the private address of
//! the process that serves the stream, and a single-use ticket. The items are fetched over HTTP, each sealed. TCP's
//! flow control slows the sender down to the reader's pace.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Path;
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::{Buf, Bytes, BytesMut};
use capsule_contracts::Problem;
use capsule_resilience::{Guard, Policy};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::STREAM_BUFFER;
use crate::duplex::{self, Duplex, End};
use crate::wire::Wire;

/// How long a ticket can be used.
const TICKET_LIFETIME: Duration = Duration::from_secs(15);
/// How long to wait for a connection to another process.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How many processes' circuit breakers are kept; more than an installation has processes.
const MAX_PEERS: usize = 256;
/// The largest sealed item, in bytes.
const MAX_ITEM_BYTES: usize = 4 << 20;

/// Where to fetch the items of a stream.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ticket {
    /// `host:port`
    address: String,
    ticket: String,
}

/// A stream or a duplex connection that another process may fetch.
#[derive(Debug)]
pub enum Offer {
    Stream(mpsc::Receiver<Vec<u8>>),
    Duplex(Duplex),
}

/// The protocol that a request for a duplex connection is upgraded to.
const DUPLEX_PROTOCOL: &str = "capsule-duplex";

/// The streams that this process offers to others, and connections to other processes' streams.
#[derive(Debug)]
pub struct Streams {
    address: String,
    wire: Wire,
    offered: Mutex<HashMap<String, (Instant, Offer)>>,
    /// One circuit breaker for each process, by its address.
    peers: Mutex<HashMap<String, Guard>>,
}

impl Streams {
    /// `address` (`host:port`) is where other processes reach [`Streams::routes`].
    pub fn new(address: String, wire: Wire) -> Self {
        Self { address, wire, offered: Mutex::default(), peers: Mutex::default() }
    }

    /// Offers a stream or a duplex connection to the process that gets the ticket.
    pub fn offer(&self, offer: Offer) -> Result<Ticket, Problem> {
        let mut random = [0_u8; 32];
        getrandom::fill(&mut random).map_err(|_| Problem::internal())?;
        let ticket = hex::encode(random);
        let mut offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        offered.retain(|_, (since, _)| since.elapsed() < TICKET_LIFETIME);
        offered.insert(ticket.clone(), (Instant::now(), offer));
        Ok(Ticket { address: self.address.clone(), ticket })
    }

    /// The HTTP route that streams are fetched from.
    pub fn routes(self: Arc<Self>) -> Router {
        let serve = move |Path(ticket): Path<String>, request: axum::extract::Request| async move { self.serve(ticket, request) };
        Router::new().route("/streams/{ticket}", get(serve))
    }

    fn serve(&self, ticket: String, request: axum::extract::Request) -> Response {
        let offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner).remove(&ticket);
        match offered.filter(|(since, _)| since.elapsed() < TICKET_LIFETIME) {
            Some((_, Offer::Stream(items))) => self.send(ticket, items),
            Some((_, Offer::Duplex(duplex))) => self.upgrade(ticket, duplex, request),
            None => StatusCode::NOT_FOUND.into_response(),
        }
    }

    fn upgrade(&self, ticket: String, duplex: Duplex, mut request: axum::extract::Request) -> Response {
        let (upgrade, wire) = (hyper::upgrade::on(&mut request), self.wire.clone());
        tokio::spawn(async move {
            if let Ok(connection) = upgrade.await {
                duplex::forward_frames(TokioIo::new(connection), duplex, &wire, &ticket, End::Handler).await;
            }
        });
        let headers = [("connection", "upgrade"), ("upgrade", DUPLEX_PROTOCOL)];
        (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
    }

    fn send(&self, ticket: String, items: mpsc::Receiver<Vec<u8>>) -> Response {
        let frames = futures_util::stream::unfold((items, 0_u64, self.wire.clone()), move |(mut items, index, wire)| {
            let ticket = ticket.clone();
            async move {
                let item = items.recv().await?;
                let sealed = wire.seal_item(&ticket, index, &item);
                let frame = sealed.map(|sealed| {
                    let length = u32::try_from(sealed.len()).unwrap_or(u32::MAX).to_be_bytes();
                    Bytes::from([&length, sealed.as_slice()].concat())
                });
                Some((frame.map_err(std::io::Error::other), (items, index + 1, wire)))
            }
        });
        Body::from_stream(frames).into_response()
    }

    /// Connects to a process, with a circuit breaker so that not every reader waits for a process that is down.
    async fn dial(&self, address: &str) -> Result<TcpStream, Problem> {
        let guard = {
            let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
            if peers.len() > MAX_PEERS {
                peers.clear();
            }
            let policy = Policy { timeout: CONNECT_TIMEOUT, ..Policy::new("The process that serves this stream") };
            peers.entry(address.to_owned()).or_insert_with(|| Guard::new(policy)).clone()
        };
        guard.call(|| TcpStream::connect(address)).await
    }

    /// Fetches a stream from the process that offers it.
    pub async fn fetch(&self, ticket: Ticket) -> Result<mpsc::Receiver<Vec<u8>>, Problem> {
        let response = self.send_ticket(&ticket, None, StatusCode::OK).await?;
        Ok(receive(response, ticket, self.wire.clone()))
    }

    /// Connects to the duplex connection that another process offers.
    pub async fn connect(&self, ticket: Ticket) -> Result<Duplex, Problem> {
        let response = self.send_ticket(&ticket, Some(DUPLEX_PROTOCOL), StatusCode::SWITCHING_PROTOCOLS).await?;
        let upgraded = hyper::upgrade::on(response).await.map_err(|cause| unreachable(&ticket, &cause))?;
        let (own, other) = Duplex::pair();
        let wire = self.wire.clone();
        tokio::spawn(async move {
            duplex::forward_frames(TokioIo::new(upgraded), other, &wire, &ticket.ticket, End::Client).await;
        });
        Ok(own)
    }

    /// Sends a ticket to the process that issued it.
    async fn send_ticket(
        &self,
        ticket: &Ticket,
        upgrade: Option<&str>,
        expected: StatusCode,
    ) -> Result<hyper::Response<hyper::body::Incoming>, Problem> {
        let connection = self.dial(&ticket.address).await?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(connection)).await;
        let (mut sender, connection) = handshake.map_err(|cause| unreachable(ticket, &cause))?;
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::get(format!("/streams/{}", ticket.ticket)).header("host", &ticket.address);
        if let Some(protocol) = upgrade {
            request = request.header("connection", "upgrade").header("upgrade", protocol);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|cause| unreachable(ticket, &cause))?;
        let response = sender.send_request(request).await.map_err(|cause| unreachable(ticket, &cause))?;
        if response.status() != expected {
            return Err(unreachable(ticket, &response.status()));
        }
        Ok(response)
    }
}

fn unreachable(ticket: &Ticket, cause: &dyn std::fmt::Display) -> Problem {
    tracing::warn!(address = ticket.address, %cause, "a stream cannot be fetched");
    Problem::unavailable("The process that serves this stream cannot be reached.")
}

/// Reads a stream from the response of the process that serves it.
fn receive(response: hyper::Response<hyper::body::Incoming>, ticket: Ticket, wire: Wire) -> mpsc::Receiver<Vec<u8>> {
    let (channel, items) = mpsc::channel(STREAM_BUFFER);
    tokio::spawn(async move {
        let (mut body, mut buffer, mut index) = (response.into_body(), BytesMut::new(), 0);
        loop {
            while let Some(sealed) = next_frame(&mut buffer) {
                let Some(item) = sealed.and_then(|sealed| wire.open_item(&ticket.ticket, index, &sealed)) else {
                    tracing::error!("an item of a stream cannot be decrypted; the stream ends");
                    return;
                };
                index += 1;
                if channel.send(item).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                frame = body.frame() => match frame {
                    Some(Ok(frame)) => if let Some(data) = frame.data_ref() { buffer.extend_from_slice(data) },
                    _ => return,
                },
                () = channel.closed() => return,
            }
        }
    });
    items
}

/// The next complete frame. The inner value is `None` for an invalid frame.
pub fn next_frame(buffer: &mut BytesMut) -> Option<Option<BytesMut>> {
    let length = usize::try_from(u32::from_be_bytes(*buffer.first_chunk::<4>()?)).ok()?;
    if length > MAX_ITEM_BYTES {
        return Some(None);
    }
    if buffer.len() < 4 + length {
        return None;
    }
    buffer.advance(4);
    Some(Some(buffer.split_to(length)))
}
