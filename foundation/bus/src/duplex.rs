//! Duplex connections: frames in both directions between a client and a handler, within one process or, sealed, over
//! a TCP connection between two processes.

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::STREAM_BUFFER;
use crate::streams::next_frame;
use crate::wire::Wire;

/// How long a connection between processes stays open after its last frame, for the other process to close it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A frame of a duplex connection, as in WebSocket (RFC 6455).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    Text(String),
    Binary(Vec<u8>),
}

/// One end of a duplex connection. Dropping it closes the connection; frames sent before are still delivered.
#[derive(Debug)]
pub struct Duplex {
    sender: mpsc::Sender<Frame>,
    receiver: mpsc::Receiver<Frame>,
}

impl Duplex {
    /// The two ends of a new connection within this process.
    pub(crate) fn pair() -> (Self, Self) {
        let (to_handler, from_client) = mpsc::channel(STREAM_BUFFER);
        let (to_client, from_handler) = mpsc::channel(STREAM_BUFFER);
        (Self { sender: to_handler, receiver: from_handler }, Self { sender: to_client, receiver: from_client })
    }

    /// Sends a frame; waits while the buffer is full. Returns `false` once the other end is closed.
    pub async fn send(&self, frame: Frame) -> bool {
        self.sender.send(frame).await.is_ok()
    }

    /// The next frame from the other end; `None` once it is closed.
    pub async fn receive(&mut self) -> Option<Frame> {
        self.receiver.recv().await
    }

    /// The two directions, for tasks that send and receive at the same time.
    #[must_use]
    pub fn split(self) -> (mpsc::Sender<Frame>, mpsc::Receiver<Frame>) {
        (self.sender, self.receiver)
    }
}

impl Frame {
    fn encode(self) -> Vec<u8> {
        let (kind, mut bytes) = match self {
            Self::Text(text) => (b't', text.into_bytes()),
            Self::Binary(bytes) => (b'b', bytes),
        };
        bytes.push(kind);
        bytes
    }

    fn decode(mut bytes: Vec<u8>) -> Option<Self> {
        match bytes.pop()? {
            b't' => String::from_utf8(bytes).ok().map(Self::Text),
            b'b' => Some(Self::Binary(bytes)),
            _ => None,
        }
    }
}

/// Which end of a connection between two processes this is.
#[derive(Clone, Copy, Debug)]
pub enum End {
    Client,
    Handler,
}

/// Moves frames between `duplex` and a connection to another process, until either is closed. Each direction is sealed
/// under a name of its own, so a frame cannot be sent back or moved.
pub async fn forward_frames(connection: impl AsyncRead + AsyncWrite, duplex: Duplex, wire: &Wire, ticket: &str, end: End) {
    let (mut reader, mut writer) = tokio::io::split(connection);
    let (sender, mut receiver) = duplex.split();
    let (own, other) = match end {
        End::Client => (format!("{ticket}/client"), format!("{ticket}/handler")),
        End::Handler => (format!("{ticket}/handler"), format!("{ticket}/client")),
    };
    let outgoing = async {
        let mut index = 0;
        while let Some(frame) = receiver.recv().await {
            let Ok(sealed) = wire.seal_item(&own, index, &frame.encode()) else { return };
            let mut bytes = BytesMut::with_capacity(4 + sealed.len());
            bytes.put_u32(u32::try_from(sealed.len()).unwrap_or(u32::MAX));
            bytes.extend_from_slice(&sealed);
            if writer.write_all(&bytes).await.is_err() {
                return;
            }
            index += 1;
        }
        let _ = writer.shutdown().await;
    };
    let incoming = async {
        let (mut buffer, mut index) = (BytesMut::new(), 0);
        loop {
            while let Some(sealed) = next_frame(&mut buffer) {
                let item = sealed.and_then(|sealed| wire.open_item(&other, index, &sealed));
                let Some(frame) = item.and_then(Frame::decode) else {
                    tracing::error!("a frame of a connection cannot be decrypted; the connection ends");
                    return;
                };
                index += 1;
                // Fails once the end in this process is closed; the connection closes when its last frames are sent.
                let _ = sender.send(frame).await;
            }
            if matches!(reader.read_buf(&mut buffer).await, Ok(0) | Err(_)) {
                return;
            }
        }
    };
    let mut incoming = std::pin::pin!(incoming);
    tokio::select! {
        // Closing a socket with unread bytes would discard the last frames, so the rest is read first.
        () = outgoing => { let _ = tokio::time::timeout(CLOSE_TIMEOUT, incoming).await; }
        () = &mut incoming => {}
    }
}

#[cfg(test)]
mod tests {
    use super::{Duplex, End, Frame, forward_frames};
    use crate::wire::Wire;
    use capsule_store::Keyring;

    #[tokio::test]
    async fn frames_pass_in_both_directions_and_the_last_ones_arrive_before_the_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let wire = Wire::new(&Keyring::open(&folder.path().join("key")).expect("a key"));
        let (one, other) = tokio::io::duplex(64);
        let ((mut client, remote_client), (remote_handler, mut handler)) = (Duplex::pair(), Duplex::pair());
        let (client_wire, handler_wire) = (wire.clone(), wire);
        tokio::spawn(async move { forward_frames(one, remote_client, &client_wire, "t", End::Client).await });
        tokio::spawn(async move { forward_frames(other, remote_handler, &handler_wire, "t", End::Handler).await });
        let sent = [Frame::Text("ä".into()), Frame::Binary(vec![0; 1000]), Frame::Binary(Vec::new())];
        for frame in &sent {
            assert!(client.send(frame.clone()).await);
        }
        for frame in &sent {
            assert_eq!(handler.receive().await.as_ref(), Some(frame));
        }
        for frame in &sent {
            assert!(handler.send(frame.clone()).await);
        }
        drop(handler);
        for frame in &sent {
            assert_eq!(client.receive().await.as_ref(), Some(frame));
        }
        assert_eq!(client.receive().await, None);
    }
}
