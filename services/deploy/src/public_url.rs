//! The public address where it differs from the one on which the ingress listens: that of a TLS proxy in front of it.

use std::fmt;
use std::str::FromStr;

/// The public URL of the installation: scheme, host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicUrl {
    is_https: bool,
    host: String,
    port: Option<u16>,
}

impl PublicUrl {
    /// The host of the API.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether the scheme is HTTPS.
    #[must_use]
    pub fn is_https(&self) -> bool {
        self.is_https
    }

    /// The URL of the application with this host.
    #[must_use]
    pub fn of(&self, host: &str) -> String {
        let scheme = if self.is_https { "https" } else { "http" };
        let port = self.port.map(|port| format!(":{port}")).unwrap_or_default();
        format!("{scheme}://{host}{port}")
    }
}

impl fmt::Display for PublicUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.of(&self.host))
    }
}

impl FromStr for PublicUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = "must look like https://apps.example.com or https://apps.example.com:8443, without a path";
        let (scheme, rest) = text.split_once("://").ok_or(malformed)?;
        let is_https = match scheme.to_ascii_lowercase().as_str() {
            "https" => true,
            "http" => false,
            _ => return Err(malformed),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse::<u16>().ok().filter(|port| *port > 0).ok_or(malformed)?)),
            None => (authority, None),
        };
        let label = |label: &str| {
            (1..=63).contains(&label.len()) && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        if host.len() > 253 || !host.split('.').all(label) {
            return Err(malformed);
        }
        let default_port = if is_https { 443 } else { 80 };
        Ok(Self { is_https, host: host.to_ascii_lowercase(), port: port.filter(|port| *port != default_port) })
    }
}

#[cfg(test)]
mod tests {
    use super::PublicUrl;

    #[test]
    fn applications_have_the_scheme_and_the_port_of_the_public_url() {
        for (text, address) in [
            ("https://apps.example.com", "https://a.apps.example.com"),
            ("HTTPS://Apps.example.com:443/", "https://a.apps.example.com"),
            ("https://apps.example.com:8443", "https://a.apps.example.com:8443"),
            ("http://apps.example.com:443", "http://a.apps.example.com:443"),
        ] {
            assert_eq!(text.parse::<PublicUrl>().map(|url| url.of("a.apps.example.com")), Ok(address.to_owned()));
        }
        for text in [
            "apps.example.com",
            "ftp://a",
            "https://",
            "https://a/b",
            "https://u@a",
            "https://a:0",
            "https://a:x",
            "https://a?b",
            "https://a..b",
        ] {
            assert!(text.parse::<PublicUrl>().is_err(), "{text}");
        }
    }
}
