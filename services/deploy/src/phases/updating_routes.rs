//! Starts the candidates, and makes them known to the ingress with no share of the requests yet.

use super::Failure;
use crate::deployments::Row;
use crate::placements::Placement;
use crate::{Deploys, instances, routes};

pub async fn run(deploys: &Deploys, placement: &Placement, row: &Row) -> Result<(), Failure> {
    for candidate in instances::candidates(deploys, placement, row).await? {
        instances::start(deploys, &candidate).await.map_err(|problem| Failure::Failed(problem.detail))?;
    }
    routes::publish(deploys).await?;
    Ok(())
}
