//! The controller runs deployments: one worker per deployment, and one deployment at a time per service and
//! environment. A worker starts at the stored phase; no state that it needs is only in memory.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capsule_bus::{Context, SystemAccess, SystemGrant};
use capsule_contracts::deploy::{Phase, Status};
use capsule_contracts::quotas::Quantity;
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::{Scope, lease, scoped};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::build_queue::{BuildQueue, Permit};
use crate::deployments::{self, Outcome, Row};
use crate::phases::Failure;
use crate::service_environments::{self, ServiceEnvironment};
use crate::{DeployService, attempts, failpoint, phases, quotas, reconcile, routes, texts};

/// The interval between passes without a wake-up.
const PERIOD: Duration = Duration::from_secs(1);

/// The running workers, and the signals that wake the controller and the reconciler.
#[derive(Debug)]
pub struct Controller {
    wake: Notify,
    reconcile: Notify,
    /// Permits for builds.
    pub builds: BuildQueue,
    running: Mutex<Running>,
    retiring: Arc<Mutex<HashSet<String>>>,
}

#[derive(Debug, Default)]
struct Running {
    workers: HashMap<Uuid, CancellationToken>,
    /// Ids of the service and environment of each worker's deployment.
    service_environments: HashSet<(Uuid, Uuid)>,
}

impl Controller {
    pub fn new(builds: usize) -> Self {
        Self {
            wake: Notify::new(),
            reconcile: Notify::new(),
            builds: BuildQueue::new(builds),
            running: Mutex::default(),
            retiring: Arc::default(),
        }
    }

    /// Wakes the controller: there may be a deployment to run.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Wakes the reconciler.
    pub fn reconcile(&self) {
        self.reconcile.notify_one();
    }

    /// Waits for [`Controller::reconcile`].
    pub async fn reconcile_requested(&self) {
        self.reconcile.notified().await;
    }

    /// Stops the worker of a deployment whose row is marked as cancelling.
    pub fn cancel(&self, deployment: Uuid) {
        if let Some(token) = self.running().workers.get(&deployment) {
            token.cancel();
        }
        self.wake();
    }

    /// Marks an instance as being retired until the guard is dropped. `None` if it is marked already.
    pub fn retire(&self, instance: &str) -> Option<RetireGuard> {
        let mut marked = self.retiring.lock().unwrap_or_else(PoisonError::into_inner);
        marked.insert(instance.to_owned()).then(|| RetireGuard { all: self.retiring.clone(), instance: instance.to_owned() })
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The mark of an instance that is being retired.
#[derive(Debug)]
pub struct RetireGuard {
    all: Arc<Mutex<HashSet<String>>>,
    instance: String,
}

impl Drop for RetireGuard {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.instance);
    }
}

/// Starts workers for unsettled deployments, while this process is the leader.
pub async fn run(service: &Arc<DeployService>, system: &SystemAccess) {
    loop {
        match deployments::unsettled(service).await {
            Ok(rows) => {
                service.controller.builds.retain(|deployment| rows.iter().any(|row| row.id == deployment));
                due_deployments(rows, Timestamp::now()).into_iter().for_each(|row| start_worker(service, system, row));
            }
            Err(problem) => tracing::warn!(%problem, "cannot read the unsettled deployments; trying again"),
        }
        let _ = tokio::time::timeout(PERIOD, service.controller.wake.notified()).await;
    }
}

/// The deployments that need a worker: the oldest of each service and environment if its next attempt is due, and all
/// that are being cancelled.
fn due_deployments(rows: Vec<Row>, now: Timestamp) -> Vec<Row> {
    let mut seen = HashSet::new();
    let is_due = |row: &Row| {
        let is_oldest = seen.insert((row.service_id, row.environment_id));
        row.cancelling || (is_oldest && row.next_attempt_at <= now.0)
    };
    rows.into_iter().filter(is_due).collect()
}

