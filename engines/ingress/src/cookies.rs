//! Confines the cookies that an app sets to its own host. With the `Domain` of a common parent domain, they would be
//! sent to the apps of other tenants.

use http::{HeaderMap, HeaderName, HeaderValue, header};

const CLEAR: HeaderName = HeaderName::from_static("clear-site-data");
/// The directives of `Clear-Site-Data` that affect one host only.
const HOST_DIRECTIVES: [&str; 2] = ["\"cache\"", "\"storage\""];

/// Removes the `Domain` attribute of cookies if it names another domain than `host`, and the directives to clear
/// cookies: browsers clear those of the whole domain.
pub fn confine(headers: &mut HeaderMap, host: &str) {
    confine_clearing(headers);
    if !headers.get_all(header::SET_COOKIE).iter().any(|cookie| names_domain(cookie.as_bytes())) {
        return;
    }
    let cookies: Vec<HeaderValue> = headers.get_all(header::SET_COOKIE).iter().map(|cookie| confined(cookie, host)).collect();
    headers.remove(header::SET_COOKIE);
    for cookie in cookies {
        headers.append(header::SET_COOKIE, cookie);
    }
}

fn confine_clearing(headers: &mut HeaderMap) {
    if !headers.contains_key(&CLEAR) {
        return;
    }
    let values = headers.get_all(&CLEAR).iter().filter_map(|value| value.to_str().ok());
    let kept: Vec<&str> =
        values.flat_map(|value| value.split(',')).map(str::trim).filter(|name| HOST_DIRECTIVES.contains(name)).collect();
    let kept = HeaderValue::from_str(&kept.join(", ")).ok().filter(|kept| !kept.is_empty());
    headers.remove(&CLEAR);
    if let Some(kept) = kept {
        headers.insert(CLEAR, kept);
    }
}

fn names_domain(cookie: &[u8]) -> bool {
    cookie.windows(6).any(|word| word.eq_ignore_ascii_case(b"domain"))
}

fn confined(cookie: &HeaderValue, host: &str) -> HeaderValue {
    // Like browsers (RFC 6265, section 5.2): a semicolon ends an attribute even within quotes.
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
    fn a_cookie_is_confined_to_the_host_that_sets_it() {
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

    #[test]
    fn an_app_cannot_clear_the_cookies_of_other_apps() {
        for (sent, kept) in [
            ("\"cookies\"", None),
            ("\"*\"", None),
            ("*", None),
            ("\"cache\", \"cookies\",\"storage\"", Some("\"cache\", \"storage\"")),
        ] {
            let mut headers = HeaderMap::new();
            headers.append("clear-site-data", HeaderValue::from_static("\"cookies\""));
            headers.append("clear-site-data", HeaderValue::from_static(sent));
            confine(&mut headers, "app.localhost");
            assert_eq!(headers.get("clear-site-data").map(|value| value.to_str().expect("text")), kept, "{sent}");
        }
    }
}
