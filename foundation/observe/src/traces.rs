//! Traces: spans are exported by OTLP over HTTP with protobuf. Processes pass each other W3C Trace Context.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use capsule_resilience::BreakerLayer;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use tower::{ServiceBuilder, ServiceExt};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Timeout of one export. Its spans are dropped afterwards.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a failing collector is not called.
const OPEN_DURATION: Duration = Duration::from_secs(30);

const TRACEPARENT: &str = "traceparent";

/// Whether spans are exported.
static TRACING: AtomicBool = AtomicBool::new(false);

/// Configuration of the export of traces.
#[derive(Clone, Debug)]
pub struct Traces {
    /// The collector's address, such as `http://127.0.0.1:4318`.
    pub endpoint: String,
    /// The percentage of traces begun here that are sampled.
    pub percent: u32,
    /// The service name of this process.
    pub name: String,
}

/// Exports the remaining spans when it is dropped.
#[derive(Debug)]
pub struct TraceExportGuard(SdkTracerProvider);

impl Drop for TraceExportGuard {
    fn drop(&mut self) {
        let _ = self.0.shutdown();
    }
}

/// Starts the export of spans.
pub fn start(traces: &Traces) -> Result<(SdkTracer, TraceExportGuard), String> {
    let endpoint = format!("{}/v1/traces", traces.endpoint.trim_end_matches('/'));
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Client::new())
        .with_endpoint(endpoint)
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .map_err(|error| format!("cannot export traces to {}: {error}", traces.endpoint))?;
    let ratio = Sampler::TraceIdRatioBased(f64::from(traces.percent.min(100)) / 100.0);
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(Sampler::ParentBased(Box::new(ratio)))
        .with_resource(Resource::builder().with_service_name(traces.name.clone()).build())
        .build();
    TRACING.store(true, Ordering::Relaxed);
    Ok((provider.tracer("capsule"), TraceExportGuard(provider)))
}

/// The `traceparent` of the current span, for outgoing requests. `None` if the span is not traced.
#[must_use]
pub fn traceparent() -> Option<String> {
    let context = Span::current().context();
    if !context.span().span_context().is_valid() {
        return None;
    }
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&context, &mut carrier);
    carrier.remove(TRACEPARENT)
}

/// Sets a span's name and kind for traces. The span must have the empty fields `otel.name` and `otel.kind`. Logs do not
/// contain them.
pub fn name_span(span: &Span, name: &str, kind: &str) {
    if TRACING.load(Ordering::Relaxed) {
        span.record("otel.name", name);
        span.record("otel.kind", kind);
    }
}

/// Makes a span a child of the one in `traceparent`.
pub fn continue_trace(span: &Span, traceparent: Option<&str>) {
    if let Some(traceparent) = traceparent {
        let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
        // Fails where the span is not traced.
        let _ = span.set_parent(TraceContextPropagator::new().extract(&carrier));
    }
}

/// The HTTP client of the exporter, on the exporter's own thread.
#[derive(Debug)]
struct Client {
    agent: ureq::Agent,
    breaker: BreakerLayer,
}

impl Client {
    fn new() -> Self {
        let agent = ureq::Agent::config_builder().timeout_global(Some(EXPORT_TIMEOUT)).http_status_as_error(false).build().into();
        Self { agent, breaker: BreakerLayer::new("the trace collector", 3, OPEN_DURATION) }
    }
}

impl Client {
    /// Sends a request through the circuit breaker. Blocks, which is fine on the exporter's own thread.
    fn send(&self, request: Request<Bytes>) -> BoxFuture<'static, Result<Response<Bytes>, HttpError>> {
        let agent = self.agent.clone();
        let send = tower::service_fn(move |request: Request<Bytes>| std::future::ready(exchange(&agent, request)));
        Box::pin(ServiceBuilder::new().layer(self.breaker.clone()).service(send).oneshot(request))
    }
}

fn exchange(agent: &ureq::Agent, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let (parts, mut body) = agent.run(request.map(|body| body.to_vec()))?.into_parts();
    Ok(Response::from_parts(parts, Bytes::from(body.read_to_vec()?)))
}

#[async_trait::async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        self.send(request).await
    }
}
