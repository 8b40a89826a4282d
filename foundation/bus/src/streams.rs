//! Streams between processes. A stream is asked for over the broker like anything else; what comes back
//! is where to fetch its items: the private address of the very process that has them, and a ticket that
//! works once. The items follow over HTTP, each sealed; TCP holds the sender back while the reader is
//! behind.

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

use crate::STREAM_CREDIT;
use crate::wire::Wire;

/// A ticket that nobody uses is void after so long.
const USE_BY: Duration = Duration::from_secs(15);
/// A process that cannot be connected to in this time is not there.
const CONNECT: Duration = Duration::from_secs(5);
/// Addresses that are remembered; there are no more processes than this.
const MOST_PEERS: usize = 256;
/// The largest item.
const ITEM_BYTES: usize = 4 << 20;

/// Where the items of a stream are to be fetched.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ticket {
    /// `host:port`
    address: String,
    ticket: String,
}

/// A stream, and since when it is offered.
type Offered = (Instant, mpsc::Receiver<Vec<u8>>);

/// The streams of this process that wait to be fetched by another, and the way to those of others.
#[derive(Debug)]
pub struct Streams {
    address: String,
    wire: Wire,
    waiting: Mutex<HashMap<String, Offered>>,
    /// By the address of a process.
    peers: Mutex<HashMap<String, Guard>>,
}

impl Streams {
    /// `address` is where other processes reach this one's private pages.
    pub fn new(address: String, wire: Wire) -> Self {
        Self { address, wire, waiting: Mutex::default(), peers: Mutex::default() }
    }

    /// Keeps a stream to be fetched.
    pub fn offer(&self, items: mpsc::Receiver<Vec<u8>>) -> Result<Ticket, Problem> {
        let mut random = [0_u8; 32];
        getrandom::fill(&mut random).map_err(|_| Problem::internal())?;
        let ticket = hex::encode(random);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, (since, _)| since.elapsed() < USE_BY);
        waiting.insert(ticket.clone(), (Instant::now(), items));
        Ok(Ticket { address: self.address.clone(), ticket })
    }

    /// The page that streams are fetched from.
    pub fn pages(self: Arc<Self>) -> Router {
        Router::new().route("/streams/{ticket}", get(move |Path(ticket): Path<String>| async move { self.send(ticket) }))
    }

    fn send(&self, ticket: String) -> Response {
        let offered = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&ticket);
        let Some((_, items)) = offered.filter(|(since, _)| since.elapsed() < USE_BY) else {
            return StatusCode::NOT_FOUND.into_response();
        };
        let frames = futures_util::stream::unfold((items, 0_u64, self.wire.clone()), move |(mut items, place, wire)| {
            let ticket = ticket.clone();
            async move {
                let item = items.recv().await?;
                let sealed = wire.item(&ticket, place, &item);
                let frame = sealed.map(|sealed| {
                    let length = u32::try_from(sealed.len()).unwrap_or(u32::MAX).to_be_bytes();
                    Bytes::from([&length, sealed.as_slice()].concat())
                });
                Some((frame.map_err(std::io::Error::other), (items, place + 1, wire)))
            }
        });
        Body::from_stream(frames).into_response()
    }

    /// Connects to a process; one that is gone is not waited for by every reader anew.
    async fn connect(&self, address: &str) -> Result<TcpStream, Problem> {
        let guard = {
            let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
            if peers.len() > MOST_PEERS {
                peers.clear();
            }
            let policy = Policy { deadline: CONNECT, ..Policy::new("The process that has this stream") };
            peers.entry(address.to_owned()).or_insert_with(|| Guard::new(policy)).clone()
        };
        guard.call(|| TcpStream::connect(address)).await
    }

    /// Fetches a stream from the process that offers it.
    pub async fn fetch(&self, ticket: Ticket) -> Result<mpsc::Receiver<Vec<u8>>, Problem> {
        let connection = self.connect(&ticket.address).await?;
        receive(connection, ticket, self.wire.clone()).await
    }
}

/// Reads a stream, once connected to the process that has it.
async fn receive(connection: TcpStream, ticket: Ticket, wire: Wire) -> Result<mpsc::Receiver<Vec<u8>>, Problem> {
    let unreachable = |cause: &dyn std::fmt::Display| {
        tracing::warn!(address = ticket.address, %cause, "a stream cannot be fetched");
        Problem::unavailable("The process that has this stream cannot be reached.")
    };
    let shaken = hyper::client::conn::http1::handshake(TokioIo::new(connection)).await;
    let (mut sender, connection) = shaken.map_err(|cause| unreachable(&cause))?;
    tokio::spawn(connection);
    let request = Request::get(format!("/streams/{}", ticket.ticket)).header("host", &ticket.address).body(Empty::<Bytes>::new());
    let request = request.map_err(|cause| unreachable(&cause))?;
    let response = sender.send_request(request).await.map_err(|cause| unreachable(&cause))?;
    if response.status() != StatusCode::OK {
        return Err(unreachable(&response.status()));
    }
    let (channel, items) = mpsc::channel(STREAM_CREDIT);
    tokio::spawn(async move {
        let (mut body, mut buffer, mut place) = (response.into_body(), BytesMut::new(), 0);
        loop {
            while let Some(sealed) = frame(&mut buffer) {
                let Some(item) = sealed.and_then(|sealed| wire.open_item(&ticket.ticket, place, &sealed)) else {
                    tracing::error!("an item of a stream does not open; the stream ends");
                    return;
                };
                place += 1;
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
    Ok(items)
}

/// The next whole frame; an inner `None` is one that no sender makes.
fn frame(buffer: &mut BytesMut) -> Option<Option<BytesMut>> {
    let length = usize::try_from(u32::from_be_bytes(*buffer.first_chunk::<4>()?)).ok()?;
    if length > ITEM_BYTES {
        return Some(None);
    }
    if buffer.len() < 4 + length {
        return None;
    }
    buffer.advance(4);
    Some(Some(buffer.split_to(length)))
}
