//! The routing table: made from the database as a whole, numbered, and told to the ingress.

use std::collections::BTreeMap;

use capsule_buildplan::Kind;
use capsule_contracts::{Problem, Uuid};
use capsule_ingress::{Route, Site, State, Table, Target};
use capsule_store::{Transaction, unscoped};
use sea_orm::FromQueryResult;

use crate::instances::{self, WEB};
use crate::{Deploys, deployments};

/// Says, in the transaction that changes what the table is made from, that it changed.
pub async fn raise(tx: &Transaction<'_>) -> Result<(), Problem> {
    tx.run(unscoped!("one table for all tenants", "UPDATE routing SET revision = revision + 1 WHERE id = 1")).await?;
    Ok(())
}

async fn revision(deploys: &Deploys) -> Result<u64, Problem> {
    let row = unscoped!("one table for all tenants", "SELECT revision FROM routing WHERE id = 1");
    let revision = deploys.store.read().value::<i64>(row).await?.unwrap_or(1);
    Ok(revision.unsigned_abs())
}

/// At start: the database goes on from the revision in force, in case it was restored from an older
/// state than the ingress has.
pub async fn catch_up(deploys: &Deploys) -> Result<(), Problem> {
    let hello = deploys.ingress.hello().await?;
    let tx = deploys.store.begin().await?;
    let known = i64::try_from(hello.revision).unwrap_or(i64::MAX - 1);
    tx.run(unscoped!(
        "one table for all tenants",
        "UPDATE routing SET revision = $1 + 1 WHERE id = 1 AND revision <= $2",
        known,
        known
    ))
    .await?;
    tx.commit().await?;
    publish(deploys).await
}

/// Tells the ingress the table as it is now; returns once it is in force.
pub async fn publish(deploys: &Deploys) -> Result<(), Problem> {
    let _one_at_a_time = deploys.publishing.lock().await;
    let revision = revision(deploys).await?;
    let table = Table {
        revision,
        base_domain: deploys.options.base_domain.clone(),
        public_host: deploys.options.public_url.as_ref().map(|url| url.host().to_owned()).unwrap_or_default(),
        trusted_proxies: deploys.options.trusted_proxies.clone(),
        routes: table(deploys).await?,
    };
    let in_force = deploys.ingress.apply(&table).await?;
    if in_force < revision {
        return Err(Problem::unavailable("The ingress did not take the routing table."));
    }
    Ok(())
}

/// Tells the ingress the table if it has an older one: after it was restarted, for one.
pub async fn publish_if_behind(deploys: &Deploys) -> Result<(), Problem> {
    let hello = deploys.ingress.hello().await?;
    if hello.revision < revision(deploys).await? { publish(deploys).await } else { Ok(()) }
}

/// A placement, with the release that serves.
#[derive(FromQueryResult)]
struct Placed {
    service_id: Uuid,
    environment_id: Uuid,
    host: String,
    wanted: String,
    release_id: Option<Uuid>,
    plan: Option<String>,
}

async fn table(deploys: &Deploys) -> Result<BTreeMap<String, Route>, Problem> {
    let instances = instances::live(deploys).await?;
    let unsettled = deployments::unsettled(deploys).await?;
    let mut routes = BTreeMap::new();
    let placed = unscoped!(
        "one table for all tenants",
        "SELECT p.service_id, p.environment_id, p.host, p.wanted, d.release_id, d.plan FROM placements p \
         LEFT JOIN deployments d ON d.id = p.active_deployment_id WHERE p.wanted <> 'removed'"
    );
    for placement in deploys.store.read().all::<Placed>(placed).await? {
        let own = |service: Uuid, environment: Uuid| service == placement.service_id && environment == placement.environment_id;
        let targets: Vec<Target> = instances
            .iter()
            .filter(|instance| own(instance.service_id, instance.environment_id) && instance.process == WEB)
            .filter(|instance| matches!(instance.role.as_str(), "candidate" | "serving"))
            .map(|instance| Target {
                instance: instance.id.clone(),
                port: u16::try_from(instance.port).unwrap_or_default(),
                weight: u32::from(instance.role == "serving"),
            })
            .collect();
        let (mut site, mut listens) = (None, true);
        if let Some(release) = placement.release_id {
            let plan = deployments::read_plan(placement.plan.as_deref())?;
            listens = plan.kind == Kind::Static || plan.processes.contains_key(WEB);
            site = (plan.kind == Kind::Static).then(|| Site {
                root: deploys.release_directory(release).join("site"),
                single_page: plan.networking.single_page,
            });
        }
        let under_way = unsettled.iter().any(|row| own(row.service_id, row.environment_id));
        if placement.release_id.is_none() && !under_way {
            // No deployment of it has succeeded yet: there is nothing under its address.
            continue;
        }
        let serving = site.is_some() || targets.iter().any(|target| target.weight > 0);
        let state = match (placement.wanted.as_str(), serving, under_way) {
            ("stopped", ..) => State::Stopped,
            (_, true, _) => State::Ready,
            (_, false, _) if !listens => State::Worker,
            (_, false, true) => State::Starting,
            (_, false, false) => State::Crashed,
        };
        let site = site.filter(|_| state == State::Ready);
        routes.insert(placement.host, Route { state, targets, site });
    }
    Ok(routes)
}
