//! Traces: spans are sent by OTLP over HTTP, as protobuf, to whatever collects them. What travels between
//! processes is W3C Trace Context.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// A collector that does not take spans in this time gets the next ones only.
const PATIENCE: Duration = Duration::from_secs(5);

const TRACEPARENT: &str = "traceparent";

/// Where spans go, and how many.
#[derive(Clone, Debug)]
pub struct Traces {
    /// The collector's address, such as `http://127.0.0.1:4318`.
    pub endpoint: String,
    /// Of a hundred traces that begin here, so many are kept.
    pub percent: u32,
    /// The name of this process.
    pub name: String,
}

/// Sends what is left when it is dropped.
#[derive(Debug)]
pub struct Exporting(SdkTracerProvider);

impl Drop for Exporting {
    fn drop(&mut self) {
        let _ = self.0.shutdown();
    }
}

/// Begins to send spans.
pub fn start(traces: &Traces) -> Result<(SdkTracer, Exporting), String> {
    let endpoint = format!("{}/v1/traces", traces.endpoint.trim_end_matches('/'));
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Client::new())
        .with_endpoint(endpoint)
        .with_timeout(PATIENCE)
        .build()
        .map_err(|error| format!("traces cannot be sent to {}: {error}", traces.endpoint))?;
    let ratio = Sampler::TraceIdRatioBased(f64::from(traces.percent.min(100)) / 100.0);
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(Sampler::ParentBased(Box::new(ratio)))
        .with_resource(Resource::builder().with_service_name(traces.name.clone()).build())
        .build();
    Ok((provider.tracer("capsule"), Exporting(provider)))
}

/// The `traceparent` of the span this is called in, for who is asked next. `None` where nothing is traced.
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

/// Makes a span part of the trace that a `traceparent` names.
pub fn continue_trace(span: &Span, traceparent: Option<&str>) {
    if let Some(traceparent) = traceparent {
        let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
        // Fails where nothing is traced.
        let _ = span.set_parent(TraceContextPropagator::new().extract(&carrier));
    }
}

/// The client that spans are sent with, on the exporter's own thread.
#[derive(Debug)]
struct Client(ureq::Agent);

impl Client {
    fn new() -> Self {
        Self(ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false).build().into())
    }
}

#[async_trait::async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let response = self.0.run(request.map(|body| body.to_vec()))?;
        let (parts, mut body) = response.into_parts();
        Ok(Response::from_parts(parts, Bytes::from(body.read_to_vec()?)))
    }
}
