//! Uploads. Their content is streamed to disk instead of over the bus, after the request is authorized.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, HttpBody};
use axum::extract::{Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use capsule_bus::Context;
use capsule_contracts::deploy::{BeginUpload, CompleteUpload, DiscardUpload, Plan, PlanUpload, Upload};
use capsule_contracts::{Message, Problem, Uuid};
use serde::Deserialize;

use crate::Gateway;
use crate::concurrency::Permit;
use crate::limits;
use crate::min_rate::MinRateBody;
use crate::request::{authenticate, correlation_id, discard_body, problem_response, with_correlation};

#[derive(Deserialize)]
struct Parameters {
    service_id: Uuid,
}

/// `POST /uploads?service_id=…`: the body is a `tar`, `tar.gz` or `zip` archive of the folder.
pub async fn upload(gateway: Arc<Gateway>, request: Request) -> Response {
    let (parts, mut body) = request.into_parts();
    let id = correlation_id(&parts.headers);
    let response = match receive(&gateway, &parts, &mut body, &id).await {
        Ok((received, upload)) => {
            received.disarm();
            (StatusCode::CREATED, Json(upload)).into_response()
        }
        Err(problem) => {
            discard_body(&mut body).await;
            problem_response(problem, &id)
        }
    };
    with_correlation(response, &id)
}

/// `POST /plan?service_id=…`: as an upload, but replies with the plan and keeps nothing.
pub async fn plan(gateway: Arc<Gateway>, request: Request) -> Response {
    let (parts, mut body) = request.into_parts();
    let id = correlation_id(&parts.headers);
    let work = async {
        let (received, upload) = receive(&gateway, &parts, &mut body, &id).await?;
        let plan = gateway.bus.request(&received.context, &PlanUpload { upload_id: upload.id }).await;
        received.discard().await?;
        plan
    };
    let outcome: Result<Plan, Problem> = work.await;
    let response = match outcome {
        Ok(plan) => Json(plan).into_response(),
        Err(problem) => {
            discard_body(&mut body).await;
            problem_response(problem, &id)
        }
    };
    with_correlation(response, &id)
}

/// An upload in progress. Dropping it, as when the client disconnects, discards the upload, unless it is disarmed.
struct PendingUpload {
    gateway: Arc<Gateway>,
    context: Context,
    upload: Option<Uuid>,
    _permit: Option<Permit>,
}

impl PendingUpload {
    fn disarm(mut self) {
        self.upload = None;
    }

    async fn discard(mut self) -> Result<(), Problem> {
        let Some(id) = self.upload.take() else { return Ok(()) };
        self.gateway.bus.request(&self.context, &DiscardUpload { id }).await.map(|_| ())
    }
}

impl Drop for PendingUpload {
    fn drop(&mut self) {
        let Some(id) = self.upload.take() else { return };
        let (gateway, context) =
            (self.gateway.clone(), Context::new(self.context.correlation_id.clone(), self.context.principal));
        tokio::spawn(async move {
            // If this fails, the upload expires.
            let _ = gateway.bus.request(&context, &DiscardUpload { id }).await;
        });
    }
}

async fn receive(
    gateway: &Arc<Gateway>,
    parts: &Parts,
    body: &mut Body,
    correlation_id: &str,
) -> Result<(PendingUpload, Upload), Problem> {
    let context = authenticate(gateway, parts, BeginUpload::ACCESS, correlation_id).await?;
    limits::check(gateway, &context, parts, BeginUpload::SUBJECT).await?;
    let Query(parameters) = Query::<Parameters>::try_from_uri(&parts.uri)
        .map_err(|_| Problem::invalid_field("service_id", "must be given in the query: the id of the service"))?;
    let permit = gateway.uploads.acquire(context.principal)?;
    let bytes = body.size_hint().exact();
    let upload = gateway.bus.request(&context, &BeginUpload { service_id: parameters.service_id, bytes }).await?;
    let mut pending = PendingUpload { gateway: gateway.clone(), context, upload: Some(upload.id), _permit: permit };
    let written = write_blob(gateway, &pending.context, &upload, body).await;
    // Receiving the body may have taken longer than the deadline of the context.
    pending.context = Context::new(pending.context.correlation_id.clone(), pending.context.principal);
    match written {
        Ok((digest, bytes)) => {
            let complete = CompleteUpload { id: upload.id, digest, bytes };
            let upload = gateway.bus.request(&pending.context, &complete).await?;
            Ok((pending, upload))
        }
        Err(problem) => {
            pending.discard().await?;
            Err(problem)
        }
    }
}

async fn write_blob(gateway: &Gateway, context: &Context, upload: &Upload, body: &mut Body) -> Result<(String, u64), Problem> {
    let disk_problem = |error: std::io::Error| {
        if error.kind() == std::io::ErrorKind::StorageFull {
            return Problem::insufficient_storage("The server's disk is full; the rest is kept in reserve.")
                .hint("Try again later, or ask an administrator to free disk space.");
        }
        tracing::error!(%error, "cannot write an upload");
        Problem::unavailable("The server cannot write the upload to its disk.").hint("Try again later.")
    };
    let mut writer = gateway.blobs.begin(&upload.id.to_string()).await.map_err(disk_problem)?;
    let mut reader = MinRateBody::new(body, gateway.upload_min_rate);
    while let Some(bytes) = reader.data().await? {
        // `upload.bytes` is what the client announced and the quota admitted.
        if writer.bytes() + bytes.len() as u64 > gateway.upload_bytes.min(upload.bytes) {
            return Err(Problem::too_large(format!("The upload is larger than {} MiB.", gateway.upload_bytes >> 20))
                .hint("List build output and downloaded files in .capsuleignore to leave them out."));
        }
        writer.write(&bytes).await.map_err(disk_problem)?;
    }
    if writer.bytes() == 0 {
        return Err(
            Problem::bad_request("The upload is empty.").hint("Send a tar, tar.gz or zip archive of the folder as the body.")
        );
    }
    // Receiving the body may have taken long, so the session is checked again; the next message checks membership.
    gateway.authenticator.recheck(context).await?;
    writer.commit().await.map_err(disk_problem)
}
