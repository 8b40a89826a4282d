//! Deployment rows: reads, inserts and transitions. Each transition is recorded with its event.

use std::collections::BTreeMap;

use capsule_buildplan::Plan;
use capsule_bus::{Context, emit};
use capsule_contracts::deploy::{Deployment, DeploymentChanged, Phase, Status};
use capsule_contracts::text::truncated;
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Scope, Transaction, scoped, unscoped};
use serde::{Deserialize, Serialize};

use crate::phases::Failure;
use crate::service_environments::ServiceEnvironment;
use crate::{DeployService, attempts};

#[derive(Clone, Debug, FromRow)]
pub struct Row {
    pub id: Uuid,
    pub organization_id: Uuid,
    pub service_id: Uuid,
    pub environment_id: Uuid,
    pub number: i64,
    pub status: String,
    pub phase: String,
    pub trigger_kind: String,
    pub upload_digest: String,
    pub release_id: Uuid,
    pub plan: Option<String>,
    pub sealed_environment: Vec<u8>,
    pub cancelling: bool,
    pub error: Option<String>,
    pub created_by: Uuid,
    pub created_at: i64,
    pub finished_at: Option<i64>,
    /// The time of the next attempt, in microseconds since 1970.
    pub next_attempt_at: i64,
}

impl Row {
    pub fn phase(&self) -> Result<Phase, Problem> {
        self.phase.parse()
    }

    pub fn status(&self) -> Result<Status, Problem> {
        self.status.parse()
    }

    /// Whether the release was built by an earlier deployment.
    pub fn reuses_release(&self) -> bool {
        self.release_id != self.id
    }

    /// The plan that the release was built with.
    pub fn plan(&self) -> Result<Plan, Problem> {
        read_plan(self.plan.as_deref())
    }

    /// The deployment as the API returns it.
    pub fn view(&self, service: &DeployService, service_environment: &ServiceEnvironment) -> Result<Deployment, Problem> {
        Ok(Deployment {
            id: self.id,
            organization_id: self.organization_id,
            project_id: service_environment.project_id,
            service_id: self.service_id,
            service_name: service_environment.service_name.clone(),
            environment_id: self.environment_id,
            environment_name: service_environment.environment_name.clone(),
            number: self.number,
            status: self.status()?,
            phase: self.phase()?,
            trigger: self.trigger_kind.clone(),
            error: self.error.clone(),
            url: service.url(&service_environment.host),
            created_by: self.created_by,
            created_at: Timestamp(self.created_at),
            finished_at: self.finished_at.map(Timestamp),
        })
    }
}

/// Parses the plan column of a row.
pub fn read_plan(text: Option<&str>) -> Result<Plan, Problem> {
    serde_json::from_str(text.ok_or_else(Problem::internal)?).map_err(|_| Problem::internal())
}

/// The deployment with this id.
pub async fn get(service: &DeployService, scope: &impl Scope, id: Uuid) -> Result<Row, Problem> {
    let row = scoped!(scope, "SELECT :columns FROM deployments WHERE organization_id = :tenant AND id = :id", id);
    service.store.read().first(row).await?.ok_or_else(|| Problem::not_found("deployment"))
}

/// Reads a deployment within a transaction.
pub async fn read(tx: &Transaction<'_>, scope: &impl Scope, id: Uuid) -> Result<Row, Problem> {
    let row = scoped!(scope, "SELECT :columns FROM deployments WHERE organization_id = :tenant AND id = :id", id);
    tx.read().first(row).await?.ok_or_else(|| Problem::not_found("deployment"))
}

/// Reads the unsettled deployments of a service in an environment within a transaction.
pub async fn unsettled_of(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
) -> Result<Vec<Row>, Problem> {
    let rows = scoped!(
        scope,
        "SELECT :columns FROM deployments WHERE organization_id = :tenant AND service_id = :service_id \
         AND environment_id = :environment_id \
         AND finished_at IS NULL ORDER BY id",
        service_id = service_environment.service_id,
        environment_id = service_environment.environment_id
    );
    tx.read().all(rows).await
}

/// Cancels a deployment that is not active. A queued deployment is settled at once, any other by its worker.
pub async fn cancel(
    service: &DeployService,
    tx: &Transaction<'_>,
    context: &Context,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    row: &Row,
) -> Result<(), Problem> {
    if row.phase()? == Phase::Queued {
        return finish(service, tx, context, scope, service_environment, row, Status::Cancelled).await;
    }
    let mark = scoped!(
        scope,
        "UPDATE deployments SET cancelling = TRUE WHERE organization_id = :tenant AND id = :id AND finished_at IS NULL",
        id = row.id
    );
    check_updated(tx.run(mark).await?)
}

/// Fails unless an update changed the one row that it was decided for.
fn check_updated(rows: u64) -> Result<(), Problem> {
    if rows == 1 { Ok(()) } else { Err(Problem::conflict("The deployment changed in the meantime.").hint("Try again.")) }
}

