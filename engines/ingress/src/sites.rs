//! Sites of plain files. A release's folder holds only regular files that nobody changes any more,
//! so serving it is reading it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::response::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Body as _;
use tower::{Layer, ServiceExt};
use tower_http::compression::CompressionLayer;
use tower_http::services::{ServeDir, ServeFile};

use crate::body::Begun;
use crate::pages::{self, Body};
use crate::table::Site;

/// Files up to this size are kept in memory once they were asked for,
const SMALL: usize = 64 << 10;
/// all of them together up to this size,
const KEPT: usize = 4 << 20;
/// and up to this number.
const MOST: usize = 4096;

/// The sites of one thread, with what was asked for lately.
#[derive(Debug, Default)]
pub struct Sites {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    answers: HashMap<Asked, (Parts, Bytes)>,
    bytes: usize,
}

/// All that an answer depends on. A release's folder never changes, and the next has another name.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Asked {
    root: PathBuf,
    path: String,
    compressed: bool,
}

impl Asked {
    /// A request whose answer may be kept: a plain one for a whole file.
    fn of(site: &Site, request: &Request<hyper::body::Incoming>) -> Option<Self> {
        let headers = request.headers();
        let special =
            [header::RANGE, header::IF_MODIFIED_SINCE, header::IF_UNMODIFIED_SINCE, header::IF_NONE_MATCH, header::IF_MATCH];
        if request.method() != Method::GET || special.iter().any(|name| headers.contains_key(name)) {
            return None;
        }
        let accepted = headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let compressed = match accepted {
            "" => false,
            // As browsers and common tools say it; whatever else there is to say is looked at each time.
            "gzip" | "gzip, deflate" | "gzip, deflate, br" | "gzip, deflate, br, zstd" => true,
            _ => return None,
        };
        Some(Self { root: site.root.clone(), path: request.uri().path().to_owned(), compressed })
    }
}

impl Sites {
    /// Answers a request from the site's folder.
    pub async fn serve(&self, site: &Site, request: &Request<hyper::body::Incoming>) -> Response<Body> {
        let asked = Asked::of(site, request);
        let kept = asked.as_ref().and_then(|asked| self.kept().answers.get(asked).cloned());
        if let Some((parts, bytes)) = kept {
            return Response::from_parts(parts, pages::whole(bytes));
        }
        let response = serve(site, request).await;
        let large = response.body().size_hint().lower() > SMALL as u64;
        match asked {
            Some(asked) if response.status() == StatusCode::OK && !large => self.keep(asked, response).await,
            _ => response,
        }
    }

    /// Keeps an answer, if it turns out to be small.
    async fn keep(&self, asked: Asked, response: Response<Body>) -> Response<Body> {
        let (mut parts, mut rest) = response.into_parts();
        let mut begun = Vec::new();
        while begun.len() <= SMALL {
            match rest.frame().await {
                Some(Ok(frame)) => begun.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Some(Err(error)) => {
                    tracing::warn!(path = asked.path, %error, "a site's file cannot be read");
                    return text(StatusCode::INTERNAL_SERVER_ERROR, "This file cannot be read\n");
                }
                None => {
                    let bytes = Bytes::from(begun);
                    parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
                    self.kept().put(asked, parts.clone(), bytes.clone());
                    return Response::from_parts(parts, pages::whole(bytes));
                }
            }
        }
        Response::from_parts(parts, Begun { begun: Some(begun.into()), rest, busy: None }.boxed_unsync())
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn put(&mut self, asked: Asked, parts: Parts, bytes: Bytes) {
        if self.bytes + bytes.len() > KEPT || self.answers.len() >= MOST {
            *self = Self::default();
        }
        self.bytes += bytes.len();
        self.answers.insert(asked, (parts, bytes));
    }
}

fn text(status: StatusCode, line: &'static str) -> Response<Body> {
    let mut page = Response::new(pages::whole(Bytes::from_static(line.as_bytes())));
    *page.status_mut() = status;
    page.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    page
}

/// Answers a request from the site's folder.
async fn serve(site: &Site, request: &Request<hyper::body::Incoming>) -> Response<Body> {
    let mut plain = Request::new(Empty::<Bytes>::new());
    *plain.method_mut() = request.method().clone();
    *plain.uri_mut() = request.uri().clone();
    *plain.headers_mut() = request.headers().clone();
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = Response::new(pages::whole(Bytes::new()));
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
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
            response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
            response
        }
        Err(never) => match never {},
    }
}

fn convert<B>(response: Response<B>) -> Response<Body>
where
    B: BodyExt<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    response.map(|body| BodyExt::map_err(body, Into::into).boxed_unsync())
}

/// Whether a file's name carries a digest of its content, as bundlers write it: `app-4f3a9c2b.js`.
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
    use super::is_fingerprinted;

    #[test]
    fn only_names_that_carry_a_digest_are_cached_forever() {
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
