//! Uploads: announced, filled by the gateway's stream row, completed, and then deployed or planned.

use std::sync::Arc;

use capsule_builder::planner::{PlannerError, Source};
use capsule_builder::trees;
use capsule_buildplan::Options;
use capsule_bus::Call;
use capsule_contracts::deploy::{BeginUpload, CompleteUpload, ForgetUpload, Plan, PlanUpload, Upload};
use capsule_contracts::{Empty, Problem, Timestamp, Uuid, new_id};
use capsule_store::{Scope, Transaction, scoped, unscoped};
use sea_orm::FromQueryResult;

use crate::{Deploys, disk, quotas, texts};

/// An upload may be deployed, again and again, for this long.
const KEPT_SECONDS: i64 = 24 * 3600;
/// What nothing refers to is removed when it is so old.
const LEFT_SECONDS: i64 = 3600;

#[derive(FromQueryResult)]
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

pub async fn begin_upload(deploys: Arc<Deploys>, call: Call<BeginUpload>) -> Result<Upload, Problem> {
    disk::check_reserve(&deploys)?;
    // Without an announcement, as much is counted as may come.
    let bytes = call.message.bytes.unwrap_or(deploys.options.upload_bytes).min(deploys.options.upload_bytes);
    let upload = Upload { id: new_id(), service_id: call.message.service_id, digest: None, bytes };
    let limits = quotas::of(&deploys, call.proof.organization()).await?;
    let tx = deploys.store.begin().await?;
    quotas::begin_upload(&tx, &call.proof, &limits, upload.id, i64::try_from(bytes).unwrap_or(i64::MAX)).await?;
    tx.run(scoped!(
        &call.proof,
        "INSERT INTO uploads (id, organization_id, service_id, bytes, created_at) VALUES ($1, :tenant, $2, 0, $3)",
        upload.id,
        upload.service_id,
        Timestamp::now().0
    ))
    .await?;
    tx.commit().await?;
    Ok(upload)
}

pub async fn complete_upload(deploys: Arc<Deploys>, call: Call<CompleteUpload>) -> Result<Upload, Problem> {
    let message = call.message;
    deploys.blobs.path(&message.digest).map_err(|_| Problem::invalid_field("digest", "no bytes with this digest arrived"))?;
    let bytes = i64::try_from(message.bytes).unwrap_or(i64::MAX);
    let tx = deploys.store.begin().await?;
    tx.run(scoped!(
        &call.proof,
        "UPDATE uploads SET digest = $1, bytes = $2 WHERE organization_id = :tenant AND id = $3",
        message.digest,
        bytes,
        message.id
    ))
    .await?;
    quotas::complete_upload(&tx, &call.proof, message.id, bytes).await?;
    tx.commit().await?;
    get(&deploys, &call.proof, message.id).await
}

pub async fn forget_upload(deploys: Arc<Deploys>, call: Call<ForgetUpload>) -> Result<Empty, Problem> {
    let upload = get(&deploys, &call.proof, call.message.id).await?;
    let tx = deploys.store.begin().await?;
    tx.run(scoped!(&call.proof, "DELETE FROM uploads WHERE organization_id = :tenant AND id = $1", call.message.id)).await?;
    tx.commit().await?;
    if let Some(digest) = upload.digest {
        forget_blob(&deploys, &digest).await?;
    }
    Ok(Empty {})
}

/// Forgets uploads that were not deployed in time.
pub async fn expire(deploys: &Deploys, now: Timestamp) -> Result<(), Problem> {
    let before = now.plus_seconds(-KEPT_SECONDS).0;
    let old = unscoped!(
        "the platform's own work",
        "SELECT id, service_id, digest, bytes FROM uploads WHERE created_at < $1 ORDER BY created_at LIMIT 100",
        before
    );
    for upload in deploys.store.read().all::<Row>(old).await? {
        let tx = deploys.store.begin().await?;
        tx.run(unscoped!("the platform's own work", "DELETE FROM uploads WHERE id = $1", upload.id)).await?;
        tx.commit().await?;
        if let Some(digest) = upload.digest {
            forget_blob(deploys, &digest).await?;
        }
    }
    Ok(())
}