/// The unsettled deployments of all tenants, oldest first.
pub async fn unsettled(service: &DeployService) -> Result<Vec<Row>, Problem> {
    let rows = unscoped!(
        "the controller works for all tenants",
        "SELECT :columns FROM deployments WHERE finished_at IS NULL ORDER BY id"
    );
    service.store.read().all(rows).await
}

/// The parts of a new deployment.
pub struct NewDeployment {
    pub trigger: &'static str,
    pub upload_digest: String,
    /// The existing release to run, and its plan. `None` if a release is to be built.
    pub release: Option<(Uuid, Option<String>)>,
    pub environment: Environment,
    pub created_by: Uuid,
}

/// Variables and secrets at the time of a deployment; stored sealed.
#[derive(Default, Serialize, Deserialize)]
pub struct EnvironmentSnapshot {
    /// Variables and secrets by name.
    pub variables: BTreeMap<String, String>,
    /// The names of the secrets.
    pub secrets: Vec<String>,
}

impl EnvironmentSnapshot {
    fn parse(plain: &[u8]) -> Result<Self, Problem> {
        // Earlier versions of Capsule stored only the variables.
        let earlier = || Some(Self { variables: serde_json::from_slice(plain).ok()?, secrets: Vec::new() });
        serde_json::from_slice(plain).ok().or_else(earlier).ok_or_else(Problem::internal)
    }

    /// The values of the secrets, to mask in logs.
    pub fn values(&self) -> Vec<String> {
        self.secrets.iter().filter_map(|name| self.variables.get(name)).cloned().collect()
    }
}

/// The source of a new deployment's variables and secrets.
pub enum Environment {
    /// The present configuration.
    Current(EnvironmentSnapshot),
    /// The snapshot of an earlier deployment.
    CopyOf(Box<Row>),
}

/// Inserts a deployment, which supersedes the queued deployments of the same service and environment.
pub async fn insert(
    service: &DeployService,
    tx: &Transaction<'_>,
    context: &Context,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    new: NewDeployment,
) -> Result<Row, Problem> {
    let id = new_id();
    let highest = scoped!(
        scope,
        "SELECT MAX(number) FROM deployments WHERE organization_id = :tenant AND service_id = :service_id \
         AND environment_id = :environment_id",
        service_id = service_environment.service_id,
        environment_id = service_environment.environment_id
    );
    let number = tx.read().value::<Option<i64>>(highest).await?.flatten().unwrap_or(0) + 1;
    let plain = match &new.environment {
        Environment::Current(environment) => serde_json::to_vec(environment).map_err(|_| Problem::internal())?,
        Environment::CopyOf(row) => tx.keyring().open_sealed(&sealing_context(row.id), &row.sealed_environment)?,
    };
    let (release_id, plan) = new.release.unwrap_or((id, None));
    let row = Row {
        id,
        organization_id: service_environment.organization_id,
        service_id: service_environment.service_id,
        environment_id: service_environment.environment_id,
        number,
        status: Status::Pending.name().into(),
        phase: Phase::Queued.name().into(),
        trigger_kind: new.trigger.into(),
        upload_digest: new.upload_digest,
        release_id,
        plan,
        sealed_environment: tx.keyring().seal(&sealing_context(id), &plain)?,
        cancelling: false,
        error: None,
        created_by: new.created_by,
        created_at: Timestamp::now().0,
        finished_at: None,
        next_attempt_at: 0,
    };
    let waiting = scoped!(
        scope,
        "SELECT :columns FROM deployments WHERE organization_id = :tenant AND service_id = :service_id \
         AND environment_id = :environment_id AND status = 'pending'",
        service_id = service_environment.service_id,
        environment_id = service_environment.environment_id
    );
    for older in tx.read().all::<Row>(waiting).await? {
        finish(service, tx, context, scope, service_environment, &older, Status::Superseded).await?;
    }
    tx.run(scoped!(
        scope,
        "INSERT INTO deployments (id, organization_id, service_id, environment_id, number, status, phase, trigger_kind, \
         upload_digest, \
         release_id, plan, sealed_environment, cancelling, created_by, created_at) \
         VALUES (:id, :tenant, :service_id, :environment_id, :number, :status, :phase, :trigger_kind, :upload_digest, \
         :release_id, :plan, :sealed_environment, :cancelling, :created_by, :created_at)",
        id = row.id,
        service_id = row.service_id,
        environment_id = row.environment_id,
        number = row.number,
        status = row.status.as_str(),
        phase = row.phase.as_str(),
        trigger_kind = row.trigger_kind.as_str(),
        upload_digest = row.upload_digest.as_str(),
        release_id = row.release_id,
        plan = row.plan.clone(),
        sealed_environment = row.sealed_environment.clone(),
        cancelling = false,
        created_by = row.created_by,
        created_at = row.created_at
    ))
    .await?;
    record(service, tx, context, scope, service_environment, &row, "queued").await?;
    Ok(row)
}

/// Decrypts the variables and secrets of a deployment.
pub fn environment(service: &DeployService, row: &Row) -> Result<EnvironmentSnapshot, Problem> {
    EnvironmentSnapshot::parse(&service.store.keyring().open_sealed(&sealing_context(row.id), &row.sealed_environment)?)
}

