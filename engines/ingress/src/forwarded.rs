//! The forwarding headers: the address of the client, and the scheme by which it reached the first proxy. Those that a
//! visitor sends are removed; those of a trusted proxy are used.

use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::request::Host;

const FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const REAL: HeaderName = HeaderName::from_static("x-real-ip");

/// Further headers by which proxies, frameworks and content delivery networks identify the client, the host, or the path.
/// Sorted.
const CLAIMS: [&str; 27] = [
    "ali-cdn-real-ip",
    "cf-connecting-ip",
    "cf-connecting-ipv6",
    "cf-ipcountry",
    "cf-visitor",
    "client-ip",
    "cloudfront-forwarded-proto",
    "fastly-client-ip",
    "fly-client-ip",
    "forwarded",
    "forwarded-for",
    "front-end-https",
    "http-client-ip",
    "proxy",
    "true-client-ip",
    "wl-proxy-client-ip",
    "x-arr-ssl",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-host",
    "x-http-host-override",
    "x-original-forwarded-for",
    "x-original-host",
    "x-original-url",
    "x-remote-addr",
    "x-remote-ip",
    "x-rewrite-url",
];
/// Prefixes of further such headers.
const CLAIM_PREFIXES: [&str; 8] =
    ["x-forwarded", "x-real-", "x-originating-", "x-envoy-", "x-azure-", "x-appengine-", "x-proxyuser-", "x-url-scheme"];
/// Headers that must not reach a backend in another spelling: some backends treat `_` and the like as `-`, as CGI does.
const GUARDED: [&str; 11] = [
    "authorization",
    "connection",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "host",
    "origin",
    "transfer-encoding",
    "upgrade",
    "x-correlation-id",
];

/// The most proxies in front of the ingress.
const MAX_HOPS: usize = 32;

/// Whether a header, in lower case, identifies the client, the host, or the path.
pub fn is_claim(name: &str) -> bool {
    // A fast path: most headers of a request begin with none of these letters.
    matches!(name.as_bytes().first(), Some(b'x' | b'f' | b'c' | b't' | b'p' | b'w' | b'h' | b'a'))
        && (CLAIM_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) || CLAIMS.binary_search(&name).is_ok())
}

/// Whether a header must be removed: it identifies the client, or is another spelling of a guarded header.
fn is_forged(name: &str, from_proxy: bool) -> bool {
    if name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return !from_proxy && is_claim(name);
    }
    let normalized: String = name.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).collect();
    is_claim(&normalized) || GUARDED.contains(&normalized.as_str())
}

/// The client of a request, as far as it can be determined.
#[derive(Debug, PartialEq, Eq)]
pub struct Client {
    /// The client, and the proxies between it and the ingress.
    chain: Vec<IpAddr>,
    is_https: bool,
}

impl Client {
    /// Finds the client of a request that came from `peer`: the address nearest to the ingress that is not that of a
    /// trusted proxy.
    pub fn find(headers: &HeaderMap, peer: IpAddr, trusts: impl Fn(IpAddr) -> bool) -> Self {
        let peer = peer.to_canonical();
        let mut client = Self { chain: vec![peer], is_https: false };
        if !trusts(peer) {
            return client;
        }
        let hops = if headers.contains_key(&FOR) || !headers.contains_key(header::FORWARDED) {
            x_forwarded(headers)
        } else {
            forwarded(headers)
        };
        for hop in hops.iter().rev().take(MAX_HOPS) {
            if let Some(is_https) = hop.is_https {
                client.is_https = is_https;
            }
            let Some(address) = hop.address else { break };
            client.chain.insert(0, address);
            if !trusts(address) {
                break;
            }
        }
        client
    }

