//! Handling of one request: its body, query and path become a message; the reply or problem becomes the response.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequestParts, RawPathParams, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use capsule_bus::{Context, Principal};
use capsule_cache::Decision;
use capsule_contracts::{Access, Problem, Uuid, new_id};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tracing::Instrument;
use tracing::field::Empty;
use utoipa::openapi::schema::{SchemaType, Type};
use utoipa::openapi::{RefOr, Schema};

use crate::limits::Attempt;
use crate::min_rate::{MinRate, MinRateBody};
use crate::rows::{Row, RowKind};
use crate::uploads::RawRequest;
use crate::{BODY_BYTES, Gateway, REQUEST_TIMEOUT, fan_out, limits, reply, websocket};

/// `Retry-After` of responses with status 503.
const RETRY_SECONDS: u64 = 5;

const CORRELATION: HeaderName = HeaderName::from_static("x-correlation-id");

/// Handles a request. All kinds of endpoint take the same steps: correlation id and span, authentication, rate limit,
/// limit of open connections, the message, and its authorization by the service that handles it.
pub async fn serve(gateway: Arc<Gateway>, row: &'static Row, request: Request) -> Response {
    let span = tracing::info_span!(
        "http",
        otel.name = Empty,
        otel.kind = Empty,
        method = %row.method,
        route = row.path,
        status = Empty
    );
    capsule_observe::name_span(&span, "http", "server");
    let traceparent = request.headers().get("traceparent").and_then(|value| value.to_str().ok()).map(str::to_owned);
    capsule_observe::continue_trace(&span, traceparent.as_deref());
    handle(gateway, row, request, traceparent).instrument(span).await
}

/// What the steps before a failure found out.
#[derive(Default)]
struct Progress {
    decision: Option<Decision>,
    attempt: Option<Attempt>,
}

async fn handle(gateway: Arc<Gateway>, row: &'static Row, request: Request, traceparent: Option<String>) -> Response {
    let began = Instant::now();
    let (parts, mut body) = request.into_parts();
    let correlation_id = correlation_id(&parts.headers);
    let mut progress = Progress::default();
    let timeout = match row.kind {
        RowKind::Raw { .. } => REQUEST_TIMEOUT + gateway.upload_min_rate.deadline,
        _ => REQUEST_TIMEOUT,
    };
    let work = respond(&gateway, row, parts, &mut body, &correlation_id, traceparent, &mut progress);
    let outcome = tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| Err(Problem::deadline(row.subject)));
    if let (Ok(_), Some(attempt)) = (&outcome, &progress.attempt) {
        limits::mark_known_address(&gateway, attempt).await;
    }
    let mut response = match outcome {
        Ok(response) => response,
        Err(problem) => {
            // The bodies of other requests are read before anything else.
            if matches!(row.kind, RowKind::Raw { .. }) {
                discard_body(&mut body).await;
            }
            problem_response(problem, &correlation_id)
        }
    };
    if let Some(decision) = &progress.decision {
        limits::set_rate_limit_headers(&mut response, decision);
    }
    let status = response.status().as_str().to_owned();
    tracing::Span::current().record("status", status.as_str());
    let labels = [("method", row.method.to_string()), ("route", row.path.to_owned()), ("status", status)];
    metrics::counter!("capsule_http_requests_total", &labels).increment(1);
    metrics::histogram!("capsule_http_request_duration_seconds", "route" => row.path).record(began.elapsed());
    with_correlation(response, &correlation_id)
}

