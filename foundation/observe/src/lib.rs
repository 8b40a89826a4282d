//! Logs, metrics, traces and health of a process.
//!
//! Logs go to standard error, as text or JSON, with a correlation id on every line that belongs to a
//! request. Metrics are in Prometheus' text format. There are two health checks, as in Kubernetes: liveness and
//! readiness.

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

pub use traces::{TraceExportGuard, Traces, continue_trace, name_span, traceparent};

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Pretty,
    Json,
}

/// Upper bounds of latency histograms, in seconds.
const BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Starts logging to standard error, and the export of traces if `traces` is given. `levels` is a list such as
/// `info,capsule_deploy=debug`. Keep the returned guard until the process ends.
///
/// # Errors
/// When `levels` or the collector's address is invalid.
pub fn start(format: Format, levels: &str, traces: Option<&Traces>) -> Result<Option<TraceExportGuard>, String> {
    let filter = EnvFilter::try_new(levels)
        .map_err(|error| format!("`{levels}` is not a list of log levels such as `info,capsule_deploy=debug`: {error}"))?;
    let base = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_span_events(FmtSpan::NONE);
    let logs = match format {
        Format::Pretty => base.with_target(false).compact().with_filter(filter).boxed(),
        Format::Json => base.json().flatten_event(true).with_filter(filter).boxed(),
    };
    let (tracer, guard) = traces.map(traces::start).transpose()?.unzip();
    // Only Capsule's own spans. Events go to the logs.
    let ours = filter_fn(|metadata| metadata.is_span() && metadata.target().starts_with("capsule"));
    let spans = tracer.map(|tracer| tracing_opentelemetry::layer().with_tracer(tracer).with_filter(ours));
    // A second call in the same process has no effect.
    let _ = tracing_subscriber::registry().with(logs).with(spans).try_init();
    Ok(guard)
}

/// Installs the metrics recorder of this process. The handle renders the metrics.
///
/// # Errors
/// When a recorder is already installed.
pub fn metrics() -> Result<PrometheusHandle, String> {
    PrometheusBuilder::new()
        .set_buckets(&BUCKETS)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|error| format!("cannot record metrics: {error}"))
}

/// The name of a dependency, and a check of whether it is available.
pub type Check = (String, Arc<dyn Fn() -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>);

/// A dependency that does not respond within this time is reported as missing.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// Routes for liveness (`/health/live`) and readiness (`/health/ready`, and the same as `/health`).
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

/// The routes of a process's private listener: health, and `/metrics`.
pub fn pages(metrics: PrometheusHandle, checks: Vec<Check>) -> Router {
    health(checks).route(
        "/metrics",
        get(move || {
            let text = metrics.render();
            async move { ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text) }
        }),
    )
}

/// Runs all checks and reports the state of each dependency.
async fn ready(checks: &[Check]) -> impl IntoResponse + use<> {
    let mut states = serde_json::Map::new();
    let mut all = true;
    let asked = checks.iter().map(|(_, check)| tokio::time::timeout(CHECK_TIMEOUT, check()));
    for ((name, _), there) in checks.iter().zip(futures_util::future::join_all(asked).await) {
        let there = there.unwrap_or_default();
        all &= there;
        states.insert(name.clone(), if there { "ok" } else { "missing" }.into());
    }
    let (status, word) = if all { (StatusCode::OK, "ok") } else { (StatusCode::SERVICE_UNAVAILABLE, "unavailable") };
    (status, axum::Json(serde_json::json!({"status": word, "dependencies": states})))
}
