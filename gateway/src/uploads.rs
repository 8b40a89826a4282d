//! Requests whose body is taken as bytes: uploads. Their content is streamed to disk instead of over the bus, after
//! the request is authorized.

use std::sync::Arc;

use axum::body::{Body, HttpBody};
use axum::http::HeaderMap;
use capsule_bus::Context;
use capsule_contracts::deploy::{BeginUpload, CompleteUpload, DiscardUpload, PlanUpload, Upload};
use capsule_contracts::{Message, Problem, Uuid};
use futures_util::future::BoxFuture;

use crate::Gateway;
use crate::min_rate::MinRateBody;

/// Handles a request whose body is taken as bytes, and returns the reply in JSON.
pub type RawHandler = for<'a> fn(RawRequest<'a>) -> BoxFuture<'a, Result<Vec<u8>, Problem>>;

/// An authenticated request whose body has not been read.
#[derive(Debug)]
pub struct RawRequest<'a> {
    pub gateway: &'a Arc<Gateway>,
    pub context: Context,
    pub headers: &'a HeaderMap,
    /// The message made of query and path, in JSON.
    pub message: Vec<u8>,
    pub body: &'a mut Body,
}

/// `POST /uploads?service_id=…`: the body is a `tar`, `tar.gz` or `zip` archive of the folder.
pub fn upload(request: RawRequest<'_>) -> BoxFuture<'_, Result<Vec<u8>, Problem>> {
    Box::pin(async move {
        let (received, upload) = receive(request).await?;
        received.disarm();
        serde_json::to_vec(&upload).map_err(|_| Problem::internal())
    })
}

/// `POST /plan?service_id=…`: as an upload, but replies with the plan and keeps nothing.
pub fn plan(request: RawRequest<'_>) -> BoxFuture<'_, Result<Vec<u8>, Problem>> {
    Box::pin(async move {
        let (received, upload) = receive(request).await?;
        let message = serde_json::to_vec(&PlanUpload { upload_id: upload.id }).map_err(|_| Problem::internal())?;
        let plan = received.gateway.bus.request_raw(&received.context, PlanUpload::SUBJECT, message).await;
        received.discard().await?;
        plan
    })
}

/// An upload in progress. Dropping it, as when the client disconnects, discards the upload, unless it is disarmed.
struct PendingUpload {
    gateway: Arc<Gateway>,
    context: Context,
    upload: Option<Uuid>,
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

async fn receive(request: RawRequest<'_>) -> Result<(PendingUpload, Upload), Problem> {
    let RawRequest { gateway, context, message, body, .. } = request;
    let mut begin: BeginUpload = serde_json::from_slice(&message).map_err(|_| Problem::internal())?;
    begin.bytes = body.size_hint().exact().or(begin.bytes);
    let upload = gateway.bus.request(&context, &begin).await?;
    let mut pending = PendingUpload { gateway: gateway.clone(), context, upload: Some(upload.id) };
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
