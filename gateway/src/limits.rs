//! How much one client may ask: told with every answer, and enforced.

use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use capsule_bus::{Context, Principal};
use capsule_cache::Verdict;
use capsule_contracts::Message;
use capsule_contracts::Problem;
use capsule_contracts::identity::{Login, Register};

use crate::Gateway;

/// Counts a request; who asks too much is refused, with when to come back.
pub async fn check(gateway: &Gateway, context: &Context, parts: &Parts, subject: &str) -> Result<Option<Verdict>, Problem> {
    let verdict = match context.principal {
        _ if subject == Login::SUBJECT || subject == Register::SUBJECT => {
            gateway.limiter.take(&format!("sign-in:{}", address(parts)), gateway.limits.sign_ins).await
        }
        Principal::User { id, .. } => gateway.limiter.take(&id.to_string(), gateway.limits.requests).await,
        _ => gateway.limiter.take(&address(parts), gateway.limits.requests).await,
    };
    match verdict {
        Some(verdict) if !verdict.allowed => {
            metrics::counter!("capsule_requests_limited_total").increment(1);
            let seconds = verdict.reset.as_secs();
            Err(Problem::too_many(format!("No more than {} such requests are answered in a minute.", verdict.limit))
                .hint(format!("Try again in {seconds} seconds.")))
        }
        verdict => Ok(verdict),
    }
}

/// The address that the ingress saw; it lets nobody name another.
fn address(parts: &Parts) -> String {
    let told = parts.headers.get("x-forwarded-for").and_then(|value| value.to_str().ok());
    told.and_then(|text| text.rsplit(',').next()).unwrap_or("unknown").trim().to_owned()
}

/// Tells the client where it stands (the IETF's RateLimit header fields).
pub fn tell(response: &mut Response, verdict: &Verdict) {
    for (name, value) in [
        ("ratelimit-limit", u64::from(verdict.limit)),
        ("ratelimit-remaining", u64::from(verdict.remaining)),
        ("ratelimit-reset", verdict.reset.as_secs()),
    ] {
        response.headers_mut().insert(name, HeaderValue::from(value));
    }
}

/// When to come back.
pub fn retry_after(response: &mut Response) {
    let seconds = capsule_cache::Limiter::until_next_window().as_secs();
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
}
