//! WebSockets (RFC 6455): the frames of a client and of a handler on the bus.

use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::request::Parts;
use axum::response::Response;
use bytes::Bytes;
use capsule_bus::{Duplex, Frame};
use capsule_contracts::Problem;
use futures_util::{SinkExt, StreamExt};
use tokio::time::Instant;

use crate::concurrency::Permit;

/// Maximum size of a frame from the client, in bytes.
const FRAME_BYTES: usize = 1 << 20;
/// How often the client is pinged.
const PING_PERIOD: Duration = Duration::from_secs(20);
/// How long a connection stays open without a frame or a pong from the client.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a frame may take to be sent to the client.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// Checks that a request asks for a WebSocket.
///
/// # Errors
/// When it does not.
pub async fn upgrade(parts: &mut Parts) -> Result<WebSocketUpgrade, Problem> {
    let upgrade = WebSocketUpgrade::from_request_parts(parts, &()).await;
    let upgrade = upgrade.map_err(|error| {
        Problem::bad_request(format!("This endpoint is a WebSocket: {error}."))
            .hint("Connect with a WebSocket client (RFC 6455, version 13).")
    })?;
    Ok(upgrade.max_message_size(FRAME_BYTES).max_frame_size(FRAME_BYTES))
}

/// Completes the upgrade, and forwards frames until either end closes.
pub fn respond(upgrade: WebSocketUpgrade, duplex: Duplex, permit: Option<Permit>) -> Response {
    upgrade.on_upgrade(move |socket| async move {
        forward_frames(socket, duplex).await;
        drop(permit);
    })
}

async fn forward_frames(socket: WebSocket, duplex: Duplex) {
    let (mut outgoing, mut incoming) = socket.split();
    let (sender, mut receiver) = duplex.split();
    let from_client = async {
        let mut deadline = Instant::now() + CLIENT_TIMEOUT;
        // Time spent waiting for the handler to take a frame does not count.
        while let Ok(Some(Ok(message))) = tokio::time::timeout_at(deadline, incoming.next()).await {
            let frame = match message {
                Message::Text(text) => Frame::Text(text.as_str().to_owned()),
                Message::Binary(bytes) => Frame::Binary(bytes.to_vec()),
                Message::Ping(_) | Message::Pong(_) => {
                    deadline = Instant::now() + CLIENT_TIMEOUT;
                    continue;
                }
                Message::Close(_) => return,
            };
            if sender.send(frame).await.is_err() {
                return;
            }
            deadline = Instant::now() + CLIENT_TIMEOUT;
        }
    };
    let to_client = async {
        let mut pings = tokio::time::interval_at(Instant::now() + PING_PERIOD, PING_PERIOD);
        loop {
            let message = tokio::select! {
                frame = receiver.recv() => match frame {
                    Some(Frame::Text(text)) => Message::Text(text.into()),
                    Some(Frame::Binary(bytes)) => Message::Binary(bytes.into()),
                    None => Message::Close(Some(CloseFrame { code: close_code::NORMAL, reason: "".into() })),
                },
                _ = pings.tick() => Message::Ping(Bytes::new()),
            };
            let last = matches!(message, Message::Close(_));
            let sent = tokio::time::timeout(SEND_TIMEOUT, outgoing.send(message)).await;
            if last || !matches!(sent, Ok(Ok(()))) {
                return;
            }
        }
    };
    tokio::select! {
        () = from_client => {}
        () = to_client => {}
    }
}
