//! Minimum rate and deadline for request bodies. Without them, a client that sends byte by byte could hold a
//! connection, a task and a file indefinitely.

use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use capsule_contracts::Problem;
use http_body_util::BodyExt;

/// How fast a body must arrive. Counts only the time spent waiting for the client.
#[derive(Clone, Copy, Debug)]
pub struct MinRate {
    /// The rate is measured over windows of this length.
    pub window: Duration,
    /// Bytes that must arrive in each window.
    pub bytes_per_window: u64,
    /// Maximum time for the whole body.
    pub deadline: Duration,
}

impl MinRate {
    /// For small bodies: those of requests that are not uploads.
    pub const ORDINARY: Self =
        Self { window: Duration::from_secs(10), bytes_per_window: 10 << 10, deadline: Duration::from_secs(45) };
    /// For bodies that are discarded; see [`discard_body`](crate::request::discard_body).
    pub const DISCARDED: Self =
        Self { window: Duration::from_secs(2), bytes_per_window: 64 << 10, deadline: Duration::from_secs(30) };

    /// For uploads.
    #[must_use]
    pub fn for_uploads(bytes_per_second: u64, deadline: Duration) -> Self {
        // Long enough for a connection that stalls for a moment.
        let window = Duration::from_secs(20).min(deadline);
        Self { window, bytes_per_window: bytes_per_second * window.as_secs(), deadline }
    }
}

/// A body that must arrive at a minimum rate.
#[derive(Debug)]
pub struct MinRateBody<'a> {
    body: &'a mut Body,
    rate: MinRate,
    /// Time spent waiting for the client, in the current window and in earlier ones.
    in_window: Duration,
    before: Duration,
    bytes_in_window: u64,
}

impl<'a> MinRateBody<'a> {
    pub fn new(body: &'a mut Body, rate: MinRate) -> Self {
        Self { body, rate, in_window: Duration::ZERO, before: Duration::ZERO, bytes_in_window: 0 }
    }

    /// The next bytes; `None` at the end of the body.
    ///
    /// # Errors
    /// When the body arrives too slowly, takes too long, or is cut short.
    pub async fn data(&mut self) -> Result<Option<Bytes>, Problem> {
        loop {
            let MinRate { window, bytes_per_window, deadline } = self.rate;
            let left = window.saturating_sub(self.in_window).min(deadline.saturating_sub(self.before + self.in_window));
            let began = Instant::now();
            let frame = tokio::time::timeout(left, self.body.frame()).await;
            self.in_window += began.elapsed();
            let data = match frame {
                Err(_) => None,
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(Problem::bad_request(format!("The request body ended early: {error}."))),
                Ok(Some(Ok(frame))) => frame.into_data().ok(),
            };
            self.bytes_in_window += data.as_ref().map_or(0, |data| data.len() as u64);
            if self.before + self.in_window >= deadline {
                return Err(Problem::too_slow(format!("The request body took longer than {} s to arrive.", deadline.as_secs())));
            }
            if self.in_window >= window {
                if self.bytes_in_window < bytes_per_window {
                    let rate = bytes_per_window / window.as_secs().max(1);
                    return Err(Problem::too_slow(format!("The request body arrived at less than {rate} bytes per second.")));
                }
                self.before += self.in_window;
                (self.in_window, self.bytes_in_window) = (Duration::ZERO, 0);
            }
            if let Some(data) = data {
                return Ok(Some(data));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{MinRate, MinRateBody};
    use axum::body::Body;
    use bytes::Bytes;
    use std::convert::Infallible;
    use std::time::Duration;

    /// An endless body that sends `bytes` bytes after each pause.
    fn drip(bytes: usize, pause: Duration) -> Body {
        let piece = Bytes::from(vec![b'x'; bytes]);
        Body::from_stream(futures_util::stream::unfold(piece, move |piece| async move {
            tokio::time::sleep(pause).await;
            Some((Ok::<_, Infallible>(piece.clone()), piece))
        }))
    }

    async fn ended(mut body: Body, rate: MinRate) -> capsule_contracts::Problem {
        let mut reader = MinRateBody::new(&mut body, rate);
        loop {
            match reader.data().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it has no end"),
                Err(problem) => return problem,
            }
        }
    }

    #[tokio::test]
    async fn a_body_that_is_slow_stalls_or_never_ends_is_rejected() {
        let rate = MinRate { window: Duration::from_millis(200), bytes_per_window: 1000, deadline: Duration::from_secs(1) };
        for (body, message) in [
            (drip(1, Duration::from_millis(5)), "less than"),
            (drip(1, Duration::from_secs(3600)), "less than"),
            (drip(4096, Duration::from_millis(1)), "longer than 1 s"),
            (drip(64, Duration::ZERO), "longer than 1 s"),
        ] {
            let problem = ended(body, rate).await;
            assert_eq!((problem.status, problem.code.as_str()), (408, "too_slow"));
            assert!(problem.detail.contains(message), "{problem}");
        }
    }

    #[tokio::test]
    async fn time_spent_by_the_server_does_not_count() {
        let rate = MinRate { window: Duration::from_millis(50), bytes_per_window: 1000, deadline: Duration::from_millis(300) };
        let mut body = Body::from_stream(futures_util::stream::iter((0..5).map(|_| Ok::<_, Infallible>(Bytes::from("x")))));
        let mut reader = MinRateBody::new(&mut body, rate);
        let mut read = 0;
        while let Some(data) = reader.data().await.expect("it is all there") {
            tokio::time::sleep(Duration::from_millis(80)).await;
            read += data.len();
        }
        assert_eq!(read, 5);
    }
}
