//! Sites of plain files. A release's folder holds only regular files that nobody changes any more,
//! so serving it is reading it.

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use tower::{Layer, ServiceExt};
use tower_http::compression::CompressionLayer;
use tower_http::services::{ServeDir, ServeFile};

use crate::pages::{self, Body};
use crate::table::Site;

/// Answers a request from the site's folder.
pub async fn serve(site: &Site, request: &Request<hyper::body::Incoming>) -> Response<Body> {
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
            let mut page = Response::new(pages::whole(Bytes::from_static(b"Not found\n")));
            *page.status_mut() = StatusCode::NOT_FOUND;
            page.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
            page
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
