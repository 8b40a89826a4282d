//! Cookies that an app sets: for its own host only. With the `Domain` of a common parent, they would reach the
//! apps of other tenants.

use http::{HeaderMap, HeaderValue, header};

/// Removes the `Domain` attribute of cookies where it names another domain than `host`.
pub fn confine(headers: &mut HeaderMap, host: &str) {
    if !headers.get_all(header::SET_COOKIE).iter().any(|cookie| names_domain(cookie.as_bytes())) {
        return;
    }
    let cookies: Vec<HeaderValue> = headers.get_all(header::SET_COOKIE).iter().map(|cookie| confined(cookie, host)).collect();
    headers.remove(header::SET_COOKIE);
    for cookie in cookies {
        headers.append(header::SET_COOKIE, cookie);
    }
}

fn names_domain(cookie: &[u8]) -> bool {
    cookie.windows(6).any(|word| word.eq_ignore_ascii_case(b"domain"))
}

fn confined(cookie: &HeaderValue, host: &str) -> HeaderValue {
    // As browsers do it (RFC 6265, section 5.2): a semicolon ends an attribute, also within quotes.
    let mut parts = cookie.as_bytes().split(|byte| *byte == b';');
    let mut kept = parts.next().unwrap_or_default().to_vec();
    for attribute in parts.filter(|attribute| !is_foreign_domain(attribute, host)) {
        kept.push(b';');
        kept.extend_from_slice(attribute);
    }
    HeaderValue::from_bytes(&kept).unwrap_or_else(|_| HeaderValue::from_static(""))
}

fn is_foreign_domain(attribute: &[u8], host: &str) -> bool {
    let (name, value) = match attribute.iter().position(|byte| *byte == b'=') {
        Some(at) => (&attribute[..at], &attribute[at + 1..]),
        None => (attribute, &[][..]),
    };
    let name: Vec<u8> = name.iter().copied().filter(u8::is_ascii_alphanumeric).collect();
    if !name.eq_ignore_ascii_case(b"domain") {
        return false;
    }
    let value = value.trim_ascii();
    let value = value.strip_prefix(b".").unwrap_or(value);
    !value.eq_ignore_ascii_case(host.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::confine;
    use http::{HeaderMap, HeaderValue, header};

    #[test]
    fn a_cookie_is_for_the_host_that_sets_it() {
        for (sent, kept) in [
            ("a=1; Path=/; Domain=localhost; HttpOnly", "a=1; Path=/; HttpOnly"),
            ("a=1;DOMAIN = .localhost", "a=1"),
            ("a=1; domain=\"localhost\"", "a=1"),
            ("a=1; Domain=app.localhost; domain=localhost", "a=1; Domain=app.localhost"),
            ("a=1; Domain=.APP.localhost", "a=1; Domain=.APP.localhost"),
            ("a=1;\tDomain\t=\tlocalhost.", "a=1"),
            ("a=1; Domain=", "a=1"),
            ("a=1; Domain", "a=1"),
            ("a=\"x; Domain=localhost\"", "a=\"x"),
            ("domain=localhost; Path=/", "domain=localhost; Path=/"),
            ("__Host-a=domain; Secure; Path=/", "__Host-a=domain; Secure; Path=/"),
            ("a=1; SameSite=Lax; Secure; Max-Age=1", "a=1; SameSite=Lax; Secure; Max-Age=1"),
        ] {
            let mut headers = HeaderMap::new();
            headers.append(header::SET_COOKIE, HeaderValue::from_static("first=1; Domain=test"));
            headers.append(header::SET_COOKIE, HeaderValue::from_static(sent));
            confine(&mut headers, "app.localhost");
            let all: Vec<_> = headers.get_all(header::SET_COOKIE).iter().map(|value| value.to_str().expect("text")).collect();
            assert_eq!(all, ["first=1", kept], "{sent}");
        }
    }
}
