//! What a visitor sees when there is no application to answer: what is the matter, and what to do.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};

use crate::table::State;

/// The ingress's response body.
pub type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// A page for people, or a problem for programs.
struct Page {
    status: StatusCode,
    title: &'static str,
    detail: &'static str,
    /// Seconds after which it is worth asking again.
    retry: Option<u8>,
}

/// Who will read the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visitor {
    Person,
    Program,
}

impl Visitor {
    /// Browsers say that they take HTML.
    pub fn of(request: &HeaderMap) -> Self {
        let accept = request.get(header::ACCEPT).and_then(|value| value.to_str().ok());
        if accept.is_some_and(|accept| accept.contains("text/html")) { Self::Person } else { Self::Program }
    }
}

/// The host is not known.
pub fn unknown(visitor: Visitor) -> Response<Body> {
    render(
        visitor,
        &Page {
            status: StatusCode::NOT_FOUND,
            title: "No such app",
            detail: "Nothing is deployed under this address. Check its spelling, or deploy to it with <code>capsule deploy</code>.",
            retry: None,
        },
    )
}

/// The host is known, but nothing takes its requests.
pub fn state(visitor: Visitor, state: State) -> Response<Body> {
    let page = match state {
        State::Ready | State::Crashed => Page {
            status: StatusCode::BAD_GATEWAY,
            title: "This app has crashed",
            detail: "It ended, or does not answer, and is started again by itself. If it is yours, <code>capsule logs</code> says why.",
            retry: Some(5),
        },
        State::Starting => Page {
            status: StatusCode::SERVICE_UNAVAILABLE,
            title: "This app is starting",
            detail: "It will be here in a moment; this page looks again by itself.",
            retry: Some(2),
        },
        State::Worker => Page {
            status: StatusCode::NOT_FOUND,
            title: "This app has no address",
            detail: "It runs, but none of its processes takes requests. A process named <code>web</code> would.",
            retry: None,
        },
        State::Stopped => Page {
            status: StatusCode::SERVICE_UNAVAILABLE,
            title: "This app is stopped",
            detail: "If it is yours, <code>capsule deploy</code> or <code>capsule start</code> brings it back.",
            retry: None,
        },
    };
    render(visitor, &page)
}

/// The request cannot be understood, or could be in two ways. Nothing more is read from its connection.
pub fn refused(visitor: Visitor, detail: &'static str) -> Response<Body> {
    let mut response =
        render(visitor, &Page { status: StatusCode::BAD_REQUEST, title: "This request was not understood", detail, retry: None });
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// The app has as many requests as it may, or accepts none.
pub fn saturated(visitor: Visitor) -> Response<Body> {
    render(
        visitor,
        &Page {
            status: StatusCode::SERVICE_UNAVAILABLE,
            title: "This app is busy",
            detail: "It accepts no more requests at the moment. If it is yours, <code>capsule logs</code> says what it does.",
            retry: Some(5),
        },
    )
}

/// The app's answer did not come in time, or is none.
pub fn no_answer(visitor: Visitor) -> Response<Body> {
    render(
        visitor,
        &Page {
            status: StatusCode::BAD_GATEWAY,
            title: "This app did not answer",
            detail: "It took the request, but sent no proper HTTP response in time. If it is yours, <code>capsule logs</code> says what it did.",
            retry: Some(5),
        },
    )
}

/// The control plane does not answer; applications are served all the same.
pub fn no_gateway(visitor: Visitor) -> Response<Body> {
    render(
        visitor,
        &Page {
            status: StatusCode::SERVICE_UNAVAILABLE,
            title: "Capsule is restarting",
            detail: "The control plane does not answer at the moment. Your apps keep running.",
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
        // As the API's own problems are (RFC 9457), for programs that take both.
        let code = match *status {
            StatusCode::NOT_FOUND => "not_found",
            StatusCode::BAD_REQUEST => "bad_request",
            _ => "unavailable",
        };
        let problem = serde_json::json!({"code": code, "title": title, "status": status.as_u16(), "detail": plain});
        ("application/problem+json", problem.to_string())
    };
    let mut response = Response::new(whole(body.into()));
    *response.status_mut() = *status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(seconds) = retry {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(u16::from(*seconds)));
    }
    response
}

/// A body of known bytes.
pub fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}
