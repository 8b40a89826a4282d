//! One request: its body, query and path become a message; the reply or the problem becomes the
//! answer.

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

use crate::pace::{Pace, PacedBody};
use crate::rows::Row;
use crate::{BODY_BYTES, Gateway, REQUEST, everywhere, limits};

/// When to come back where a part of the platform is busy or away.
const RETRY_SECONDS: u64 = 5;

const CORRELATION: HeaderName = HeaderName::from_static("x-correlation-id");

/// Answers a request with one reply.
pub async fn call(gateway: Arc<Gateway>, row: &'static Row, request: Request) -> Response {
    let span = tracing::info_span!(
        "http",
        otel.name = Empty,
        otel.kind = Empty,
        method = %row.method,
        route = row.path,
        status = Empty
    );
    capsule_observe::describe(&span, "http", "server");
    let traceparent = request.headers().get("traceparent").and_then(|value| value.to_str().ok()).map(str::to_owned);
    capsule_observe::continue_trace(&span, traceparent.as_deref());
    answer(gateway, row, request, traceparent).instrument(span).await
}

async fn answer(gateway: Arc<Gateway>, row: &'static Row, request: Request, traceparent: Option<String>) -> Response {
    let began = Instant::now();
    let (parts, body) = request.into_parts();
    let correlation_id = correlation_id(&parts.headers);
    let (mut verdict, mut attempt) = (None, None);
    let work = async {
        // Read before anything is refused: a connection whose request was not read cannot be kept.
        let body = collect(body).await?;
        let mut context = authenticate(&gateway, &parts, row.access, &correlation_id).await?;
        context.traceparent = capsule_observe::traceparent().or(traceparent);
        verdict = limits::check(&gateway, &context, &parts, row.subject).await?;
        let key = idempotency_key(&parts)?;
        let client = limits::address(&parts);
        let message = message(row, parts, &body).await?;
        attempt = limits::check_account(&gateway, &context, &client, row.subject, &message).await?;
        let context = match key {
            Some(key) => remembered(&gateway, context, row.subject, &key, &message),
            None => context,
        };
        match row.everywhere {
            true => everywhere::ask(&gateway.bus, &context, row.subject, message).await,
            false => gateway.bus.request_raw(&context, row.subject, message).await,
        }
    };
    let outcome = tokio::time::timeout(REQUEST, work).await.unwrap_or_else(|_| Err(Problem::deadline(row.subject)));
    if let (Ok(_), Some(attempt)) = (&outcome, &attempt) {
        limits::remember(&gateway, attempt).await;
    }
    let mut response = match outcome {
        Ok(reply) => (row.success, [(header::CONTENT_TYPE, "application/json")], reply).into_response(),
        Err(problem) => problem_response(problem, &correlation_id),
    };
    if let Some(verdict) = &verdict {
        limits::set_rate_limit_headers(&mut response, verdict);
    }
    let status = response.status().as_str().to_owned();
    tracing::Span::current().record("status", status.as_str());
    let labels = [("method", row.method.to_string()), ("route", row.path.to_owned()), ("status", status)];
    metrics::counter!("capsule_http_requests_total", &labels).increment(1);
    metrics::histogram!("capsule_http_request_duration_seconds", "route" => row.path).record(began.elapsed());
    with_correlation(response, &correlation_id)
}

/// Answers a request with a stream: one JSON object a line, or server-sent events if asked for.
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
            // The permit lives as long as the stream.
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

/// Who asks, and under which correlation id.
pub async fn authenticate(gateway: &Gateway, parts: &Parts, access: Access, correlation_id: &str) -> Result<Context, Problem> {
    // A stale token must not keep anybody from signing in again.
    let principal = match access {
        Access::Public => Principal::Anonymous,
        _ => gateway.authenticator.principal(&parts.headers, correlation_id).await?,
    };
    if principal == Principal::Anonymous && access != Access::Public {
        return Err(Problem::unauthenticated("This takes a signed-in user."));
    }
    Ok(Context::new(correlation_id.to_owned(), principal))
}

