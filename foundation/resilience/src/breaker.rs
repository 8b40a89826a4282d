//! The circuit breaker (Nygard, *Release It!*): closed while all is well; open after failures one after the
//! other, when nothing gets through; half open after a rest, when one attempt does.

use std::fmt::{Display, Formatter};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;
use tower::{BoxError, Layer, Service};

/// The breaker is open: the peer was not asked.
#[derive(Debug)]
pub struct Open {
    peer: &'static str,
}

impl Display for Open {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} has failed several times and is left alone for a moment", self.peer)
    }
}

impl std::error::Error for Open {}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// While open: when the next attempt may go through.
    until: Option<Instant>,
    /// The one attempt of a half-open breaker is under way.
    trying: bool,
}

/// Puts a circuit breaker around a service. Its clones share one breaker.
#[derive(Clone, Debug)]
pub struct BreakerLayer {
    peer: &'static str,
    failures: u32,
    rest: Duration,
    state: Arc<Mutex<State>>,
}

impl BreakerLayer {
    /// A closed breaker that opens for `rest` after so many `failures` one after the other.
    #[must_use]
    pub fn new(peer: &'static str, failures: u32, rest: Duration) -> Self {
        Self { peer, failures, rest, state: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an attempt may go through.
    fn lets_through(&self) -> bool {
        let mut state = self.state();
        match state.until {
            None => true,
            Some(until) if Instant::now() >= until && !state.trying => {
                state.trying = true;
                true
            }
            Some(_) => false,
        }
    }

    fn settle(&self, succeeded: bool) {
        let mut state = self.state();
        state.trying = false;
        if succeeded {
            if state.until.take().is_some() {
                tracing::info!(peer = self.peer, "answers again");
                metrics::gauge!("capsule_breaker_open", "peer" => self.peer).set(0.0);
            }
            state.failures = 0;
            return;
        }
        state.failures = state.failures.saturating_add(1);
        if state.failures >= self.failures {
            if state.until.is_none() {
                tracing::warn!(peer = self.peer, failures = state.failures, "does not answer: it is left alone for a moment");
                metrics::gauge!("capsule_breaker_open", "peer" => self.peer).set(1.0);
                metrics::counter!("capsule_breaker_opened_total", "peer" => self.peer).increment(1);
            }
            state.until = Some(Instant::now() + self.rest);
        }
    }
}

impl<S> Layer<S> for BreakerLayer {
    type Service = Breaker<S>;

    fn layer(&self, inner: S) -> Breaker<S> {
        Breaker { inner, breaker: self.clone() }
    }
}

/// A service behind a circuit breaker.
#[derive(Clone, Debug)]
pub struct Breaker<S> {
    inner: S,
    breaker: BreakerLayer,
}

/// Settles the attempt as failed if it is given up before it ends.
struct Attempt {
    breaker: BreakerLayer,
    settled: bool,
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.settled {
            self.breaker.state().trying = false;
        }
    }
}

impl<S, R> Service<R> for Breaker<S>
where
    S: Service<R, Error = BoxError>,
    S::Future: Send,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = BreakerFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> Self::Future {
        let attempt = self
            .breaker
            .lets_through()
            .then(|| (Box::pin(self.inner.call(request)), Attempt { breaker: self.breaker.clone(), settled: false }));
        BreakerFuture { attempt, peer: self.breaker.peer }
    }
}

/// An attempt under way, or one that was not let through.
pub struct BreakerFuture<F> {
    attempt: Option<(Pin<Box<F>>, Attempt)>,
    peer: &'static str,
}

impl<F> std::fmt::Debug for BreakerFuture<F> {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "BreakerFuture({})", self.peer)
    }
}

impl<F, T> Future for BreakerFuture<F>
where
    F: Future<Output = Result<T, BoxError>>,
{
    type Output = Result<T, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let peer = self.peer;
        let Some((call, attempt)) = &mut self.attempt else { return Poll::Ready(Err(Box::new(Open { peer }))) };
        let outcome = std::task::ready!(call.as_mut().poll(cx));
        attempt.settled = true;
        attempt.breaker.settle(outcome.is_ok());
        Poll::Ready(outcome)
    }
}
