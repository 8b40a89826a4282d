//! The bodies of forwarded requests and responses.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use crate::balance::InFlightGuard;
use crate::pool::Lease;
use crate::visitor::Upload;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The body of a request to a backend: that of the visitor's request, or none.
#[derive(Debug)]
pub enum Outgoing {
    Empty,
    Visitor { body: Incoming, upload: Upload },
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Self::Visitor { body, upload } = self.get_mut() else { return Poll::Ready(None) };
        let frame = Pin::new(body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame {
            upload.count(frame.data_ref().map_or(0, Bytes::len));
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Visitor { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Visitor { body, .. } => body.size_hint(),
        }
    }
}

/// A body whose first bytes were read already. The HTTP library writes bytes that are ready together with the head, in
/// one system call.
#[derive(Debug)]
pub struct PrefixedBody<B> {
    /// The bytes that were read.
    pub prefix: Option<Bytes>,
    /// The rest of the body.
    pub rest: B,
}

impl<B> Body for PrefixedBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Error>,
{
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if let Some(bytes) = self.prefix.take() {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        Pin::new(&mut self.rest).poll_frame(cx).map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.prefix.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let prefix = self.prefix.as_ref().map_or(0, |bytes| bytes.len() as u64);
        let rest = self.rest.size_hint();
        let mut whole = SizeHint::new();
        whole.set_lower(prefix + rest.lower());
        if let Some(upper) = rest.upper() {
            whole.set_upper(prefix + upper);
        }
        whole
    }
}

/// The body of a backend's response. The request stays in flight until the last byte is sent; then the connection
/// returns to the pool.
#[derive(Debug)]
pub struct Proxied {
    body: Incoming,
    has_ended: bool,
    lease: Option<Lease>,
    #[expect(dead_code, reason = "the request is in flight until this is dropped")]
    in_flight: InFlightGuard,
}

impl Proxied {
    pub fn new(body: Incoming, lease: Lease, in_flight: InFlightGuard) -> Self {
        Self { body, has_ended: false, lease: Some(lease), in_flight }
    }
}

impl Body for Proxied {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        self.has_ended |= matches!(frame, Poll::Ready(None));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.has_ended || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Proxied {
    fn drop(&mut self) {
        // Otherwise the connection is closed: unread bytes of the response are still to come.
        if self.is_end_stream()
            && let Some(lease) = self.lease.take()
        {
            lease.release();
        }
    }
}
