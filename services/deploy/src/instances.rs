//! Instances: the processes of a release. A row is written before its shim is started; who answers
//! under its name is it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use capsule_buildplan::{Kind, Plan};
use capsule_contracts::quotas::Quotas;
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_runtime::{Limits, Network, Spec, Writes};
use capsule_store::{scoped, unscoped};
use sea_orm::FromQueryResult;

use crate::deployments::{self, Row as Deployment};
use crate::phases::Failure;
use crate::placements::Placement;
use crate::quotas::{self, Load, Room};
use crate::{Deploys, placements, texts};

/// The process type that takes requests.
pub const WEB: &str = "web";

#[derive(Clone, Debug, FromQueryResult)]
pub struct Row {
    pub id: String,
    pub organization_id: Uuid,
    pub service_id: Uuid,
    pub environment_id: Uuid,
    pub deployment_id: Uuid,
    pub process: String,
    pub port: i32,
    pub role: String,
    pub created_at: i64,
}

/// Instances that are not gone, of all tenants.
pub async fn live(deploys: &Deploys) -> Result<Vec<Row>, Problem> {
    let rows = unscoped!(
        "reconciliation and routing are about all tenants",
        "SELECT * FROM instances WHERE role <> 'gone' ORDER BY created_at, id"
    );
    deploys.store.read().all(rows).await
}

/// Instances of a placement, oldest first, with those that are gone.
pub async fn of(deploys: &Deploys, placement: &Placement) -> Result<Vec<Row>, Problem> {
    let rows = unscoped!(
        "the placement was read with proof",
        "SELECT * FROM instances WHERE service_id = $1 AND environment_id = $2 ORDER BY created_at, id",
        placement.service_id,
        placement.environment_id
    );
    deploys.store.read().all(rows).await
}

/// How often instances that have to wait for others to drain look again.
const DRAIN_POLL: Duration = Duration::from_millis(500);
/// How long an instance may take to stop once it has drained.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// The candidates of a deployment, made now unless a run before this one made them. They count towards the quotas
/// of their organization from here on.
pub async fn candidates(deploys: &Deploys, placement: &Placement, deployment: &Deployment) -> Result<Vec<Row>, Failure> {
    let plan = deployment.plan()?;
    let grant = deployment.grant();
    let known = scoped!(
        &grant,
        "SELECT * FROM instances WHERE organization_id = :tenant AND deployment_id = $1 AND role = 'candidate'",
        deployment.id
    );
    // Only the deployment's one worker makes them: nobody comes between this and the transaction.
    let known = deploys.store.read().all::<Row>(known).await?;
    if !known.is_empty() || plan.kind == Kind::Static {
        return Ok(known);
    }
    let limits = quotas::of(deploys, placement.organization_id).await?;
    let deadline = Instant::now() + Duration::from_secs(deploys.options.drain_seconds) + STOP_TIMEOUT;
    loop {
        if let Some(rows) = make_candidates(deploys, placement, deployment, &plan, &limits).await? {
            return Ok(rows);
        }
        if Instant::now() > deadline {
            let why = "too many instances of earlier deployments of the organization have not stopped yet; deploy again later";
            return Err(Failure::Failed(why.into()));
        }
        tokio::time::sleep(DRAIN_POLL).await;
    }
}

/// Makes the candidates of a deployment; not while too many instances of its organization still drain.
async fn make_candidates(
    deploys: &Deploys,
    placement: &Placement,
    deployment: &Deployment,
    plan: &Plan,
    limits: &Quotas,
) -> Result<Option<Vec<Row>>, Failure> {
    let grant = deployment.grant();
    let memory = i64::try_from(memory_limit(plan)).unwrap_or(i64::MAX);
    let tx = deploys.store.begin().await?;
    if !deployments::goes_on(&tx, deployment).await? {
        return Err(Failure::Cancelled);
    }
    let place = (placement.service_id, placement.environment_id);
    if quotas::more_instances(&tx, &grant, limits, place, Load::of(plan)).await? == Room::Later {
        return Ok(None);
    }
    let mut rows = Vec::new();
    for process in plan.processes.keys() {
        let row = Row {
            id: instance_id(),
            organization_id: placement.organization_id,
            service_id: placement.service_id,
            environment_id: placement.environment_id,
            deployment_id: deployment.id,
            process: process.clone(),
            port: i32::from(plan.networking.port.unwrap_or(3000)),
            role: "candidate".into(),
            created_at: Timestamp::now().0,
        };
        tx.run(scoped!(
            &grant,
            "INSERT INTO instances (id, organization_id, service_id, environment_id, deployment_id, process, port, role, created_at, \
             memory_bytes) VALUES ($1, :tenant, $2, $3, $4, $5, $6, 'candidate', $7, $8)",
            row.id.as_str(),
            row.service_id,
            row.environment_id,
            row.deployment_id,
            row.process.as_str(),
            row.port,
            row.created_at,
            memory
        ))
        .await?;
        rows.push(row);
    }
    crate::routes::raise(&tx).await?;
    tx.commit().await?;
    Ok(Some(rows))
}

