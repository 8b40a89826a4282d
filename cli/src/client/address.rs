//! The URL of a server: `https` by default, `http` for loopback addresses.

use std::net::IpAddr;

use ureq::http::Uri;

use crate::terminal::Failure;

/// A server's base URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Without a trailing slash.
    pub url: String,
    pub is_https: bool,
    pub is_loopback: bool,
}

impl Address {
    /// Parses a URL that a user typed, such as `capsule.example.com` or `http://localhost:8080`.
    ///
    /// # Errors
    /// When it is not a base URL, or contains a user name.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let malformed = || {
            Failure::new("invalid_server", format!("Invalid server URL `{text}`."))
                .hint("Use a URL such as https://capsule.example.com.")
        };
        let typed = text.trim();
        let (scheme, rest) = match typed.split_once("://") {
            Some((scheme, rest)) => (Some(scheme.to_ascii_lowercase()), rest),
            None => (None, typed),
        };
        // Parsed with a scheme: without one, `localhost:8080` is a scheme and a path.
        let uri: Uri = format!("https://{}", rest.trim_end_matches('/')).parse().map_err(|_| malformed())?;
        let (Some(host), Some(authority)) = (uri.host(), uri.authority()) else { return Err(malformed()) };
        if authority.as_str().contains('@') {
            return Err(Failure::new("invalid_server", "The server URL contains a user name or password.")
                .hint("Remove them, and sign in with `capsule login --server URL`."));
        }
        if host.is_empty() || authority.as_str().ends_with(':') || !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(malformed());
        }
        let is_loopback = is_loopback(host);
        let is_https = match scheme.as_deref() {
            Some("https") => true,
            Some("http") => false,
            Some(_) => return Err(malformed()),
            None => !is_loopback,
        };
        let scheme = if is_https { "https" } else { "http" };
        Ok(Self { url: format!("{scheme}://{}", authority.as_str().to_ascii_lowercase()), is_https, is_loopback })
    }

    /// Whether requests are sent over the network without encryption.
    pub fn is_unencrypted(&self) -> bool {
        !self.is_https && !self.is_loopback
    }

    /// Checks that passwords and sessions may be sent to this address.
    ///
    /// # Errors
    /// When the connection is not encrypted and `insecure_http` is not set.
    pub fn check_encryption(&self, insecure_http: bool) -> Result<(), Failure> {
        if self.is_unencrypted() && !insecure_http {
            let https = self.url.replacen("http://", "https://", 1);
            return Err(Failure::new(
                "insecure_http",
                format!("The connection to {} is not encrypted: your password and session would be sent in the clear.", self.url),
            )
            .hint(format!("Use {https}, or --insecure-http if you trust the network.")));
        }
        Ok(())
    }
}

/// Whether the host of a URL is a loopback address or name.
fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.').to_ascii_lowercase();
    match host.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        // RFC 6761: these names resolve to the loopback address.
        Err(_) => host == "localhost" || host.ends_with(".localhost"),
    }
}

/// Returns a URL that is safe to open in a browser: http or https, without a user name, and only with characters that
/// URLs of applications contain.
pub fn web_page(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    let is_web = matches!(uri.scheme_str(), Some("http" | "https"));
    let authority = uri.authority()?.as_str();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._~:/?#[]@!=&+,;%".contains(c);
    (is_web && !authority.contains('@') && uri.host().is_some_and(|host| !host.is_empty()) && url.chars().all(plain))
        .then(|| uri.to_string())
}

#[cfg(test)]
mod tests {
    use super::{Address, web_page};

    #[test]
    fn https_is_the_default_except_for_loopback_addresses() {
        for (typed, url) in [
            ("capsule.example.com", "https://capsule.example.com"),
            ("Capsule.Example.com:8443/", "https://capsule.example.com:8443"),
            ("10.0.0.5:8080", "https://10.0.0.5:8080"),
            ("0.0.0.0:8080", "https://0.0.0.0:8080"),
            ("[2001:db8::1]:80", "https://[2001:db8::1]:80"),
            ("localhost.example.com", "https://localhost.example.com"),
            ("127.0.0.1.example.com", "https://127.0.0.1.example.com"),
            ("localhost", "http://localhost"),
            ("localhost:8080", "http://localhost:8080"),
            ("LOCALHOST:8080", "http://localhost:8080"),
            ("127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("127.8.9.1", "http://127.8.9.1"),
            ("[::1]:8080", "http://[::1]:8080"),
            ("[::ffff:127.0.0.1]:8080", "http://[::ffff:127.0.0.1]:8080"),
            ("https://localhost:8080", "https://localhost:8080"),
            ("HTTP://127.0.0.1:9", "http://127.0.0.1:9"),
        ] {
            let address = Address::parse(typed).expect(typed);
            assert_eq!(address.url, url, "{typed}");
            assert!(address.check_encryption(false).is_ok(), "{typed}");
        }
    }

    #[test]
    fn unencrypted_connections_need_insecure_http() {
        for typed in ["http://capsule.example.com", "http://10.0.0.5:8080", "http://[fe80::1]", "http://localhost.example.com"] {
            let address = Address::parse(typed).expect(typed);
            let refused = address.check_encryption(false).expect_err(typed);
            assert_eq!(refused.code, "insecure_http");
            assert!(refused.message.contains("in the clear"), "{refused}");
            assert!(address.check_encryption(true).is_ok() && address.is_unencrypted());
        }
    }

    #[test]
    fn a_url_that_is_not_a_base_url_is_refused() {
        for typed in [
            "",
            "ftp://example.com",
            "file:///etc",
            "https://",
            "https://a/b",
            "https://a?b=c",
            "a b",
            "http://a@b",
            "x:y@localhost",
        ] {
            assert!(Address::parse(typed).is_err(), "{typed}");
        }
    }

    #[test]
    fn only_web_pages_are_opened_in_a_browser() {
        for url in ["http://web-production.localhost:8080", "https://web.example.com/"] {
            assert!(web_page(url).is_some_and(|page| page.starts_with("http")), "{url}");
        }
        for url in [
            "",
            "-h",
            "--help",
            "file:///etc/passwd",
            "javascript:alert(1)",
            "ssh://x",
            "smb://x/y",
            "vscode://x",
            "http:",
            "http:///x",
            "http://a@b",
            "http://x/$(id)",
            "http://x/`id`",
            "http://x/'",
            "http://x/\"",
            "http://x/ y",
            "http://x/\ny",
            "http://x/\u{1b}",
            " http://x",
        ] {
            assert_eq!(web_page(url), None, "{url:?}");
        }
    }
}
