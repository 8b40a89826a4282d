//! The connections of visitors and backends, below HTTP.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The largest head of a request or a response, in bytes, and the size of the HTTP library's read buffer.
pub const MAX_HEAD_BYTES: usize = 64 << 10;
/// The bytes that a connection reads before it yields to the other connections of its thread.
const MAX_TURN_BYTES: usize = 256 << 10;

/// Watches the bytes of one connection and may end it.
pub trait StreamGuard: Unpin {
    /// Called before each read.
    ///
    /// # Errors
    /// When the connection must not read any more.
    fn check_read(&self) -> io::Result<()> {
        Ok(())
    }

    /// Called with the bytes of each read.
    fn record_read(&mut self, bytes: &[u8]);

    /// Called with the result of each write; returns the result to pass on.
    fn check_write(&mut self, _cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        written
    }
}

/// A stream with a guard. It yields after [`MAX_TURN_BYTES`], so that one fast peer does not hold up the thread.
#[derive(Debug)]
pub struct GuardedStream<S, G> {
    stream: S,
    guard: G,
    /// Bytes read since the last yield.
    turn_bytes: usize,
}

impl<S, G> GuardedStream<S, G> {
    /// Puts `guard` in front of `stream`.
    pub fn new(stream: S, guard: G) -> Self {
        Self { stream, guard, turn_bytes: 0 }
    }

    /// The guard of this stream.
    pub fn guard(&self) -> &G {
        &self.guard
    }
}

impl<S: AsyncRead + Unpin, G: StreamGuard> AsyncRead for GuardedStream<S, G> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.guard.check_read()?;
        if self.turn_bytes >= MAX_TURN_BYTES {
            self.turn_bytes = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_pending() {
            self.turn_bytes = 0;
        }
        ready!(read)?;
        let bytes = &buf.filled()[before..];
        self.turn_bytes += bytes.len();
        self.guard.record_read(bytes);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin, G: StreamGuard> AsyncWrite for GuardedStream<S, G> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.guard.check_write(cx, written)
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
        self.guard.check_write(cx, written)
    }
}
