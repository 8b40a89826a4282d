//! Who calls: the bearer of an access token, which the identity service is asked about. An answer is
//! remembered for less than a second, so a revoked session ends within one.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, header};
use capsule_bus::{Bus, Context, Principal};
use capsule_contracts::Problem;
use capsule_contracts::identity::ValidateToken;

/// How long an answer is taken for true.
const FRESH: Duration = Duration::from_millis(800);
/// Answers remembered at the most.
const MOST: usize = 4096;

/// Turns a request's headers into a principal.
#[derive(Debug)]
pub struct Authenticator {
    bus: Bus,
    known: Mutex<HashMap<String, (Instant, Principal)>>,
}

impl Authenticator {
    pub fn new(bus: Bus) -> Self {
        Self { bus, known: Mutex::default() }
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
        let context = Context::new(correlation_id.to_owned(), Principal::Service("gateway"));
        let status = self.bus.request(&context, &ValidateToken { token: token.clone() }).await?;
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

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Instant, Principal)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
