//! Deployment rows: read, made, and moved on. Every move is recorded with its event.

use std::collections::BTreeMap;

use capsule_buildplan::Plan;
use capsule_bus::{Context, SystemGrant, emit};
use capsule_contracts::deploy::{Deployment, DeploymentChanged, Phase, Status};
use capsule_contracts::text::shortened;
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_store::{Scope, Transaction, scoped, unscoped};
use sea_orm::FromQueryResult;
use serde::{Deserialize, Serialize};

use crate::phases::Failure;
use crate::placements::Placement;
use crate::{Deploys, attempts};

#[derive(Clone, Debug, FromQueryResult)]
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
    /// An attempt is not begun before.
    pub next_attempt_at: i64,
}

impl Row {
    pub fn phase(&self) -> Result<Phase, Problem> {
        self.phase.parse()
    }

    pub fn status(&self) -> Result<Status, Problem> {
        self.status.parse()
    }

    /// What the platform's own work on it is allowed by.
    pub fn grant(&self) -> SystemGrant {
        SystemGrant::new(self.organization_id, "a deployment is carried out")
    }

    /// Whether it runs a release that an earlier deployment built.
    pub fn reuses_release(&self) -> bool {
        self.release_id != self.id
    }

    /// The plan its release was built by.
    pub fn plan(&self) -> Result<Plan, Problem> {
        read_plan(self.plan.as_deref())
    }

    /// As the API shows it.
    pub fn view(&self, deploys: &Deploys, placement: &Placement) -> Result<Deployment, Problem> {
        Ok(Deployment {
            id: self.id,
            organization_id: self.organization_id,
            project_id: placement.project_id,
            service_id: self.service_id,
            service_name: placement.service_name.clone(),
            environment_id: self.environment_id,
            environment_name: placement.environment_name.clone(),
            number: self.number,
            status: self.status()?,
            phase: self.phase()?,
            trigger: self.trigger_kind.clone(),
            error: self.error.clone(),
            url: deploys.url(&placement.host),
            created_by: self.created_by,
            created_at: Timestamp(self.created_at),
            finished_at: self.finished_at.map(Timestamp),
        })
    }
}

/// A plan as a row keeps it.
pub fn read_plan(text: Option<&str>) -> Result<Plan, Problem> {
    serde_json::from_str(text.ok_or_else(Problem::internal)?).map_err(|_| Problem::internal())
}

/// The deployment with this id.
pub async fn get(deploys: &Deploys, scope: &impl Scope, id: Uuid) -> Result<Row, Problem> {
    let row = scoped!(scope, "SELECT * FROM deployments WHERE organization_id = :tenant AND id = $1", id);
    deploys.store.read().first(row).await?.ok_or_else(|| Problem::not_found("deployment"))
}

/// The same, in the transaction that goes by it.
pub async fn read(tx: &Transaction<'_>, scope: &impl Scope, id: Uuid) -> Result<Row, Problem> {
    let row = scoped!(scope, "SELECT * FROM deployments WHERE organization_id = :tenant AND id = $1", id);
    tx.read().first(row).await?.ok_or_else(|| Problem::not_found("deployment"))
}

/// The deployments of a placement that are not settled, in the transaction that goes by it.
pub async fn unsettled_of(tx: &Transaction<'_>, scope: &impl Scope, placement: &Placement) -> Result<Vec<Row>, Problem> {
    let rows = scoped!(
        scope,
        "SELECT * FROM deployments WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 \
         AND finished_at IS NULL ORDER BY id",
        placement.service_id,
        placement.environment_id
    );
    tx.read().all(rows).await
}

/// Cancels a deployment that does not serve. One that is queued is settled at once; the worker of any other settles
/// it.
pub async fn cancel(
    deploys: &Deploys,
    tx: &Transaction<'_>,
    context: &Context,
    placement: &Placement,
    row: &Row,
) -> Result<(), Problem> {
    if row.phase()? == Phase::Queued {
        return finish(deploys, tx, context, placement, row, Status::Cancelled, None).await;
    }
    let mark = scoped!(
        &row.grant(),
        "UPDATE deployments SET cancelling = TRUE WHERE organization_id = :tenant AND id = $1 AND finished_at IS NULL",
        row.id
    );
    changed(tx.run(mark).await?)
}

/// An update must have met what it was decided by.
fn changed(rows: u64) -> Result<(), Problem> {
    if rows == 1 { Ok(()) } else { Err(Problem::conflict("The deployment changed in the meantime.").hint("Try again.")) }
}

