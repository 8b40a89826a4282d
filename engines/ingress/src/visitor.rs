//! The connection of a visitor, below HTTP.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Sleep;

use crate::stream::{GuardedStream, MAX_HEAD_BYTES, StreamGuard};

/// The connection of a visitor that accepts no bytes for this long is closed.
const WRITE_TIMEOUT: Duration = Duration::from_secs(120);

/// The most bytes kept of heads that [`Heads::next`] has not taken yet: more than the HTTP library reads ahead.
const MAX_RECORDED_BYTES: usize = 4 * MAX_HEAD_BYTES;

/// The heads of the requests that a connection reads, as they were sent. Where a request has a `Content-Length` and a
/// `Transfer-Encoding`, the HTTP library drops the length; here it is still visible.
#[derive(Clone, Debug, Default)]
pub struct Heads(Arc<Mutex<Recorded>>);

#[derive(Debug, Default)]
struct Recorded {
    bytes: Vec<u8>,
    /// The bytes still to come of the present request's body.
    body_left: u64,
    /// Whether the beginning of the next head is unknown.
    is_lost: bool,
}

impl Recorded {
    fn record(&mut self, read: &[u8]) {
        let body = read.len().min(usize::try_from(self.body_left).unwrap_or(usize::MAX));
        self.body_left -= body as u64;
        let rest = &read[body..];
        let room = MAX_RECORDED_BYTES.saturating_sub(self.bytes.len());
        self.is_lost |= rest.len() > room;
        self.bytes.extend_from_slice(&rest[..rest.len().min(room)]);
    }
}

impl Heads {
    fn record(&self, read: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).record(read);
    }

    /// Takes the next head, which `body` bytes of a body follow. Returns whether the head has a `Content-Length`, or may
    /// have one because it was not recorded. After a body of unknown length (`None`), no further head is recorded.
    pub fn next(&self, body: Option<u64>) -> bool {
        let mut recorded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut has_length, mut has_started, mut is_whole) = (false, false, false);
        let mut end = 0;
        for line in recorded.bytes.split_inclusive(|byte| *byte == b'\n') {
            end += line.len();
            if matches!(line, b"\n" | b"\r\n") {
                is_whole = has_started;
                if is_whole {
                    break;
                }
                // Empty lines before a request are skipped.
                continue;
            }
            has_started = true;
            let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
            has_length |= name.eq_ignore_ascii_case(b"content-length");
        }
        recorded.is_lost |= !is_whole;
        let ahead = recorded.bytes.split_off(end);
        recorded.bytes.clear();
        recorded.body_left = body.unwrap_or(u64::MAX);
        recorded.record(&ahead);
        has_length || recorded.is_lost
    }

    /// Stops recording: the connection has switched to another protocol.
    pub fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
            Recorded { bytes: Vec::new(), body_left: u64::MAX, is_lost: true };
    }
}

/// Counts the bytes read of a request's body.
#[derive(Clone, Debug, Default)]
pub struct Upload(Arc<AtomicU64>);

impl Upload {
    pub fn count(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The connection of a visitor.
pub type VisitorStream = GuardedStream<TcpStream, VisitorGuard>;

/// Records the heads that a visitor sends, and ends the connection of a visitor that accepts no bytes.
#[derive(Debug, Default)]
pub struct VisitorGuard {
    heads: Heads,
    /// Runs while the visitor accepts no bytes.
    stall_timeout: Option<Pin<Box<Sleep>>>,
}

impl VisitorGuard {
    /// The heads that the connection reads.
    pub fn heads(&self) -> Heads {
        self.heads.clone()
    }
}

impl StreamGuard for VisitorGuard {
    fn record_read(&mut self, bytes: &[u8]) {
        self.heads.record(bytes);
    }

    /// Fails once no write has succeeded for [`WRITE_TIMEOUT`].
    fn check_write(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stall_timeout = None;
            return written;
        }
        let stalled = self.stall_timeout.get_or_insert_with(|| Box::pin(tokio::time::sleep(WRITE_TIMEOUT)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::{Heads, MAX_RECORDED_BYTES};

    #[test]
    fn a_content_length_is_found_in_the_head_that_has_it() {
        let heads = Heads::default();
        heads.record(b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nContent-");
        heads.record(b"length: 3\r\n\r\nx");
        assert!(!heads.next(Some(0)));
        assert!(heads.next(Some(3)));
        // One read has the end of the body and the beginning of the next head.
        heads.record(b"yzPOST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Le");
        heads.record(b"ngth: 3\r\n\r\n0\r\n\r\n");
        assert!(heads.next(None));

        let heads = Heads::default();
        heads.record(b"POST / HTTP/1.1\r\nContent-Length: 20\r\n\r\nContent-Length: 1\r\n\nGET / HTTP/1.1\nHost: a\n\n");
        assert!(heads.next(Some(20)));
        assert!(!heads.next(Some(0)));
    }

    #[test]
    fn a_head_that_was_not_recorded_may_have_a_content_length() {
        let heads = Heads::default();
        heads.record(b"GET / HTTP/1.1\r\n\r\n");
        assert!(!heads.next(Some(0)));
        assert!(heads.next(Some(0)));
        let heads = Heads::default();
        heads.record(b"GET / HTTP/1.1\r\n\r\n");
        heads.record(&[b'x'; MAX_RECORDED_BYTES]);
        assert!(heads.next(Some(0)));
    }
}
