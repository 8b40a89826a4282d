//! A trace collector: receives spans with OTLP over HTTP, as protobuf.

use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use prost::Message;

/// A received span.
#[derive(Clone, Debug)]
pub struct Span {
    /// The process that sent it.
    pub service: String,
    pub name: String,
    /// In hexadecimal, as in `traceparent`.
    pub trace: String,
    pub id: String,
    pub parent: String,
}

/// A collector on a free port. Dropping the value stops it.
#[derive(Debug)]
pub struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
    port: u16,
    _runtime: tokio::runtime::Runtime,
}

impl Collector {
    /// Starts the collector.
    #[must_use]
    pub fn start() -> Self {
        let spans: Arc<Mutex<Vec<Span>>> = Arc::default();
        let pages = Router::new().route("/v1/traces", post(receive)).with_state(spans.clone());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let port = listener.local_addr().expect("an address").port();
        runtime.spawn(async move { axum::serve(listener, pages).await });
        Self { spans, port, _runtime: runtime }
    }

    /// `http://host:port`
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The spans of a trace that were received so far.
    #[must_use]
    pub fn trace(&self, id: &str) -> Vec<Span> {
        let spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        spans.iter().filter(|span| span.trace == id).cloned().collect()
    }
}

async fn receive(State(spans): State<Arc<Mutex<Vec<Span>>>>, body: Bytes) -> (StatusCode, Vec<u8>) {
    let Ok(request) = ExportTraceServiceRequest::decode(body) else { return (StatusCode::BAD_REQUEST, Vec::new()) };
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut all = spans.lock().unwrap_or_else(PoisonError::into_inner);
    for resource in request.resource_spans {
        let attributes = resource.resource.map(|resource| resource.attributes).unwrap_or_default();
        let service =
            attributes.into_iter().find(|attribute| attribute.key == "service.name").and_then(|attribute| attribute.value?.value);
        let service = match service {
            Some(Value::StringValue(name)) => name,
            _ => String::new(),
        };
        for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            let (trace, id, parent) = (hex(&span.trace_id), hex(&span.span_id), hex(&span.parent_span_id));
            all.push(Span { service: service.clone(), name: span.name, trace, id, parent });
        }
    }
    (StatusCode::OK, ExportTraceServiceResponse::default().encode_to_vec())
}