/// Deployments that are not settled, oldest first.
pub async fn unsettled(deploys: &Deploys) -> Result<Vec<Row>, Problem> {
    let rows =
        unscoped!("the controller works for all tenants", "SELECT * FROM deployments WHERE finished_at IS NULL ORDER BY id");
    deploys.store.read().all(rows).await
}

/// What a new deployment is made of.
pub struct New {
    pub trigger: &'static str,
    pub upload_digest: String,
    /// The release to run, where none is to be built, and the plan it was built by.
    pub release: Option<(Uuid, Option<String>)>,
    pub environment: Environment,
    pub created_by: Uuid,
}

/// Variables and secrets, as a deployment keeps them.
#[derive(Default, Serialize, Deserialize)]
pub struct Sealed {
    /// All of them.
    pub variables: BTreeMap<String, String>,
    /// The names of those that are secrets.
    pub secrets: Vec<String>,
}

impl Sealed {
    fn parse(plain: &[u8]) -> Result<Self, Problem> {
        // Deployments of earlier releases kept the variables alone.
        let earlier = || Some(Self { variables: serde_json::from_slice(plain).ok()?, secrets: Vec::new() });
        serde_json::from_slice(plain).ok().or_else(earlier).ok_or_else(Problem::internal)
    }

    /// The values that no log may show.
    pub fn values(&self) -> Vec<String> {
        self.secrets.iter().filter_map(|name| self.variables.get(name)).cloned().collect()
    }
}

/// The variables and secrets a deployment is made with.
pub enum Environment {
    /// As they are now.
    Plain(Sealed),
    /// As an earlier deployment was made with them.
    Of(Box<Row>),
}

/// Makes a deployment; those of the same placement that have not begun give way to it.
pub async fn insert(
    deploys: &Deploys,
    tx: &Transaction<'_>,
    context: &Context,
    scope: &impl Scope,
    placement: &Placement,
    new: New,
) -> Result<Row, Problem> {
    let id = new_id();
    let highest = scoped!(
        scope,
        "SELECT MAX(number) FROM deployments WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2",
        placement.service_id,
        placement.environment_id
    );
    let number = tx.read().value::<Option<i64>>(highest).await?.flatten().unwrap_or(0) + 1;
    let plain = match &new.environment {
        Environment::Plain(environment) => serde_json::to_vec(environment).map_err(|_| Problem::internal())?,
        Environment::Of(row) => tx.keyring().open_sealed(&sealing_context(row.id), &row.sealed_environment)?,
    };
    let (release_id, plan) = new.release.unwrap_or((id, None));
    let row = Row {
        id,
        organization_id: placement.organization_id,
        service_id: placement.service_id,
        environment_id: placement.environment_id,
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
        "SELECT * FROM deployments WHERE organization_id = :tenant AND service_id = $1 AND environment_id = $2 AND status = 'pending'",
        placement.service_id,
        placement.environment_id
    );
    for older in tx.read().all::<Row>(waiting).await? {
        finish(deploys, tx, context, placement, &older, Status::Superseded, None).await?;
    }
    tx.run(scoped!(
        scope,
        "INSERT INTO deployments (id, organization_id, service_id, environment_id, number, status, phase, trigger_kind, upload_digest, \
         release_id, plan, sealed_environment, cancelling, created_by, created_at) \
         VALUES ($1, :tenant, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
        row.id,
        row.service_id,
        row.environment_id,
        row.number,
        row.status.as_str(),
        row.phase.as_str(),
        row.trigger_kind.as_str(),
        row.upload_digest.as_str(),
        row.release_id,
        row.plan.clone(),
        row.sealed_environment.clone(),
        false,
        row.created_by,
        row.created_at
    ))
    .await?;
    record(deploys, tx, context, placement, &row, "queued").await?;
    Ok(row)
}

/// The environment a deployment was made with, in the clear.
pub fn environment(deploys: &Deploys, row: &Row) -> Result<Sealed, Problem> {
    Sealed::parse(&deploys.store.keyring().open_sealed(&sealing_context(row.id), &row.sealed_environment)?)
}

fn sealing_context(id: Uuid) -> String {
    format!("deployments/{id}")
}

