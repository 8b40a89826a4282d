//! Bodies of answers, on their way through.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

use crate::balance::Busy;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// A body of which something was read already. What is known when an answer's head goes out goes out
/// with it, in one write.
#[derive(Debug)]
pub struct Begun<B> {
    /// What was read.
    pub begun: Option<Bytes>,
    /// What is still to come.
    pub rest: B,
    /// An instance that counts as busy until the last byte went out.
    #[expect(dead_code, reason = "it counts for as long as it lives")]
    pub busy: Option<Busy>,
}

impl<B> Body for Begun<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Error>,
{
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if let Some(bytes) = self.begun.take() {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        Pin::new(&mut self.rest).poll_frame(cx).map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.begun.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let begun = self.begun.as_ref().map_or(0, |bytes| bytes.len() as u64);
        let rest = self.rest.size_hint();
        let mut whole = SizeHint::new();
        whole.set_lower(begun + rest.lower());
        if let Some(upper) = rest.upper() {
            whole.set_upper(begun + upper);
        }
        whole
    }
}
