//! Creates the release directory, atomically: the built directory of a program, or the files of a site.

use capsule_builder::{collect_site, log_line, trees};
use capsule_buildplan::Kind;

use super::{Failure, io_failure, run_blocking};
use crate::deployments::Row;
use crate::{DeployService, disk};

pub async fn run(service: &DeployService, row: &Row) -> Result<(), Failure> {
    let plan = row.plan()?;
    let work = service.work_directory(row.id);
    let release = service.release_directory(row.release_id);
    let log = service.build_log(row.id);
    // The files of a site are copied; the directory of a program is moved.
    if plan.kind == Kind::Static && !release.exists() {
        disk::check_reserve(service).map_err(|problem| Failure::Failed(problem.to_string()))?;
    }
    let reserve = disk::reserve(service);
    run_blocking(move || {
        if release.exists() {
            return Ok(());
        }
        let parent = release.parent().ok_or_else(|| io_failure(std::io::ErrorKind::NotFound.into()))?;
        std::fs::create_dir_all(parent).map_err(io_failure)?;
        let source = work.join("source");
        let staged = work.join("release");
        if plan.kind == Kind::Static {
            trees::remove(&staged).map_err(io_failure)?;
            std::fs::create_dir(&staged).map_err(io_failure)?;
            let output = plan.build.output.as_deref().unwrap_or(".");
            let collected = collect_site(&source, output, &staged.join("site"), &reserve);
            let left_out = collected.map_err(|error| Failure::Failed(error.to_string()))?;
            if let Some(line) = left_out.line() {
                log_line(&log, &line).map_err(io_failure)?;
            }
        } else {
            std::fs::create_dir_all(&staged).map_err(io_failure)?;
            if source.exists() {
                std::fs::rename(&source, staged.join("app")).map_err(io_failure)?;
            }
        }
        std::fs::rename(&staged, &release).map_err(io_failure)?;
        trees::remove(&work).map_err(io_failure)
    })
    .await
}