async fn respond(
    gateway: &Arc<Gateway>,
    row: &'static Row,
    mut parts: Parts,
    body: &mut Body,
    correlation_id: &str,
    traceparent: Option<String>,
    progress: &mut Progress,
) -> Result<Response, Problem> {
    // Read before anything is rejected: a connection with an unread request body cannot be reused.
    let read = match row.kind {
        RowKind::Raw { .. } => Vec::new(),
        _ => read_body(body).await?,
    };
    let mut context = authenticate(gateway, &parts, row.access, correlation_id).await?;
    context.traceparent = capsule_observe::traceparent().or(traceparent);
    progress.decision = limits::check(gateway, &context, &parts, row.subject).await?;
    // Held until the upload, the stream or the connection ends.
    let permit = match row.kind {
        RowKind::Raw { .. } => gateway.uploads.acquire(context.principal)?,
        RowKind::Stream | RowKind::Duplex { .. } => gateway.streams.acquire(context.principal)?,
        RowKind::Json { .. } | RowKind::Download | RowKind::Redirect => None,
    };
    let message = message(row, &mut parts, &read).await?;
    match &row.kind {
        RowKind::Json { .. } | RowKind::Download | RowKind::Redirect => {
            let client = limits::address(&parts);
            progress.attempt = limits::check_account(gateway, &context, &client, row.subject, &message).await?;
            if let Some(key) = idempotency_key(&parts)? {
                context = with_idempotency_key(gateway, context, row.subject, &key, &message);
            }
            context.if_match = if_match(row, &parts.headers)?;
            let reply = match row.is_fan_out() {
                true => fan_out::request(&gateway.bus, &context, row.subject, message).await?,
                false => gateway.bus.request_raw(&context, row.subject, message).await?,
            };
            reply::respond(row, &parts.headers, reply)
        }
        RowKind::Raw { handler, .. } => {
            let request = RawRequest { gateway, context, headers: &parts.headers, message, body };
            let reply = handler(request).await?;
            reply::respond(row, &parts.headers, reply)
        }
        RowKind::Stream => {
            let items = gateway.bus.open_raw(&context, row.subject, message).await?;
            Ok(reply::stream(&parts.headers, items, permit))
        }
        RowKind::Duplex { .. } => {
            let upgrade = websocket::upgrade(&mut parts).await?;
            let duplex = gateway.bus.connect_raw(&context, row.subject, message).await?;
            Ok(websocket::respond(upgrade, duplex, permit))
        }
    }
}

pub async fn no_such_endpoint(request: Request) -> Response {
    let id = correlation_id(request.headers());
    let problem = Problem::not_found("endpoint").hint("The endpoints are listed at /api/documentation.");
    with_correlation(problem_response(problem, &id), &id)
}

/// Authenticates a request.
async fn authenticate(gateway: &Gateway, parts: &Parts, access: Access, correlation_id: &str) -> Result<Context, Problem> {
    // Ignores tokens on public endpoints, so that a stale one does not prevent signing in again.
    let principal = match access {
        Access::Public => Principal::Anonymous,
        _ => gateway.authenticator.principal(&parts.headers, correlation_id).await?,
    };
    if principal == Principal::Anonymous && access != Access::Public {
        return Err(Problem::unauthenticated("You are not signed in.").hint("Run `capsule login`."));
    }
    Ok(Context::new(correlation_id.to_owned(), principal))
}

/// The value of `If-Match`, for the service to check in the transaction of the update.
fn if_match(row: &Row, headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get(header::IF_MATCH).filter(|_| row.is_update()) else { return Ok(None) };
    if !row.has_entity_tag() {
        return Err(Problem::bad_request("This resource cannot be read, so it has no entity tag to match.")
            .hint("Send the request without If-Match."));
    }
    let list = value.to_str().map_err(|_| Problem::bad_request("The If-Match header is not a list of entity tags."))?;
    Ok(Some(list.to_owned()))
}

/// The value of `Idempotency-Key`. A command that is repeated with the same key runs once.
fn idempotency_key(parts: &Parts) -> Result<Option<String>, Problem> {
    let Some(value) = parts.headers.get("idempotency-key").filter(|_| parts.method != Method::GET) else { return Ok(None) };
    let key = value.to_str().ok().filter(|text| (1..=255).contains(&text.len()));
    let key =
        key.ok_or_else(|| Problem::bad_request("The Idempotency-Key header must have 1 to 255 printable ASCII characters."))?;
    Ok(Some(key.to_owned()))
}

