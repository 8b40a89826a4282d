//! Checks of a request before it is forwarded: it must have one host and one length, and nothing that the ingress and a
//! backend could parse differently (RFC 9112).

use std::net::Ipv6Addr;

use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Version, header};

/// The host that a request is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// In lower case and without a dot at its end. Empty if an HTTP/1.0 client sent none.
    pub name: String,
    pub port: Option<u16>,
}

impl Host {
    /// The value of a `Host` header.
    pub fn authority(&self) -> String {
        match self.port {
            Some(port) => format!("{}:{port}", self.name),
            None => self.name.clone(),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let end = if text.starts_with('[') { text.find(']')? + 1 } else { text.find(':').unwrap_or(text.len()) };
        let (name, port) = text.split_at(end);
        let port = match port {
            "" | ":" => None,
            port => {
                let digits = port.strip_prefix(':')?;
                let well_formed = digits.len() <= 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
                Some(digits.parse().ok().filter(|port| well_formed && *port > 0)?)
            }
        };
        let name = match name.strip_prefix('[') {
            Some(address) => format!("[{}]", address.strip_suffix(']')?.parse::<Ipv6Addr>().ok()?),
            None => {
                let name = name.strip_suffix('.').unwrap_or(name);
                let label = |label: &str| {
                    (1..=63).contains(&label.len())
                        && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
                };
                (name.len() <= 253 && name.split('.').all(label)).then(|| name.to_ascii_lowercase())?
            }
        };
        Some(Self { name, port })
    }
}

/// Headers that concern one connection only (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Headers that are end-to-end even if `Connection` lists them. Those that identify the client are end-to-end, too.
const END_TO_END: [&str; 20] = [
    "accept-encoding",
    "authorization",
    "cache-control",
    "content-encoding",
    "content-length",
    "content-range",
    "content-type",
    "cookie",
    "date",
    "expect",
    "host",
    "if-match",
    "if-none-match",
    "origin",
    "range",
    "referer",
    "set-cookie",
    "via",
    "x-correlation-id",
    "x-requested-with",
];

/// Checks that a request is unambiguous, and returns its host. `has_length` is whether the request was sent with a
/// `Content-Length`.
///
/// # Errors
/// Why the request is rejected, for the visitor.
pub fn check<B>(request: &Request<B>, has_length: bool) -> Result<Host, &'static str> {
    let headers = request.headers();
    if request.method() == Method::CONNECT {
        return Err("The CONNECT method is not supported.");
    }
    if headers.contains_key(header::TRANSFER_ENCODING) {
        let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
        let chunked = codings.next().is_some_and(|coding| coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"));
        if !chunked || codings.next().is_some() {
            return Err("The only supported Transfer-Encoding is a single \"chunked\".");
        }
        if has_length || headers.contains_key(header::CONTENT_LENGTH) {
            return Err("The request has both a Content-Length and a Transfer-Encoding.");
        }
    }
    if headers.get_all(header::CONTENT_LENGTH).iter().nth(1).is_some() {
        return Err("The request has several Content-Length headers.");
    }
    for option in connection_options(headers) {
        let name = option.to_ascii_lowercase();
        if END_TO_END.contains(&name.as_str()) || crate::forwarded::is_claim(&name) {
            return Err("The Connection header lists an end-to-end header.");
        }
    }
    host(request)
}

fn host<B>(request: &Request<B>) -> Result<Host, &'static str> {
    let mut named = request.headers().get_all(header::HOST).iter();
    let host = match (named.next(), named.next()) {
        (_, Some(_)) => return Err("The request has several Host headers."),
        (None, _) if request.version() == Version::HTTP_10 => None,
        (None, _) => return Err("The request has no Host header."),
        (Some(value), None) => {
            let host = value.to_str().ok().and_then(Host::parse);
            Some(host.ok_or("The Host header is not a valid host name with an optional port.")?)
        }
    };
    let uri = request.uri();
    match (uri.scheme_str(), uri.authority().map(Authority::as_str)) {
        (None, None) if uri.path().starts_with('/') => {}
        (None, None) if uri.path() == "*" && request.method() == Method::OPTIONS => {}
        (Some(scheme @ ("http" | "https")), Some(authority)) => {
            let target = Host::parse(authority).ok_or("The request target has no valid host.")?;
            let port = |host: &Host| host.port.unwrap_or(if scheme == "https" { 443 } else { 80 });
            return match host {
                Some(host) if host.name != target.name || port(&host) != port(&target) => {
                    Err("The request target and the Host header name different hosts.")
                }
                _ => Ok(target),
            };
        }
        _ => return Err("The request target must be a path, or begin with http:// or https://."),
    }
    Ok(host.unwrap_or_default())
}

/// Whether a request is a WebSocket upgrade. Other upgrades are not forwarded: through one to HTTP/2 in clear text, for
/// example, requests would reach the backend unchecked.
pub fn is_websocket<B>(request: &Request<B>) -> bool {
    let headers = request.headers();
    let mut protocols = headers.get_all(header::UPGRADE).iter();
    let websocket = protocols.next().is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(b"websocket"));
    websocket
        && protocols.next().is_none()
        && request.method() == Method::GET
        && request.version() == Version::HTTP_11
        && connection_options(headers).any(|option| option.eq_ignore_ascii_case("upgrade"))
}

