//! A small service on axum.

use axum::extract::Path;
use axum::response::Html;
use axum::routing::get;
use axum::{Json, Router};
use tokio::signal::unix::{signal, SignalKind};

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let app = Router::new()
        .route("/", get(|| async { Html("<h1>Hello from axum</h1>") }))
        .route("/greet/{name}", get(|Path(name): Path<String>| async move { Json(serde_json::json!({"greeting": format!("Hello, {name}")})) }));
    let port = std::env::var("PORT").unwrap_or_else(|_| "3000".into());
    let listener = tokio::net::TcpListener::bind(format!("0.0.0.0:{port}")).await?;
    println!("listening on {port}");
    let mut terminate = signal(SignalKind::terminate())?;
    axum::serve(listener, app).with_graceful_shutdown(async move { terminate.recv().await; }).await
}
