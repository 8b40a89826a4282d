//! Unpacks the upload into a new directory.

use std::os::unix::fs::PermissionsExt;

use capsule_builder::{archive, trees};

use super::{Failure, io_failure, run_blocking};
use crate::deployments::Row;
use crate::{DeployService, disk};

pub async fn run(service: &DeployService, row: &Row) -> Result<(), Failure> {
    let archive = service.blobs.path(&row.upload_digest).map_err(|_| {
        Failure::Failed("the uploaded source is no longer available; upload it again with `capsule deploy`".into())
    })?;
    disk::check_reserve(service).map_err(|problem| Failure::Failed(problem.to_string()))?;
    let reserve = disk::reserve(service);
    let work = service.work_directory(row.id);
    run_blocking(move || {
        trees::remove(&work).map_err(io_failure)?;
        let source = work.join("source");
        std::fs::create_dir_all(&source).map_err(io_failure)?;
        // The planner reads the source as a user without privileges.
        std::fs::set_permissions(&source, std::fs::Permissions::from_mode(0o755)).map_err(io_failure)?;
        let unpacked = archive::unpack(&archive, &source, archive::Limits::default(), &reserve);
        unpacked.map_err(|error| Failure::Failed(error.to_string()))
    })
    .await
}
