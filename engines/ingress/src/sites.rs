//! Static sites. The directory of a release never changes, so small responses are cached in memory. Files that a site
//! does not publish are not served, even if they are in the directory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use capsule_buildplan::{is_published, is_published_folder};
use http::response::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Body as _;
use tower::{Layer, ServiceExt};
use tower_http::compression::CompressionLayer;
use tower_http::services::{ServeDir, ServeFile};

use crate::body::PrefixedBody;
use crate::pages::{self, Body};
use crate::table::Site;

/// The largest response body that is cached.
const MAX_CACHED_BODY_BYTES: usize = 64 << 10;
/// The most bytes of all cached bodies of a thread.
const MAX_CACHE_BYTES: usize = 4 << 20;
/// The most cached responses of a thread.
const MAX_CACHE_ENTRIES: usize = 4096;

/// Serves the sites, with a response cache; one for each thread.
#[derive(Debug, Default)]
pub struct Sites {
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    responses: HashMap<CacheKey, (Parts, Bytes)>,
    bytes: usize,
}

/// Everything that a response depends on. The directory of a release never changes, and the next has another name.
#[derive(Debug, PartialEq, Eq, Hash)]
struct CacheKey {
    root: PathBuf,
    path: String,
    compressed: bool,
}

impl CacheKey {
    /// The key of a request whose response may be cached: an unconditional GET request for a whole file.
    fn of(site: &Site, request: &Request<hyper::body::Incoming>) -> Option<Self> {
        let headers = request.headers();
        let conditional =
            [header::RANGE, header::IF_MODIFIED_SINCE, header::IF_UNMODIFIED_SINCE, header::IF_NONE_MATCH, header::IF_MATCH];
        if request.method() != Method::GET || conditional.iter().any(|name| headers.contains_key(name)) {
            return None;
        }
        let accepted = headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let compressed = match accepted {
            "" => false,
            // The values that browsers and common tools send. Others are not cached.
            "gzip" | "gzip, deflate" | "gzip, deflate, br" | "gzip, deflate, br, zstd" => true,
            _ => return None,
        };
        Some(Self { root: site.root.clone(), path: request.uri().path().to_owned(), compressed })
    }
}

impl Sites {
    /// Responds to a request with a file of the site.
    pub async fn serve(&self, site: &Site, request: &Request<hyper::body::Incoming>) -> Response<Body> {
        let key = CacheKey::of(site, request);
        let cached = key.as_ref().and_then(|key| self.cache().responses.get(key).cloned());
        if let Some((parts, bytes)) = cached {
            return Response::from_parts(parts, pages::full(bytes));
        }
        let response = serve(site, request).await;
        let is_large = response.body().size_hint().lower() > MAX_CACHED_BODY_BYTES as u64;
        match key {
            Some(key) if response.status() == StatusCode::OK && !is_large => self.cache_if_small(key, response).await,
            _ => response,
        }
    }

