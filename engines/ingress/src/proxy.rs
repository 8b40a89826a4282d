//! One request through the door: find the host, pick an instance, forward, hand the answer back.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Either, Empty};
use hyper::body::{Body as _, Incoming};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::TokioIo;
use uuid::Uuid;

use crate::balance::{Balancer, Busy, Pick};
use crate::body::Begun;
use crate::pages::{self, Body};
use crate::sites::Sites;
use crate::table::State;
use crate::upstream::{Connector, GATEWAY, Served};

/// Why an instance did not answer.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What goes to an instance: the visitor's body, or none.
pub type Outgoing = Either<Incoming, Empty<Bytes>>;

/// Headers that concern one connection only (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
];
const CORRELATION: HeaderName = HeaderName::from_static("x-correlation-id");

/// What every request needs.
#[derive(Debug)]
pub struct Proxy {
    pub balancer: Arc<Balancer>,
    pub client: Client<Connector, Outgoing>,
    /// Takes a connection of its own for each request.
    pub fresh: Client<Connector, Empty<Bytes>>,
    pub sites: Sites,
}

impl Proxy {
    /// Answers one request from `peer`.
    pub async fn handle(&self, mut request: Request<Incoming>, peer: IpAddr) -> Response<Body> {
        let host = host_of(&request);
        match self.balancer.pick(&host) {
            Pick::Unknown => pages::unknown(pages::Visitor::of(request.headers())),
            Pick::Gateway => {
                let visitor = pages::Visitor::of(request.headers());
                prepare(&mut request, peer, GATEWAY, 80);
                match self.forward(request, None).await {
                    Ok(response) => response,
                    Err(_) => pages::no_gateway(visitor),
                }
            }
            Pick::Route(route) => match route.site {
                Some(site) if route.state == State::Ready => self.sites.serve(&site, &request).await,
                _ => pages::state(pages::Visitor::of(request.headers()), route.state),
            },
            Pick::Instance(busy) => {
                let visitor = pages::Visitor::of(request.headers());
                prepare(&mut request, peer, &busy.instance, busy.port);
                match self.forward(request, Some(busy)).await {
                    Ok(response) => response,
                    Err(error) => {
                        tracing::debug!(host, %error, "an instance did not answer");
                        pages::state(visitor, State::Crashed)
                    }
                }
            }
        }
    }

    async fn forward(&self, mut request: Request<Incoming>, busy: Option<Busy>) -> Result<Response<Body>, Failure> {
        let upgrade = request.headers().contains_key(header::UPGRADE).then(|| hyper::upgrade::on(&mut request));
        let mut response = self.send(request).await?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS
            && let Some(visitor) = upgrade
        {
            let instance = hyper::upgrade::on(&mut response);
            tokio::spawn(async move {
                let _busy = busy;
                if let (Ok(visitor), Ok(instance)) = (visitor.await, instance.await) {
                    let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(visitor), &mut TokioIo::new(instance)).await;
                }
            });
            return Ok(response.map(|_| pages::whole(Bytes::new())));
        }
        remove_hop_by_hop(response.headers_mut());
        let (parts, mut rest) = response.into_parts();
        // A body of known length is on its way already; one without may be a stream that lasts.
        let known = rest.size_hint().exact().is_some_and(|bytes| bytes > 0);
        let first = if known { rest.frame().await.transpose()? } else { None };
        let begun = first.and_then(|frame| frame.into_data().ok());
        Ok(Response::from_parts(parts, Begun { begun, rest, busy }.boxed_unsync()))
    }

    /// Sends a request. A kept connection may turn out to have been closed by its other end just now:
    /// then a request that may be sent twice is sent again, over a new one (RFC 9110, section 9.2.2).
    async fn send(&self, request: Request<Incoming>) -> Result<Response<Incoming>, Error> {
        let repeatable = request.method().is_idempotent() && request.body().is_end_stream();
        if !repeatable {
            return self.client.request(request.map(Either::Left)).await.inspect(served);
        }
        let (parts, _) = request.into_parts();
        let first = Request::from_parts(parts.clone(), Either::Right(Empty::new()));
        match self.client.request(first).await.inspect(served) {
            Err(error) if was_kept(&error) => self.fresh.request(Request::from_parts(parts, Empty::new())).await,
            answered => answered,
        }
    }
}

/// Marks the connection that a response came over.
fn served(response: &Response<Incoming>) {
    if let Some(served) = response.extensions().get::<Served>() {
        served.mark();
    }
}

/// Whether an error came over a connection that had served a request before.
fn was_kept(error: &Error) -> bool {
    let mut extras = http::Extensions::new();
    error.connect_info().inspect(|connected| connected.get_extras(&mut extras));
    extras.get::<Served>().is_some_and(Served::is_marked)
}

/// The host a request is for, in lower case and without a port.
fn host_of(request: &Request<Incoming>) -> String {
    let named = request.uri().authority().map(Authority::as_str);
    let named = named.or_else(|| request.headers().get(header::HOST)?.to_str().ok()).unwrap_or_default();
    strip_port(named).to_ascii_lowercase()
}

fn strip_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && (!name.contains(':') || name.ends_with(']')) => name,
        _ => host,
    }
    .trim_end_matches('.')
}

/// Makes a visitor's request one to the instance: its address, and the headers that say who asks.
fn prepare(request: &mut Request<Incoming>, peer: IpAddr, instance: &str, port: u16) {
    let headers = request.headers_mut();
    let upgrade = headers.get(header::UPGRADE).cloned();
    remove_hop_by_hop(headers);
    if upgrade.is_some() {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    if let Ok(address) = HeaderValue::from_str(&peer.to_string()) {
        // What a visitor claims of itself is not passed on: this is the first proxy.
        headers.insert("x-forwarded-for", address.clone());
        headers.insert("x-real-ip", address);
    }
    headers.insert("x-forwarded-proto", HeaderValue::from_static("http"));
    if let Some(host) = headers.get(header::HOST).cloned() {
        headers.insert("x-forwarded-host", host);
    }
    if !headers.contains_key(&CORRELATION)
        && let Ok(id) = HeaderValue::from_str(&Uuid::now_v7().to_string())
    {
        headers.insert(CORRELATION, id);
    }
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = format!("{instance}:{port}").parse().ok();
    parts.path_and_query = parts.path_and_query.or_else(|| Some(PathAndQuery::from_static("/")));
    *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    *request.version_mut() = http::Version::HTTP_11;
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name| *name != header::UPGRADE)
        .collect();
    for name in HOP_BY_HOP.iter().chain(&named) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::{remove_hop_by_hop, strip_port};
    use http::{HeaderMap, HeaderValue};

    #[test]
    fn a_host_loses_its_port_and_its_trailing_dot() {
        for (given, host) in [
            ("a.localhost:8080", "a.localhost"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
            ("a.localhost.", "a.localhost"),
            ("", ""),
        ] {
            assert_eq!(strip_port(given), host);
        }
    }

    #[test]
    fn headers_of_one_connection_and_those_it_names_go_no_further() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("connection", "close, x-secret"), ("x-secret", "1"), ("transfer-encoding", "chunked"), ("accept", "*/*")]
        {
            headers.insert(name, HeaderValue::from_static(value));
        }
        remove_hop_by_hop(&mut headers);
        assert_eq!(headers.keys().map(http::HeaderName::as_str).collect::<Vec<_>>(), ["accept"]);
    }
}
