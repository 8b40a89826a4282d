//! What every call to the outside goes through: a deadline, retries, and a circuit breaker, as tower
//! layers. A peer that is down is not asked by everybody all the time, and costs nobody more than a moment.

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

/// How a peer is dealt with.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// The peer's name, in metrics and in what people are told.
    pub peer: &'static str,
    /// How long one attempt may take.
    pub deadline: Duration,
    /// How often a failed attempt is repeated. More than 0 only for what may be done twice.
    pub retries: u32,
    /// So many failures one after the other open the breaker.
    pub failures: u32,
    /// An open breaker lets the next attempt through after so long.
    pub rest: Duration,
}

impl Policy {
    /// A deadline of ten seconds, two retries, and a breaker that opens after five failures for ten seconds.
    #[must_use]
    pub fn new(peer: &'static str) -> Self {
        let (deadline, rest) = (Duration::from_secs(10), Duration::from_secs(10));
        Self { peer, deadline, retries: 2, failures: 5, rest }
    }
}

/// Calls a peer under a policy. Cloned, it shares the breaker.
#[derive(Clone, Debug)]
pub struct Guard {
    policy: Policy,
    breaker: BreakerLayer,
}

impl Guard {
    /// A guard whose breaker is closed.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self { policy, breaker: BreakerLayer::new(policy.peer, policy.failures, policy.rest) }
    }

    /// Calls the peer; again if it fails, as often as the policy says.
    ///
    /// # Errors
    /// [`Problem::unavailable`] once the last attempt has failed, or at once while the breaker is open. What
    /// went wrong is logged.
    pub fn call<'a, T, E, F, C>(&self, call: C) -> BoxFuture<'a, Result<T, Problem>>
    where
        C: Fn() -> F + Clone + Send + 'a,
        F: Future<Output = Result<T, E>> + Send + 'a,
        E: Into<BoxError> + 'a,
        T: Send + 'a,
    {
        let guard = self.clone();
        // Types are named where the compiler would not find them across an await.
        let once = tower::service_fn(move |()| -> BoxFuture<'a, Result<T, BoxError>> {
            let called = call();
            Box::pin(async move { called.await.map_err(Into::into) })
        });
        let service = ServiceBuilder::new()
            .layer(Retry::layer(self.policy.retries))
            .layer(self.breaker.clone())
            .layer(TimeoutLayer::new(self.policy.deadline))
            .service(once);
        let outcome: BoxFuture<'a, Result<T, BoxError>> = Box::pin(service.oneshot(()));
        Box::pin(outcome.map_err(move |error| guard.told(&error)))
    }

    fn told(&self, error: &dyn Display) -> Problem {
        tracing::debug!(peer = self.policy.peer, %error, "a call has failed");
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
            deadline: Duration::from_secs(1),
            retries: 1,
            failures: 3,
            rest: Duration::from_secs(5),
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
    async fn a_slow_attempt_ends_at_its_deadline() {
        let guard = Guard::new(Policy { retries: 0, ..policy() });
        let problem = guard.call(std::future::pending::<Result<(), String>>).await.expect_err("too slow");
        assert!(problem.detail.contains("the peer does not answer"), "{problem:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_is_down_is_left_alone_until_it_may_be_up_again() {
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
        assert_eq!(attempts.load(Ordering::Relaxed), 3, "asked no more once the breaker is open");
        tokio::time::advance(Duration::from_secs(6)).await;
        call().await.expect_err("still down");
        call().await.expect_err("left alone again at once");
        assert_eq!(attempts.load(Ordering::Relaxed), 4);
        up.store(1, Ordering::Relaxed);
        tokio::time::advance(Duration::from_secs(6)).await;
        call().await.expect("up");
        call().await.expect("and asked as before");
        assert_eq!(attempts.load(Ordering::Relaxed), 6);
    }
}
