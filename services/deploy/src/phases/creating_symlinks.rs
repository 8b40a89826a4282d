//! Points `apps/<host>/next` at the release, and runs the release command if there is one.

use capsule_builder::Job;

use super::{Failure, files, host, point_next};
use crate::deployments::Row;
use crate::placements::Placement;
use crate::{Deploys, instances};

pub async fn run(deploys: &Deploys, placement: &Placement, row: &Row) -> Result<(), Failure> {
    let release = deploys.release_directory(row.release_id);
    let folder = deploys.options.data.join("apps").join(&placement.host);
    let target = release.clone();
    files(move || point_next(&folder, &target).map_err(host)).await?;
    let plan = row.plan()?;
    if let Some(command) = &plan.build.release {
        let job = Job {
            id: super::building::build_id(row),
            directory: release.join("app"),
            cache: release.join("no-cache"),
            log: deploys.build_log(row.id),
            uid: placement.uid.unsigned_abs(),
            environment: Default::default(),
            masked: crate::deployments::environment(deploys, row)?.values(),
            relaxations: deploys.relaxations(row.service_id),
        };
        let environment = instances::environment(deploys, placement, row, None)?;
        deploys.builder.step("release", command, &job, environment).await.map_err(|error| Failure::Failed(error.to_string()))?;
    }
    Ok(())
}
