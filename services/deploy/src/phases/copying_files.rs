//! Sets the release aside: a program's folder as it was built, or the files of a site. It appears
//! under its name as a whole or not at all.

use capsule_builder::{collect_site, say, trees};
use capsule_buildplan::Kind;

use super::{Failure, files, host};
use crate::deployments::Row;
use crate::{Deploys, disk};

pub async fn run(deploys: &Deploys, row: &Row) -> Result<(), Failure> {
    let plan = row.plan()?;
    let work = deploys.work_directory(row.id);
    let release = deploys.release_directory(row.release_id);
    let log = deploys.build_log(row.id);
    // The files of a site are copied; the folder of a program is moved.
    if plan.kind == Kind::Static && !release.exists() {
        disk::check_reserve(deploys).map_err(|problem| Failure::Failed(problem.to_string()))?;
    }
    let reserve = disk::reserve(deploys);
    files(move || {
        if release.exists() {
            return Ok(());
        }
        let parent = release.parent().ok_or_else(|| host(std::io::ErrorKind::NotFound.into()))?;
        std::fs::create_dir_all(parent).map_err(host)?;
        let source = work.join("source");
        let staged = work.join("release");
        if plan.kind == Kind::Static {
            trees::remove(&staged).map_err(host)?;
            std::fs::create_dir(&staged).map_err(host)?;
            let output = plan.build.output.as_deref().unwrap_or(".");
            let collected = collect_site(&source, output, &staged.join("site"), &reserve);
            let left_out = collected.map_err(|error| Failure::Failed(error.to_string()))?;
            if let Some(line) = left_out.line() {
                say(&log, &line).map_err(host)?;
            }
        } else {
            std::fs::create_dir_all(&staged).map_err(host)?;
            if source.exists() {
                std::fs::rename(&source, staged.join("app")).map_err(host)?;
            }
        }
        std::fs::rename(&staged, &release).map_err(host)?;
        trees::remove(&work).map_err(host)
    })
    .await
}