fn start_worker(service: &Arc<DeployService>, system: &SystemAccess, row: Row) {
    let token = CancellationToken::new();
    {
        let mut running = service.controller.running();
        // Another process may have accepted the cancellation.
        if let Some(token) = running.workers.get(&row.id).filter(|_| row.cancelling) {
            token.cancel();
        }
        if running.workers.contains_key(&row.id) || !running.service_environments.insert((row.service_id, row.environment_id)) {
            return;
        }
        running.workers.insert(row.id, token.clone());
    }
    let grant = system.organization(row.organization_id, "a deployment is carried out");
    let service = service.clone();
    lease::spawn(async move {
        let (id, key) = (row.id, (row.service_id, row.environment_id));
        if let Err(problem) = run_worker(&service, &grant, row, token).await {
            // The next pass starts a worker at the same phase: the row has not changed.
            tracing::warn!(deployment = %id, %problem, "the worker of a deployment failed; trying again");
            tokio::time::sleep(PERIOD).await;
        }
        let mut running = service.controller.running();
        running.workers.remove(&id);
        running.service_environments.remove(&key);
        drop(running);
        service.controller.wake();
    });
}

async fn run_worker(
    service: &Arc<DeployService>,
    grant: &SystemGrant,
    row: Row,
    token: CancellationToken,
) -> Result<(), Problem> {
    let service_environment = service_environments::get(service, grant, row.service_id, row.environment_id).await?;
    // Dropping the future of the phases ends the current step.
    let outcome = tokio::select! {
        outcome = run_phases(service, grant, &service_environment, row.clone()) => outcome,
        () = token.cancelled() => Err(Failure::Cancelled),
    };
    match outcome {
        Ok(()) => Ok(()),
        Err(Failure::Cancelled) => settle(service, grant, &row, Status::Cancelled, "cancelled").await,
        Err(Failure::Failed(why)) => fail(service, grant, &row, &why).await,
        Err(Failure::Retry(problem)) => {
            tracing::warn!(deployment = %row.id, %problem, "a part of the platform was not available; the attempt is repeated");
            match record_hindered(service, grant, &row, &problem).await? {
                Some(why) => fail(service, grant, &row, &why).await,
                None => Ok(()),
            }
        }
    }
}

/// Sets the time of the next attempt. Returns the reason if there is none.
async fn record_hindered(
    service: &DeployService,
    scope: &impl Scope,
    row: &Row,
    problem: &Problem,
) -> Result<Option<String>, Problem> {
    let tx = service.store.begin().await?;
    let row = deployments::read(&tx, scope, row.id).await?;
    let given_up = attempts::record_hindered(&tx, scope, &row, row.phase()?, problem).await?;
    tx.commit().await?;
    Ok(given_up)
}

/// Settles a deployment as failed. `why` may contain secrets and paths of the host, which are removed first.
async fn fail(service: &DeployService, scope: &impl Scope, row: &Row, why: &str) -> Result<(), Problem> {
    let why = texts::for_users(service, row, why);
    let _ = capsule_builder::log_line(&service.build_log(row.id), &why);
    settle(service, scope, row, Status::Failed, &why).await
}

/// Runs the phases from the stored one to the last.
async fn run_phases(
    service: &Arc<DeployService>,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    mut row: Row,
) -> Result<(), Failure> {
    let mut phase = match row.phase()? {
        // A build that was interrupted starts again with a fresh copy of the source.
        Phase::Building => Phase::PullingSource,
        phase => phase,
    };
    // Held from the first step on the source until the release exists: unpacking and planning count as building.
    let mut permit = None;
    let mut completed = None;
    loop {
        match phase {
            Phase::PullingSource if permit.is_none() => match acquire_build_permit(service, scope, &row).await? {
                Some(granted) => permit = Some(granted),
                // It was settled in the meantime: a newer deployment supersedes it.
                None => return Ok(()),
            },
            Phase::CopyingFiles => permit = None,
            _ => {}
        }
        row = deployments::enter_phase(service, scope, service_environment, &row, phase, completed).await?;
        failpoint::reach(phase, "before").await;
        let next = match phase {
            Phase::Queued if row.reuses_release() => Phase::UpdatingRoutes,
            Phase::Queued => Phase::PullingSource,
            Phase::PullingSource => phases::pulling_source::run(service, &row).await.map(|()| Phase::Building)?,
            Phase::Building => {
                row = phases::building::run(service, scope, service_environment, &row).await?;
                Phase::CopyingFiles
            }
            Phase::CopyingFiles => phases::copying_files::run(service, &row).await.map(|()| Phase::CreatingSymlinks)?,
            Phase::CreatingSymlinks => {
                phases::creating_symlinks::run(service, service_environment, &row).await?;
                Phase::UpdatingRoutes
            }
            Phase::UpdatingRoutes => {
                phases::updating_routes::run(service, scope, service_environment, &row).await?;
                Phase::HealthCheck
            }
            Phase::HealthCheck => {
                phases::health_check::run(service, scope, service_environment, &row).await.map(|()| Phase::Active)?
            }
            Phase::Active => {
                phases::active::run(service, scope, service_environment, &row).await?;
                failpoint::reach(phase, "after").await;
                return Ok(());
            }
        };
        failpoint::reach(phase, "after").await;
        completed = Some(std::mem::replace(&mut phase, next));
    }
}

