//! Uploads: bytes that do not go over the bus. The right to send them is proven first; then they
//! stream to disk, counted and digested on the way.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, HttpBody};
use axum::extract::{Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use capsule_bus::Context;
use capsule_contracts::deploy::{BeginUpload, CompleteUpload, ForgetUpload, Plan, PlanUpload, Upload};
use capsule_contracts::{Message, Problem, Uuid};
use http_body_util::BodyExt;
use serde::Deserialize;

use crate::Gateway;
use crate::request::{authenticate, correlation_id, problem_response, swallow, with_correlation};

/// A client that sends nothing for this long is given up.
const STALLED: std::time::Duration = std::time::Duration::from_secs(60);

#[derive(Deserialize)]
struct Parameters {
    service_id: Uuid,
}

/// `POST /uploads?service_id=…`: the body is a `tar`, `tar.gz` or `zip` archive of the folder.
pub async fn upload(gateway: Arc<Gateway>, request: Request) -> Response {
    let (parts, mut body) = request.into_parts();
    let id = correlation_id(&parts.headers);
    let response = match receive(&gateway, &parts, &mut body, &id).await {
        Ok((_, upload)) => (StatusCode::CREATED, Json(upload)).into_response(),
        Err(problem) => {
            swallow(&mut body).await;
            problem_response(problem, &id)
        }
    };
    with_correlation(response, &id)
}

/// `POST /plan?service_id=…`: as an upload, but answered with the plan; nothing is kept.
pub async fn plan(gateway: Arc<Gateway>, request: Request) -> Response {
    let (parts, mut body) = request.into_parts();
    let id = correlation_id(&parts.headers);
    let work = async {
        let (context, upload) = receive(&gateway, &parts, &mut body, &id).await?;
        let plan = gateway.bus.request(&context, &PlanUpload { upload_id: upload.id }).await;
        gateway.bus.request(&context, &ForgetUpload { id: upload.id }).await?;
        plan
    };
    let outcome: Result<Plan, Problem> = work.await;
    let response = match outcome {
        Ok(plan) => Json(plan).into_response(),
        Err(problem) => {
            swallow(&mut body).await;
            problem_response(problem, &id)
        }
    };
    with_correlation(response, &id)
}

async fn receive(gateway: &Gateway, parts: &Parts, body: &mut Body, correlation_id: &str) -> Result<(Context, Upload), Problem> {
    let context = authenticate(gateway, parts, BeginUpload::ACCESS, correlation_id).await?;
    let Query(parameters) = Query::<Parameters>::try_from_uri(&parts.uri)
        .map_err(|_| Problem::invalid_field("service_id", "must be given in the query: the id of the service"))?;
    let bytes = body.size_hint().exact();
    let upload = gateway.bus.request(&context, &BeginUpload { service_id: parameters.service_id, bytes }).await?;
    let kept = keep(gateway, &context, &upload, body).await;
    // Sending the bytes may have taken longer than a request's patience.
    let context = Context::new(context.correlation_id, context.principal);
    match kept {
        Ok((digest, bytes)) => {
            let complete = CompleteUpload { id: upload.id, digest, bytes };
            let upload = gateway.bus.request(&context, &complete).await?;
            Ok((context, upload))
        }
        Err(problem) => {
            gateway.bus.request(&context, &ForgetUpload { id: upload.id }).await?;
            Err(problem)
        }
    }
}

async fn keep(gateway: &Gateway, context: &Context, upload: &Upload, body: &mut Body) -> Result<(String, u64), Problem> {
    let disk = |error: std::io::Error| {
        if error.kind() == std::io::ErrorKind::StorageFull {
            return Problem::insufficient_storage("The server keeps the rest of its disk in reserve and takes no upload now.");
        }
        tracing::error!(%error, "an upload could not be written");
        Problem::unavailable("The server cannot keep the upload: its disk does not take it.")
    };
    let mut writer = gateway.blobs.begin(&upload.id.to_string()).await.map_err(disk)?;
    loop {
        let frame = match tokio::time::timeout(STALLED, body.frame()).await {
            Err(_) => return Err(Problem::bad_request(format!("The upload stalled for {} s.", STALLED.as_secs()))),
            Ok(None) => break,
            Ok(Some(Err(error))) => return Err(Problem::bad_request(format!("The upload was cut short: {error}."))),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(bytes) = frame.into_data() else { continue };
        // What was announced was counted.
        if writer.bytes() + bytes.len() as u64 > gateway.upload_bytes.min(upload.bytes) {
            return Err(Problem::too_large(format!("The upload is larger than {} MiB.", gateway.upload_bytes >> 20))
                .hint("Leave out what is built or downloaded: name it in .capsuleignore."));
        }
        writer.write(&bytes).await.map_err(disk)?;
    }
    if writer.bytes() == 0 {
        return Err(
            Problem::bad_request("The upload is empty.").hint("Send a tar, tar.gz or zip archive of the folder as the body.")
        );
    }
    // Sending it may have taken long. That the sender is a member still is checked with what follows.
    gateway.authenticator.recheck(context).await?;
    writer.keep().await.map_err(disk)
}
