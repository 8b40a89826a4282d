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
use serde::Deserialize;

use crate::Gateway;
use crate::concurrency::Permit;
use crate::limits;
use crate::pace::PacedBody;
use crate::request::{authenticate, correlation_id, problem_response, swallow, with_correlation};

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
            received.keep();
            (StatusCode::CREATED, Json(upload)).into_response()
        }
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
        let (received, upload) = receive(&gateway, &parts, &mut body, &id).await?;
        let plan = gateway.bus.request(&received.context, &PlanUpload { upload_id: upload.id }).await;
        received.forget().await?;
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

/// An upload under way. Dropped before it is kept, it is forgotten: a client that hangs up leaves nothing.
struct Receiving {
    gateway: Arc<Gateway>,
    context: Context,
    upload: Option<Uuid>,
    _permit: Option<Permit>,
}

impl Receiving {
    fn keep(mut self) {
        self.upload = None;
    }

    async fn forget(mut self) -> Result<(), Problem> {
        let Some(id) = self.upload.take() else { return Ok(()) };
        self.gateway.bus.request(&self.context, &ForgetUpload { id }).await.map(|_| ())
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        let Some(id) = self.upload.take() else { return };
        let (gateway, context) =
            (self.gateway.clone(), Context::new(self.context.correlation_id.clone(), self.context.principal));
        tokio::spawn(async move {
            // What is not forgotten now expires.
            let _ = gateway.bus.request(&context, &ForgetUpload { id }).await;
        });
    }
}

async fn receive(
    gateway: &Arc<Gateway>,
    parts: &Parts,
    body: &mut Body,
    correlation_id: &str,
) -> Result<(Receiving, Upload), Problem> {
    let context = authenticate(gateway, parts, BeginUpload::ACCESS, correlation_id).await?;
    limits::check(gateway, &context, parts, BeginUpload::SUBJECT).await?;
    let Query(parameters) = Query::<Parameters>::try_from_uri(&parts.uri)
        .map_err(|_| Problem::invalid_field("service_id", "must be given in the query: the id of the service"))?;
    let permit = gateway.uploads.acquire(context.principal)?;
    let bytes = body.size_hint().exact();
    let upload = gateway.bus.request(&context, &BeginUpload { service_id: parameters.service_id, bytes }).await?;
    let mut receiving = Receiving { gateway: gateway.clone(), context, upload: Some(upload.id), _permit: permit };
    let kept = keep(gateway, &receiving.context, &upload, body).await;
    // Sending the bytes may have taken longer than a request's patience.
    receiving.context = Context::new(receiving.context.correlation_id.clone(), receiving.context.principal);
    match kept {
        Ok((digest, bytes)) => {
            let complete = CompleteUpload { id: upload.id, digest, bytes };
            let upload = gateway.bus.request(&receiving.context, &complete).await?;
            Ok((receiving, upload))
        }
        Err(problem) => {
            receiving.forget().await?;
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
    let mut paced = PacedBody::new(body, gateway.upload_pace);
    while let Some(bytes) = paced.data().await? {
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