/// Waits for a permit to build. `None` if the deployment was settled in the meantime. The stored phase is `queued`,
/// in which no attempts are counted.
async fn acquire_build_permit(service: &DeployService, scope: &impl Scope, row: &Row) -> Result<Option<Permit>, Problem> {
    loop {
        let limits = quotas::limits_of(service, row.organization_id).await?;
        let limit = usize::try_from(limits.limit(Quantity::ConcurrentBuilds)).unwrap_or(1);
        let mut acquiring = std::pin::pin!(service.controller.builds.acquire(row.organization_id, row.id, limit));
        let permit = match tokio::time::timeout(PERIOD, &mut acquiring).await {
            Ok(permit) => permit,
            Err(_) => {
                let why = "Waiting for other builds to finish: the limit of concurrent builds of your organization or of this \
                           server is reached.";
                let _ = capsule_builder::log_line(&service.build_log(row.id), why);
                acquiring.await
            }
        };
        let now = deployments::get(service, scope, row.id).await?;
        if permit.is_some() || now.finished_at.is_some() {
            return Ok(permit.filter(|_| now.finished_at.is_none()));
        }
    }
}

/// Settles a deployment that failed or was cancelled: its candidates retire, and the previous release stays live. A
/// deployment that is active already is settled as running.
pub async fn settle(service: &DeployService, scope: &impl Scope, row: &Row, status: Status, why: &str) -> Result<(), Problem> {
    let tx = service.store.begin().await?;
    let row = deployments::read(&tx, scope, row.id).await?;
    let service_environment = service_environments::read(&tx, scope, row.service_id, row.environment_id).await?;
    if row.finished_at.is_some() {
        return Ok(());
    }
    if service_environment.active_deployment_id == Some(row.id) && service_environment.desired_state != "removed" {
        drop(tx);
        return phases::active::settle(service, scope, &row).await;
    }
    let error = (status == Status::Failed).then(|| why.to_owned());
    let outcome = Outcome { status, error };
    deployments::finish(service, &tx, &Context::background("deploy"), scope, &service_environment, &row, outcome).await?;
    tx.run(scoped!(
        scope,
        "UPDATE instances SET role = 'retiring' WHERE organization_id = :tenant AND deployment_id = :deployment_id \
         AND role = 'candidate'",
        deployment_id = row.id
    ))
    .await?;
    routes::bump_revision(&tx).await?;
    tx.commit().await?;
    tracing::info!(deployment = %row.id, status = status.name(), why, "a deployment is settled");
    service.controller.reconcile();
    let directory = service.work_directory(row.id);
    let _ = tokio::task::spawn_blocking(move || capsule_builder::trees::remove(&directory)).await;
    reconcile::prune(service, &service_environment).await?;
    routes::publish(service).await
}

#[cfg(test)]
mod tests {
    use super::due_deployments;
    use crate::deployments::Row;
    use crate::tests::row;
    use capsule_contracts::{Timestamp, Uuid};

    #[test]
    fn a_deployment_in_back_off_delays_only_later_deployments_of_its_service() {
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let rows = vec![
            Row { next_attempt_at: 10, ..row(11, one) },
            row(12, one),
            Row { cancelling: true, ..row(13, one) },
            row(14, two),
            row(15, two),
        ];
        let at = |now: i64| due_deployments(rows.clone(), Timestamp(now)).iter().map(|row| row.id.as_u128()).collect::<Vec<_>>();
        assert_eq!(at(9), [13, 14]);
        assert_eq!(at(10), [11, 13, 14]);
    }
}
