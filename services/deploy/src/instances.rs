//! Instances: the running processes of a release. A row is written before its shim starts; the shim listens on a socket
//! that has the instance's id as its name.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use capsule_buildplan::{Kind, Plan};
use capsule_contracts::quotas::Quotas;
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_runtime::{Limits, Network, Spec, Writes};
use capsule_store::{FromRow, Scope, scoped, unscoped};

use crate::deployments::{self, Row as Deployment};
use crate::phases::Failure;
use crate::quotas::{self, Admission, Load};
use crate::service_environments::ServiceEnvironment;
use crate::{DeployService, service_environments, texts};

/// The process type that serves requests.
pub const WEB: &str = "web";

#[derive(Clone, Debug, FromRow)]
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

/// Reads the instances that are not gone, of all tenants.
pub async fn live(service: &DeployService) -> Result<Vec<Row>, Problem> {
    let rows = unscoped!(
        "reconciliation and routing are about all tenants",
        "SELECT :columns FROM instances WHERE role <> 'gone' ORDER BY created_at, id"
    );
    service.store.read().all(rows).await
}

/// Reads the instances of a service in an environment, oldest first, including those that are gone.
pub async fn of(service: &DeployService, service_environment: &ServiceEnvironment) -> Result<Vec<Row>, Problem> {
    let rows = unscoped!(
        "the service_environment was read with proof",
        "SELECT :columns FROM instances WHERE service_id = :service_id AND environment_id = :environment_id \
         ORDER BY created_at, id",
        service_id = service_environment.service_id,
        environment_id = service_environment.environment_id
    );
    service.store.read().all(rows).await
}

/// The interval between checks whether enough instances have drained.
const DRAIN_POLL: Duration = Duration::from_millis(500);
/// The time for an instance to stop once it has drained.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the candidates of a deployment. Inserts them on the first call; from then on they count towards the quotas of
/// their organization.
pub async fn candidates(
    service: &DeployService,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    deployment: &Deployment,
) -> Result<Vec<Row>, Failure> {
    let plan = deployment.plan()?;
    let existing = scoped!(
        scope,
        "SELECT :columns FROM instances WHERE organization_id = :tenant AND deployment_id = :deployment_id \
         AND role = 'candidate'",
        deployment_id = deployment.id
    );
    // Only the deployment's one worker inserts candidates, so this read may precede the transaction.
    let existing = service.store.read().all::<Row>(existing).await?;
    if !existing.is_empty() || plan.kind == Kind::Static {
        return Ok(existing);
    }
    let limits = quotas::limits_of(service, service_environment.organization_id).await?;
    let deadline = Instant::now() + Duration::from_secs(service.options.drain_seconds) + STOP_TIMEOUT;
    loop {
        if let Some(rows) = insert_candidates(service, scope, service_environment, deployment, &plan, &limits).await? {
            return Ok(rows);
        }
        if Instant::now() > deadline {
            let why = "too many instances of earlier deployments of the organization have not stopped yet; deploy again later";
            return Err(Failure::Failed(why.into()));
        }
        tokio::time::sleep(DRAIN_POLL).await;
    }
}

/// Inserts the candidates of a deployment. `None` while too many instances of the organization still drain.
async fn insert_candidates(
    service: &DeployService,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    deployment: &Deployment,
    plan: &Plan,
    limits: &Quotas,
) -> Result<Option<Vec<Row>>, Failure> {
    let memory = i64::try_from(memory_limit(plan)).unwrap_or(i64::MAX);
    let tx = service.store.begin().await?;
    if !deployments::is_in_progress(&tx, scope, deployment).await? {
        return Err(Failure::Cancelled);
    }
    let key = (service_environment.service_id, service_environment.environment_id);
    if quotas::admit_instances(&tx, scope, limits, key, Load::of(plan)).await? == Admission::Later {
        return Ok(None);
    }
    let mut rows = Vec::new();
    for process in plan.processes.keys() {
        let row = Row {
            id: instance_id(),
            organization_id: service_environment.organization_id,
            service_id: service_environment.service_id,
            environment_id: service_environment.environment_id,
            deployment_id: deployment.id,
            process: process.clone(),
            port: i32::from(plan.networking.port.unwrap_or(3000)),
            role: "candidate".into(),
            created_at: Timestamp::now().0,
        };
        tx.run(scoped!(
            scope,
            "INSERT INTO instances (id, organization_id, service_id, environment_id, deployment_id, process, port, role, \
             created_at, \
             memory_bytes) VALUES (:id, :tenant, :service_id, :environment_id, :deployment_id, :process, :port, 'candidate', \
             :created_at, :memory)",
            id = row.id.as_str(),
            service_id = row.service_id,
            environment_id = row.environment_id,
            deployment_id = row.deployment_id,
            process = row.process.as_str(),
            port = row.port,
            created_at = row.created_at,
            memory
        ))
        .await?;
        rows.push(row);
    }
    crate::routes::bump_revision(&tx).await?;
    tx.commit().await?;
    Ok(Some(rows))
}

