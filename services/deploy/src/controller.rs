//! Carries deployments out: one worker per deployment, one deployment per placement at a time. A
//! worker starts from the phase on record; nothing it needs lives only in memory.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capsule_bus::Context;
use capsule_contracts::deploy::{Phase, Status};
use capsule_contracts::quotas::Quantity;
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::{lease, scoped};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::build_queue::{BuildQueue, Permit};
use crate::deployments::{self, Row};
use crate::phases::Failure;
use crate::placements::{self, Placement};
use crate::{Deploys, attempts, phases, quotas, reconcile, routes, texts};

/// Looks for work this often even if nobody wakes it.
const PERIOD: Duration = Duration::from_secs(1);

/// Which workers run, and what wakes them.
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
    placements: HashSet<(Uuid, Uuid)>,
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

    /// There is a deployment to carry out.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// There is something to put right.
    pub fn reconcile(&self) {
        self.reconcile.notify_one();
    }

    /// Resolves when there is something to put right.
    pub async fn to_reconcile(&self) {
        self.reconcile.notified().await;
    }

    /// Stops the worker of a deployment, which was marked as to be cancelled.
    pub fn cancel(&self, deployment: Uuid) {
        if let Some(token) = self.running().workers.get(&deployment) {
            token.cancel();
        }
        self.wake();
    }

    /// Marks an instance as being retired, for as long as the mark lives; not if it is marked already.
    pub fn retire(&self, instance: &str) -> Option<Retiring> {
        let mut marked = self.retiring.lock().unwrap_or_else(PoisonError::into_inner);
        marked.insert(instance.to_owned()).then(|| Retiring { all: self.retiring.clone(), instance: instance.to_owned() })
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An instance is being retired.
#[derive(Debug)]
pub struct Retiring {
    all: Arc<Mutex<HashSet<String>>>,
    instance: String,
}

impl Drop for Retiring {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.instance);
    }
}

/// Starts workers for unsettled deployments, for as long as this process leads.
pub async fn run(deploys: &Arc<Deploys>) {
    loop {
        match deployments::unsettled(deploys).await {
            Ok(rows) => {
                deploys.controller.builds.retain(|deployment| rows.iter().any(|row| row.id == deployment));
                due(rows, Timestamp::now()).into_iter().for_each(|row| start(deploys, row));
            }
            Err(problem) => tracing::warn!(%problem, "deployments could not be looked for"),
        }
        let _ = tokio::time::timeout(PERIOD, deploys.controller.wake.notified()).await;
    }
}

/// Of each placement the oldest deployment, once it is time for its next attempt, and all that are to be cancelled.
fn due(rows: Vec<Row>, now: Timestamp) -> Vec<Row> {
    let mut placements = HashSet::new();
    let is_due = |row: &Row| {
        let is_oldest = placements.insert((row.service_id, row.environment_id));
        row.cancelling || (is_oldest && row.next_attempt_at <= now.0)
    };
    rows.into_iter().filter(is_due).collect()
}

fn start(deploys: &Arc<Deploys>, row: Row) {
    let token = CancellationToken::new();
    {
        let mut running = deploys.controller.running();
        // It may have been told to stop by way of another process.
        if let Some(token) = running.workers.get(&row.id).filter(|_| row.cancelling) {
            token.cancel();
        }
        if running.workers.contains_key(&row.id) || !running.placements.insert((row.service_id, row.environment_id)) {
            return;
        }
        running.workers.insert(row.id, token.clone());
    }
    let deploys = deploys.clone();
    lease::spawn(async move {
        let (id, place) = (row.id, (row.service_id, row.environment_id));
        if let Err(problem) = work(&deploys, row, token).await {
            // Tried again after the period: the phase on record has not moved.
            tracing::warn!(deployment = %id, %problem, "a deployment could not go on");
            tokio::time::sleep(PERIOD).await;
        }
        let mut running = deploys.controller.running();
        running.workers.remove(&id);
        running.placements.remove(&place);
        drop(running);
        deploys.controller.wake();
    });
}

