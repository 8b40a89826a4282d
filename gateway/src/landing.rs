//! The first page of an installation: that it runs, and where to go from here.

use axum::response::Html;

pub async fn page() -> Html<&'static str> {
    Html(include_str!("landing.html"))
}

/// Where registration links lead. The secret in them follows the `#`, which no browser sends.
pub async fn register() -> Html<&'static str> {
    Html(include_str!("register.html"))
}
