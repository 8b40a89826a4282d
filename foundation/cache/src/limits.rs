//! Rate limits: so many in a minute, counted for all processes together where they share a cache.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::Cache;

/// The length of a window, in seconds.
const WINDOW: u64 = 60;
/// Counts that one process keeps by itself at the most.
const MOST: usize = 100_000;

/// How many are let through in a minute; 0 is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(pub u32);

/// Whether one more is let through, and what to tell of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub allowed: bool,
    pub limit: u32,
    /// How many more would be in this window.
    pub remaining: u32,
    /// When the next window begins.
    pub reset: Duration,
}

/// Counts what comes, by who it comes from.
#[derive(Debug)]
pub struct Limiter {
    cache: Cache,
    /// The present window, and the counts in it.
    own: Mutex<(u64, HashMap<String, u64>)>,
}

impl Limiter {
    /// A limiter that counts in `cache`, or by itself where that does not answer.
    #[must_use]
    pub fn new(cache: Cache) -> Self {
        Self { cache, own: Mutex::default() }
    }

    /// Counts one more of `who`. `None` where there is no limit.
    pub async fn take(&self, who: &str, rate: Rate) -> Option<Verdict> {
        if rate.0 == 0 {
            return None;
        }
        let (window, reset) = (now() / WINDOW, Self::until_next_window());
        let own = self.count(who, window);
        let shared = self.cache.count(&format!("capsule:limit:{who}:{window}"), Duration::from_secs(2 * WINDOW)).await;
        let count = u32::try_from(shared.unwrap_or(own).max(own)).unwrap_or(u32::MAX);
        Some(Verdict { allowed: count <= rate.0, limit: rate.0, remaining: rate.0.saturating_sub(count), reset })
    }

    /// How long it is until everybody's count begins anew.
    #[must_use]
    pub fn until_next_window() -> Duration {
        Duration::from_secs(WINDOW - now() % WINDOW)
    }

    /// Counts by itself, too: when the shared cache fails, the count goes on from what this process saw.
    fn count(&self, who: &str, window: u64) -> u64 {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if own.0 != window || own.1.len() > MOST {
            *own = (window, HashMap::new());
        }
        let count = own.1.entry(who.to_owned()).or_default();
        *count += 1;
        *count
    }
}

/// Seconds since the epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::{Limiter, Rate};
    use crate::Cache;

    #[tokio::test]
    async fn each_has_a_limit_of_their_own() {
        let limiter = Limiter::new(Cache::none());
        let mut allowed = 0;
        for _ in 0..20 {
            allowed += u32::from(limiter.take("one", Rate(5)).await.expect("limited").allowed);
        }
        // A new minute may begin in between.
        assert!(allowed == 5 || allowed == 10, "{allowed}");
        assert!(limiter.take("other", Rate(5)).await.expect("limited").allowed);
        assert_eq!(limiter.take("one", Rate(0)).await, None);
    }

    #[tokio::test]
    async fn a_cache_that_is_down_stops_nobody_and_limits_still() {
        let limiter = Limiter::new(Cache::at("redis://127.0.0.1:1").expect("an address"));
        let mut refused = 0;
        for _ in 0..20 {
            refused += u32::from(!limiter.take("one", Rate(5)).await.expect("limited").allowed);
        }
        assert!(refused >= 10, "{refused}");
    }
}
