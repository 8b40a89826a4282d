//! Rate limits: so many in a window of time, counted for all processes together where they share a cache.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::Cache;

/// The length of a window, in seconds, unless it is said otherwise.
const WINDOW: u64 = 60;
/// Counts that one process keeps by itself at the most.
const MOST: usize = 100_000;

/// How many are let through in a window; 0 is no limit.
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
    own: Mutex<HashMap<String, Count>>,
    /// What is remembered, and until when, in seconds since the epoch.
    marks: Mutex<HashMap<String, u64>>,
}

#[derive(Debug, Default)]
struct Count {
    number: u64,
    /// When its window ends, in seconds since the epoch.
    end: u64,
}

impl Limiter {
    /// A limiter that counts in `cache`, or by itself where that does not answer.
    #[must_use]
    pub fn new(cache: Cache) -> Self {
        Self { cache, own: Mutex::default(), marks: Mutex::default() }
    }

    /// Counts one more of `who` in this minute. `None` where there is no limit.
    pub async fn take(&self, who: &str, rate: Rate) -> Option<Verdict> {
        self.take_in(who, rate, Duration::from_secs(WINDOW)).await
    }

    /// Counts one more of `who` in a window of this length. `None` where there is no limit.
    pub async fn take_in(&self, who: &str, rate: Rate, length: Duration) -> Option<Verdict> {
        if rate.0 == 0 {
            return None;
        }
        let (now, length) = (now(), length.as_secs().max(1));
        let window = now / length;
        let end = (window + 1) * length;
        let own = self.count(who, now, end);
        let shared = self.cache.count(&format!("capsule:limit:{who}:{window}"), Duration::from_secs(2 * length)).await;
        let count = u32::try_from(shared.unwrap_or(own).max(own)).unwrap_or(u32::MAX);
        let reset = Duration::from_secs(end - now);
        Some(Verdict { allowed: count <= rate.0, limit: rate.0, remaining: rate.0.saturating_sub(count), reset })
    }

    /// Remembers something for so long; after a restart, only what processes share.
    pub async fn mark(&self, what: &str, time: Duration) {
        {
            let now = now();
            let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
            if marks.len() >= MOST {
                marks.retain(|_, until| *until > now);
            }
            if marks.len() < MOST {
                marks.insert(what.to_owned(), now + time.as_secs());
            }
        }
        self.cache.put(&format!("capsule:mark:{what}"), b"1", time).await;
    }

    /// Whether something is remembered.
    pub async fn is_marked(&self, what: &str) -> bool {
        let own = self.marks.lock().unwrap_or_else(PoisonError::into_inner).get(what).is_some_and(|until| *until > now());
        own || self.cache.get(&[&format!("capsule:mark:{what}")]).await.is_some_and(|found| found != [None])
    }

    /// How long it is until everybody's count of this minute begins anew.
    #[must_use]
    pub fn until_next_window() -> Duration {
        Duration::from_secs(WINDOW - now() % WINDOW)
    }

    /// Counts by itself, too: when the shared cache fails, the count goes on from what this process saw.
    fn count(&self, who: &str, now: u64, end: u64) -> u64 {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if own.len() >= MOST && !own.contains_key(who) {
            // Whoever comes by many names must not make the count of one begin anew: the lowest go first.
            own.retain(|_, count| count.end > now);
            let mut least = 1;
            while own.len() >= MOST / 2 {
                own.retain(|_, count| count.number > least);
                least *= 2;
            }
        }
        let count = own.entry(who.to_owned()).or_default();
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
    async fn many_names_do_not_make_the_count_of_one_begin_anew() {
        let limiter = Limiter::new(Cache::none());
        let hour = Duration::from_secs(3600);
        let mut refused = 0;
        for round in 0..30 {
            refused += u32::from(!limiter.take_in("account", Rate(5), hour).await.expect("limited").allowed);
            for name in 0..10_000 {
                limiter.take(&format!("{round}-{name}"), Rate(5)).await;
            }
        }
        // A new hour may begin in between.
        assert!(refused >= 20, "{refused}");
    }

    #[tokio::test]
    async fn what_is_marked_is_remembered_for_its_time() {
        let limiter = Limiter::new(Cache::none());
        limiter.mark("one", Duration::from_secs(60)).await;
        limiter.mark("other", Duration::ZERO).await;
        assert!(limiter.is_marked("one").await);
        assert!(!limiter.is_marked("other").await && !limiter.is_marked("third").await);
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
