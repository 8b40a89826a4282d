//! A circuit breaker (Nygard, *Release It!*). Closed: every call goes through. Open, after consecutive failures: every
//! call fails at once. Half open, some time later: one call goes through and decides the next state.

use std::fmt::{Display, Formatter};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;
use tower::{BoxError, Layer, Service};

/// The error of a call that was not made because the breaker is open.
#[derive(Debug)]
pub struct Open {
    peer: &'static str,
}

impl Display for Open {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} has failed several times; it is not called for a while", self.peer)
    }
}

impl std::error::Error for Open {}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// While open: when the next attempt may go through.
    open_until: Option<Instant>,
    /// Whether the half-open breaker's one attempt is in flight.
    probing: bool,
}

/// Puts a circuit breaker around a service. Its clones share one breaker.
#[derive(Clone, Debug)]
pub struct BreakerLayer {
    peer: &'static str,
    failure_threshold: u32,
    open_duration: Duration,
    state: Arc<Mutex<State>>,
}

impl BreakerLayer {
    /// A closed breaker that opens for `open_duration` after `failure_threshold` consecutive failures.
    #[must_use]
    pub fn new(peer: &'static str, failure_threshold: u32, open_duration: Duration) -> Self {
        Self { peer, failure_threshold, open_duration, state: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts an attempt. Returns `false` if the breaker is open.
    fn try_start(&self) -> bool {
        let mut state = self.state();
        match state.open_until {
            None => true,
            Some(until) if Instant::now() >= until && !state.probing => {
                state.probing = true;
                true
            }
            Some(_) => false,
        }
    }

    /// Records the outcome of an attempt.
    fn record(&self, succeeded: bool) {
        let mut state = self.state();
        state.probing = false;
        if succeeded {
            if state.open_until.take().is_some() {
                tracing::info!(peer = self.peer, "calls succeed again; the circuit breaker is closed");
                metrics::gauge!("capsule_breaker_open", "peer" => self.peer).set(0.0);
            }
            state.failures = 0;
            return;
        }
        state.failures = state.failures.saturating_add(1);
        if state.failures >= self.failure_threshold {
            if state.open_until.is_none() {
                tracing::warn!(peer = self.peer, failures = state.failures, "calls keep failing; the circuit breaker is open");
                metrics::gauge!("capsule_breaker_open", "peer" => self.peer).set(1.0);
                metrics::counter!("capsule_breaker_opened_total", "peer" => self.peer).increment(1);
            }
            state.open_until = Some(Instant::now() + self.open_duration);
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

/// An attempt in flight. If it is dropped before it ends, the breaker permits another one.
struct Attempt {
    breaker: BreakerLayer,
    recorded: bool,
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.recorded {
            self.breaker.state().probing = false;
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
            .try_start()
            .then(|| (Box::pin(self.inner.call(request)), Attempt { breaker: self.breaker.clone(), recorded: false }));
        BreakerFuture { attempt, peer: self.breaker.peer }
    }
}

/// A call in flight, or one that the breaker refused.
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
        attempt.recorded = true;
        attempt.breaker.record(outcome.is_ok());
        Poll::Ready(outcome)
    }
}