    /// Reads the response body, and caches the response if the body turns out to be small.
    async fn cache_if_small(&self, key: CacheKey, response: Response<Body>) -> Response<Body> {
        let (mut parts, mut rest) = response.into_parts();
        let mut prefix = Vec::new();
        while prefix.len() <= MAX_CACHED_BODY_BYTES {
            match rest.frame().await {
                Some(Ok(frame)) => prefix.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Some(Err(error)) => {
                    tracing::warn!(path = key.path, %error, "cannot read a file of a site");
                    return text(StatusCode::INTERNAL_SERVER_ERROR, "Cannot read this file\n");
                }
                None => {
                    let bytes = Bytes::from(prefix);
                    parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
                    self.cache().insert(key, parts.clone(), bytes.clone());
                    return Response::from_parts(parts, pages::full(bytes));
                }
            }
        }
        Response::from_parts(parts, PrefixedBody { prefix: Some(prefix.into()), rest }.boxed_unsync())
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cache {
    /// Adds a response. A full cache is emptied first.
    fn insert(&mut self, key: CacheKey, parts: Parts, bytes: Bytes) {
        if self.bytes + bytes.len() > MAX_CACHE_BYTES || self.responses.len() >= MAX_CACHE_ENTRIES {
            *self = Self::default();
        }
        self.bytes += bytes.len();
        self.responses.insert(key, (parts, bytes));
    }
}

fn text(status: StatusCode, line: &'static str) -> Response<Body> {
    let mut page = Response::new(pages::full(Bytes::from_static(line.as_bytes())));
    *page.status_mut() = status;
    page.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    page
}

/// Responds to a request with a file of the site, without the cache.
async fn serve(site: &Site, request: &Request<hyper::body::Incoming>) -> Response<Body> {
    let mut plain = Request::new(Empty::<Bytes>::new());
    *plain.method_mut() = request.method().clone();
    *plain.uri_mut() = request.uri().clone();
    *plain.headers_mut() = request.headers().clone();
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = Response::new(pages::full(Bytes::new()));
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    if !is_servable(&site.root, request.uri().path()) {
        return text(StatusCode::NOT_FOUND, "Not found\n");
    }
    let files = ServeDir::new(&site.root);
    let index = site.root.join("index.html");
    let not_found = site.root.join("404.html");
    let response = if site.single_page {
        CompressionLayer::new().layer(files.fallback(ServeFile::new(index))).oneshot(plain).await.map(convert)
    } else if not_found.is_file() {
        CompressionLayer::new().layer(files.not_found_service(ServeFile::new(not_found))).oneshot(plain).await.map(convert)
    } else {
        CompressionLayer::new().layer(files).oneshot(plain).await.map(convert)
    };
    match response {
        Ok(response) if response.status() == StatusCode::NOT_FOUND && !response.headers().contains_key(header::CONTENT_TYPE) => {
            text(StatusCode::NOT_FOUND, "Not found\n")
        }
        Ok(mut response) => {
            if response.status().is_success() {
                let forever = is_fingerprinted(request.uri().path());
                let value = if forever { "public, max-age=31536000, immutable" } else { "public, max-age=0, must-revalidate" };
                response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static(value));
            }
            add_charset(response.headers_mut());
            keep_on_site(response.headers_mut());
            response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
            response
        }
        Err(never) => match never {},
    }
}

/// Whether the file at a path is published, by its own name and by that of the file that it links to. True if there is
/// no file.
fn is_servable(root: &Path, path: &str) -> bool {
    let Ok(decoded) = percent_encoding::percent_decode_str(path).decode_utf8() else { return false };
    // A segment with an encoded separator is an attempt to be decoded differently elsewhere.
    let parts: Vec<String> =
        path.split('/').map(|part| percent_encoding::percent_decode_str(part).decode_utf8_lossy().into_owned()).collect();
    if parts.iter().any(|part| part.contains(['/', '\\']) || part.chars().any(char::is_control)) {
        return false;
    }
    let path = root.join(decoded.trim_start_matches('/'));
    let (Ok(real), Ok(root)) = (path.canonicalize(), root.canonicalize()) else { return true };
    let below = |path: &Path| path.strip_prefix(&root).map(Path::to_path_buf).ok();
    let named: PathBuf = decoded.split('/').filter(|part| !part.is_empty()).collect();
    match below(&real) {
        Some(found) if real.is_dir() => {
            let index = real.join("index.html").canonicalize().ok();
            is_published_folder(&found)
                && is_published_folder(&named)
                && index.is_none_or(|index| below(&index).is_some_and(|index| is_published(&index)))
        }
        Some(found) => is_published(&found) && is_published(&named),
        None => false,
    }
}

/// Adds `charset=utf-8` to text without a charset: a browser would guess one, which an attacker could exploit (UTF-7).
fn add_charset(headers: &mut HeaderMap) {
    let Some(kind) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return };
    let (essence, parameters) = kind.split_once(';').unwrap_or((kind, ""));
    let essence = essence.trim().to_ascii_lowercase();
    let is_text = essence.starts_with("text/")
        || essence.ends_with("+xml")
        || essence.ends_with("+json")
        || ["javascript", "ecmascript", "json", "xml"].iter().any(|name| essence.strip_prefix("application/") == Some(name));
    if is_text
        && !parameters.to_ascii_lowercase().contains("charset")
        && let Ok(value) = HeaderValue::from_str(&format!("{essence}; charset=utf-8"))
    {
        headers.insert(header::CONTENT_TYPE, value);
    }
}

