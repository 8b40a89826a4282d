//! Uploads: begun with a size, filled by the gateway, completed, and then deployed or planned.

use std::sync::Arc;

use capsule_builder::planner::{PlannerError, Source};
use capsule_builder::trees;
use capsule_buildplan::Options;
use capsule_bus::Call;
use capsule_contracts::deploy::{BeginUpload, CompleteUpload, DiscardUpload, Plan, PlanUpload, Upload};
use capsule_contracts::{Empty, Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Scope, Transaction, scoped, unscoped};

use crate::{DeployService, disk, quotas, texts};

/// Retention of an upload. In this time it can be deployed any number of times.
const UPLOAD_RETENTION_SECONDS: i64 = 24 * 3600;
/// Retention of archives and directories without a reference.
const ORPHAN_RETENTION_SECONDS: i64 = 3600;

#[derive(FromRow)]
struct Row {
    id: Uuid,
    service_id: Uuid,
    digest: Option<String>,
    bytes: i64,
}

impl From<Row> for Upload {
    fn from(row: Row) -> Self {
        Self { id: row.id, service_id: row.service_id, digest: row.digest, bytes: row.bytes.unsigned_abs() }
    }
}

pub async fn begin_upload(service: Arc<DeployService>, call: Call<BeginUpload>) -> Result<Upload, Problem> {
    disk::check_reserve(&service)?;
    // Without an announced size, the largest possible one counts.
    let bytes = call.message.bytes.unwrap_or(service.options.upload_bytes).min(service.options.upload_bytes);
    let upload = Upload { id: new_id(), service_id: call.message.service_id, digest: None, bytes };
    let limits = quotas::limits_of(&service, call.grant.organization()).await?;
    let tx = service.store.begin().await?;
    quotas::begin_upload(&tx, &call.grant, &limits, upload.id, i64::try_from(bytes).unwrap_or(i64::MAX)).await?;
    tx.run(scoped!(
        &call.grant,
        "INSERT INTO uploads (id, organization_id, service_id, bytes, created_at) \
         VALUES (:id, :tenant, :service_id, 0, :created_at)",
        id = upload.id,
        service_id = upload.service_id,
        created_at = Timestamp::now().0
    ))
    .await?;
    tx.commit().await?;
    Ok(upload)
}

pub async fn complete_upload(service: Arc<DeployService>, call: Call<CompleteUpload>) -> Result<Upload, Problem> {
    let message = call.message;
    service.blobs.path(&message.digest).map_err(|_| Problem::invalid_field("digest", "no uploaded bytes have this digest"))?;
    let bytes = i64::try_from(message.bytes).unwrap_or(i64::MAX);
    let tx = service.store.begin().await?;
    tx.run(scoped!(
        &call.grant,
        "UPDATE uploads SET digest = :digest, bytes = :bytes WHERE organization_id = :tenant AND id = :id",
        digest = message.digest,
        bytes,
        id = message.id
    ))
    .await?;
    quotas::complete_upload(&tx, &call.grant, message.id, bytes).await?;
    tx.commit().await?;
    get(&service, &call.grant, message.id).await
}

pub async fn forget_upload(service: Arc<DeployService>, call: Call<DiscardUpload>) -> Result<Empty, Problem> {
    let upload = get(&service, &call.grant, call.message.id).await?;
    let tx = service.store.begin().await?;
    tx.run(scoped!(&call.grant, "DELETE FROM uploads WHERE organization_id = :tenant AND id = :id", id = call.message.id))
        .await?;
    tx.commit().await?;
    if let Some(digest) = upload.digest {
        remove_unused_blob(&service, &digest).await?;
    }
    Ok(Empty {})
}

/// Deletes the uploads whose retention is over at `now`.
pub async fn expire(service: &DeployService, now: Timestamp) -> Result<(), Problem> {
    let before = now.plus_seconds(-UPLOAD_RETENTION_SECONDS).0;
    let old = unscoped!(
        "the platform's own work",
        "SELECT id, service_id, digest, bytes FROM uploads WHERE created_at < :before ORDER BY created_at LIMIT 100",
        before
    );
    for upload in service.store.read().all::<Row>(old).await? {
        let tx = service.store.begin().await?;
        tx.run(unscoped!("the platform's own work", "DELETE FROM uploads WHERE id = :id", id = upload.id)).await?;
        tx.commit().await?;
        if let Some(digest) = upload.digest {
            remove_unused_blob(service, &digest).await?;
        }
    }
    Ok(())
}

