//! How much one client may ask: told with every answer, and enforced.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use capsule_bus::{Context, Principal};
use capsule_cache::{Rate, Verdict};
use capsule_contracts::Message;
use capsule_contracts::Problem;
use capsule_contracts::identity::{Login, Register};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::Gateway;

/// Attempts to sign in to one account are counted for so long.
const ACCOUNT_WINDOW: Duration = Duration::from_secs(3600);
/// Where somebody signed in to an account is remembered for so long.
const KNOWN_ADDRESS: Duration = Duration::from_secs(30 * 24 * 3600);

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
            Err(refused(format!("No more than {} such requests are answered in a minute.", verdict.limit))
                .hint(format!("Try again in {} seconds.", verdict.reset.as_secs())))
        }
        verdict => Ok(verdict),
    }
}

/// A password that is tried, on an account, from an address.
#[derive(Debug)]
pub struct Attempt {
    known: String,
}

/// Counts an attempt at an account's password, from wherever it comes. Where its owner signed in before, only
/// the address's own limit holds: nobody can lock them out from elsewhere.
pub async fn check_account(
    gateway: &Gateway,
    context: &Context,
    client: &str,
    subject: &str,
    message: &[u8],
) -> Result<Option<Attempt>, Problem> {
    let Ok(PasswordFields { email, password, current_password }) = serde_json::from_slice(message) else { return Ok(None) };
    if let (Principal::User { id, .. }, true) = (context.principal, password.is_some() || current_password.is_some()) {
        let verdict = gateway.limiter.take(&format!("password:{id}"), gateway.limits.sign_ins).await;
        return match verdict {
            Some(verdict) if !verdict.allowed => Err(refused("This password was tried too often.".into())
                .hint(format!("Try again in {} seconds.", verdict.reset.as_secs()))),
            _ => Ok(None),
        };
    }
    let (Some(email), true) = (email, subject == Login::SUBJECT || subject == Register::SUBJECT) else { return Ok(None) };
    let account = hex::encode(&Sha256::digest(email.trim().to_lowercase())[..16]);
    let attempt = Attempt { known: format!("signed-in:{account}:{client}") };
    if subject == Login::SUBJECT && !gateway.limiter.is_marked(&attempt.known).await {
        let one = format!("account:{account}:{client}");
        let counted = gateway.limiter.take_in(&one, of_one_address(gateway.limits.account), ACCOUNT_WINDOW).await;
        if let Some(verdict) = counted.filter(|verdict| !verdict.allowed) {
            let minutes = verdict.reset.as_secs().div_ceil(60);
            return Err(refused("Too many attempts to sign in to this account from this address.".into())
                .hint(format!("Try again in {minutes} minutes, or from another network.")));
        }
        let counted = gateway.limiter.take_in(&format!("account:{account}"), gateway.limits.account, ACCOUNT_WINDOW).await;
        if let Some(verdict) = counted.filter(|verdict| !verdict.allowed) {
            let minutes = verdict.reset.as_secs().div_ceil(60);
            return Err(refused("Too many attempts to sign in to this account from unknown addresses.".into())
                .hint(format!("Try again in {minutes} minutes, or from a network where you signed in before.")));
        }
    }
    Ok(Some(attempt))
}

/// A tenth of an account's attempts: one address that uses up its own locks out nobody else.
fn of_one_address(account: Rate) -> Rate {
    Rate(account.0.div_ceil(10))
}

/// The attempt succeeded: from its address, the account is its owner's.
pub async fn remember(gateway: &Gateway, attempt: &Attempt) {
    gateway.limiter.mark(&attempt.known, KNOWN_ADDRESS).await;
}

/// The fields of a message by which a password is tried.
#[derive(Deserialize)]
struct PasswordFields {
    email: Option<String>,
    password: Option<String>,
    current_password: Option<String>,
}

fn refused(text: String) -> Problem {
    metrics::counter!("capsule_requests_limited_total").increment(1);
    Problem::too_many(text)
}

/// The client's address as the ingress found it, which lets nobody else name it. Whoever has an IPv6 address has
/// a network of 64 bits at least: that counts as one.
pub fn address(parts: &Parts) -> String {
    let told = parts.headers.get("x-real-ip").and_then(|value| value.to_str().ok()).and_then(|text| text.parse().ok());
    match told.map(|address: IpAddr| address.to_canonical()) {
        Some(IpAddr::V6(address)) => format!("{}/64", Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        Some(address) => address.to_string(),
        None => "unknown".into(),
    }
}

/// Sets the IETF's RateLimit header fields.
pub fn set_rate_limit_headers(response: &mut Response, verdict: &Verdict) {
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

#[cfg(test)]
mod tests {
    use super::{address, of_one_address};
    use axum::http::Request;
    use capsule_cache::Rate;

    #[test]
    fn one_address_has_a_small_part_of_an_accounts_attempts() {
        assert_eq!([0, 8, 100].map(|limit| of_one_address(Rate(limit))), [Rate(0), Rate(1), Rate(10)]);
    }

    #[test]
    fn a_client_is_an_address_or_a_network_of_64_bits_as_the_ingress_says() {
        for (told, client) in [
            (Some("192.0.2.1"), "192.0.2.1"),
            (Some("::ffff:192.0.2.1"), "192.0.2.1"),
            (Some("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64"),
            (Some("2001:db8:1:2:ffff::"), "2001:db8:1:2::/64"),
            (Some("rubbish"), "unknown"),
            (None, "unknown"),
        ] {
            let mut request = Request::builder().header("x-forwarded-for", "203.0.113.9");
            if let Some(told) = told {
                request = request.header("x-real-ip", told);
            }
            assert_eq!(address(&request.body(()).expect("a request").into_parts().0), client);
        }
    }
}