/// Short enough for a socket's name, and never used again.
fn instance_id() -> String {
    let random = new_id().simple().to_string();
    format!("i{}", &random[random.len() - 15..])
}

/// Marks a retired instance as gone; the routing table follows.
pub async fn set_gone(deploys: &Deploys, id: &str) -> Result<(), Problem> {
    let tx = deploys.store.begin().await?;
    let gone =
        unscoped!("the id was read with proof", "UPDATE instances SET role = 'gone' WHERE id = $1 AND role = 'retiring'", id);
    if tx.run(gone).await? == 1 {
        crate::routes::raise(&tx).await?;
        tx.commit().await?;
    }
    Ok(())
}

/// Whether an instance is still to serve.
pub async fn serves(deploys: &Deploys, id: &str) -> Result<bool, Problem> {
    let row = unscoped!("the id was read with proof", "SELECT 1 FROM instances WHERE id = $1 AND role = 'serving'", id);
    deploys.store.read().exists(row).await
}

/// Starts an instance, unless it runs.
pub async fn start(deploys: &Deploys, instance: &Row) -> Result<(), Problem> {
    let grant = capsule_bus::SystemGrant::new(instance.organization_id, "an instance is started");
    let deployment = deployments::get(deploys, &grant, instance.deployment_id).await?;
    let placement = placements::get(deploys, &grant, instance.service_id, instance.environment_id).await?;
    let spec = spec(deploys, &placement, &deployment, instance)?;
    deploys.runtime.start(&spec).await.map_err(|error| {
        tracing::warn!(instance = instance.id, %error, "an instance could not be started");
        Problem::unavailable(texts::without_paths(deploys, &error.to_string()))
    })
}

fn spec(deploys: &Deploys, placement: &Placement, deployment: &Deployment, instance: &Row) -> Result<Spec, Problem> {
    let plan = deployment.plan()?;
    let command = plan.processes.get(&instance.process).cloned().ok_or_else(Problem::internal)?;
    let limits = Limits {
        memory: Some(memory_limit(&plan)),
        cpu_percent: plan.resources.cpu.limit.parse::<f64>().ok().map(|cores| (cores * 100.0) as u32),
        processes: Some(1024),
        ..deploys.options.run_limits
    };
    Ok(Spec {
        id: instance.id.clone(),
        command,
        directory: deploys.release_directory(deployment.release_id).join("app"),
        writes: Writes::Layer,
        layers: Some(deploys.builder.layers.join(&instance.id)),
        mounts: deploys.builder.toolchains.mounts().to_vec(),
        environment: environment(deploys, placement, deployment, Some(instance))?,
        uid: placement.uid.unsigned_abs(),
        limits,
        network: Network::Egress,
        once: false,
        grace_seconds: 10,
        run_directory: deploys.runtime.run_directory().into(),
        log_directory: deploys.instance_log(&instance.id),
        masked: Vec::new(),
        relaxations: deploys.relaxations(placement.service_id),
    })
}

/// What a process of a deployment finds in its environment: the platform's, then the user's own.
pub fn environment(
    deploys: &Deploys,
    placement: &Placement,
    deployment: &Deployment,
    instance: Option<&Row>,
) -> Result<BTreeMap<String, String>, Problem> {
    let plan = deployment.plan()?;
    let mut all = deploys.builder.toolchains.environment();
    all.extend([
        ("HOME".into(), "/home/app".into()),
        ("CAPSULE_SERVICE".into(), placement.service_name.clone()),
        ("CAPSULE_ENVIRONMENT".into(), placement.environment_name.clone()),
        ("CAPSULE_DEPLOYMENT".into(), deployment.number.to_string()),
        ("CAPSULE_URL".into(), deploys.url(&placement.host)),
    ]);
    match plan.detection.language.as_deref() {
        Some("javascript") => all.insert("NODE_ENV".into(), "production".into()),
        Some("python") => all.insert("PYTHONUNBUFFERED".into(), "1".into()),
        _ => None,
    };
    all.extend(plan.build.env.clone());
    all.extend(deployments::environment(deploys, deployment)?.variables);
    if let Some(instance) = instance {
        all.insert("CAPSULE_INSTANCE".into(), instance.id.clone());
        if instance.process == WEB {
            all.insert("PORT".into(), instance.port.to_string());
        }
    }
    Ok(all)
}

/// Bytes of memory that each instance of a plan may use. Nothing runs without a limit: it would count for nothing.
pub fn memory_limit(plan: &Plan) -> u64 {
    quantity(&plan.resources.memory.limit).filter(|bytes| *bytes > 0).unwrap_or(512 << 20)
}

/// `512Mi` and the like, in bytes.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::quantity;

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, bytes) in [("512Mi", Some(512 << 20)), ("1Gi", Some(1 << 30)), ("100", Some(100)), ("1Xi", None), ("", None)] {
            assert_eq!(quantity(text), bytes, "{text}");
        }
    }
}
