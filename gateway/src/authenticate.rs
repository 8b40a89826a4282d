//! Authentication by bearer token. The identity service validates tokens. Its replies are cached for less than a
//! second, so a revoked session ends within one.
//!
//! Gateways with a shared cache also share these replies, as long as the identity service keeps its list of revoked
//! sessions there. Without that list, the shared replies are ignored.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, header};
use capsule_bus::{Bus, Context, Principal};
use capsule_cache::{Cache, revocation};
use capsule_contracts::identity::{CheckSessions, TokenStatus, ValidateToken};
use capsule_contracts::{Problem, Timestamp};
use capsule_store::{DerivedKey, Keyring};
use sha2::{Digest, Sha256};

/// How long this process caches a principal.
const PRINCIPAL_TTL: Duration = Duration::from_millis(800);
/// How long a reply stays in the shared cache.
const SHARED_TTL: Duration = Duration::from_secs(60);
/// Maximum number of principals in this process's cache.
const MAX_PRINCIPALS: usize = 4096;

/// Turns a request's headers into a principal.
#[derive(Debug)]
pub struct Authenticator {
    bus: Bus,
    cache: Cache,
    /// Encrypts shared replies, so that write access to the cache does not allow forging an administrator.
    key: DerivedKey,
    principals: Mutex<HashMap<String, (Instant, Principal)>>,
}

impl Authenticator {
    pub fn new(bus: Bus, cache: Cache, keyring: &Keyring) -> Self {
        Self { bus, cache, key: keyring.derive("gateway"), principals: Mutex::default() }
    }

    /// The principal of these headers, anonymous without credentials.
    ///
    /// # Errors
    /// When there are credentials and they are not valid.
    pub async fn principal(&self, headers: &HeaderMap, correlation_id: &str) -> Result<Principal, Problem> {
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            return Ok(Principal::Anonymous);
        };
        let token = value
            .to_str()
            .ok()
            .and_then(|text| text.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim().to_owned())
            .ok_or_else(|| Problem::unauthenticated("The Authorization header is not `Bearer <access token>`."))?;
        if let Some((at, principal)) = self.principals().get(&token)
            && at.elapsed() < PRINCIPAL_TTL
        {
            return Ok(*principal);
        }
        let status = match self.load_shared(&token).await {
            Some(status) => status,
            None => {
                let context = Context::new(correlation_id.to_owned(), Principal::Service("gateway"));
                let status = self.bus.request(&context, &ValidateToken { token: token.clone() }).await?;
                self.store_shared(&token, &status).await;
                status
            }
        };
        let (true, Some(id), Some(session)) = (status.active, status.user_id, status.session_id) else {
            return Err(Problem::unauthenticated(
                "The access token is not valid: it is expired, revoked, or from another installation.",
            )
            .hint("Refresh it, or sign in again with `capsule login`."));
        };
        let principal = Principal::User { id, session, platform_admin: status.platform_admin };
        let mut principals = self.principals();
        if principals.len() >= MAX_PRINCIPALS {
            principals.retain(|_, (at, _)| at.elapsed() < PRINCIPAL_TTL);
        }
        if principals.len() < MAX_PRINCIPALS {
            principals.insert(token, (Instant::now(), principal));
        }
        Ok(principal)
    }

    /// A keyed digest of a message.
    pub fn fingerprint(&self, message: &[u8]) -> String {
        self.key.sign(message)
    }

    /// Fails if the session ended while the request was being received.
    pub async fn recheck(&self, context: &Context) -> Result<(), Problem> {
        let session = match context.principal {
            Principal::User { session, .. } => session,
            Principal::ApiKey { .. } => return Err(Problem::unauthenticated("The API key cannot be checked again.")),
            Principal::Anonymous | Principal::Service(_) => return Ok(()),
        };
        let own_context = Context::new(context.correlation_id.clone(), Principal::Service("gateway"));
        let live = self.bus.request(&own_context, &CheckSessions { ids: vec![session] }).await?;
        match live.ids.contains(&session) {
            true => Ok(()),
            false => Err(Problem::unauthenticated("Your session ended during the request.")),
        }
    }

    /// The reply that a gateway put into the shared cache, if the session is not revoked and the token not expired.
    async fn load_shared(&self, token: &str) -> Option<TokenStatus> {
        if !self.cache.is_shared() {
            return None;
        }
        let key = shared_key(token);
        let first = self.cache.get(&[&key, revocation::COMPLETE_KEY]).await?;
        let [Some(sealed), Some(_)] = first.as_slice() else { return None };
        let status: TokenStatus = serde_json::from_slice(&self.key.open(&key, sealed)?).ok()?;
        let revoked = self.cache.get(&[&revocation::key(status.session_id?)]).await?;
        let expired = status.expires_at.is_none_or(|at| at.0 <= Timestamp::now().0);
        (revoked == [None] && !expired).then_some(status)
    }

    async fn store_shared(&self, token: &str, status: &TokenStatus) {
        if self.cache.is_shared()
            && status.active
            && let Ok(bytes) = serde_json::to_vec(status)
        {
            let key = shared_key(token);
            if let Ok(sealed) = self.key.seal(&key, &bytes) {
                self.cache.put(&key, &sealed, SHARED_TTL).await;
            }
        }
    }

    fn principals(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Instant, Principal)>> {
        self.principals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The key in the shared cache. Tokens are secret, so it contains a digest.
fn shared_key(token: &str) -> String {
    format!("capsule:token:{}", hex::encode(Sha256::digest(token)))
}