/// The key by which a client sends a command again without its being carried out again.
fn idempotency_key(parts: &Parts) -> Result<Option<String>, Problem> {
    let Some(value) = parts.headers.get("idempotency-key").filter(|_| parts.method != Method::GET) else { return Ok(None) };
    let key = value.to_str().ok().filter(|text| (1..=255).contains(&text.len()));
    let key =
        key.ok_or_else(|| Problem::bad_request("The Idempotency-Key header must have 1 to 255 printable ASCII characters."))?;
    Ok(Some(key.to_owned()))
}

/// The same request, known by its sender, its subject and the key; nobody else's key is the same.
fn remembered(gateway: &Gateway, context: Context, subject: &str, key: &str, message: &[u8]) -> Context {
    let Principal::User { id, .. } = context.principal else { return context };
    let mut digest = Sha256::new_with_prefix(id.as_bytes());
    digest.update(format!("\0{subject}\0{key}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.finalize()[..16]);
    // Keyed, for it is stored: from a plain digest, a password in the message could be guessed.
    context.once(Uuid::from_bytes(bytes), gateway.authenticator.fingerprint(message))
}

/// The caller's correlation id if it is a decent one, or a new one.
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

/// A problem as RFC 9457 has it.
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

/// Body, then query, then path fill the message's members; the later go before the earlier.
async fn message(row: &Row, mut parts: Parts, body: &[u8]) -> Result<Vec<u8>, Problem> {
    let mut object = if parts.method == Method::GET { Map::new() } else { body_object(&parts.headers, body)? };
    for (name, value) in query(parts.uri.query().unwrap_or_default())? {
        let value = typed(&row.message.schema, &name, value)?;
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
    // A form or plain text from another site's page is no JSON: browsers ask before they send that.
    let json =
        headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).is_some_and(|value| value.contains("json"));
    if !json {
        return Err(Problem::bad_request("The body's Content-Type is not application/json."));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Problem::bad_request("The body is not a JSON object.")),
        Err(error) => Err(Problem::bad_request(format!("The body is not valid JSON: {error}."))),
    }
}

async fn collect(mut body: Body) -> Result<Vec<u8>, Problem> {
    let mut bytes = Vec::new();
    let mut paced = PacedBody::new(&mut body, Pace::ORDINARY);
    while let Some(data) = paced.data().await? {
        bytes.extend_from_slice(&data);
        if bytes.len() > BODY_BYTES {
            swallow(&mut body).await;
            return Err(Problem::too_large(format!("The body is larger than {} MiB.", BODY_BYTES >> 20)));
        }
    }
    Ok(bytes)
}

/// Reads the rest of a body that is not wanted: whoever still sends does not listen yet, and would find
/// the connection closed instead of an answer. A body that arrives slowly is not worth it.
pub async fn swallow(body: &mut Body) {
    let mut paced = PacedBody::new(body, Pace::DISCARDED);
    while let Ok(Some(_)) = paced.data().await {}
}

fn query(text: &str) -> Result<Vec<(String, String)>, Problem> {
    let uri = format!("/?{text}").parse().map_err(|_| Problem::bad_request("The query is malformed."))?;
    let axum::extract::Query(pairs) = axum::extract::Query::try_from_uri(&uri)
        .map_err(|error| Problem::bad_request(format!("The query is malformed: {error}.")))?;
    Ok(pairs)
}

/// A query parameter as the message's schema wants it: everything in a query is text.
fn typed(schema: &RefOr<Schema>, name: &str, text: String) -> Result<Value, Problem> {
    let wants = |wanted: &Type| match schema {
        RefOr::T(Schema::Object(object)) => match object.properties.get(name) {
            Some(RefOr::T(Schema::Object(property))) => match &property.schema_type {
                SchemaType::Type(kind) => kind == wanted,
                SchemaType::Array(kinds) => kinds.contains(wanted),
                SchemaType::AnyValue => false,
            },
            _ => false,
        },
        _ => false,
    };
    if wants(&Type::Integer) {
        return text.parse::<i64>().map(Value::from).map_err(|_| Problem::invalid_field(name, "must be a whole number"));
    }
    if wants(&Type::Boolean) {
        return match text.as_str() {
            "true" | "1" | "" => Ok(Value::Bool(true)),
            "false" | "0" => Ok(Value::Bool(false)),
            _ => Err(Problem::invalid_field(name, "must be true or false")),
        };
    }
    Ok(Value::String(text))
}
