//! A cache that the processes of an installation share: counters of rate limits, replies, and revoked sessions.
//!
//! It is in Redis. Without Redis, or while it is down, each process uses only its own memory. Nothing may depend on
//! the cache for correctness.

mod limits;
pub mod revocation;

use std::sync::Arc;
use std::time::Duration;

use capsule_resilience::{Guard, Policy};
use redis::AsyncCommands;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use tokio::sync::OnceCell;

pub use limits::{Decision, Limiter, Rate};

/// How long to wait for a response of the shared cache.
const RESPONSE_TIMEOUT: Duration = Duration::from_millis(250);
/// How long a failing cache is not called.
const OPEN_DURATION: Duration = Duration::from_secs(2);

/// A shared cache, or none.
#[derive(Clone)]
pub struct Cache(Option<Arc<Shared>>);

struct Shared {
    client: redis::Client,
    connection: OnceCell<ConnectionManager>,
    guard: Guard,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Cache(Redis)" } else { "Cache(none)" })
    }
}

impl Cache {
    /// No shared cache.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// The Redis server at `url` (`redis://:password@host:port/db`). The first command connects, and a lost
    /// connection is reestablished.
    ///
    /// # Errors
    /// When `url` is invalid. The error does not contain it, as it may contain a password.
    pub fn at(url: &str) -> Result<Self, String> {
        let client = redis::Client::open(url).map_err(|_| "must look like redis://:password@host:6379".to_owned())?;
        let policy = Policy {
            timeout: RESPONSE_TIMEOUT,
            retries: 0,
            failure_threshold: 3,
            open_duration: OPEN_DURATION,
            ..Policy::new("Redis")
        };
        Ok(Self(Some(Arc::new(Shared { client, connection: OnceCell::new(), guard: Guard::new(policy) }))))
    }

    /// Whether a shared cache is configured.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.0.is_some()
    }

    /// Whether the shared cache responds. `None` where none is configured.
    pub async fn is_available(&self) -> Option<bool> {
        self.0.as_ref()?;
        Some(self.get(&["capsule:ping"]).await.is_some())
    }

    /// The values of several keys, each `None` if missing. `None` if there is no shared cache or it does not respond.
    pub async fn get(&self, keys: &[&str]) -> Option<Vec<Option<Vec<u8>>>> {
        let keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
        self.call(move |mut redis| {
            let keys = keys.clone();
            async move { redis.mget::<_, Vec<Option<Vec<u8>>>>(keys).await }
        })
        .await
    }

    /// Stores a value for `ttl`, at least one second. Returns whether it was stored.
    pub async fn put(&self, key: &str, value: &[u8], ttl: Duration) -> bool {
        let (key, value, seconds) = (key.to_owned(), value.to_vec(), ttl.as_secs().max(1));
        let stored = self.call(move |mut redis| {
            let (key, value) = (key.clone(), value.clone());
            async move { redis.set_ex::<_, _, ()>(key, value, seconds).await }
        });
        stored.await.is_some()
    }

    /// Increments a counter that expires after `ttl`, and returns its value.
    async fn increment(&self, key: &str, ttl: Duration) -> Option<u64> {
        let (key, seconds) = (key.to_owned(), i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX));
        self.call(move |mut redis| {
            let key = key.clone();
            async move {
                let mut both = redis::pipe();
                both.atomic().incr(&key, 1).expire(&key, seconds).ignore();
                both.query_async::<(u64,)>(&mut redis).await.map(|(count,)| count)
            }
        })
        .await
    }

    async fn call<T, F, Fut>(&self, command: F) -> Option<T>
    where
        F: Fn(ConnectionManager) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = redis::RedisResult<T>> + Send + 'static,
        T: Send + 'static,
    {
        let shared = self.0.clone()?;
        let guard = shared.guard.clone();
        let reply = guard.call(move || {
            let (shared, command) = (shared.clone(), command.clone());
            async move { command(shared.connection().await?).await }
        });
        reply.await.ok()
    }
}

impl Shared {
    async fn connection(&self) -> redis::RedisResult<ConnectionManager> {
        let config = ConnectionManagerConfig::new().set_number_of_retries(1).set_response_timeout(Some(RESPONSE_TIMEOUT));
        let connect = || self.client.get_connection_manager_with_config(config);
        self.connection.get_or_try_init(connect).await.cloned()
    }
}
