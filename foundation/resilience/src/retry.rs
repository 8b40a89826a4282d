//! Retries with exponential back-off and jitter; none while the breaker is open.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use rand::RngExt;
use tower::BoxError;
use tower::retry::{Policy, RetryLayer};

use crate::breaker::Open;

/// The first delay; each further one is twice as long.
const FIRST_DELAY: Duration = Duration::from_millis(50);

/// A retry policy with a limited number of retries.
#[derive(Clone, Debug)]
pub struct Retry {
    left: u32,
    delay: Duration,
}

impl Retry {
    /// A layer that repeats a failed call up to `retries` times.
    #[must_use]
    pub fn layer(retries: u32) -> RetryLayer<Self> {
        RetryLayer::new(Self { left: retries, delay: FIRST_DELAY })
    }
}

impl<R: Clone, T> Policy<R, T, BoxError> for Retry {
    type Future = Pin<Box<dyn Future<Output = ()> + Send>>;

    fn retry(&mut self, _: &mut R, outcome: &mut Result<T, BoxError>) -> Option<Self::Future> {
        let error = outcome.as_ref().err()?;
        if self.left == 0 || error.is::<Open>() {
            return None;
        }
        let delay = self.delay.mul_f64(rand::rng().random_range(0.5..1.5));
        self.left -= 1;
        self.delay *= 2;
        Some(Box::pin(tokio::time::sleep(delay)))
    }

    fn clone_request(&mut self, request: &R) -> Option<R> {
        Some(request.clone())
    }
}