async fn work(deploys: &Arc<Deploys>, row: Row, token: CancellationToken) -> Result<(), Problem> {
    let placement = placements::get(deploys, &row.grant(), row.service_id, row.environment_id).await?;
    // Dropping the phases' future ends whatever step they are at.
    let outcome = tokio::select! {
        outcome = carry_out(deploys, &placement, row.clone()) => outcome,
        () = token.cancelled() => Err(Failure::Cancelled),
    };
    match outcome {
        Ok(()) => Ok(()),
        Err(Failure::Cancelled) => settle(deploys, &row, Status::Cancelled, "cancelled").await,
        Err(Failure::Failed(why)) => fail(deploys, &row, &why).await,
        Err(Failure::Retry(problem)) => {
            tracing::warn!(deployment = %row.id, %problem, "an attempt was hindered");
            match hinder(deploys, &row, &problem).await? {
                Some(why) => fail(deploys, &row, &why).await,
                None => Ok(()),
            }
        }
    }
}

/// Sets the time of the next attempt, or says why there is none.
async fn hinder(deploys: &Deploys, row: &Row, problem: &Problem) -> Result<Option<String>, Problem> {
    let tx = deploys.store.begin().await?;
    let row = deployments::read(&tx, &row.grant(), row.id).await?;
    let given_up = attempts::hinder(&tx, &row, row.phase()?, problem).await?;
    tx.commit().await?;
    Ok(given_up)
}

/// Whatever failed may have named a secret or a path; users see neither.
async fn fail(deploys: &Deploys, row: &Row, why: &str) -> Result<(), Problem> {
    let why = texts::for_users(deploys, row, why);
    let _ = capsule_builder::say(&deploys.build_log(row.id), &why);
    settle(deploys, row, Status::Failed, &why).await
}

/// Runs the phases from the one on record to the last.
async fn carry_out(deploys: &Arc<Deploys>, placement: &Placement, mut row: Row) -> Result<(), Failure> {
    let mut phase = match row.phase()? {
        // Half a source or half a build is not gone on with.
        Phase::Building => Phase::PullingSource,
        phase => phase,
    };
    // Held from the source to the release: what is unpacked and planned is bounded as well.
    let mut permit = None;
    let mut complete = None;
    loop {
        match phase {
            Phase::PullingSource if permit.is_none() => match permit_to_build(deploys, &row).await? {
                Some(granted) => permit = Some(granted),
                // It was settled meanwhile: a newer one takes its place.
                None => return Ok(()),
            },
            Phase::CopyingFiles => permit = None,
            _ => {}
        }
        row = deployments::enter(deploys, placement, &row, phase, complete).await?;
        failpoint(phase, "before").await;
        let next = match phase {
            Phase::Queued if row.reuses_release() => Phase::UpdatingRoutes,
            Phase::Queued => Phase::PullingSource,
            Phase::PullingSource => phases::pulling_source::run(deploys, &row).await.map(|()| Phase::Building)?,
            Phase::Building => {
                row = phases::building::run(deploys, placement, &row).await?;
                Phase::CopyingFiles
            }
            Phase::CopyingFiles => phases::copying_files::run(deploys, &row).await.map(|()| Phase::CreatingSymlinks)?,
            Phase::CreatingSymlinks => {
                phases::creating_symlinks::run(deploys, placement, &row).await?;
                Phase::UpdatingRoutes
            }
            Phase::UpdatingRoutes => {
                phases::updating_routes::run(deploys, placement, &row).await?;
                Phase::HealthCheck
            }
            Phase::HealthCheck => phases::health_check::run(deploys, placement, &row).await.map(|()| Phase::Active)?,
            Phase::Active => {
                phases::active::run(deploys, placement, &row).await?;
                failpoint(phase, "after").await;
                return Ok(());
            }
        };
        failpoint(phase, "after").await;
        complete = Some(std::mem::replace(&mut phase, next));
    }
}

