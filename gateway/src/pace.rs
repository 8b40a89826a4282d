//! Request bodies with a minimum rate and a deadline. A client that sends byte by byte would otherwise hold a
//! connection, a task and a file for as long as it likes.

use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use capsule_contracts::Problem;
use http_body_util::BodyExt;

/// How fast a body must arrive. Only time that is spent waiting for the client counts.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The rate is measured over windows of this length.
    pub window: Duration,
    /// The fewest bytes that must arrive in each window.
    pub bytes_per_window: u64,
    /// The longest that the whole body may take.
    pub deadline: Duration,
}

impl Pace {
    /// For the bodies of ordinary requests, which are small.
    pub const ORDINARY: Self =
        Self { window: Duration::from_secs(10), bytes_per_window: 10 << 10, deadline: Duration::from_secs(45) };
    /// For bodies that are read only so that the client notices the answer.
    pub const DISCARDED: Self =
        Self { window: Duration::from_secs(2), bytes_per_window: 64 << 10, deadline: Duration::from_secs(30) };

    /// For uploads.
    #[must_use]
    pub fn of_uploads(bytes_per_second: u64, deadline: Duration) -> Self {
        // Long enough for a line that stalls for a moment.
        let window = Duration::from_secs(20).min(deadline);
        Self { window, bytes_per_window: bytes_per_second * window.as_secs(), deadline }
    }
}

/// A body that is read at a pace.
#[derive(Debug)]
pub struct PacedBody<'a> {
    body: &'a mut Body,
    pace: Pace,
    /// Time spent waiting for the client, in the present window and before it.
    in_window: Duration,
    before: Duration,
    bytes_in_window: u64,
}

impl<'a> PacedBody<'a> {
    pub fn new(body: &'a mut Body, pace: Pace) -> Self {
        Self { body, pace, in_window: Duration::ZERO, before: Duration::ZERO, bytes_in_window: 0 }
    }

    /// The next bytes; `None` at the end of the body.
    ///
    /// # Errors
    /// When the body arrives too slowly, takes too long, or is cut short.
    pub async fn data(&mut self) -> Result<Option<Bytes>, Problem> {
        loop {
            let Pace { window, bytes_per_window, deadline } = self.pace;
            let left = window.saturating_sub(self.in_window).min(deadline.saturating_sub(self.before + self.in_window));
            let began = Instant::now();
            let frame = tokio::time::timeout(left, self.body.frame()).await;
            self.in_window += began.elapsed();
            let data = match frame {
                Err(_) => None,
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(Problem::bad_request(format!("The body was cut short: {error}."))),
                Ok(Some(Ok(frame))) => frame.into_data().ok(),
            };
            self.bytes_in_window += data.as_ref().map_or(0, |data| data.len() as u64);
            if self.before + self.in_window >= deadline {
                return Err(Problem::too_slow(format!("The body took longer than {} s.", deadline.as_secs())));
            }
            if self.in_window >= window {
                if self.bytes_in_window < bytes_per_window {
                    let rate = bytes_per_window / window.as_secs().max(1);
                    return Err(Problem::too_slow(format!("The body arrived at less than {rate} bytes a second.")));
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
    use super::{Pace, PacedBody};
    use axum::body::Body;
    use bytes::Bytes;
    use std::convert::Infallible;
    use std::time::Duration;

    /// A body without end: so many bytes after each pause.
    fn drip(bytes: usize, pause: Duration) -> Body {
        let piece = Bytes::from(vec![b'x'; bytes]);
        Body::from_stream(futures_util::stream::unfold(piece, move |piece| async move {
            tokio::time::sleep(pause).await;
            Some((Ok::<_, Infallible>(piece.clone()), piece))
        }))
    }

    async fn ended(mut body: Body, pace: Pace) -> capsule_contracts::Problem {
        let mut paced = PacedBody::new(&mut body, pace);
        loop {
            match paced.data().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it has no end"),
                Err(problem) => return problem,
            }
        }
    }

    #[tokio::test]
    async fn a_body_that_drips_stalls_or_never_ends_is_ended() {
        let pace = Pace { window: Duration::from_millis(200), bytes_per_window: 1000, deadline: Duration::from_secs(1) };
        for (body, told) in [
            (drip(1, Duration::from_millis(5)), "less than"),
            (drip(1, Duration::from_secs(3600)), "less than"),
            (drip(4096, Duration::from_millis(1)), "longer than 1 s"),
            (drip(64, Duration::ZERO), "longer than 1 s"),
        ] {
            let problem = ended(body, pace).await;
            assert_eq!((problem.status, problem.code.as_str()), (408, "too_slow"));
            assert!(problem.detail.contains(told), "{problem}");
        }
    }

    #[tokio::test]
    async fn the_time_that_the_server_takes_is_not_the_clients() {
        let pace = Pace { window: Duration::from_millis(50), bytes_per_window: 1000, deadline: Duration::from_millis(300) };
        let mut body = Body::from_stream(futures_util::stream::iter((0..5).map(|_| Ok::<_, Infallible>(Bytes::from("x")))));
        let mut paced = PacedBody::new(&mut body, pace);
        let mut read = 0;
        while let Some(data) = paced.data().await.expect("it is all there") {
            tokio::time::sleep(Duration::from_millis(80)).await;
            read += data.len();
        }
        assert_eq!(read, 5);
    }
}
