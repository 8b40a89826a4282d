//! The handling of one request: find the host, pick a backend, forward the request, return the response.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use hyper_util::rt::TokioIo;
use uuid::Uuid;

use crate::balance::{Balancer, InFlightGuard, Pick};
use crate::body::{Outgoing, PrefixedBody, Proxied};
use crate::cookies;
use crate::forwarded::Client;
use crate::pages::{self, Body};
use crate::pool::{Failure, Pool};
use crate::request::{self, Host, remove_hop_by_hop, upgrade_to_websocket};
use crate::sites::Sites;
use crate::table::State;
use crate::visitor::{Heads, Upload};

const CORRELATION: HeaderName = HeaderName::from_static("x-correlation-id");
/// A response header that makes nginx, as a proxy in front of the ingress, serve one of its own files.
const ACCEL_REDIRECT: HeaderName = HeaderName::from_static("x-accel-redirect");

/// Handles requests; one for each thread.
#[derive(Debug)]
pub struct Proxy {
    pub balancer: Arc<Balancer>,
    pub pool: Arc<Pool>,
    pub sites: Sites,
}

/// The connection that a request came over.
#[derive(Debug)]
pub struct Visitor {
    /// The address of the other end.
    pub peer: IpAddr,
    pub heads: Heads,
}

impl Proxy {
    /// Handles one request.
    pub async fn handle(&self, request: Request<Incoming>, visitor: &Visitor) -> Response<Body> {
        let is_chunked = request.headers().contains_key(header::TRANSFER_ENCODING);
        let mut response = self.route(request, visitor).await;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            visitor.heads.end();
        } else if is_chunked {
            // Only the HTTP library sees where a chunked body ends, so no further head can be recorded.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    async fn route(&self, mut request: Request<Incoming>, visitor: &Visitor) -> Response<Body> {
        let has_body = !request.body().is_end_stream();
        let has_length = visitor.heads.next(request.body().size_hint().exact());
        let upload = has_body.then(Upload::default);
        let reader = pages::Visitor::of(request.headers());
        let chunked = request.headers().contains_key(header::TRANSFER_ENCODING);
        let host = match request::check(&request, chunked && has_length) {
            Ok(host) => host,
            Err(detail) => return pages::bad_request(reader, detail),
        };
        match self.balancer.pick(&host.name) {
            Pick::Unknown => pages::unknown_host(reader),
            Pick::Saturated => pages::saturated(reader),
            Pick::Route(route) => match route.site {
                Some(site) if route.state == State::Ready => self.sites.serve(&site, &request).await,
                _ => pages::state(reader, route.state),
            },
            Pick::Gateway(guard) | Pick::Instance(guard) => {
                let is_gateway = guard.is_gateway();
                let websocket = !is_gateway && !has_body && request::is_websocket(&request);
                self.prepare(&mut request, visitor.peer, &host, websocket);
                match self.forward(request, guard, upload, &host, websocket).await {
                    Ok(response) => response,
                    Err(_) if is_gateway => pages::no_gateway(reader),
                    Err(failure) => {
                        tracing::debug!(host = host.name, %failure, "cannot forward a request");
                        match failure {
                            Failure::Saturated => pages::saturated(reader),
                            Failure::Unreachable(_) => pages::state(reader, State::Crashed),
                            Failure::Timeout | Failure::Malformed(_) | Failure::UnexpectedUpgrade => pages::bad_gateway(reader),
                        }
                    }
                }
            }
        }
    }

    /// Rewrites a visitor's request for the backend: the request target, and the headers that identify the client.
    fn prepare(&self, request: &mut Request<Incoming>, peer: IpAddr, host: &Host, websocket: bool) {
        let headers = request.headers_mut();
        remove_hop_by_hop(headers);
        if websocket {
            upgrade_to_websocket(headers);
        }
        Client::find(headers, peer, |address| self.balancer.trusts(address)).write_headers(headers, host);
        if !headers.contains_key(&CORRELATION)
            && let Ok(id) = HeaderValue::from_str(&Uuid::now_v7().to_string())
        {
            headers.insert(CORRELATION, id);
        }
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
        *request.version_mut() = http::Version::HTTP_11;
    }

    async fn forward(
        &self,
        mut request: Request<Incoming>,
        guard: InFlightGuard,
        upload: Option<Upload>,
        host: &Host,
        websocket: bool,
    ) -> Result<Response<Body>, Failure> {
        let upgrade = websocket.then(|| hyper::upgrade::on(&mut request));
        let request = request.map(|body| match &upload {
            Some(upload) => Outgoing::Visitor { body, upload: upload.clone() },
            None => Outgoing::Empty,
        });
        let (mut response, lease) = self.pool.send(request, &guard, upload.as_ref()).await?;
        remove_hop_by_hop(response.headers_mut());
        confine(response.headers_mut(), host);
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // Without an upgrade request, this is no valid response.
            let visitor = upgrade.ok_or(Failure::UnexpectedUpgrade)?;
            let instance = hyper::upgrade::on(&mut response);
            tokio::spawn(async move {
                let _in_flight = guard;
                if let (Ok(visitor), Ok(instance)) = (visitor.await, instance.await) {
                    let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(visitor), &mut TokioIo::new(instance)).await;
                }
            });
            upgrade_to_websocket(response.headers_mut());
            return Ok(response.map(|_| pages::full(Bytes::new())));
        }
        let (parts, body) = response.into_parts();
        let mut rest = Proxied::new(body, lease, guard);
        // Wait for the first bytes of a body of known length only: one of unknown length may be a long stream.
        let has_length = rest.size_hint().exact().is_some_and(|bytes| bytes > 0);
        let first = if has_length { rest.frame().await.transpose().map_err(Failure::Malformed)? } else { None };
        let prefix = first.and_then(|frame| frame.into_data().ok());
        Ok(Response::from_parts(parts, PrefixedBody { prefix, rest }.boxed_unsync()))
    }
}

/// Removes headers by which a response could affect other hosts.
fn confine(headers: &mut HeaderMap, host: &Host) {
    cookies::confine(headers, &host.name);
    headers.remove(ACCEL_REDIRECT);
}