/// Rewrites the redirect to a directory so that it does not lead to another host: `//name/` would.
fn keep_on_site(headers: &mut HeaderMap) {
    let Some(location) = headers.get(header::LOCATION).and_then(|value| value.to_str().ok()) else { return };
    let path = location.trim_start_matches(['/', '\\']);
    if let Ok(value) = HeaderValue::from_str(&format!("/{path}")) {
        headers.insert(header::LOCATION, value);
    }
}

fn convert<B>(response: Response<B>) -> Response<Body>
where
    B: BodyExt<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    response.map(|body| BodyExt::map_err(body, Into::into).boxed_unsync())
}

/// Whether the name of a file contains a digest of its content, as bundlers write it: `app-4f3a9c2b.js`.
fn is_fingerprinted(path: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or_default();
    let Some((stem, "js" | "css" | "woff2" | "woff" | "png" | "jpg" | "svg" | "webp" | "avif")) = file.rsplit_once('.') else {
        return false;
    };
    let digest = stem.rsplit(['-', '.']).next().unwrap_or_default();
    digest.len() >= 8
        && digest.len() < stem.len()
        && digest.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && digest.bytes().any(|b| b.is_ascii_digit() || b.is_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::{add_charset, is_fingerprinted, is_servable, keep_on_site};
    use http::{HeaderMap, HeaderValue, header};

    #[test]
    fn an_unpublished_file_is_not_served_under_any_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().join("site");
        for (file, links) in
            [("index.html", &[] as &[&str]), (".git/config", &["x"]), ("keys/id_rsa", &["a.txt"]), ("d/a.js", &[])]
        {
            let path = root.join(file);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(&path, "x").expect("written");
            for link in links {
                let target = if file.starts_with('.') { root.join(".git") } else { path.clone() };
                std::os::unix::fs::symlink(target, root.join(link)).expect("linked");
            }
        }
        std::os::unix::fs::symlink("/etc", root.join("etc")).expect("linked");
        std::fs::create_dir(root.join("linked")).expect("made");
        std::os::unix::fs::symlink("../.git/config", root.join("linked/index.html")).expect("linked");
        for path in [
            "/.git/config",
            "/%2egit/config",
            "/x/config",
            "/x",
            "/keys/id_rsa",
            "/keys/id%5Frsa",
            "/a.txt",
            "/etc/passwd",
            "/d%2fa.js",
            "/%5cd",
            "/%09/d",
            "/linked/",
        ] {
            assert!(!is_servable(&root, path), "{path}");
        }
        for path in ["/", "/index.html", "/d", "/d/", "//d", "/d/a.js", "/of/the/single/page", "/dockerfile"] {
            assert!(is_servable(&root, path), "{path}");
        }
    }

    #[test]
    fn a_folder_redirects_to_itself_and_text_has_a_charset() {
        for (location, kept) in [("//d/", "/d/"), ("/d/?a=//b", "/d/?a=//b"), ("/\\d/", "/d/"), ("///d/", "/d/")] {
            let mut headers = HeaderMap::new();
            headers.insert(header::LOCATION, HeaderValue::from_str(location).expect("a value"));
            keep_on_site(&mut headers);
            assert_eq!(headers[header::LOCATION], kept);
        }
        for (kind, expected) in [
            ("text/html", "text/html; charset=utf-8"),
            ("text/html; charset=iso-8859-1", "text/html; charset=iso-8859-1"),
            ("text/javascript", "text/javascript; charset=utf-8"),
            ("application/json", "application/json; charset=utf-8"),
            ("image/svg+xml", "image/svg+xml; charset=utf-8"),
            ("application/manifest+json", "application/manifest+json; charset=utf-8"),
            ("image/png", "image/png"),
            ("application/octet-stream", "application/octet-stream"),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
            add_charset(&mut headers);
            assert_eq!(headers[header::CONTENT_TYPE], expected);
        }
    }

    #[test]
    fn only_names_with_a_digest_are_cached_forever() {
        for (path, forever) in [
            ("/assets/index-4f3a9c2b.js", true),
            ("/assets/index-DxK3_aBc.css", true),
            ("/index.html", false),
            ("/jquery.js", false),
            ("/some-component.js", false),
            ("/4f3a9c2b.js", false),
        ] {
            assert_eq!(is_fingerprinted(path), forever, "{path}");
        }
    }
}
