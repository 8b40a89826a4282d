//! A visitor's connection, below HTTP.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use crate::upstream::TURN_BYTES;

/// The largest head of a request.
pub const HEAD_SIZE: usize = 64 << 10;
/// A visitor that accepts no bytes for so long is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(120);

/// The head of the request that a connection reads, as it was sent. The HTTP library drops one of two lengths
/// that contradict each other; here both can still be seen.
#[derive(Clone, Debug, Default)]
pub struct Heads(Arc<Recorded>);

#[derive(Debug, Default)]
struct Recorded {
    is_in_body: AtomicBool,
    bytes: Mutex<Vec<u8>>,
}

impl Heads {
    fn record(&self, read: &[u8]) {
        if !self.0.is_in_body.load(Ordering::Relaxed) {
            let mut bytes = self.0.bytes.lock().unwrap_or_else(PoisonError::into_inner);
            let room = HEAD_SIZE.saturating_sub(bytes.len());
            bytes.extend_from_slice(&read[..read.len().min(room)]);
        }
    }

    /// The next head has been read. Whether it has a `Content-Length`, kept by the library or not. With a body,
    /// nothing is recorded until that is [over](Self::end_of_body).
    pub fn next(&self, has_body: bool) -> bool {
        let mut bytes = self.0.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut has_length = false;
        let mut end = 0;
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            end += line.len();
            // Empty lines before a request are skipped.
            if matches!(line, b"\n" | b"\r\n") && end > 2 {
                break;
            }
            let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
            has_length |= name.eq_ignore_ascii_case(b"content-length");
        }
        if has_body {
            bytes.clear();
        } else {
            bytes.drain(..end);
        }
        self.0.is_in_body.store(has_body, Ordering::Relaxed);
        has_length
    }

    /// A request's body was read to its end, or given up.
    fn end_of_body(&self) {
        self.0.is_in_body.store(false, Ordering::Relaxed);
    }
}

/// How much of a request's body has been read. The body is over when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Upload(Arc<Counted>);

#[derive(Debug)]
struct Counted {
    bytes: AtomicU64,
    heads: Heads,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.heads.end_of_body();
    }
}

impl Upload {
    pub fn new(heads: Heads) -> Self {
        Self(Arc::new(Counted { bytes: AtomicU64::new(0), heads }))
    }

    pub fn count(&self, bytes: usize) {
        self.0.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }
}

/// A visitor's connection.
#[derive(Debug)]
pub struct VisitorStream {
    stream: TcpStream,
    heads: Heads,
    /// Bytes read in this turn.
    turn: usize,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl VisitorStream {
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, heads: Heads::default(), turn: 0, stalled: None }
    }

    /// The heads that it reads.
    pub fn heads(&self) -> Heads {
        self.heads.clone()
    }

    /// Passes on what came of a write, unless none has succeeded for too long.
    fn bounded(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(WRITE_TIMEOUT)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for VisitorStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.turn >= TURN_BYTES {
            self.turn = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_pending() {
            self.turn = 0;
        }
        ready!(read)?;
        let bytes = &buf.filled()[before..];
        self.turn += bytes.len();
        self.heads.record(bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for VisitorStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.bounded(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.bounded(cx, written)
    }
}

#[cfg(test)]
mod tests {
    use super::Heads;

    #[test]
    fn a_length_is_seen_in_the_head_that_has_it() {
        let heads = Heads::default();
        heads.record(b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nContent-");
        heads.record(b"length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
        assert!(!heads.next(false));
        assert!(heads.next(true));
        heads.record(b"Content-Length: 1\r\n\r\n");
        heads.end_of_body();
        heads.record(b"GET / HTTP/1.1\nHost: a\n\n");
        assert!(!heads.next(false));
    }
}
