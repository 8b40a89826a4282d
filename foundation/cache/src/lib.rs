//! What several processes of an installation share for a while: counts for rate limits, answers worth
//! remembering, sessions that were revoked. In Redis; and where there is none, or it is down, each process
//! goes by itself: nothing that must be true depends on it.

mod limits;
pub mod revocation;

use std::sync::Arc;
use std::time::Duration;

use capsule_resilience::{Guard, Policy};
use redis::AsyncCommands;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use tokio::sync::OnceCell;

pub use limits::{Limiter, Rate, Verdict};

/// A shared cache that does not answer at once is not waited for.
const PATIENCE: Duration = Duration::from_millis(250);
/// One that is down is left alone so long.
const REST: Duration = Duration::from_secs(2);

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
    /// No shared cache: every process goes by itself.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// The Redis server at `url` (`redis://:password@host:port/db`). It is connected to when it is first
    /// asked, and again whenever the connection is lost.
    ///
    /// # Errors
    /// When the address is not understood; it is not shown, for it may hold a password.
    pub fn at(url: &str) -> Result<Self, String> {
        let client = redis::Client::open(url).map_err(|_| "must look like redis://:password@host:6379".to_owned())?;
        let policy = Policy { deadline: PATIENCE, retries: 0, failures: 3, rest: REST, ..Policy::new("Redis") };
        Ok(Self(Some(Arc::new(Shared { client, connection: OnceCell::new(), guard: Guard::new(policy) }))))
    }

    /// Whether there is a shared cache at all.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.0.is_some()
    }

    /// Whether it answers. `None` where there is none.
    pub async fn answers(&self) -> Option<bool> {
        self.0.as_ref()?;
        Some(self.get(&["capsule:ping"]).await.is_some())
    }

    /// The values of several keys, each if it is there. `None` where the cache does not answer.
    pub async fn get(&self, keys: &[&str]) -> Option<Vec<Option<Vec<u8>>>> {
        let keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
        self.ask(move |mut redis| {
            let keys = keys.clone();
            async move { redis.mget::<_, Vec<Option<Vec<u8>>>>(keys).await }
        })
        .await
    }

    /// Keeps a value for so long. Whether it was kept.
    pub async fn put(&self, key: &str, value: &[u8], time: Duration) -> bool {
        let (key, value, seconds) = (key.to_owned(), value.to_vec(), time.as_secs().max(1));
        let kept = self.ask(move |mut redis| {
            let (key, value) = (key.clone(), value.clone());
            async move { redis.set_ex::<_, _, ()>(key, value, seconds).await }
        });
        kept.await.is_some()
    }

    /// Counts one more under a key that lasts so long, and tells how many there are.
    async fn count(&self, key: &str, time: Duration) -> Option<u64> {
        let (key, seconds) = (key.to_owned(), i64::try_from(time.as_secs()).unwrap_or(i64::MAX));
        self.ask(move |mut redis| {
            let key = key.clone();
            async move {
                let mut both = redis::pipe();
                both.atomic().incr(&key, 1).expire(&key, seconds).ignore();
                both.query_async::<(u64,)>(&mut redis).await.map(|(count,)| count)
            }
        })
        .await
    }

    async fn ask<T, F, Fut>(&self, question: F) -> Option<T>
    where
        F: Fn(ConnectionManager) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = redis::RedisResult<T>> + Send + 'static,
        T: Send + 'static,
    {
        let shared = self.0.clone()?;
        let guard = shared.guard.clone();
        let answer = guard.call(move || {
            let (shared, question) = (shared.clone(), question.clone());
            async move { question(shared.connection().await?).await }
        });
        answer.await.ok()
    }
}

impl Shared {
    async fn connection(&self) -> redis::RedisResult<ConnectionManager> {
        let config = ConnectionManagerConfig::new().set_number_of_retries(1).set_response_timeout(Some(PATIENCE));
        let connect = || self.client.get_connection_manager_with_config(config);
        self.connection.get_or_try_init(connect).await.cloned()
    }
}
