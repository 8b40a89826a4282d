//! Retries with growing, jittered pauses; none where the breaker is open.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use rand::RngExt;
use tower::BoxError;
use tower::retry::{Policy, RetryLayer};

use crate::breaker::Open;

/// The first pause; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(50);

/// Repeats what failed so many times.
#[derive(Clone, Debug)]
pub struct Retry {
    left: u32,
    pause: Duration,
}

impl Retry {
    /// A layer that repeats a failed call up to `times` times.
    #[must_use]
    pub fn layer(times: u32) -> RetryLayer<Self> {
        RetryLayer::new(Self { left: times, pause: PAUSE })
    }
}

impl<R: Clone, T> Policy<R, T, BoxError> for Retry {
    type Future = Pin<Box<dyn Future<Output = ()> + Send>>;

    fn retry(&mut self, _: &mut R, outcome: &mut Result<T, BoxError>) -> Option<Self::Future> {
        let error = outcome.as_ref().err()?;
        if self.left == 0 || error.is::<Open>() {
            return None;
        }
        let pause = self.pause.mul_f64(rand::rng().random_range(0.5..1.5));
        self.left -= 1;
        self.pause *= 2;
        Some(Box::pin(tokio::time::sleep(pause)))
    }

    fn clone_request(&mut self, request: &R) -> Option<R> {
        Some(request.clone())
    }
}
