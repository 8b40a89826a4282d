//! The error responses of the ingress itself: a page for people, a problem document for programs.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};

use crate::table::State;

/// The ingress's response body.
pub type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// An error response.
struct Page {
    status: StatusCode,
    title: &'static str,
    detail: &'static str,
    /// The `Retry-After` header, in seconds.
    retry: Option<u8>,
}

/// Who reads the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visitor {
    Person,
    Program,
}

impl Visitor {
    /// Takes a visitor that accepts HTML for a person with a browser.
    pub fn of(request: &HeaderMap) -> Self {
        let accept = request.get(header::ACCEPT).and_then(|value| value.to_str().ok());
        if accept.is_some_and(|accept| accept.contains("text/html")) { Self::Person } else { Self::Program }
    }
}

/// 404: the host is not in the routing table.
pub fn unknown_host(visitor: Visitor) -> Response<Body> {
    render(
        visitor,
        &Page {
            status: StatusCode::NOT_FOUND,
            title: "No such app",
            detail: "No app is deployed at this address. Check the spelling, or deploy an app with <code>capsule deploy</code>.",
            retry: None,
        },
    )
}

/// The host is known, but no instance serves requests.
pub fn state(visitor: Visitor, state: State) -> Response<Body> {
    let page = match state {
        State::Ready | State::Crashed => Page {
            status: StatusCode::BAD_GATEWAY,
            title: "This app has crashed",
            detail: "Capsule restarts it automatically. If this is your app, <code>capsule logs</code> shows why it crashed.",
            retry: Some(5),
        },
        State::Starting => Page {
            status: StatusCode::SERVICE_UNAVAILABLE,
            title: "This app is starting",
            detail: "It will be ready in a moment. This page reloads automatically.",
            retry: Some(2),
        },
        State::Worker => Page {
            status: StatusCode::NOT_FOUND,
            title: "This app has no address",
            detail: "It runs, but has no process that serves requests. Add a process named <code>web</code> to serve this address.",
            retry: None,
        },
        State::Stopped => Page {
            status: StatusCode::SERVICE_UNAVAILABLE,
            title: "This app is stopped",
            detail: "If this is your app, start it with <code>capsule start</code> or <code>capsule deploy</code>.",
            retry: None,
        },
    };
    render(visitor, &page)
}

/// 400: the request is malformed or ambiguous. The connection is closed.
pub fn bad_request(visitor: Visitor, detail: &'static str) -> Response<Body> {
    let mut response = render(visitor, &Page { status: StatusCode::BAD_REQUEST, title: "Bad request", detail, retry: None });
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// 503: the app has the most requests in flight that it may, or accepts no connections.
pub fn saturated(visitor: Visitor) -> Response<Body> {
    render(
        visitor,
        &Page {
            status: StatusCode::SERVICE_UNAVAILABLE,
            title: "This app is busy",
            detail: "It accepts no more requests at the moment. Try again in a few seconds. If this is your app, <code>capsule logs</code> shows what it is doing.",
            retry: Some(5),
        },
    )
}

/// 502: the app's response did not come in time, or is not valid HTTP.
pub fn bad_gateway(visitor: Visitor) -> Response<Body> {
    render(
        visitor,
        &Page {
            status: StatusCode::BAD_GATEWAY,
            title: "This app did not respond",
            detail: "It accepted the request, but sent no valid HTTP response in time. If this is your app, <code>capsule logs</code> shows what it did.",
            retry: Some(5),
        },
    )
}

/// 503: the control plane is down. Applications are still served.
pub fn no_gateway(visitor: Visitor) -> Response<Body> {
    render(
        visitor,
        &Page {
            status: StatusCode::SERVICE_UNAVAILABLE,
            title: "Capsule is restarting",
            detail: "The control plane is not available at the moment. Your apps keep running.",
            retry: Some(2),
        },
    )
}

fn render(visitor: Visitor, page: &Page) -> Response<Body> {
    let Page { status, title, detail, retry } = page;
    let (kind, body) = if visitor == Visitor::Person {
        let refresh = retry.map(|seconds| format!("<meta http-equiv=\"refresh\" content=\"{seconds}\">")).unwrap_or_default();
        (
            "text/html; charset=utf-8",
            include_str!("page.html").replace("{title}", title).replace("{detail}", detail).replace("{refresh}", &refresh),
        )
    } else {
        let plain = detail.replace("<code>", "`").replace("</code>", "`");
        // The form of the API's own problems (RFC 9457).
        let code = match *status {
            StatusCode::NOT_FOUND => "not_found",
            StatusCode::BAD_REQUEST => "bad_request",
            _ => "unavailable",
        };
        let problem = serde_json::json!({"code": code, "title": title, "status": status.as_u16(), "detail": plain});
        ("application/problem+json", problem.to_string())
    };
    let mut response = Response::new(full(body.into()));
    *response.status_mut() = *status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(seconds) = retry {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(u16::from(*seconds)));
    }
    response
}

/// A body of these bytes.
pub fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}