/// Removes archives and folders that were left behind: of uploads that were cut short, and of plans and builds that
/// the server did not live to see the end of.
pub async fn sweep(deploys: &Deploys, now: Timestamp) -> Result<(), Problem> {
    let before =
        std::time::UNIX_EPOCH + std::time::Duration::from_secs(now.plus_seconds(-LEFT_SECONDS).as_seconds().unsigned_abs());
    deploys.blobs.remove_unfinished(before);
    for digest in deploys.blobs.older_than(before) {
        forget_blob(deploys, &digest).await?;
    }
    let unsettled: Vec<_> =
        crate::deployments::unsettled(deploys).await?.iter().map(|row| deploys.work_directory(row.id)).collect();
    let work = deploys.options.data.join("work");
    let swept = tokio::task::spawn_blocking(move || {
        for entry in std::fs::read_dir(work).into_iter().flatten().flatten() {
            let changed = entry.metadata().and_then(|kind| kind.modified());
            if changed.is_ok_and(|changed| changed < before) && !unsettled.contains(&entry.path()) {
                let _ = trees::remove(&entry.path());
            }
        }
    });
    swept.await.map_err(|_| Problem::internal())
}

#[derive(FromQueryResult)]
struct User {
    release_id: Uuid,
    finished_at: Option<i64>,
}

/// Removes an archive, unless an upload, a deployment under way or a release that is kept is of it.
pub async fn forget_blob(deploys: &Deploys, digest: &str) -> Result<(), Problem> {
    let uploads = unscoped!("blobs are shared by digest", "SELECT 1 FROM uploads WHERE digest = $1", digest);
    if deploys.store.read().exists(uploads).await? {
        return Ok(());
    }
    let users = unscoped!(
        "blobs are shared by digest",
        "SELECT release_id, finished_at FROM deployments WHERE upload_digest = $1",
        digest
    );
    let users = deploys.store.read().all::<User>(users).await?;
    if !users.iter().any(|user| user.finished_at.is_none() || deploys.release_directory(user.release_id).exists()) {
        let _ = deploys.blobs.remove(digest);
    }
    Ok(())
}

async fn get(deploys: &Deploys, scope: &impl Scope, id: Uuid) -> Result<Upload, Problem> {
    let row = scoped!(scope, "SELECT id, service_id, digest, bytes FROM uploads WHERE organization_id = :tenant AND id = $1", id);
    deploys.store.read().first::<Row>(row).await?.map(Upload::from).ok_or_else(|| Problem::not_found("upload"))
}

/// The digest of a complete upload of this service.
pub async fn digest_of(deploys: &Deploys, scope: &impl Scope, id: Uuid, service: Uuid) -> Result<String, Problem> {
    let upload = get(deploys, scope, id).await?;
    if upload.service_id != service {
        return Err(Problem::not_found("upload"));
    }
    upload.digest.ok_or_else(|| Problem::conflict("The upload is not complete yet.").hint("Send its bytes first."))
}

/// An upload must still be there in the transaction that makes a deployment of it: from then on, its archive is kept.
pub async fn check(tx: &Transaction<'_>, scope: &impl Scope, id: Uuid) -> Result<(), Problem> {
    let row = scoped!(scope, "SELECT 1 FROM uploads WHERE organization_id = :tenant AND id = $1 AND digest IS NOT NULL", id);
    if tx.read().exists(row).await? { Ok(()) } else { Err(Problem::not_found("upload")) }
}

pub async fn plan_upload(deploys: Arc<Deploys>, call: Call<PlanUpload>) -> Result<Plan, Problem> {
    let upload = get(&deploys, &call.proof, call.message.upload_id).await?;
    let digest = upload.digest.ok_or_else(|| Problem::conflict("The upload is not complete yet."))?;
    let archive = deploys.blobs.path(&digest).map_err(|_| Problem::not_found("upload"))?;
    disk::check_reserve(&deploys)?;
    let planner = deploys.planner.clone().keeping_free(deploys.options.disk_reserve_bytes);
    let planned = planner.plan_now(&Source::Archive(archive), Options { containers: false }).await;
    let mut plan = planned.map_err(|error| match error {
        PlannerError::Refused(why) => Problem::invalid_field("upload_id", texts::without_paths(&deploys, &why)),
        PlannerError::Busy => Problem::unavailable("Too many plans are being made at the moment."),
        PlannerError::Host(why) => {
            tracing::error!(why, "a plan could not be made");
            Problem::internal()
        }
    })?;
    let scratch = deploys.work_directory(new_id());
    plan.mismatches = deploys.versions.mismatches(&deploys.builder, &plan, &scratch).await;
    serde_json::to_value(&plan).map(Plan).map_err(|_| Problem::internal())
}