/// Removes the headers that concern one connection only, and those that `Connection` lists.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::TRANSFER_ENCODING) {
        // Transfer-Encoding overrides Content-Length (RFC 9112, section 6.3).
        headers.remove(header::CONTENT_LENGTH);
    }
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = connection_options(headers)
            .filter_map(|option| option.parse().ok())
            .filter(|name: &HeaderName| !END_TO_END.contains(&name.as_str()))
            .collect();
        for name in &named {
            headers.remove(name);
        }
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Adds the headers of a WebSocket upgrade.
pub fn upgrade_to_websocket(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

fn connection_options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::{Host, check, is_websocket, remove_hop_by_hop};
    use http::{HeaderMap, HeaderValue, Request};

    #[test]
    fn a_host_is_a_name_or_an_address_with_an_optional_port() {
        for (given, authority) in [
            ("A.localhost:8080", Some("a.localhost:8080")),
            ("a.localhost.", Some("a.localhost")),
            ("a.localhost:", Some("a.localhost")),
            ("[0:0::1]:80", Some("[::1]:80")),
            ("127.0.0.1", Some("127.0.0.1")),
            ("a_b.localhost", Some("a_b.localhost")),
            ("", None),
            (".", None),
            ("a..localhost", None),
            (".localhost", None),
            ("a.localhost..", None),
            ("a@b", None),
            ("a b", None),
            ("a,b", None),
            ("a/b", None),
            ("a.localhost:0", None),
            ("a.localhost:65536", None),
            ("a.localhost:+80", None),
            ("a:1:2", None),
            ("::1", None),
            ("[::1", None),
            ("[::1%eth0]", None),
            ("[::1]x", None),
            ("a%2eb", None),
        ] {
            assert_eq!(Host::parse(given).map(|host| host.authority()).as_deref(), authority, "{given}");
        }
    }

    fn request(uri: &str, headers: &[(&'static str, &'static str)]) -> Request<()> {
        let mut request = Request::builder().uri(uri).body(()).expect("a request");
        for (name, value) in headers {
            request.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        request
    }

    #[test]
    fn an_ambiguous_request_is_rejected() {
        let host = ("host", "a.test");
        for (uri, headers) in [
            ("/", &[] as &[_]),
            ("/", &[host, host]),
            ("/", &[host, ("host", "b.test")]),
            ("http://b.test/", &[host]),
            ("http://a.test:81/", &[host]),
            ("http://user@a.test/", &[host]),
            ("ftp://a.test/", &[host]),
            ("a.test", &[host]),
            ("*", &[host]),
            ("/", &[host, ("connection", "close, Host")]),
            ("/", &[host, ("connection", "content-length")]),
            ("/", &[host, ("connection", "x-forwarded-for")]),
            ("/", &[host, ("connection", "close"), ("connection", "Forwarded")]),
            ("/", &[host, ("connection", "cookie")]),
            ("/", &[host, ("transfer-encoding", "gzip, chunked")]),
            ("/", &[host, ("transfer-encoding", "chunked, chunked")]),
            ("/", &[host, ("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")]),
            ("/", &[host, ("transfer-encoding", "chunked"), ("content-length", "1")]),
            ("/", &[host, ("content-length", "1"), ("content-length", "1")]),
        ] {
            assert!(check(&request(uri, headers), false).is_err(), "{uri} {headers:?}");
        }
        assert!(check(&request("/", &[host, ("transfer-encoding", "chunked")]), true).is_err());
        for (uri, headers) in [
            ("//b.test/", &[host] as &[_]),
            ("http://A.test/", &[host]),
            ("http://a.test:80/", &[host]),
            ("https://a.test:443/", &[host]),
            ("/", &[host, ("connection", "keep-alive, upgrade"), ("transfer-encoding", "Chunked")]),
        ] {
            assert_eq!(check(&request(uri, headers), false).map(|host| host.name), Ok("a.test".into()), "{uri} {headers:?}");
        }
    }

    #[test]
    fn only_websocket_upgrades_are_recognized() {
        for (headers, is) in [
            (&[("upgrade", "WebSocket"), ("connection", "keep-alive, Upgrade")] as &[_], true),
            (&[("upgrade", "websocket")], false),
            (&[("upgrade", "h2c"), ("connection", "upgrade, http2-settings")], false),
            (&[("upgrade", "websocket, h2c"), ("connection", "upgrade")], false),
            (&[("upgrade", "websocket"), ("upgrade", "h2c"), ("connection", "upgrade")], false),
        ] {
            assert_eq!(is_websocket(&request("/", headers)), is, "{headers:?}");
        }
    }

    #[test]
    fn hop_by_hop_headers_and_those_that_connection_lists_are_removed() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, x-secret, content-type, upgrade"),
            ("x-secret", "1"),
            ("transfer-encoding", "chunked"),
            ("content-length", "7"),
            ("upgrade", "h2c"),
            ("proxy-connection", "keep-alive"),
            ("accept", "*/*"),
            ("content-type", "text/plain"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        remove_hop_by_hop(&mut headers);
        let mut names: Vec<_> = headers.keys().map(http::HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept", "content-type"]);
    }
}
