//! Replies as HTTP responses: JSON, files, redirects and streams.

use std::convert::Infallible;
use std::io::Write;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use capsule_bus::{entity_tag, matches_entity_tag};
use capsule_contracts::{Download, Problem, Redirect};
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::concurrency::Permit;
use crate::rows::{Row, RowKind};

/// JSON of more bytes is compressed where the client accepts it.
const COMPRESSED_BYTES: usize = 1 << 10;

/// The response of an endpoint with one reply, to a request with these header fields.
///
/// # Errors
/// When the reply is not of the type that the row requires.
pub fn respond(row: &Row, request: &HeaderMap, reply: Vec<u8>) -> Result<Response, Problem> {
    match row.kind {
        RowKind::Download => {
            let Download { media_type, file_name, content } = decode(&reply)?;
            let headers = [
                (header::CONTENT_TYPE, header_value(&media_type)?),
                (header::CONTENT_DISPOSITION, header_value(&disposition(&file_name))?),
            ];
            Ok((row.success, headers, content).into_response())
        }
        RowKind::Redirect => {
            let Redirect { location } = decode(&reply)?;
            Ok((row.success, [(header::LOCATION, header_value(&location)?)]).into_response())
        }
        _ => json(row, request, reply),
    }
}

/// JSON with its entity tag, or status 304 if the client has this representation.
fn json(row: &Row, request: &HeaderMap, reply: Vec<u8>) -> Result<Response, Problem> {
    let tag = row.has_entity_tag().then(|| entity_tag(&reply));
    if let (Some(tag), Some(seen)) = (&tag, request.get(header::IF_NONE_MATCH).filter(|_| row.method == Method::GET)) {
        // Weak comparison (RFC 9110, section 13.1.2).
        let seen = seen.to_str().unwrap_or_default().replace("W/", "");
        if matches_entity_tag(&seen, tag) {
            let headers = [(header::ETAG, header_value(tag)?), (header::VARY, VARY)];
            return Ok((StatusCode::NOT_MODIFIED, headers).into_response());
        }
    }
    let (encoding, body) = encode(request, reply);
    let mut response = (row.success, [(header::CONTENT_TYPE, "application/json")], body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::VARY, VARY);
    if let Some(encoding) = encoding {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(encoding));
    }
    if let Some(tag) = tag {
        // Another encoding is another representation, so its strong tag differs.
        let tag = if encoding.is_some() { tag.trim_end_matches('"').to_owned() + "-gzip\"" } else { tag };
        headers.insert(header::ETAG, header_value(&tag)?);
    }
    Ok(response)
}

const VARY: HeaderValue = HeaderValue::from_static("accept-encoding");

/// The bytes compressed, and the name of the encoding, if that pays and the client accepts it.
fn encode(request: &HeaderMap, bytes: Vec<u8>) -> (Option<&'static str>, Vec<u8>) {
    if bytes.len() <= COMPRESSED_BYTES || !accepts_gzip(request) {
        return (None, bytes);
    }
    let mut encoder = GzEncoder::new(Vec::with_capacity(bytes.len() / 4), Compression::fast());
    match encoder.write_all(&bytes).and_then(|()| encoder.finish()) {
        Ok(compressed) => (Some("gzip"), compressed),
        Err(_) => (None, bytes),
    }
}

fn accepts_gzip(request: &HeaderMap) -> bool {
    let fields = request.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    fields.flat_map(|value| value.split(',')).any(|item| {
        let mut parts = item.split(';').map(str::trim);
        let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case("gzip"));
        // A quality of 0 means that it is not accepted.
        let quality = parts.find_map(|part| part.strip_prefix("q=")?.trim().parse::<f32>().ok());
        named && quality.is_none_or(|quality| quality > 0.0)
    })
}

fn decode<T: DeserializeOwned>(reply: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(reply).map_err(|_| Problem::internal())
}

fn header_value(text: &str) -> Result<HeaderValue, Problem> {
    HeaderValue::from_str(text).map_err(|_| Problem::internal())
}

/// The `Content-Disposition` of a file (RFC 6266): its name in ASCII, and in UTF-8 (RFC 8187).
fn disposition(file_name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let ascii: String = file_name.chars().map(|c| if plain(c) { c } else { '_' }).collect();
    let mut encoded = String::new();
    for byte in file_name.bytes() {
        match char::from(byte) {
            c if plain(c) => encoded.push(c),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    format!("attachment; filename=\"{ascii}\"; filename*=UTF-8''{encoded}")
}

/// A stream of replies as a response: one JSON object per line, or server-sent events if `Accept` lists them.
pub fn stream(request: &HeaderMap, items: mpsc::Receiver<Vec<u8>>, permit: Option<Permit>) -> Response {
    let accept = request.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let events = accept.is_some_and(|value| value.contains("text/event-stream"));
    let items = futures_util::stream::unfold((items, permit), |(mut items, permit)| async move {
        Some((items.recv().await?, (items, permit)))
    });
    let lines = items.map(move |item| {
        let mut line = if events { b"data: ".to_vec() } else { Vec::new() };
        line.extend_from_slice(&item);
        line.extend_from_slice(if events { b"\n\n" } else { b"\n" });
        Ok::<_, Infallible>(Bytes::from(line))
    });
    let media_type = if events { "text/event-stream" } else { "application/x-ndjson" };
    ([(header::CONTENT_TYPE, media_type)], Body::from_stream(lines)).into_response()
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderMap, HeaderValue, header};

    use super::{accepts_gzip, disposition};

    #[test]
    fn gzip_is_used_only_where_the_client_accepts_it() {
        for (value, accepted) in [
            ("gzip", true),
            ("br, GZIP;q=0.5", true),
            ("gzip;q=0", false),
            ("gzip; q=0.000", false),
            ("identity", false),
            ("", false),
        ] {
            let headers = HeaderMap::from_iter([(header::ACCEPT_ENCODING, HeaderValue::from_static(value))]);
            assert_eq!(accepts_gzip(&headers), accepted, "{value}");
        }
    }

    #[test]
    fn a_file_name_cannot_leave_its_header_parameter() {
        assert_eq!(disposition("a.tar.gz"), "attachment; filename=\"a.tar.gz\"; filename*=UTF-8''a.tar.gz");
        assert_eq!(disposition("\"ä\r\n/x"), "attachment; filename=\"_____x\"; filename*=UTF-8''%22%C3%A4%0D%0A%2Fx");
    }
}
