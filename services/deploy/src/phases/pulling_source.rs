//! Unpacks the upload into a fresh folder.

use std::os::unix::fs::PermissionsExt;

use capsule_builder::{archive, trees};

use super::{Failure, files, host};
use crate::deployments::Row;
use crate::{Deploys, disk};

pub async fn run(deploys: &Deploys, row: &Row) -> Result<(), Failure> {
    let archive =
        deploys.blobs.path(&row.upload_digest).map_err(|_| Failure::Failed("the uploaded source is not kept any more".into()))?;
    disk::check_reserve(deploys).map_err(|problem| Failure::Failed(problem.to_string()))?;
    let reserve = disk::reserve(deploys);
    let work = deploys.work_directory(row.id);
    files(move || {
        trees::remove(&work).map_err(host)?;
        let source = work.join("source");
        std::fs::create_dir_all(&source).map_err(host)?;
        // The plan's process, which reads it, owns nothing.
        std::fs::set_permissions(&source, std::fs::Permissions::from_mode(0o755)).map_err(host)?;
        let unpacked = archive::unpack(&archive, &source, archive::Limits::default(), &reserve);
        unpacked.map_err(|error| Failure::Failed(error.to_string()))
    })
    .await
}