/// Moves a deployment to a phase, before the phase begins; the one before it is complete. Not if it is cancelled or
/// settled by then.
pub async fn enter(
    deploys: &Deploys,
    placement: &Placement,
    row: &Row,
    phase: Phase,
    complete: Option<Phase>,
) -> Result<Row, Failure> {
    let status = match phase {
        Phase::Queued => Status::Pending,
        Phase::PullingSource | Phase::Building => Status::Building,
        _ => Status::Deploying,
    };
    let moved = Row { status: status.name().into(), phase: phase.name().into(), ..row.clone() };
    let tx = deploys.store.begin().await?;
    let entered = tx
        .run(scoped!(
            &row.grant(),
            "UPDATE deployments SET status = $1, phase = $2 \
             WHERE organization_id = :tenant AND id = $3 AND finished_at IS NULL AND NOT cancelling",
            moved.status.as_str(),
            moved.phase.as_str(),
            row.id
        ))
        .await?;
    if entered != 1 {
        return Err(Failure::Cancelled);
    }
    if let Some(phase) = complete {
        attempts::complete(&tx, row, phase).await?;
    }
    // Nothing happens in a queue that could end the server.
    if phase != Phase::Queued {
        if let Some(why) = attempts::begin(&tx, row, phase).await? {
            return Err(Failure::Failed(why));
        }
        record(deploys, &tx, &Context::background("deploy"), placement, &moved, phase.name()).await?;
    }
    tx.commit().await?;
    Ok(moved)
}

/// Whether a deployment is neither cancelled nor settled, in the transaction that goes on with it.
pub async fn goes_on(tx: &Transaction<'_>, row: &Row) -> Result<bool, Problem> {
    let row = scoped!(
        &row.grant(),
        "SELECT 1 FROM deployments WHERE organization_id = :tenant AND id = $1 AND finished_at IS NULL AND NOT cancelling",
        row.id
    );
    tx.read().exists(row).await
}

/// Keeps the plan that a release is built by.
pub async fn set_plan(deploys: &Deploys, row: &Row, plan: &Plan) -> Result<Row, Problem> {
    let text = serde_json::to_string(plan).map_err(|_| Problem::internal())?;
    let tx = deploys.store.begin().await?;
    let keep = scoped!(
        &row.grant(),
        "UPDATE deployments SET plan = $1 WHERE organization_id = :tenant AND id = $2 AND finished_at IS NULL",
        text.as_str(),
        row.id
    );
    changed(tx.run(keep).await?)?;
    tx.commit().await?;
    Ok(Row { plan: Some(text), ..row.clone() })
}

/// Settles a deployment, which must be as it was read in this transaction.
pub async fn finish(
    deploys: &Deploys,
    tx: &Transaction<'_>,
    context: &Context,
    placement: &Placement,
    row: &Row,
    status: Status,
    error: Option<String>,
) -> Result<(), Problem> {
    let phase = if status == Status::Running { Phase::Active } else { row.phase()? };
    // It may name what came out of an archive or a build, of any length.
    let error = error.map(shortened);
    let finished_at = row.finished_at.unwrap_or_else(|| Timestamp::now().0);
    let settled = Row {
        status: status.name().into(),
        phase: phase.name().into(),
        error: error.clone(),
        finished_at: Some(finished_at),
        ..row.clone()
    };
    let settle = scoped!(
        &row.grant(),
        "UPDATE deployments SET status = $1, phase = $2, error = $3, finished_at = $4 \
         WHERE organization_id = :tenant AND id = $5 AND status = $6 AND phase = $7",
        settled.status.as_str(),
        settled.phase.as_str(),
        error,
        finished_at,
        row.id,
        row.status.as_str(),
        row.phase.as_str()
    );
    changed(tx.run(settle).await?)?;
    metrics::counter!("capsule_deployments_total", "status" => status.name()).increment(1);
    let message = settled.error.clone().unwrap_or_else(|| status.name().into());
    record(deploys, tx, context, placement, &settled, &message).await
}

async fn record(
    deploys: &Deploys,
    tx: &Transaction<'_>,
    context: &Context,
    placement: &Placement,
    row: &Row,
    message: &str,
) -> Result<(), Problem> {
    tx.run(scoped!(
        &row.grant(),
        "INSERT INTO deployment_events (deployment_id, organization_id, at, status, phase, message) VALUES ($1, :tenant, $2, $3, $4, $5)",
        row.id,
        Timestamp::now().0,
        row.status.as_str(),
        row.phase.as_str(),
        message
    ))
    .await?;
    emit(tx, context, &DeploymentChanged { deployment: row.view(deploys, placement)? }).await
}
