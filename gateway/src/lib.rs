//! The only door for clients: REST, its documentation, and the streams beside it.
//!
//! A request takes one path, the same for every endpoint: row, authenticate, message, bus. The table
//! in [`rows`] is all there is to an endpoint here; who may do what is decided where the data is.

mod authenticate;
mod concurrency;
mod documents;
mod everywhere;
mod landing;
mod limits;
mod pace;
mod request;
pub mod rows;
mod uploads;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{MethodFilter, any, get, on};
use capsule_blob::Blobs;
use capsule_bus::Bus;
use capsule_cache::{Cache, Limiter, Rate};
use capsule_observe::Check;
use capsule_store::Keyring;

pub use documents::openapi;

use authenticate::Authenticator;
use concurrency::Concurrency;
use pace::Pace;

/// What the gateway needs.
pub struct Gateway {
    bus: Bus,
    blobs: Blobs,
    authenticator: Authenticator,
    limiter: Limiter,
    limits: Limits,
    /// The largest upload, in bytes.
    upload_bytes: u64,
    upload_pace: Pace,
    uploads: Concurrency,
    streams: Concurrency,
}

/// What clients may ask of the gateway, in a minute unless it is said otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests of one user, or of one address that nobody is signed in at.
    pub requests: Rate,
    /// Attempts of one address to sign in or to register.
    pub sign_ins: Rate,
    /// Attempts to sign in to one account in an hour, from addresses where nobody signed in to it lately.
    pub account: Rate,
    /// Uploads, and streams, that one user has open at the same time; 0 is no limit.
    pub concurrent_uploads: u32,
    pub concurrent_streams: u32,
}

/// What a gateway is made of.
#[derive(Debug)]
pub struct Options {
    pub bus: Bus,
    pub blobs: Blobs,
    pub keyring: Keyring,
    /// Shared with other gateways, or none.
    pub cache: Cache,
    pub limits: Limits,
    /// The largest upload, in bytes.
    pub upload_bytes: u64,
    /// The slowest upload, in bytes a second, and the longest.
    pub upload_bytes_per_second: u64,
    pub upload_deadline: Duration,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gateway")
    }
}

/// The largest body of an ordinary request.
const BODY_BYTES: usize = 2 << 20;
/// How long an ordinary request may take, its body included.
const REQUEST: Duration = Duration::from_secs(60);

/// All that clients can reach.
pub fn router(options: Options, checks: Vec<Check>) -> Router {
    let Options { bus, blobs, keyring, cache, limits, upload_bytes, upload_bytes_per_second, upload_deadline } = options;
    let authenticator = Authenticator::new(bus.clone(), cache.clone(), &keyring);
    let limiter = Limiter::new(cache);
    let gateway = Arc::new(Gateway {
        authenticator,
        bus,
        blobs,
        limiter,
        limits,
        upload_bytes,
        upload_pace: Pace::of_uploads(upload_bytes_per_second, upload_deadline),
        uploads: Concurrency::new("uploads", limits.concurrent_uploads),
        streams: Concurrency::new("streams", limits.concurrent_streams),
    });
    let mut api = Router::new();
    for row in rows::all() {
        let gateway = gateway.clone();
        let filter = MethodFilter::try_from(row.method.clone()).unwrap_or(MethodFilter::GET);
        api = api.route(row.path, on(filter, move |request: Request| request::call(gateway, row, request)));
    }
    for row in rows::streams() {
        let gateway = gateway.clone();
        api = api.route(row.path, get(move |request: Request| request::stream(gateway, row, request)));
    }
    let uploads = gateway.clone();
    api = api.route("/uploads", on(MethodFilter::POST, move |request: Request| uploads::upload(uploads, request)));
    let plans = gateway.clone();
    api = api.route("/plan", on(MethodFilter::POST, move |request: Request| uploads::plan(plans, request)));
    Router::new()
        .nest("/api/v1", api)
        .merge(documents::router())
        .merge(capsule_observe::health(checks))
        .route("/.well-known/jwks.json", get(move |request: Request| request::call(gateway, rows::keys(), request)))
        .route("/", get(landing::page))
        .route("/register", get(landing::register))
        .fallback(any(request::no_such_endpoint))
        .layer(middleware::from_fn(harden))
}

/// Puts the headers on every answer that keep browsers from being talked into anything.
async fn harden(request: Request, next: Next) -> Response {
    let documents = request.uri().path().starts_with("/api/documentation");
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    let policy = if documents {
        "default-src 'self'; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
    } else {
        "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    };
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if !documents {
        headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    }
    response
}

#[cfg(test)]
mod tests;