/// Deletes orphaned archives and directories: of incomplete uploads, and of plans and builds during which the server
/// crashed.
pub async fn remove_orphans(service: &DeployService, now: Timestamp) -> Result<(), Problem> {
    let before = std::time::UNIX_EPOCH
        + std::time::Duration::from_secs(now.plus_seconds(-ORPHAN_RETENTION_SECONDS).as_seconds().unsigned_abs());
    service.blobs.remove_unfinished(before);
    for digest in service.blobs.older_than(before) {
        remove_unused_blob(service, &digest).await?;
    }
    let unsettled: Vec<_> =
        crate::deployments::unsettled(service).await?.iter().map(|row| service.work_directory(row.id)).collect();
    let work = service.options.data.join("work");
    let removed = tokio::task::spawn_blocking(move || {
        for entry in std::fs::read_dir(work).into_iter().flatten().flatten() {
            let changed = entry.metadata().and_then(|kind| kind.modified());
            if changed.is_ok_and(|changed| changed < before) && !unsettled.contains(&entry.path()) {
                let _ = trees::remove(&entry.path());
            }
        }
    });
    removed.await.map_err(|_| Problem::internal())
}

#[derive(FromRow)]
struct BlobUse {
    release_id: Uuid,
    finished_at: Option<i64>,
}

/// Deletes an archive unless an upload, an unsettled deployment or a release refers to it.
pub async fn remove_unused_blob(service: &DeployService, digest: &str) -> Result<(), Problem> {
    let uploads = unscoped!("blobs are shared by digest", "SELECT 1 FROM uploads WHERE digest = :digest", digest);
    if service.store.read().exists(uploads).await? {
        return Ok(());
    }
    let uses = unscoped!(
        "blobs are shared by digest",
        "SELECT release_id, finished_at FROM deployments WHERE upload_digest = :digest",
        digest
    );
    let uses = service.store.read().all::<BlobUse>(uses).await?;
    if !uses.iter().any(|one| one.finished_at.is_none() || service.release_directory(one.release_id).exists()) {
        let _ = service.blobs.remove(digest);
    }
    Ok(())
}

async fn get(service: &DeployService, scope: &impl Scope, id: Uuid) -> Result<Upload, Problem> {
    let row =
        scoped!(scope, "SELECT id, service_id, digest, bytes FROM uploads WHERE organization_id = :tenant AND id = :id", id);
    service.store.read().first::<Row>(row).await?.map(Upload::from).ok_or_else(|| Problem::not_found("upload"))
}

/// The digest of a complete upload of a service.
pub async fn digest_of(service: &DeployService, scope: &impl Scope, id: Uuid, service_id: Uuid) -> Result<String, Problem> {
    let upload = get(service, scope, id).await?;
    if upload.service_id != service_id {
        return Err(Problem::not_found("upload"));
    }
    upload.digest.ok_or_else(|| Problem::conflict("The upload is not complete yet.").hint("Send its bytes first."))
}

/// Fails unless a complete upload exists. Called in the transaction that inserts its deployment, which keeps the archive.
pub async fn check_complete(tx: &Transaction<'_>, scope: &impl Scope, id: Uuid) -> Result<(), Problem> {
    let row = scoped!(scope, "SELECT 1 FROM uploads WHERE organization_id = :tenant AND id = :id AND digest IS NOT NULL", id);
    if tx.read().exists(row).await? { Ok(()) } else { Err(Problem::not_found("upload")) }
}

pub async fn plan_upload(service: Arc<DeployService>, call: Call<PlanUpload>) -> Result<Plan, Problem> {
    let upload = get(&service, &call.grant, call.message.upload_id).await?;
    let digest = upload.digest.ok_or_else(|| Problem::conflict("The upload is not complete yet."))?;
    let archive = service.blobs.path(&digest).map_err(|_| Problem::not_found("upload"))?;
    disk::check_reserve(&service)?;
    let planner = service.planner.clone().with_disk_reserve(service.options.disk_reserve_bytes);
    let planned = planner.plan_now(&Source::Archive(archive), Options { containers: false }).await;
    let mut plan = planned.map_err(|error| match error {
        PlannerError::Refused(why) => Problem::invalid_field("upload_id", texts::without_paths(&service, &why)),
        PlannerError::Busy => Problem::unavailable("Too many plans are being made at the moment. Try again in a few seconds."),
        PlannerError::Host(why) => {
            tracing::error!(why, "cannot make a plan");
            Problem::internal()
        }
    })?;
    let scratch = service.work_directory(new_id());
    plan.mismatches = service.versions.mismatches(&service.builder, &plan, &scratch).await;
    serde_json::to_value(&plan).map(Plan).map_err(|_| Problem::internal())
}
