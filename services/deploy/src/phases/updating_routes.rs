//! Starts the candidates, and publishes them to the ingress with weight 0.

use super::Failure;
use crate::deployments::Row;
use crate::service_environments::ServiceEnvironment;
use crate::{DeployService, instances, routes};

pub async fn run(service: &DeployService, service_environment: &ServiceEnvironment, row: &Row) -> Result<(), Failure> {
    for candidate in instances::candidates(service, service_environment, row).await? {
        instances::start(service, &candidate).await.map_err(|problem| Failure::Failed(problem.detail))?;
    }
    routes::publish(service).await?;
    Ok(())
}
