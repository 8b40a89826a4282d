//! Starts the candidates, and publishes them to the ingress with weight 0.

use capsule_store::Scope;

use super::Failure;
use crate::deployments::Row;
use crate::service_environments::ServiceEnvironment;
use crate::{DeployService, instances, routes};

pub async fn run(
    service: &DeployService,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    row: &Row,
) -> Result<(), Failure> {
    for candidate in instances::candidates(service, scope, service_environment, row).await? {
        instances::start(service, scope, &candidate).await.map_err(|problem| Failure::Failed(problem.detail))?;
    }
    routes::publish(service).await?;
    Ok(())
}
