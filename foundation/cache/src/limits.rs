//! Fixed-window rate limits, counted for all processes together where they share a cache.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::Cache;

/// The length of a window where none is given.
const DEFAULT_WINDOW_SECONDS: u64 = 60;
/// Maximum number of counters, and of marks, in the memory of a process.
const MAX_ENTRIES: usize = 100_000;

/// Requests allowed per window; 0 means no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(pub u32);

/// Whether a request is allowed, and the state of its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    pub limit: u32,
    /// Requests left in this window.
    pub remaining: u32,
    /// Time until the next window.
    pub reset: Duration,
}

/// Counts requests per key, such as a client's address.
#[derive(Debug)]
pub struct Limiter {
    cache: Cache,
    own: Mutex<HashMap<String, Count>>,
    /// Marks and the times they expire, in seconds since the epoch.
    marks: Mutex<HashMap<String, u64>>,
}

#[derive(Debug, Default)]
struct Count {
    number: u64,
    /// When its window ends, in seconds since the epoch.
    end: u64,
}

impl Limiter {
    /// A limiter that counts in `cache`, and in its own memory while that does not respond.
    #[must_use]
    pub fn new(cache: Cache) -> Self {
        Self { cache, own: Mutex::default(), marks: Mutex::default() }
    }

    /// Counts a request of `key` in the current minute. `None` where there is no limit.
    pub async fn check(&self, key: &str, rate: Rate) -> Option<Decision> {
        self.check_window(key, rate, Duration::from_secs(DEFAULT_WINDOW_SECONDS)).await
    }

    /// Counts a request of `key` in the current window of this length. `None` where there is no limit.
    pub async fn check_window(&self, key: &str, rate: Rate, length: Duration) -> Option<Decision> {
        if rate.0 == 0 {
            return None;
        }
        let (now, length) = (now(), length.as_secs().max(1));
        let window = now / length;
        let end = (window + 1) * length;
        let own = self.count(key, now, end);
        let shared = self.cache.increment(&format!("capsule:limit:{key}:{window}"), Duration::from_secs(2 * length)).await;
        let count = u32::try_from(shared.unwrap_or(own).max(own)).unwrap_or(u32::MAX);
        let reset = Duration::from_secs(end - now);
        Some(Decision { allowed: count <= rate.0, limit: rate.0, remaining: rate.0.saturating_sub(count), reset })
    }

    /// Sets a mark that expires after `ttl`. Without a shared cache, a restart loses it.
    pub async fn mark(&self, what: &str, ttl: Duration) {
        {
            let now = now();
            let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
            if marks.len() >= MAX_ENTRIES {
                marks.retain(|_, until| *until > now);
            }
            if marks.len() < MAX_ENTRIES {
                marks.insert(what.to_owned(), now + ttl.as_secs());
            }
        }
        self.cache.put(&format!("capsule:mark:{what}"), b"1", ttl).await;
    }

    /// Whether a mark is set.
    pub async fn is_marked(&self, what: &str) -> bool {
        let own = self.marks.lock().unwrap_or_else(PoisonError::into_inner).get(what).is_some_and(|until| *until > now());
        own || self.cache.get(&[&format!("capsule:mark:{what}")]).await.is_some_and(|found| found != [None])
    }

    /// Time until the next window of one minute, when all counters start again.
    #[must_use]
    pub fn until_next_window() -> Duration {
        Duration::from_secs(DEFAULT_WINDOW_SECONDS - now() % DEFAULT_WINDOW_SECONDS)
    }

    /// Counts in the process's own memory as well, so that the count continues when the shared cache fails.
    fn count(&self, key: &str, now: u64, end: u64) -> u64 {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if own.len() >= MAX_ENTRIES && !own.contains_key(key) {
            // A client with many keys must not reset the counter of another key: evict the lowest counters first.
            own.retain(|_, count| count.end > now);
            let mut least = 1;
            while own.len() >= MAX_ENTRIES / 2 {
                own.retain(|_, count| count.number > least);
                least *= 2;
            }
        }
        let count = own.entry(key.to_owned()).or_default();
        if count.end != end {
            *count = Count { number: 0, end };
        }
        count.number += 1;
        count.number
    }
}

/// Seconds since the epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Limiter, Rate};
    use crate::Cache;

    #[tokio::test]
    async fn each_key_has_its_own_limit() {
        let limiter = Limiter::new(Cache::none());
        let mut allowed = 0;
        for _ in 0..20 {
            allowed += u32::from(limiter.check("one", Rate(5)).await.expect("limited").allowed);
        }
        // A new minute may begin in between.
        assert!(allowed == 5 || allowed == 10, "{allowed}");
        assert!(limiter.check("other", Rate(5)).await.expect("limited").allowed);
        assert_eq!(limiter.check("one", Rate(0)).await, None);
    }

    #[tokio::test]
    async fn many_keys_do_not_reset_the_count_of_one() {
        let limiter = Limiter::new(Cache::none());
        let hour = Duration::from_secs(3600);
        let mut refused = 0;
        for round in 0..30 {
            refused += u32::from(!limiter.check_window("account", Rate(5), hour).await.expect("limited").allowed);
            for name in 0..10_000 {
                limiter.check(&format!("{round}-{name}"), Rate(5)).await;
            }
        }
        // A new hour may begin in between.
        assert!(refused >= 20, "{refused}");
    }

    #[tokio::test]
    async fn a_mark_expires_after_its_time() {
        let limiter = Limiter::new(Cache::none());
        limiter.mark("one", Duration::from_secs(60)).await;
        limiter.mark("other", Duration::ZERO).await;
        assert!(limiter.is_marked("one").await);
        assert!(!limiter.is_marked("other").await && !limiter.is_marked("third").await);
    }

    #[tokio::test]
    async fn limits_apply_while_the_cache_is_down() {
        let limiter = Limiter::new(Cache::at("redis://127.0.0.1:1").expect("an address"));
        let mut refused = 0;
        for _ in 0..20 {
            refused += u32::from(!limiter.check("one", Rate(5)).await.expect("limited").allowed);
        }
        assert!(refused >= 10, "{refused}");
    }
}
