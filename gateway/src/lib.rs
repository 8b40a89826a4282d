//! The HTTP API: REST endpoints, streams, WebSockets, uploads, and their documentation.
//!
//! Every endpoint is a row of the table in [`rows`]. Requests of every kind of row take the same steps: find the row,
//! authenticate, check the rate limit, build the message, send it over the bus. The service that owns the data authorizes the request.

mod authenticate;
mod concurrency;
mod documents;
mod fan_out;
mod landing;
mod limits;
mod min_rate;
mod reply;
mod request;
pub mod rows;
mod uploads;
mod websocket;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{MethodFilter, any, get, on};
use capsule_blob::Blobs;
use capsule_bus::Bus;
use capsule_cache::{Cache, Limiter, Rate};
use capsule_observe::Check;
use capsule_store::Keyring;
use tower_http::cors::CorsLayer;

pub use documents::openapi;

use authenticate::Authenticator;
use concurrency::Concurrency;
use min_rate::MinRate;
use rows::Row;

/// The state shared by all requests.
pub struct Gateway {
    bus: Bus,
    blobs: Blobs,
    authenticator: Authenticator,
    limiter: Limiter,
    limits: Limits,
    /// Maximum size of an upload, in bytes.
    upload_bytes: u64,
    upload_min_rate: MinRate,
    uploads: Concurrency,
    streams: Concurrency,
}

/// Rate and concurrency limits for clients. Rates are per minute unless stated otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests per user, or per address for anonymous requests.
    pub requests: Rate,
    /// Attempts to sign in or to register, per address.
    pub sign_ins: Rate,
    /// Attempts to sign in to one account per hour, from addresses without a recent successful sign-in to it.
    pub account: Rate,
    /// Open uploads and open streams per user; 0 means no limit.
    pub concurrent_uploads: u32,
    pub concurrent_streams: u32,
}

/// Options for [`router`].
#[derive(Debug)]
pub struct Options {
    pub bus: Bus,
    pub blobs: Blobs,
    pub keyring: Keyring,
    /// The cache shared with other gateways.
    pub cache: Cache,
    pub limits: Limits,
    /// The largest upload, in bytes.
    pub upload_bytes: u64,
    /// Minimum rate of an upload, in bytes per second, and its maximum duration.
    pub upload_bytes_per_second: u64,
    pub upload_deadline: Duration,
    /// Origins of web pages that may call the API (CORS), such as `https://console.example.com`.
    pub allowed_origins: Vec<HeaderValue>,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gateway")
    }
}

/// Maximum body size of a request that is not an upload.
const BODY_BYTES: usize = 2 << 20;
/// Timeout of a request that is not an upload or stream, including reading its body.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// The routes of the API.
pub fn router(options: Options, checks: Vec<Check>) -> Router {
    router_of(options, checks, rows::all())
}

/// As [`router`], with these endpoints.
pub fn router_of(options: Options, checks: Vec<Check>, rows: &'static [Row]) -> Router {
    let Options { bus, blobs, keyring, cache, limits, upload_bytes, upload_bytes_per_second, upload_deadline, allowed_origins } =
        options;
    let authenticator = Authenticator::new(bus.clone(), cache.clone(), &keyring);
    let limiter = Limiter::new(cache);
    let gateway = Arc::new(Gateway {
        authenticator,
        bus,
        blobs,
        limiter,
        limits,
        upload_bytes,
        upload_min_rate: MinRate::for_uploads(upload_bytes_per_second, upload_deadline),
        uploads: Concurrency::new("uploads", limits.concurrent_uploads),
        streams: Concurrency::new("streams", limits.concurrent_streams),
    });
    let mut api = Router::new();
    for row in rows {
        let gateway = gateway.clone();
        let filter = MethodFilter::try_from(row.method.clone()).unwrap_or(MethodFilter::GET);
        api = api.route(row.path, on(filter, move |request: Request| request::serve(gateway, row, request)));
    }
    let router = Router::new()
        .nest("/api/v1", api)
        .merge(documents::router())
        .merge(capsule_observe::health(checks))
        .route("/.well-known/jwks.json", get(move |request: Request| request::serve(gateway, rows::keys(), request)))
        .route("/", get(landing::page))
        .route("/register", get(landing::register))
        .fallback(any(request::no_such_endpoint))
        .layer(middleware::from_fn(set_security_headers));
    match allowed_origins.is_empty() {
        true => router,
        false => router.layer(cross_origin(allowed_origins)),
    }
}

/// Allows web pages of these origins to call the API. They send tokens in a header: cookies are not allowed.
fn cross_origin(origins: Vec<HeaderValue>) -> CorsLayer {
    let header = HeaderName::from_static;
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
        .allow_headers([
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            header::IF_MATCH,
            header::IF_NONE_MATCH,
            header("idempotency-key"),
            header("traceparent"),
            header("x-correlation-id"),
        ])
        .expose_headers([
            header::ETAG,
            header::RETRY_AFTER,
            header("ratelimit-limit"),
            header("ratelimit-remaining"),
            header("ratelimit-reset"),
            header("x-correlation-id"),
        ])
        .max_age(Duration::from_secs(3600))
}

/// Adds security headers for browsers to every response.
async fn set_security_headers(request: Request, next: Next) -> Response {
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
