//! The start page of an installation, and the page that registration links lead to.

use axum::response::Html;

pub async fn page() -> Html<&'static str> {
    Html(include_str!("landing.html"))
}

/// The page that registration links lead to. Their secret is in the fragment, which browsers do not send.
pub async fn register() -> Html<&'static str> {
    Html(include_str!("register.html"))
}