/// Waits until it is the organization's turn to build; `None` where the deployment was settled meanwhile. The phase on
/// record is the queue, where no attempts are counted.
async fn permit_to_build(deploys: &Deploys, row: &Row) -> Result<Option<Permit>, Problem> {
    loop {
        let limits = quotas::of(deploys, row.organization_id).await?;
        let limit = usize::try_from(limits.limit(Quantity::ConcurrentBuilds)).unwrap_or(1);
        let mut acquiring = std::pin::pin!(deploys.controller.builds.acquire(row.organization_id, row.id, limit));
        let permit = match tokio::time::timeout(PERIOD, &mut acquiring).await {
            Ok(permit) => permit,
            Err(_) => {
                let why = "waiting for other builds to end: as many run as may run at a time, of your organization or of all";
                let _ = capsule_builder::say(&deploys.build_log(row.id), why);
                acquiring.await
            }
        };
        let now = deployments::get(deploys, &row.grant(), row.id).await?;
        if permit.is_some() || now.finished_at.is_some() {
            return Ok(permit.filter(|_| now.finished_at.is_none()));
        }
    }
}

/// Settles a deployment that does not come to serve: its candidates go, what served before goes on. One that serves
/// all the same is settled as what runs.
pub async fn settle(deploys: &Deploys, row: &Row, status: Status, why: &str) -> Result<(), Problem> {
    let grant = row.grant();
    let tx = deploys.store.begin().await?;
    let row = deployments::read(&tx, &grant, row.id).await?;
    let placement = placements::read(&tx, &grant, row.service_id, row.environment_id).await?;
    if row.finished_at.is_some() {
        return Ok(());
    }
    if placement.active_deployment_id == Some(row.id) && placement.wanted != "removed" {
        drop(tx);
        return phases::active::settle(deploys, &row).await;
    }
    let error = (status == Status::Failed).then(|| why.to_owned());
    deployments::finish(deploys, &tx, &Context::background("deploy"), &placement, &row, status, error).await?;
    tx.run(scoped!(
        &grant,
        "UPDATE instances SET role = 'retiring' WHERE organization_id = :tenant AND deployment_id = $1 AND role = 'candidate'",
        row.id
    ))
    .await?;
    routes::raise(&tx).await?;
    tx.commit().await?;
    tracing::info!(deployment = %row.id, status = status.name(), why, "deployment settled");
    deploys.controller.reconcile();
    let directory = deploys.work_directory(row.id);
    let _ = tokio::task::spawn_blocking(move || capsule_builder::trees::remove(&directory)).await;
    reconcile::prune(deploys, &placement).await?;
    routes::publish(deploys).await
}

/// For tests: `CAPSULE_FAILPOINT=<phase>:before` (or `:after`) ends the process there, at once. With `=<file>` behind
/// it, the worker makes `<file>.reached` and waits until there is `<file>`.
async fn failpoint(phase: Phase, moment: &str) {
    let Ok(wanted) = std::env::var("CAPSULE_FAILPOINT") else { return };
    let (point, file) = wanted.split_once('=').map_or((wanted.as_str(), None), |(point, file)| (point, Some(file)));
    if point.split_once(':') != Some((phase.name(), moment)) {
        return;
    }
    let Some(file) = file else { std::process::abort() };
    let _ = std::fs::write(format!("{file}.reached"), "");
    while !std::path::Path::new(file).exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::due;
    use crate::deployments::Row;
    use crate::tests::row;
    use capsule_contracts::{Timestamp, Uuid};

    #[test]
    fn a_deployment_in_back_off_holds_later_ones_of_its_service_back_and_no_others() {
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let rows = vec![
            Row { next_attempt_at: 10, ..row(11, one) },
            row(12, one),
            Row { cancelling: true, ..row(13, one) },
            row(14, two),
            row(15, two),
        ];
        let at = |now: i64| due(rows.clone(), Timestamp(now)).iter().map(|row| row.id.as_u128()).collect::<Vec<_>>();
        assert_eq!(at(9), [13, 14]);
        assert_eq!(at(10), [11, 13, 14]);
    }
}