    /// Replaces the headers that identify the client and the host.
    pub fn write_headers(&self, headers: &mut HeaderMap, host: &Host) {
        let is_proxied = self.chain.len() > 1;
        let forged: Vec<HeaderName> = headers.keys().filter(|name| is_forged(name.as_str(), is_proxied)).cloned().collect();
        for name in &forged {
            headers.remove(name);
        }
        let client = self.chain.first().copied().unwrap_or(IpAddr::from([0, 0, 0, 0]));
        let address = value(client.to_string());
        let chain = match is_proxied {
            true => value(self.chain.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ")),
            false => address.clone(),
        };
        let (proto, default_port) = if self.is_https { ("https", 443) } else { ("http", 80) };
        let authority = host.authority();
        headers.insert(header::FORWARDED, value(self.forwarded(&authority, proto)));
        headers.insert(REAL, address);
        headers.insert(FOR, chain);
        headers.insert(PROTO, HeaderValue::from_static(proto));
        headers.insert(PORT, HeaderValue::from(host.port.unwrap_or(default_port)));
        if authority.is_empty() {
            headers.remove(HOST);
        } else {
            let authority = value(authority);
            headers.insert(HOST, authority.clone());
            headers.insert(header::HOST, authority);
        }
    }

    /// The `Forwarded` header (RFC 7239).
    fn forwarded(&self, authority: &str, proto: &str) -> String {
        let mut text = String::with_capacity(96);
        for (at, address) in self.chain.iter().enumerate() {
            let separator = if at > 0 { ", " } else { "" };
            let _ = match address {
                IpAddr::V4(address) => write!(text, "{separator}for={address}"),
                IpAddr::V6(address) => write!(text, "{separator}for=\"[{address}]\""),
            };
            if at == 0 {
                let _ = write!(text, ";host=\"{authority}\";proto={proto}");
            }
        }
        text
    }
}

/// A header value. Addresses and host names are always valid ones.
fn value(text: String) -> HeaderValue {
    HeaderValue::from_maybe_shared(Bytes::from(text)).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// What one proxy reports about its client.
#[derive(Debug, Default, PartialEq, Eq)]
struct Hop {
    address: Option<IpAddr>,
    is_https: Option<bool>,
}

/// The hops of `X-Forwarded-For` and `X-Forwarded-Proto`. A single protocol is that of the client.
fn x_forwarded(headers: &HeaderMap) -> Vec<Hop> {
    let protocols = elements(headers, &PROTO);
    let mut hops: Vec<Hop> =
        elements(headers, &FOR).iter().map(|element| Hop { address: address(element), is_https: None }).collect();
    if hops.is_empty() && !protocols.is_empty() {
        hops.push(Hop::default());
    }
    let count = hops.len();
    for (at, hop) in hops.iter_mut().enumerate() {
        let from_end = count - at;
        let protocol = if protocols.len() == 1 { protocols.first() } else { protocols.iter().rev().nth(from_end - 1) };
        hop.is_https = protocol.map(|protocol| is_https(protocol));
    }
    hops
}

/// The elements of a list. An element that is not UTF-8 is empty, so that it does not hide its neighbours.
fn elements<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Vec<&'a str> {
    let values = headers.get_all(name).iter();
    let elements = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    elements.map(|element| str::from_utf8(element).unwrap_or_default().trim()).collect()
}

/// The hops of `Forwarded` (RFC 7239). If quotes are unbalanced, a visitor may have hidden in them what the proxy added:
/// then the whole header is ignored.
fn forwarded(headers: &HeaderMap) -> Vec<Hop> {
    let mut hops = Vec::new();
    for value in headers.get_all(header::FORWARDED) {
        let Some(elements) = split_outside_quotes(value.as_bytes(), b',') else { return Vec::new() };
        hops.extend(elements.into_iter().map(|element| forwarded_hop(element).unwrap_or_default()));
    }
    hops
}

/// One element of `Forwarded`; `None` if it is malformed.
fn forwarded_hop(element: &[u8]) -> Option<Hop> {
    let mut hop = Hop::default();
    for pair in split_outside_quotes(element, b';')? {
        let Some((name, value)) = str::from_utf8(pair).ok()?.split_once('=') else { continue };
        let value = value.trim().trim_matches('"');
        match name.trim().to_ascii_lowercase().as_str() {
            "for" => hop.address = address(value),
            "proto" => hop.is_https = Some(is_https(value)),
            _ => {}
        }
    }
    Some(hop)
}

/// Splits at separators outside of quotes. `None` if a quote is not closed, or does not enclose a whole value.
fn split_outside_quotes(text: &[u8], separator: u8) -> Option<Vec<&[u8]>> {
    let (mut parts, mut from) = (Vec::new(), 0);
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' if quoted => {
                if !matches!(text[at + 1..].trim_ascii_start().first(), None | Some(b',' | b';')) {
                    return None;
                }
                quoted = false;
            }
            b'"' if text[..at].ends_with(b"=") => quoted = true,
            b'"' => return None,
            _ if *byte == separator && !quoted => {
                parts.push(&text[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[from..]);
    (!quoted).then_some(parts)
}

fn is_https(protocol: &str) -> bool {
    protocol.eq_ignore_ascii_case("https") || protocol.eq_ignore_ascii_case("wss")
}

/// Parses an address, with or without a port, as proxies write it.
fn address(text: &str) -> Option<IpAddr> {
    let plain = text.parse().or_else(|_| text.parse::<SocketAddr>().map(|both| both.ip()));
    let address = plain.or_else(|error| text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).ok_or(error)?.parse());
    address.ok().map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::{CLAIMS, Client, is_forged};
    use crate::request::Host;
    use http::{HeaderMap, HeaderName, HeaderValue};

    fn forwarded_headers(peer: &str, sent: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in sent {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let proxies: Vec<ipnet::IpNet> =
            ["10.0.0.0/8", "fd00::/8"].iter().map(|network| network.parse().expect("a network")).collect();
        let trusts = |address: IpAddr| proxies.iter().any(|network| network.contains(&address));
        let client = Client::find(&headers, peer.parse().expect("an address"), trusts);
        client.write_headers(&mut headers, &Host { name: "a.test".into(), port: None });
        headers
    }

    fn lines(headers: &HeaderMap) -> [&str; 4] {
        ["x-real-ip", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-port"]
            .map(|name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("none"))
    }

    #[test]
    fn forwarding_headers_of_an_untrusted_peer_are_removed() {
        assert!(CLAIMS.is_sorted());
        let headers = forwarded_headers(
            "::ffff:192.0.2.1",
            &[
                ("x-forwarded-for", "10.0.0.1"),
                ("x-forwarded-for", "127.0.0.1"),
                ("x_forwarded_for", "127.0.0.1"),
                ("x-forwarded_proto", "https"),
                ("x-forwarded-proto", "https"),
                ("x-forwarded-host", "evil.test"),
                ("x-forwarded-prefix", "/evil"),
                ("forwarded", "for=127.0.0.1"),
                ("true-client-ip", "127.0.0.1"),
                ("cf-connecting-ip", "127.0.0.1"),
                ("proxy", "evil.test"),
                ("content_length", "5"),
                ("my_header", "kept"),
            ],
        );
        assert_eq!(lines(&headers), ["192.0.2.1", "192.0.2.1", "http", "80"]);
        assert_eq!(headers["x-forwarded-host"], "a.test");
        assert_eq!(headers["forwarded"], "for=192.0.2.1;host=\"a.test\";proto=http");
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "forwarded",
                "host",
                "my_header",
                "x-forwarded-for",
                "x-forwarded-host",
                "x-forwarded-port",
                "x-forwarded-proto",
                "x-real-ip"
            ]
        );
    }

    #[test]
    fn every_spelling_of_a_claim_is_recognized() {
        for name in ["x_forwarded_for", "x.forwarded.for", "x-forwarded~for", "x-real_ip", "client_ip", "host_", "forwarded"] {
            assert_eq!(is_forged(name, false), name != "host_", "{name}");
        }
        assert!(is_forged("x_forwarded_for", true) && !is_forged("x-forwarded-prefix", true));
    }

    #[test]
    fn the_chain_of_proxies_is_followed_as_far_as_it_is_trusted() {
        for (peer, sent, expected) in [
            ("10.0.0.1", &[] as &[_], ["10.0.0.1", "10.0.0.1", "http", "80"]),
            ("10.0.0.1", &[("x-forwarded-proto", "HTTPS")], ["10.0.0.1", "10.0.0.1", "https", "443"]),
            (
                "10.0.0.1",
                &[("x-forwarded-for", "203.0.113.9, 192.0.2.7"), ("x-forwarded-proto", "https")],
                ["192.0.2.7", "192.0.2.7, 10.0.0.1", "https", "443"],
            ),
            (
                "fd00::1",
                &[("x-forwarded-for", "203.0.113.9, [2001:db8::1]:4711"), ("x-forwarded-for", "10.9.9.9")],
                ["2001:db8::1", "2001:db8::1, 10.9.9.9, fd00::1", "http", "80"],
            ),
            (
                "10.0.0.1",
                &[("x-forwarded-for", "203.0.113.9, rubbish"), ("x-forwarded-proto", "https")],
                ["10.0.0.1", "10.0.0.1", "https", "443"],
            ),
            (
                "10.0.0.1",
                &[("x-forwarded-for", "192.0.2.7, 10.0.0.2"), ("x-forwarded-proto", "https, http")],
                ["192.0.2.7", "192.0.2.7, 10.0.0.2, 10.0.0.1", "https", "443"],
            ),
            (
                "10.0.0.1",
                &[("forwarded", "for=1.1.1.1, for=\"[2001:db8::7]:80\";proto=https;host=\"x,y\"")],
                ["2001:db8::7", "2001:db8::7, 10.0.0.1", "https", "443"],
            ),
            ("10.0.0.1", &[("forwarded", "for=9.9.9.9;x=\", for=192.0.2.7;proto=https")], ["10.0.0.1", "10.0.0.1", "http", "80"]),
            (
                "10.0.0.1",
                &[("forwarded", "for=9.9.9.9;x=\", for=\"[2001:db8::7]\";x=\"")],
                ["10.0.0.1", "10.0.0.1", "http", "80"],
            ),
            (
                "10.0.0.1",
                &[("forwarded", "for=192.0.2.7;host=\"a\\\";for=9.9.9.9;x=\\\"b\"")],
                ["192.0.2.7", "192.0.2.7, 10.0.0.1", "http", "80"],
            ),
            (
                "10.0.0.1",
                &[("forwarded", "for=1.1.1.1;proto=https"), ("x-forwarded-for", "192.0.2.7")],
                ["192.0.2.7", "192.0.2.7, 10.0.0.1", "http", "80"],
            ),
            (
                "192.0.2.1",
                &[("x-forwarded-for", "192.0.2.7"), ("x-forwarded-proto", "https")],
                ["192.0.2.1", "192.0.2.1", "http", "80"],
            ),
        ] {
            let headers = forwarded_headers(peer, sent);
            assert_eq!(lines(&headers), expected, "{peer} {sent:?}");
        }
    }

    #[test]
    fn an_element_that_is_not_text_hides_no_other() {
        for (name, value, expected) in [
            ("x-forwarded-for", &b"\xff, 203.0.113.5"[..], &["203.0.113.5", "10.0.0.1"][..]),
            ("x-forwarded-for", &b"9.9.9.9, \xff, 10.0.0.2"[..], &["10.0.0.2", "10.0.0.1"][..]),
            ("x-forwarded-for", &b"9.9.9.9, \xff"[..], &["10.0.0.1"][..]),
            ("forwarded", &b"for=\xff, for=203.0.113.5"[..], &["203.0.113.5", "10.0.0.1"][..]),
            ("forwarded", &b"for=9.9.9.9, for=1.1.1.1;x=\xff"[..], &["10.0.0.1"][..]),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_bytes(value).expect("a value"));
            let peer = IpAddr::from([10, 0, 0, 1]);
            let client = Client::find(&headers, peer, |address| address.to_string().starts_with("10."));
            let chain: Vec<String> = client.chain.iter().map(ToString::to_string).collect();
            assert_eq!(chain, expected, "{name}: {}", value.escape_ascii());
        }
    }
}
