//! Timeout, retries and circuit breaker, as tower layers, for every call to an external system. While a peer is
//! down, calls to it fail at once instead of waiting for a timeout.

mod breaker;
mod retry;

use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

use capsule_contracts::Problem;
use futures_util::future::{BoxFuture, TryFutureExt};
use tower::timeout::TimeoutLayer;
use tower::{BoxError, ServiceBuilder, ServiceExt};

pub use breaker::{Breaker, BreakerLayer, Open};
pub use retry::Retry;

/// How to call a peer.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// The peer's name, in metrics and error messages.
    pub peer: &'static str,
    /// The timeout of one attempt.
    pub timeout: Duration,
    /// How often a failed attempt is repeated. More than 0 only for idempotent calls.
    pub retries: u32,
    /// The number of consecutive failures that opens the breaker.
    pub failure_threshold: u32,
    /// How long the breaker stays open before it permits the next attempt.
    pub open_duration: Duration,
}

impl Policy {
    /// A timeout of ten seconds, two retries, and a breaker that opens after five failures for ten seconds.
    #[must_use]
    pub fn new(peer: &'static str) -> Self {
        let (timeout, open_duration) = (Duration::from_secs(10), Duration::from_secs(10));
        Self { peer, timeout, retries: 2, failure_threshold: 5, open_duration }
    }
}

/// Calls a peer under a policy. Clones share the breaker.
#[derive(Clone, Debug)]
pub struct Guard {
    policy: Policy,
    breaker: BreakerLayer,
}

impl Guard {
    /// A guard whose breaker is closed.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self { policy, breaker: BreakerLayer::new(policy.peer, policy.failure_threshold, policy.open_duration) }
    }

    /// Calls the peer, with the policy's retries.
    ///
    /// # Errors
    /// [`Problem::unavailable`] once the last attempt has failed, or at once while the breaker is open. The cause is
    /// logged.
    pub fn call<'a, T, E, F, C>(&self, call: C) -> BoxFuture<'a, Result<T, Problem>>
    where
        C: Fn() -> F + Clone + Send + 'a,
        F: Future<Output = Result<T, E>> + Send + 'a,
        E: Into<BoxError> + 'a,
        T: Send + 'a,
    {
        let guard = self.clone();
        // The type annotations are needed: the compiler does not infer these types across an await.
        let once = tower::service_fn(move |()| -> BoxFuture<'a, Result<T, BoxError>> {
            let called = call();
            Box::pin(async move { called.await.map_err(Into::into) })
        });
        let service = ServiceBuilder::new()
            .layer(Retry::layer(self.policy.retries))
            .layer(self.breaker.clone())
            .layer(TimeoutLayer::new(self.policy.timeout))
            .service(once);
        let outcome: BoxFuture<'a, Result<T, BoxError>> = Box::pin(service.oneshot(()));
        Box::pin(outcome.map_err(move |error| guard.problem(&error)))
    }

    fn problem(&self, error: &dyn Display) -> Problem {
        tracing::debug!(peer = self.policy.peer, %error, "a call failed");
        Problem::unavailable(format!("{} does not answer.", self.policy.peer))
    }
}

#[cfg(test)]
mod tests {
    use super::{Guard, Policy};
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    fn policy() -> Policy {
        Policy {
            timeout: Duration::from_secs(1),
            retries: 1,
            failure_threshold: 3,
            open_duration: Duration::from_secs(5),
            ..Policy::new("the peer")
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_attempt_is_repeated() {
        let attempts = AtomicU32::new(0);
        let answer = Guard::new(policy())
            .call(|| async { if attempts.fetch_add(1, Ordering::Relaxed) == 0 { Err("no") } else { Ok(7) } })
            .await;
        assert_eq!(answer.expect("the second answers"), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_attempt_ends_at_its_timeout() {
        let guard = Guard::new(Policy { retries: 0, ..policy() });
        let problem = guard.call(std::future::pending::<Result<(), String>>).await.expect_err("too slow");
        assert!(problem.detail.contains("the peer does not answer"), "{problem:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_breaker_permits_one_attempt_at_a_time_until_the_peer_is_up() {
        let (attempts, up) = (AtomicU32::new(0), AtomicU32::new(0));
        let guard = Guard::new(Policy { retries: 0, ..policy() });
        let call = || {
            guard.call(|| async {
                attempts.fetch_add(1, Ordering::Relaxed);
                if up.load(Ordering::Relaxed) == 1 { Ok(()) } else { Err("down") }
            })
        };
        for _ in 0..10 {
            call().await.expect_err("down");
        }
        assert_eq!(attempts.load(Ordering::Relaxed), 3, "no call once the breaker is open");
        tokio::time::advance(Duration::from_secs(6)).await;
        call().await.expect_err("still down");
        call().await.expect_err("open again at once");
        assert_eq!(attempts.load(Ordering::Relaxed), 4);
        up.store(1, Ordering::Relaxed);
        tokio::time::advance(Duration::from_secs(6)).await;
        call().await.expect("up");
        call().await.expect("closed again");
        assert_eq!(attempts.load(Ordering::Relaxed), 6);
    }
}
