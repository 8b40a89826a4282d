//! The first page of an installation: that it runs, and where to go from here.

use axum::response::Html;

pub async fn page() -> Html<&'static str> {
    Html(include_str!("landing.html"))
}