fn sealing_context(id: Uuid) -> String {
    format!("deployments/{id}")
}

/// Stores a phase before it begins, and completes the attempt of the phase before it. Fails with
/// [`Failure::Cancelled`] if the deployment was cancelled or settled.
pub async fn enter_phase(
    service: &DeployService,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    row: &Row,
    phase: Phase,
    completed: Option<Phase>,
) -> Result<Row, Failure> {
    let status = match phase {
        Phase::Queued => Status::Pending,
        Phase::PullingSource | Phase::Building => Status::Building,
        _ => Status::Deploying,
    };
    let moved = Row { status: status.name().into(), phase: phase.name().into(), ..row.clone() };
    let tx = service.store.begin().await?;
    let entered = tx
        .run(scoped!(
            scope,
            "UPDATE deployments SET status = :status, phase = :phase \
             WHERE organization_id = :tenant AND id = :id AND finished_at IS NULL AND NOT cancelling",
            status = moved.status.as_str(),
            phase = moved.phase.as_str(),
            id = row.id
        ))
        .await?;
    if entered != 1 {
        return Err(Failure::Cancelled);
    }
    if let Some(phase) = completed {
        attempts::complete(&tx, scope, row, phase).await?;
    }
    // No work is done in the queue, so no attempt is counted.
    if phase != Phase::Queued {
        if let Some(why) = attempts::begin(&tx, scope, row, phase).await? {
            return Err(Failure::Failed(why));
        }
        record(service, &tx, &Context::background("deploy"), scope, service_environment, &moved, phase.name()).await?;
    }
    tx.commit().await?;
    Ok(moved)
}

/// Whether a deployment is neither cancelled nor settled.
pub async fn is_in_progress(tx: &Transaction<'_>, scope: &impl Scope, row: &Row) -> Result<bool, Problem> {
    let row = scoped!(
        scope,
        "SELECT 1 FROM deployments WHERE organization_id = :tenant AND id = :id AND finished_at IS NULL AND NOT cancelling",
        id = row.id
    );
    tx.read().exists(row).await
}

/// Stores the plan of a deployment.
pub async fn set_plan(service: &DeployService, scope: &impl Scope, row: &Row, plan: &Plan) -> Result<Row, Problem> {
    let text = serde_json::to_string(plan).map_err(|_| Problem::internal())?;
    let tx = service.store.begin().await?;
    let update = scoped!(
        scope,
        "UPDATE deployments SET plan = :plan WHERE organization_id = :tenant AND id = :id AND finished_at IS NULL",
        plan = text.as_str(),
        id = row.id
    );
    check_updated(tx.run(update).await?)?;
    tx.commit().await?;
    Ok(Row { plan: Some(text), ..row.clone() })
}

/// The outcome of a deployment.
pub struct Outcome {
    pub status: Status,
    /// The reason of a failure, for users.
    pub error: Option<String>,
}

impl From<Status> for Outcome {
    fn from(status: Status) -> Self {
        Self { status, error: None }
    }
}

/// Settles a deployment. `row` must have been read in this transaction.
pub async fn finish(
    service: &DeployService,
    tx: &Transaction<'_>,
    context: &Context,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    row: &Row,
    outcome: impl Into<Outcome>,
) -> Result<(), Problem> {
    let Outcome { status, error } = outcome.into();
    let phase = if status == Status::Running { Phase::Active } else { row.phase()? };
    // The text may contain file names and output of any length.
    let error = error.map(truncated);
    let finished_at = row.finished_at.unwrap_or_else(|| Timestamp::now().0);
    let settled = Row {
        status: status.name().into(),
        phase: phase.name().into(),
        error: error.clone(),
        finished_at: Some(finished_at),
        ..row.clone()
    };
    let settle = scoped!(
        scope,
        "UPDATE deployments SET status = :status, phase = :phase, error = :error, finished_at = :finished_at \
         WHERE organization_id = :tenant AND id = :id AND status = :known_status AND phase = :known_phase",
        status = settled.status.as_str(),
        phase = settled.phase.as_str(),
        error,
        finished_at,
        id = row.id,
        known_status = row.status.as_str(),
        known_phase = row.phase.as_str()
    );
    check_updated(tx.run(settle).await?)?;
    metrics::counter!("capsule_deployments_total", "status" => status.name()).increment(1);
    let message = settled.error.clone().unwrap_or_else(|| status.name().into());
    record(service, tx, context, scope, service_environment, &settled, &message).await
}

async fn record(
    service: &DeployService,
    tx: &Transaction<'_>,
    context: &Context,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    row: &Row,
    message: &str,
) -> Result<(), Problem> {
    tx.run(scoped!(
        scope,
        "INSERT INTO deployment_events (deployment_id, organization_id, at, status, phase, message) \
         VALUES (:deployment_id, :tenant, :at, :status, :phase, :message)",
        deployment_id = row.id,
        at = Timestamp::now().0,
        status = row.status.as_str(),
        phase = row.phase.as_str(),
        message
    ))
    .await?;
    emit(tx, context, &DeploymentChanged { deployment: row.view(service, service_environment)? }).await
}
