//! Points `apps/<host>/next` at the release, and runs the release command if there is one.

use capsule_builder::Job;

use super::{Failure, io_failure, run_blocking, update_next_link};
use crate::deployments::Row;
use crate::service_environments::ServiceEnvironment;
use crate::{DeployService, instances};

pub async fn run(service: &DeployService, service_environment: &ServiceEnvironment, row: &Row) -> Result<(), Failure> {
    let release = service.release_directory(row.release_id);
    let directory = service.options.data.join("apps").join(&service_environment.host);
    let target = release.clone();
    run_blocking(move || update_next_link(&directory, &target).map_err(io_failure)).await?;
    let plan = row.plan()?;
    if let Some(command) = &plan.build.release {
        let job = Job {
            id: super::building::build_id(row),
            directory: release.join("app"),
            cache: release.join("no-cache"),
            log: service.build_log(row.id),
            uid: service_environment.uid.unsigned_abs(),
            environment: Default::default(),
            masked: crate::deployments::environment(service, row)?.values(),
            relaxations: service.relaxations(row.service_id),
        };
        let environment = instances::environment(service, service_environment, row, None)?;
        service.builder.step("release", command, &job, environment).await.map_err(|error| Failure::Failed(error.to_string()))?;
    }
    Ok(())
}
