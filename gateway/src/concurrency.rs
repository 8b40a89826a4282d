//! Limits on concurrent uploads and streams per user, in this process. They stay open for long, so a rate limit does
//! not bound them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use capsule_bus::Principal;
use capsule_contracts::{Problem, Uuid};

/// Counts open uploads or streams per user.
#[derive(Clone, Debug)]
pub struct Concurrency {
    kind: &'static str,
    limit: u32,
    open: Arc<Mutex<HashMap<Uuid, u32>>>,
}

impl Concurrency {
    /// Allows `limit` open items of a kind, such as `uploads`, per user; 0 means no limit.
    pub fn new(kind: &'static str, limit: u32) -> Self {
        Self { kind, limit, open: Arc::default() }
    }

    /// Acquires a permit. Dropping it releases it. `None` where there is no limit.
    ///
    /// # Errors
    /// When the user is at the limit.
    pub fn acquire(&self, principal: Principal) -> Result<Option<Permit>, Problem> {
        let Some(id) = principal.account() else { return Ok(None) };
        if self.limit == 0 {
            return Ok(None);
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(id).or_default();
        if *count >= self.limit {
            metrics::counter!("capsule_requests_limited_total").increment(1);
            let Self { limit, kind, .. } = self;
            return Err(Problem::too_many(format!("You have {limit} open {kind}, the limit per user."))
                .hint("Wait until one ends, or cancel one."));
        }
        *count += 1;
        Ok(Some(Permit { open: self.open.clone(), user: id }))
    }
}

/// An open upload or stream of a user.
#[derive(Debug)]
pub struct Permit {
    open: Arc<Mutex<HashMap<Uuid, u32>>>,
    user: Uuid,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Concurrency;
    use capsule_bus::Principal;
    use capsule_contracts::Uuid;

    #[test]
    fn each_user_has_a_limit_and_dropping_a_permit_releases_it() {
        let user = |n| Principal::User { id: Uuid::from_u128(n), session: Uuid::nil(), platform_admin: false };
        let uploads = Concurrency::new("uploads", 2);
        let first = uploads.acquire(user(1)).expect("one");
        let _second = uploads.acquire(user(1)).expect("two");
        assert_eq!(uploads.acquire(user(1)).expect_err("three").status, 429);
        let _other = uploads.acquire(user(2)).expect("another user");
        drop(first);
        let _third = uploads.acquire(user(1)).expect("two again");
        assert_eq!(uploads.open.lock().expect("alive").len(), 2);
    }
}
