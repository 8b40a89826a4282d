//! Rate limits for clients, enforced and reported in response headers.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use capsule_bus::{Context, Principal};
use capsule_cache::{Decision, Rate};
use capsule_contracts::Message;
use capsule_contracts::Problem;
use capsule_contracts::identity::{Login, Register};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::Gateway;

/// The window in which attempts to sign in to one account are counted.
const ACCOUNT_WINDOW: Duration = Duration::from_secs(3600);
/// How long an address stays known for an account after a successful sign-in.
const KNOWN_ADDRESS_TTL: Duration = Duration::from_secs(30 * 24 * 3600);

/// Counts a request against its limit.
///
/// # Errors
/// Status 429 over the limit, with the time to wait.
pub async fn check(gateway: &Gateway, context: &Context, parts: &Parts, subject: &str) -> Result<Option<Decision>, Problem> {
    let decision = match context.principal {
        _ if subject == Login::SUBJECT || subject == Register::SUBJECT => {
            gateway.limiter.check(&format!("sign-in:{}", address(parts)), gateway.limits.sign_ins).await
        }
        Principal::User { id, .. } | Principal::ApiKey { id, .. } => {
            gateway.limiter.check(&id.to_string(), gateway.limits.requests).await
        }
        _ => gateway.limiter.check(&address(parts), gateway.limits.requests).await,
    };
    match decision {
        Some(decision) if !decision.allowed => {
            Err(limit_exceeded(format!("Too many requests: the limit is {} per minute.", decision.limit))
                .hint(format!("Try again in {} seconds.", decision.reset.as_secs())))
        }
        decision => Ok(decision),
    }
}

/// An attempt to sign in to an account, from an address.
#[derive(Debug)]
pub struct Attempt {
    /// The limiter's mark that the address is known for the account.
    known_address: String,
}

/// Counts an attempt to use an account's password, across all addresses. An address with a recent successful sign-in
/// to the account is exempt, so that attempts from elsewhere cannot lock out the account's owner.
pub async fn check_account(
    gateway: &Gateway,
    context: &Context,
    client: &str,
    subject: &str,
    message: &[u8],
) -> Result<Option<Attempt>, Problem> {
    let Ok(PasswordFields { email, password, current_password }) = serde_json::from_slice(message) else { return Ok(None) };
    if let (Some(id), true) = (context.principal.account(), password.is_some() || current_password.is_some()) {
        let decision = gateway.limiter.check(&format!("password:{id}"), gateway.limits.sign_ins).await;
        return match decision {
            Some(decision) if !decision.allowed => Err(limit_exceeded("Too many attempts to enter your password.".into())
                .hint(format!("Try again in {} seconds.", decision.reset.as_secs()))),
            _ => Ok(None),
        };
    }
    let (Some(email), true) = (email, subject == Login::SUBJECT || subject == Register::SUBJECT) else { return Ok(None) };
    let account = hex::encode(&Sha256::digest(email.trim().to_lowercase())[..16]);
    let attempt = Attempt { known_address: format!("signed-in:{account}:{client}") };
    if subject == Login::SUBJECT && !gateway.limiter.is_marked(&attempt.known_address).await {
        let one = format!("account:{account}:{client}");
        let counted = gateway.limiter.check_window(&one, share_of_one_address(gateway.limits.account), ACCOUNT_WINDOW).await;
        if let Some(decision) = counted.filter(|decision| !decision.allowed) {
            let minutes = decision.reset.as_secs().div_ceil(60);
            return Err(limit_exceeded("Too many attempts to sign in to this account from this address.".into())
                .hint(format!("Try again in {minutes} minutes, or from another network.")));
        }
        let counted = gateway.limiter.check_window(&format!("account:{account}"), gateway.limits.account, ACCOUNT_WINDOW).await;
        if let Some(decision) = counted.filter(|decision| !decision.allowed) {
            let minutes = decision.reset.as_secs().div_ceil(60);
            return Err(limit_exceeded("Too many attempts to sign in to this account from unknown addresses.".into())
                .hint(format!("Try again in {minutes} minutes, or from a network where you signed in before.")));
        }
    }
    Ok(Some(attempt))
}

/// A tenth of an account's attempts, so that one address cannot use up all of them.
fn share_of_one_address(account: Rate) -> Rate {
    Rate(account.0.div_ceil(10))
}

/// Marks the address of a successful attempt as known for the account.
pub async fn mark_known_address(gateway: &Gateway, attempt: &Attempt) {
    gateway.limiter.mark(&attempt.known_address, KNOWN_ADDRESS_TTL).await;
}

/// The fields of a message that contain a password or an account.
#[derive(Deserialize)]
struct PasswordFields {
    email: Option<String>,
    password: Option<String>,
    current_password: Option<String>,
}

fn limit_exceeded(text: String) -> Problem {
    metrics::counter!("capsule_requests_limited_total").increment(1);
    Problem::too_many(text)
}

/// The client's address from `X-Real-IP`, which the ingress sets and clients cannot. IPv6 addresses are reduced to
/// their /64 network, the smallest that one client has.
pub fn address(parts: &Parts) -> String {
    let real = parts.headers.get("x-real-ip").and_then(|value| value.to_str().ok()).and_then(|text| text.parse().ok());
    match real.map(|address: IpAddr| address.to_canonical()) {
        Some(IpAddr::V6(address)) => format!("{}/64", Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        Some(address) => address.to_string(),
        None => "unknown".into(),
    }
}

/// Sets the `RateLimit` header fields (draft-ietf-httpapi-ratelimit-headers).
pub fn set_rate_limit_headers(response: &mut Response, decision: &Decision) {
    for (name, value) in [
        ("ratelimit-limit", u64::from(decision.limit)),
        ("ratelimit-remaining", u64::from(decision.remaining)),
        ("ratelimit-reset", decision.reset.as_secs()),
    ] {
        response.headers_mut().insert(name, HeaderValue::from(value));
    }
}

/// Sets the `Retry-After` header field.
pub fn retry_after(response: &mut Response) {
    let seconds = capsule_cache::Limiter::until_next_window().as_secs();
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
}

#[cfg(test)]
mod tests {
    use super::{address, share_of_one_address};
    use axum::http::Request;
    use capsule_cache::Rate;

    #[test]
    fn one_address_has_a_tenth_of_an_accounts_attempts() {
        assert_eq!([0, 8, 100].map(|limit| share_of_one_address(Rate(limit))), [Rate(0), Rate(1), Rate(10)]);
    }

    #[test]
    fn a_client_is_an_ipv4_address_or_an_ipv6_network_of_64_bits() {
        for (real, client) in [
            (Some("192.0.2.1"), "192.0.2.1"),
            (Some("::ffff:192.0.2.1"), "192.0.2.1"),
            (Some("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64"),
            (Some("2001:db8:1:2:ffff::"), "2001:db8:1:2::/64"),
            (Some("rubbish"), "unknown"),
            (None, "unknown"),
        ] {
            let mut request = Request::builder().header("x-forwarded-for", "203.0.113.9");
            if let Some(real) = real {
                request = request.header("x-real-ip", real);
            }
            assert_eq!(address(&request.body(()).expect("a request").into_parts().0), client);
        }
    }
}