/// Creates a unique id, short enough for the name of a socket.
fn instance_id() -> String {
    let random = new_id().simple().to_string();
    format!("i{}", &random[random.len() - 15..])
}

/// Marks a retiring instance as gone, and removes it from the routing table.
pub async fn set_gone(service: &DeployService, id: &str) -> Result<(), Problem> {
    let tx = service.store.begin().await?;
    let gone =
        unscoped!("the id was read with a grant", "UPDATE instances SET role = 'gone' WHERE id = :id AND role = 'retiring'", id);
    if tx.run(gone).await? == 1 {
        crate::routes::bump_revision(&tx).await?;
        tx.commit().await?;
    }
    Ok(())
}

/// Whether an instance has the role `serving`.
pub async fn is_serving(service: &DeployService, id: &str) -> Result<bool, Problem> {
    let row = unscoped!("the id was read with a grant", "SELECT 1 FROM instances WHERE id = :id AND role = 'serving'", id);
    service.store.read().exists(row).await
}

/// Starts an instance unless it runs.
pub async fn start(service: &DeployService, scope: &impl Scope, instance: &Row) -> Result<(), Problem> {
    let deployment = deployments::get(service, scope, instance.deployment_id).await?;
    let service_environment = service_environments::get(service, scope, instance.service_id, instance.environment_id).await?;
    let spec = spec(service, &service_environment, &deployment, instance)?;
    service.runtime.start(&spec).await.map_err(|error| {
        tracing::warn!(instance = instance.id, %error, "cannot start an instance");
        Problem::unavailable(texts::without_paths(service, &error.to_string()))
    })
}

fn spec(
    service: &DeployService,
    service_environment: &ServiceEnvironment,
    deployment: &Deployment,
    instance: &Row,
) -> Result<Spec, Problem> {
    let plan = deployment.plan()?;
    let command = plan.processes.get(&instance.process).cloned().ok_or_else(Problem::internal)?;
    let limits = Limits {
        memory: Some(memory_limit(&plan)),
        cpu_percent: plan.resources.cpu.limit.parse::<f64>().ok().map(|cores| (cores * 100.0) as u32),
        processes: Some(1024),
        ..service.options.run_limits
    };
    Ok(Spec {
        id: instance.id.clone(),
        command,
        directory: service.release_directory(deployment.release_id).join("app"),
        writes: Writes::Layer,
        layers: Some(service.builder.layers.join(&instance.id)),
        mounts: service.builder.toolchains.mounts().to_vec(),
        environment: environment(service, service_environment, deployment, Some(instance))?,
        uid: service_environment.uid.unsigned_abs(),
        limits,
        network: Network::Egress,
        once: false,
        grace_seconds: 10,
        run_directory: service.runtime.run_directory().into(),
        log_directory: service.instance_log(&instance.id),
        masked: Vec::new(),
        relaxations: service.relaxations(service_environment.service_id),
    })
}

/// The environment variables of a process: those of the platform, overridden by those of the user.
pub fn environment(
    service: &DeployService,
    service_environment: &ServiceEnvironment,
    deployment: &Deployment,
    instance: Option<&Row>,
) -> Result<BTreeMap<String, String>, Problem> {
    let plan = deployment.plan()?;
    let mut all = service.builder.toolchains.environment();
    all.extend([
        ("HOME".into(), "/home/app".into()),
        ("CAPSULE_SERVICE".into(), service_environment.service_name.clone()),
        ("CAPSULE_ENVIRONMENT".into(), service_environment.environment_name.clone()),
        ("CAPSULE_DEPLOYMENT".into(), deployment.number.to_string()),
        ("CAPSULE_URL".into(), service.url(&service_environment.host)),
    ]);
    match plan.detection.language.as_deref() {
        Some("javascript") => all.insert("NODE_ENV".into(), "production".into()),
        Some("python") => all.insert("PYTHONUNBUFFERED".into(), "1".into()),
        _ => None,
    };
    all.extend(plan.build.env.clone());
    all.extend(deployments::environment(service, deployment)?.variables);
    if let Some(instance) = instance {
        all.insert("CAPSULE_INSTANCE".into(), instance.id.clone());
        if instance.process == WEB {
            all.insert("PORT".into(), instance.port.to_string());
        }
    }
    Ok(all)
}

/// The memory limit of each instance of a plan, in bytes. There is always one, because quotas count it.
pub fn memory_limit(plan: &Plan) -> u64 {
    parse_quantity(&plan.resources.memory.limit).filter(|bytes| *bytes > 0).unwrap_or(512 << 20)
}

/// Parses a quantity such as `512Mi` into bytes.
fn parse_quantity(text: &str) -> Option<u64> {
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
    use super::parse_quantity;

    #[test]
    fn quantities_are_parsed_as_in_kubernetes() {
        for (text, bytes) in [("512Mi", Some(512 << 20)), ("1Gi", Some(1 << 30)), ("100", Some(100)), ("1Xi", None), ("", None)] {
            assert_eq!(parse_quantity(text), bytes, "{text}");
        }
    }
}
