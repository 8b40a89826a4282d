//! Replies as HTTP responses: JSON, files, redirects and streams.

use std::convert::Infallible;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use capsule_contracts::{Download, Problem, Redirect};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::concurrency::Permit;
use crate::rows::{Row, RowKind};

/// The response of an endpoint with one reply.
///
/// # Errors
/// When the reply is not of the type that the row requires.
pub fn respond(row: &Row, reply: Vec<u8>) -> Result<Response, Problem> {
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
        _ => Ok((row.success, [(header::CONTENT_TYPE, "application/json")], reply).into_response()),
    }
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
    use super::disposition;

    #[test]
    fn a_file_name_cannot_leave_its_header_parameter() {
        assert_eq!(disposition("a.tar.gz"), "attachment; filename=\"a.tar.gz\"; filename*=UTF-8''a.tar.gz");
        assert_eq!(disposition("\"ä\r\n/x"), "attachment; filename=\"_____x\"; filename*=UTF-8''%22%C3%A4%0D%0A%2Fx");
    }
}
