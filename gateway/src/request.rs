//! Handling of one request: its body, query and path become a message; the reply or problem becomes the response.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequestParts, RawPathParams, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use capsule_bus::{Context, Principal};
use capsule_contracts::{Access, Problem, Uuid, new_id};
use futures_util::StreamExt;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tracing::Instrument;
use tracing::field::Empty;
use utoipa::openapi::schema::{SchemaType, Type};
use utoipa::openapi::{RefOr, Schema};

use crate::min_rate::{MinRate, MinRateBody};
use crate::rows::Row;
use crate::{BODY_BYTES, Gateway, REQUEST_TIMEOUT, fan_out, limits};

/// `Retry-After` of responses with status 503.
const RETRY_SECONDS: u64 = 5;

const CORRELATION: HeaderName = HeaderName::from_static("x-correlation-id");

/// Handles a request that has one reply.
pub async fn call(gateway: Arc<Gateway>, row: &'static Row, request: Request) -> Response {
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

async fn handle(gateway: Arc<Gateway>, row: &'static Row, request: Request, traceparent: Option<String>) -> Response {
    let began = Instant::now();
    let (parts, body) = request.into_parts();
    let correlation_id = correlation_id(&parts.headers);
    let (mut decision, mut attempt) = (None, None);
    let work = async {
        // Read before anything is rejected: a connection with an unread request body cannot be reused.
        let body = read_body(body).await?;
        let mut context = authenticate(&gateway, &parts, row.access, &correlation_id).await?;
        context.traceparent = capsule_observe::traceparent().or(traceparent);
        decision = limits::check(&gateway, &context, &parts, row.subject).await?;
        let key = idempotency_key(&parts)?;
        let client = limits::address(&parts);
        let message = message(row, parts, &body).await?;
        attempt = limits::check_account(&gateway, &context, &client, row.subject, &message).await?;
        let context = match key {
            Some(key) => with_idempotency_key(&gateway, context, row.subject, &key, &message),
            None => context,
        };
        match row.fan_out {
            true => fan_out::request(&gateway.bus, &context, row.subject, message).await,
            false => gateway.bus.request_raw(&context, row.subject, message).await,
        }
    };
    let outcome = tokio::time::timeout(REQUEST_TIMEOUT, work).await.unwrap_or_else(|_| Err(Problem::deadline(row.subject)));
    if let (Ok(_), Some(attempt)) = (&outcome, &attempt) {
        limits::mark_known_address(&gateway, attempt).await;
    }
    let mut response = match outcome {
        Ok(reply) => (row.success, [(header::CONTENT_TYPE, "application/json")], reply).into_response(),
        Err(problem) => problem_response(problem, &correlation_id),
    };
    if let Some(decision) = &decision {
        limits::set_rate_limit_headers(&mut response, decision);
    }
    let status = response.status().as_str().to_owned();
    tracing::Span::current().record("status", status.as_str());
    let labels = [("method", row.method.to_string()), ("route", row.path.to_owned()), ("status", status)];
    metrics::counter!("capsule_http_requests_total", &labels).increment(1);
    metrics::histogram!("capsule_http_request_duration_seconds", "route" => row.path).record(began.elapsed());
    with_correlation(response, &correlation_id)
}

/// Handles a request that has a stream of replies: one JSON object per line, or server-sent events if `Accept` lists
/// them.
pub async fn stream(gateway: Arc<Gateway>, row: &'static Row, request: Request) -> Response {
    let (parts, _) = request.into_parts();
    let correlation_id = correlation_id(&parts.headers);
    let events = parts
        .headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.contains("text/event-stream"));
    let opened = async {
        let context = authenticate(&gateway, &parts, row.access, &correlation_id).await?;
        limits::check(&gateway, &context, &parts, row.subject).await?;
        let permit = gateway.streams.acquire(context.principal)?;
        let message = message(row, parts, &[]).await?;
        Ok((gateway.bus.open_raw(&context, row.subject, message).await?, permit))
    };
    let response = match opened.await {
        Ok(opened) => {
            // The permit is released when the stream ends.
            let lines = futures_util::stream::unfold(opened, |(mut items, permit)| async move {
                Some((items.recv().await?, (items, permit)))
            });
            let lines = lines.map(move |item| {
                let mut line = if events { b"data: ".to_vec() } else { Vec::new() };
                line.extend_from_slice(&item);
                line.extend_from_slice(if events { b"\n\n" } else { b"\n" });
                Ok::<_, Infallible>(Bytes::from(line))
            });
            let kind = if events { "text/event-stream" } else { "application/x-ndjson" };
            ([(header::CONTENT_TYPE, kind)], Body::from_stream(lines)).into_response()
        }
        Err(problem) => problem_response(problem, &correlation_id),
    };
    with_correlation(response, &correlation_id)
}

pub async fn no_such_endpoint(request: Request) -> Response {
    let id = correlation_id(request.headers());
    let problem = Problem::not_found("endpoint").hint("The endpoints are listed at /api/documentation.");
    with_correlation(problem_response(problem, &id), &id)
}

/// Authenticates a request.
pub async fn authenticate(gateway: &Gateway, parts: &Parts, access: Access, correlation_id: &str) -> Result<Context, Problem> {
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
    let Principal::User { id, .. } = context.principal else { return context };
    let mut digest = Sha256::new_with_prefix(id.as_bytes());
    digest.update(format!("\0{subject}\0{key}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.finalize()[..16]);
    // The digest is stored, so it is keyed: a plain digest would allow guessing a password in the message.
    context.with_command_id(Uuid::from_bytes(bytes), gateway.authenticator.fingerprint(message))
}

/// The client's correlation id if it is 1 to 128 printable ASCII characters, otherwise a new one.
pub fn correlation_id(headers: &HeaderMap) -> String {
    headers
        .get(&CORRELATION)
        .and_then(|value| value.to_str().ok())
        .filter(|text| (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()))
        .map_or_else(|| new_id().to_string(), str::to_owned)
}

pub fn with_correlation(mut response: Response, id: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(id) {
        response.headers_mut().insert(CORRELATION, value);
    }
    response
}

/// A problem as a response (RFC 9457).
pub fn problem_response(problem: Problem, correlation_id: &str) -> Response {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let problem = Problem { correlation_id: Some(correlation_id.to_owned()), ..problem };
    let mut response = (status, Json(problem)).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
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
async fn message(row: &Row, mut parts: Parts, body: &[u8]) -> Result<Vec<u8>, Problem> {
    let mut object = if parts.method == Method::GET { Map::new() } else { body_object(&parts.headers, body)? };
    for (name, value) in query(parts.uri.query().unwrap_or_default())? {
        let value = parse_parameter(&row.message.schema, &name, value)?;
        object.insert(name, value);
    }
    let path =
        RawPathParams::from_request_parts(&mut parts, &()).await.map_err(|error| Problem::bad_request(error.to_string()))?;
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

async fn read_body(mut body: Body) -> Result<Vec<u8>, Problem> {
    let mut bytes = Vec::new();
    let mut reader = MinRateBody::new(&mut body, MinRate::ORDINARY);
    while let Some(data) = reader.data().await? {
        bytes.extend_from_slice(&data);
        if bytes.len() > BODY_BYTES {
            discard_body(&mut body).await;
            return Err(Problem::too_large(format!("The body is larger than {} MiB.", BODY_BYTES >> 20)));
        }
    }
    Ok(bytes)
}

/// Reads and discards the rest of a body. A client that is still sending would otherwise see a closed connection
/// instead of the response. Stops if the body arrives too slowly.
pub async fn discard_body(body: &mut Body) {
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
