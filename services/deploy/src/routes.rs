//! The routing table of the ingress. Each version is built from the whole database and has a revision.

use std::collections::BTreeMap;

use capsule_buildplan::Kind;
use capsule_contracts::{Problem, Uuid};
use capsule_ingress::{Endpoint, Route, Site, State, Table};
use capsule_store::{FromRow, Transaction, unscoped};

use crate::instances::{self, WEB};
use crate::{DeployService, deployments};

/// Increments the revision, in the transaction that changes the routing table.
pub async fn bump_revision(tx: &Transaction<'_>) -> Result<(), Problem> {
    tx.run(unscoped!("one table for all tenants", "UPDATE routing SET revision = revision + 1 WHERE id = 1")).await?;
    Ok(())
}

async fn revision(service: &DeployService) -> Result<u64, Problem> {
    let row = unscoped!("one table for all tenants", "SELECT revision FROM routing WHERE id = 1");
    let revision = service.store.read().value::<i64>(row).await?.unwrap_or(1);
    Ok(revision.unsigned_abs())
}

/// Publishes the routing table when this process becomes the leader. The revision first moves beyond the one in force:
/// after a restore, the revision in the database can be older.
pub async fn catch_up(service: &DeployService) -> Result<(), Problem> {
    let hello = service.ingress.hello().await?;
    let tx = service.store.begin().await?;
    let in_force = i64::try_from(hello.revision).unwrap_or(i64::MAX - 1);
    tx.run(unscoped!(
        "one table for all tenants",
        "UPDATE routing SET revision = :in_force + 1 WHERE id = 1 AND revision <= :in_force",
        in_force
    ))
    .await?;
    tx.commit().await?;
    publish(service).await
}

/// Publishes the present routing table to the ingress; returns once it is in force.
pub async fn publish(service: &DeployService) -> Result<(), Problem> {
    let _guard = service.publish_lock.lock().await;
    let revision = revision(service).await?;
    let table = Table {
        revision,
        base_domain: service.options.base_domain.clone(),
        public_host: service.options.public_url.as_ref().map(|url| url.host().to_owned()).unwrap_or_default(),
        trusted_proxies: service.options.trusted_proxies.clone(),
        routes: table(service).await?,
    };
    let in_force = service.ingress.apply(&table).await?;
    if in_force < revision {
        return Err(Problem::unavailable("The ingress did not accept the routing table."));
    }
    Ok(())
}

/// Publishes the routing table if the ingress has an older revision, as after a restart.
pub async fn publish_if_behind(service: &DeployService) -> Result<(), Problem> {
    let hello = service.ingress.hello().await?;
    if hello.revision < revision(service).await? { publish(service).await } else { Ok(()) }
}

/// A service in an environment, with its active release.
#[derive(FromRow)]
struct RouteRow {
    service_id: Uuid,
    environment_id: Uuid,
    host: String,
    #[column("wanted")]
    desired_state: String,
    release_id: Option<Uuid>,
    plan: Option<String>,
}

async fn table(service: &DeployService) -> Result<BTreeMap<String, Route>, Problem> {
    let instances = instances::live(service).await?;
    let unsettled = deployments::unsettled(service).await?;
    let mut routes = BTreeMap::new();
    let rows = unscoped!(
        "one table for all tenants",
        "SELECT p.service_id, p.environment_id, p.host, p.wanted, d.release_id, d.plan FROM placements p \
         LEFT JOIN deployments d ON d.id = p.active_deployment_id WHERE p.wanted <> 'removed'"
    );
    for service_environment in service.store.read().all::<RouteRow>(rows).await? {
        let own = |service_id: Uuid, environment_id: Uuid| {
            service_id == service_environment.service_id && environment_id == service_environment.environment_id
        };
        let endpoints: Vec<Endpoint> = instances
            .iter()
            .filter(|instance| own(instance.service_id, instance.environment_id) && instance.process == WEB)
            .filter(|instance| matches!(instance.role.as_str(), "candidate" | "serving"))
            .map(|instance| Endpoint {
                instance: instance.id.clone(),
                port: u16::try_from(instance.port).unwrap_or_default(),
                weight: u32::from(instance.role == "serving"),
            })
            .collect();
        let (mut site, mut listens) = (None, true);
        if let Some(release) = service_environment.release_id {
            let plan = deployments::read_plan(service_environment.plan.as_deref())?;
            listens = plan.kind == Kind::Static || plan.processes.contains_key(WEB);
            site = (plan.kind == Kind::Static).then(|| Site {
                root: service.release_directory(release).join("site"),
                single_page: plan.networking.single_page,
            });
        }
        let is_deploying = unsettled.iter().any(|row| own(row.service_id, row.environment_id));
        if service_environment.release_id.is_none() && !is_deploying {
            // Before the first successful deployment there is no route.
            continue;
        }
        let is_serving = site.is_some() || endpoints.iter().any(|endpoint| endpoint.weight > 0);
        let state = match (service_environment.desired_state.as_str(), is_serving, is_deploying) {
            ("stopped", ..) => State::Stopped,
            (_, true, _) => State::Ready,
            (_, false, _) if !listens => State::Worker,
            (_, false, true) => State::Starting,
            (_, false, false) => State::Crashed,
        };
        let site = site.filter(|_| state == State::Ready);
        routes.insert(service_environment.host, Route { state, endpoints, site });
    }
    Ok(routes)
}