/// Gives the command an id derived from its sender, its subject and the key, so that keys of different users never
/// collide.
fn with_idempotency_key(gateway: &Gateway, context: Context, subject: &str, key: &str, message: &[u8]) -> Context {
    let (Principal::User { id, .. } | Principal::ApiKey { id, .. }) = context.principal else { return context };
    let mut digest = Sha256::new_with_prefix(id.as_bytes());
    digest.update(format!("\0{subject}\0{key}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.finalize()[..16]);
    // The digest is stored, so it is keyed: a plain digest would allow guessing a password in the message.
    context.with_command_id(Uuid::from_bytes(bytes), gateway.authenticator.fingerprint(message))
}

/// The client's correlation id if it is 1 to 128 printable ASCII characters, otherwise a new one.
fn correlation_id(headers: &HeaderMap) -> String {
    headers
        .get(&CORRELATION)
        .and_then(|value| value.to_str().ok())
        .filter(|text| (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()))
        .map_or_else(|| new_id().to_string(), str::to_owned)
}

fn with_correlation(mut response: Response, id: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(id) {
        response.headers_mut().insert(CORRELATION, value);
    }
    response
}

/// A problem as a response (RFC 9457).
fn problem_response(problem: Problem, correlation_id: &str) -> Response {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let problem = Problem { correlation_id: Some(correlation_id.to_owned()), ..problem };
    let etag = problem.etag.as_deref().and_then(|tag| HeaderValue::from_str(tag).ok());
    let mut response = (status, Json(problem)).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    if let Some(etag) = etag {
        response.headers_mut().insert(header::ETAG, etag);
    }
    if status == StatusCode::TOO_MANY_REQUESTS {
        limits::retry_after(&mut response);
    }
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_SECONDS));
    }
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// Builds the message from body, query and path. Later ones override earlier ones.
async fn message(row: &Row, parts: &mut Parts, body: &[u8]) -> Result<Vec<u8>, Problem> {
    let mut object = if row.takes_json() { body_object(&parts.headers, body)? } else { Map::new() };
    for (name, value) in query(parts.uri.query().unwrap_or_default())? {
        let value = parse_parameter(&row.message.schema, &name, value)?;
        object.insert(name, value);
    }
    let path = RawPathParams::from_request_parts(parts, &()).await.map_err(|error| Problem::bad_request(error.to_string()))?;
    for (name, value) in &path {
        object.insert(name.to_owned(), Value::String(value.to_owned()));
    }
    (row.check)(object)
}

fn body_object(headers: &HeaderMap, bytes: &[u8]) -> Result<Map<String, Value>, Problem> {
    if bytes.is_empty() {
        return Ok(Map::new());
    }
    // Requires JSON against CSRF: browsers send it to another site only after a CORS preflight.
    let json =
        headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).is_some_and(|value| value.contains("json"));
    if !json {
        return Err(Problem::bad_request("The request's Content-Type is not application/json."));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Problem::bad_request("The body is not a JSON object.")),
        Err(error) => Err(Problem::bad_request(format!("The body is not valid JSON: {error}."))),
    }
}

async fn read_body(body: &mut Body) -> Result<Vec<u8>, Problem> {
    let mut bytes = Vec::new();
    let mut reader = MinRateBody::new(body, MinRate::ORDINARY);
    while let Some(data) = reader.data().await? {
        bytes.extend_from_slice(&data);
        if bytes.len() > BODY_BYTES {
            discard_body(body).await;
            return Err(Problem::too_large(format!("The body is larger than {} MiB.", BODY_BYTES >> 20)));
        }
    }
    Ok(bytes)
}

/// Reads and discards the rest of a body. A client that is still sending would otherwise see a closed connection
/// instead of the response. Stops if the body arrives too slowly.
async fn discard_body(body: &mut Body) {
    let mut reader = MinRateBody::new(body, MinRate::DISCARDED);
    while let Ok(Some(_)) = reader.data().await {}
}

fn query(text: &str) -> Result<Vec<(String, String)>, Problem> {
    let uri = format!("/?{text}").parse().map_err(|_| Problem::bad_request("The query is malformed."))?;
    let axum::extract::Query(pairs) = axum::extract::Query::try_from_uri(&uri)
        .map_err(|error| Problem::bad_request(format!("The query is malformed: {error}.")))?;
    Ok(pairs)
}

/// Converts a query parameter to the type in the message's schema.
fn parse_parameter(schema: &RefOr<Schema>, name: &str, text: String) -> Result<Value, Problem> {
    let is_type = |expected: &Type| match schema {
        RefOr::T(Schema::Object(object)) => match object.properties.get(name) {
            Some(RefOr::T(Schema::Object(property))) => match &property.schema_type {
                SchemaType::Type(kind) => kind == expected,
                SchemaType::Array(kinds) => kinds.contains(expected),
                SchemaType::AnyValue => false,
            },
            _ => false,
        },
        _ => false,
    };
    if is_type(&Type::Integer) {
        return text.parse::<i64>().map(Value::from).map_err(|_| Problem::invalid_field(name, "must be a whole number"));
    }
    if is_type(&Type::Boolean) {
        return match text.as_str() {
            "true" | "1" | "" => Ok(Value::Bool(true)),
            "false" | "0" => Ok(Value::Bool(false)),
            _ => Err(Problem::invalid_field(name, "must be true or false")),
        };
    }
    Ok(Value::String(text))
}
