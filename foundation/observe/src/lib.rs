//! What a process tells of itself: logs, metrics, traces, health.
//!
//! Logs go to standard error, pretty or as JSON, a correlation id on every line that belongs to a
//! request. Metrics are in Prometheus' text format. Health is two questions: is the process alive,
//! and can it do its work.

mod traces;

use std::future::Future;
use std::io::IsTerminal;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

pub use traces::{Exporting, Traces, continue_trace, describe, traceparent};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Pretty,
    Json,
}

/// Bounds of latency histograms, in seconds.
const BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Sends this process's logs to standard error, and its traces to their collector if there is one. `levels` is
/// a list such as `info,capsule_deploy=debug`. What it returns is to be kept as long as the process lives.
///
/// # Errors
/// When `levels` or the collector's address is not understood.
pub fn start(format: Format, levels: &str, traces: Option<&Traces>) -> Result<Option<Exporting>, String> {
    let filter = EnvFilter::try_new(levels).map_err(|error| format!("`{levels}` is no list of log levels: {error}"))?;
    let base = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_span_events(FmtSpan::NONE);
    let logs = match format {
        Format::Pretty => base.with_target(false).compact().with_filter(filter).boxed(),
        Format::Json => base.json().flatten_event(true).with_filter(filter).boxed(),
    };
    let (tracer, exporting) = traces.map(traces::start).transpose()?.unzip();
    // Spans of our own, down to each statement; events are for the logs.
    let ours = filter_fn(|metadata| metadata.is_span() && metadata.target().starts_with("capsule"));
    let spans = tracer.map(|tracer| tracing_opentelemetry::layer().with_tracer(tracer).with_filter(ours));
    // Set once per process; a second call changes nothing.
    let _ = tracing_subscriber::registry().with(logs).with(spans).try_init();
    Ok(exporting)
}

/// Begins to count. The handle renders what was counted.
///
/// # Errors
/// When this process counts already.
pub fn metrics() -> Result<PrometheusHandle, String> {
    PrometheusBuilder::new()
        .set_buckets(&BUCKETS)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|error| format!("metrics cannot be recorded: {error}"))
}

/// A dependency of a process, and whether it is there.
pub type Check = (String, Arc<dyn Fn() -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>);

/// A dependency that takes longer to answer is missing: who asks does not wait for long either.
const CHECK: Duration = Duration::from_secs(2);

/// Whether a process lives, and can do its work: `/health/live`, `/health/ready`, and `/health`, which is
/// the same as the latter.
pub fn health(checks: Vec<Check>) -> Router {
    let checks = Arc::new(checks);
    let ready = get(move || {
        let checks = checks.clone();
        async move { ready(&checks).await }
    });
    Router::new()
        .route("/health/live", get(|| async { axum::Json(serde_json::json!({"status": "ok"})) }))
        .route("/health/ready", ready.clone())
        .route("/health", ready)
}

/// The private pages of a process: its health, and `/metrics`.
pub fn pages(metrics: PrometheusHandle, checks: Vec<Check>) -> Router {
    health(checks).route(
        "/metrics",
        get(move || {
            let text = metrics.render();
            async move { ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text) }
        }),
    )
}

/// Asks every dependency; says which are missing.
async fn ready(checks: &[Check]) -> impl IntoResponse + use<> {
    let mut states = serde_json::Map::new();
    let mut all = true;
    let asked = checks.iter().map(|(_, check)| tokio::time::timeout(CHECK, check()));
    for ((name, _), there) in checks.iter().zip(futures_util::future::join_all(asked).await) {
        let there = there.unwrap_or_default();
        all &= there;
        states.insert(name.clone(), if there { "ok" } else { "missing" }.into());
    }
    let (status, word) = if all { (StatusCode::OK, "ok") } else { (StatusCode::SERVICE_UNAVAILABLE, "unavailable") };
    (status, axum::Json(serde_json::json!({"status": word, "dependencies": states})))
}
