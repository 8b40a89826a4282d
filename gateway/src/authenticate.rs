//! Who calls: the bearer of an access token, which the identity service is asked about. An answer is
//! remembered for less than a second, so a revoked session ends within one.
//!
//! Where gateways share a cache, they share the answers as well, for as long as the identity service keeps
//! its list of revoked sessions there; without that list, nothing in the cache is believed.

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

/// How long an answer is taken for true.
const FRESH: Duration = Duration::from_millis(800);
/// How long gateways share an answer.
const SHARED: Duration = Duration::from_secs(60);
/// Answers remembered at the most.
const MOST: usize = 4096;

/// Turns a request's headers into a principal.
#[derive(Debug)]
pub struct Authenticator {
    bus: Bus,
    cache: Cache,
    /// Answers rest sealed: whoever can write to the cache makes nobody an administrator.
    key: DerivedKey,
    known: Mutex<HashMap<String, (Instant, Principal)>>,
}

impl Authenticator {
    pub fn new(bus: Bus, cache: Cache, keyring: &Keyring) -> Self {
        Self { bus, cache, key: keyring.derive("gateway"), known: Mutex::default() }
    }

    /// Who sends these headers. Nobody in particular without credentials.
    ///
    /// # Errors
    /// When there are credentials, and they do not hold.
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
        if let Some((at, principal)) = self.known().get(&token)
            && at.elapsed() < FRESH
        {
            return Ok(*principal);
        }
        let status = match self.shared(&token).await {
            Some(status) => status,
            None => {
                let context = Context::new(correlation_id.to_owned(), Principal::Service("gateway"));
                let status = self.bus.request(&context, &ValidateToken { token: token.clone() }).await?;
                self.share(&token, &status).await;
                status
            }
        };
        let (true, Some(id), Some(session)) = (status.active, status.user_id, status.session_id) else {
            return Err(Problem::unauthenticated("The access token does not hold: it is expired, revoked or not one of ours.")
                .hint("Refresh it, or sign in again with `capsule login`."));
        };
        let principal = Principal::User { id, session, platform_admin: status.platform_admin };
        let mut known = self.known();
        if known.len() >= MOST {
            known.retain(|_, (at, _)| at.elapsed() < FRESH);
        }
        if known.len() < MOST {
            known.insert(token, (Instant::now(), principal));
        }
        Ok(principal)
    }

    /// What tells one message from another, and nothing about either.
    pub fn fingerprint(&self, message: &[u8]) -> String {
        self.key.sign(message)
    }

    /// Fails unless the session of this request lives still: the request may have taken long.
    pub async fn recheck(&self, context: &Context) -> Result<(), Problem> {
        let Principal::User { session, .. } = context.principal else { return Ok(()) };
        let ask = Context::new(context.correlation_id.clone(), Principal::Service("gateway"));
        let live = self.bus.request(&ask, &CheckSessions { ids: vec![session] }).await?;
        match live.ids.contains(&session) {
            true => Ok(()),
            false => Err(Problem::unauthenticated("The session ended while the request was sent.")),
        }
    }

    /// What another gateway was answered, if the session was not revoked since.
    async fn shared(&self, token: &str) -> Option<TokenStatus> {
        if !self.cache.is_shared() {
            return None;
        }
        let key = shared_key(token);
        let first = self.cache.get(&[&key, revocation::COMPLETE]).await?;
        let [Some(sealed), Some(_)] = first.as_slice() else { return None };
        let status: TokenStatus = serde_json::from_slice(&self.key.open(&key, sealed)?).ok()?;
        let revoked = self.cache.get(&[&revocation::key(status.session_id?)]).await?;
        let expired = status.expires_at.is_none_or(|at| at.0 <= Timestamp::now().0);
        (revoked == [None] && !expired).then_some(status)
    }

    async fn share(&self, token: &str, status: &TokenStatus) {
        if self.cache.is_shared()
            && status.active
            && let Ok(bytes) = serde_json::to_vec(status)
        {
            let key = shared_key(token);
            if let Ok(sealed) = self.key.seal(&key, &bytes) {
                self.cache.put(&key, &sealed, SHARED).await;
            }
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Instant, Principal)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tokens are secrets: their digests name the answers.
fn shared_key(token: &str) -> String {
    format!("capsule:token:{}", hex::encode(Sha256::digest(token)))
}
