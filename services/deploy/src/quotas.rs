//! Quotas for deployments, instances and uploads. Each function counts in the transaction that uses the quota; writing
//! transactions of a service are serial.
//!
//! A rollout runs old and new instances side by side, so for each service in an environment the larger of its serving
//! instances and its candidates counts; retiring ones do not. To bound the retiring instances, new ones wait while all
//! live instances together would exceed twice the limit.

use std::sync::Arc;

use capsule_buildplan::Plan;
use capsule_bus::Call;
use capsule_contracts::quotas::{CountDeployUse, Quantity, QuotaUse, Quotas};
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Scope, Store, Transaction, scoped, unscoped};

use crate::instances::memory_limit;
use crate::{DeployService, reconcile};

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;
const MIB: i64 = 1 << 20;

/// Reads the limits of an organization; call it before the transaction that counts.
///
/// # Errors
/// If they are not cached and the organization service does not answer.
pub async fn limits_of(service: &DeployService, organization: Uuid) -> Result<Quotas, Problem> {
    capsule_bus::quotas(service, organization).await
}

/// The use of an organization in the last `seconds`.
async fn used(tx: &Transaction<'_>, scope: &impl Scope, kind: &str, seconds: i64) -> Result<i64, Problem> {
    let sum = scoped!(
        scope,
        "SELECT CAST(COALESCE(SUM(amount), 0) AS BIGINT) FROM quota_uses \
         WHERE organization_id = :tenant AND kind = :kind AND at > :at",
        kind,
        at = Timestamp::now().plus_seconds(-seconds).0
    );
    Ok(tx.read().value::<i64>(sum).await?.unwrap_or_default())
}

async fn record_use(tx: &Transaction<'_>, scope: &impl Scope, id: Uuid, kind: &str, amount: i64) -> Result<(), Problem> {
    tx.run(scoped!(
        scope,
        "INSERT INTO quota_uses (id, organization_id, kind, amount, at) VALUES (:id, :tenant, :kind, :amount, :at)",
        id,
        kind,
        amount,
        at = Timestamp::now().0
    ))
    .await?;
    Ok(())
}

/// Counts a deployment, whatever its outcome, and if `has_build` also a build.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn count_deployment(tx: &Transaction<'_>, scope: &impl Scope, quotas: &Quotas, has_build: bool) -> Result<(), Problem> {
    let deployments = used(tx, scope, "deployment", HOUR).await?;
    quotas.check(Quantity::DeploymentsPerHour, deployments, deployments + 1)?;
    record_use(tx, scope, new_id(), "deployment", 1).await?;
    if has_build {
        for (quantity, seconds) in [(Quantity::BuildsPerHour, HOUR), (Quantity::BuildsPerDay, DAY)] {
            let builds = used(tx, scope, "build", seconds).await?;
            quotas.check(quantity, builds, builds + 1)?;
        }
        record_use(tx, scope, new_id(), "build", 1).await?;
    }
    Ok(())
}

/// Counts an upload with its announced size, before its bytes arrive.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn begin_upload(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    quotas: &Quotas,
    upload: Uuid,
    bytes: i64,
) -> Result<(), Problem> {
    let before = used(tx, scope, "upload", DAY).await?;
    let mib = |bytes: i64| bytes.saturating_add(MIB - 1) / MIB;
    // Compared in bytes, reported in MiB.
    if before.saturating_add(bytes) > quotas.limit(Quantity::UploadMibPerDay).saturating_mul(MIB) {
        let after = mib(before.saturating_add(bytes));
        quotas.check(Quantity::UploadMibPerDay, (before / MIB).min(after - 1), after)?;
    }
    record_use(tx, scope, upload, "upload", bytes).await
}

/// Corrects the count of an upload to its real size. An incomplete upload keeps counting with its announced size,
/// because its bytes may have been sent and written.
///
/// # Errors
/// If the database does not answer.
pub async fn complete_upload(tx: &Transaction<'_>, scope: &impl Scope, upload: Uuid, bytes: i64) -> Result<(), Problem> {
    let update =
        scoped!(scope, "UPDATE quota_uses SET amount = :bytes WHERE organization_id = :tenant AND id = :upload", bytes, upload);
    tx.run(update).await?;
    Ok(())
}

/// A number of instances, and the sum of their memory limits in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    count: i64,
    memory: i64,
}

impl Load {
    /// The instances of a plan: one of each process type.
    pub fn of(plan: &Plan) -> Self {
        let count = i64::try_from(plan.processes.len()).unwrap_or(i64::MAX);
        let memory = i64::try_from(memory_limit(plan)).unwrap_or(i64::MAX);
        Self { count, memory: count.saturating_mul(memory) }
    }

    fn plus(self, other: Self) -> Self {
        Self { count: self.count.saturating_add(other.count), memory: self.memory.saturating_add(other.memory) }
    }

    fn max(self, other: Self) -> Self {
        Self { count: self.count.max(other.count), memory: self.memory.max(other.memory) }
    }

    fn mib(self) -> i64 {
        self.memory / MIB
    }
}

/// The instances of a service in an environment by role.
#[derive(Clone, Copy, Default)]
struct LoadByRole {
    serving: Load,
    candidates: Load,
    retiring: Load,
}

impl LoadByRole {
    /// The load that counts towards quotas.
    fn counted(self) -> Load {
        self.serving.max(self.candidates)
    }

    fn total(self) -> Load {
        self.serving.plus(self.candidates).plus(self.retiring)
    }
}

#[derive(FromRow)]
struct Row {
    service_id: Uuid,
    environment_id: Uuid,
    role: String,
    instances: i64,
    memory: i64,
}

/// The live instances of an organization by service and environment.
async fn loads(tx: &Transaction<'_>, scope: &impl Scope) -> Result<Vec<((Uuid, Uuid), LoadByRole)>, Problem> {
    // Instances that earlier versions started have no recorded limit: theirs was this one, or twice as much.
    let rows = scoped!(
        scope,
        "SELECT service_id, environment_id, role, COUNT(*) AS instances, \
         CAST(SUM(COALESCE(memory_bytes, 536870912)) AS BIGINT) AS memory \
         FROM instances WHERE organization_id = :tenant AND role <> 'gone' GROUP BY service_id, environment_id, role"
    );
    let mut all: Vec<((Uuid, Uuid), LoadByRole)> = Vec::new();
    for row in tx.read().all::<Row>(rows).await? {
        let key = (row.service_id, row.environment_id);
        let index = all.iter().position(|(other, _)| *other == key).unwrap_or_else(|| {
            all.push((key, LoadByRole::default()));
            all.len() - 1
        });
        let by_role = &mut all[index].1;
        let load = Load { count: row.instances, memory: row.memory };
        match row.role.as_str() {
            "serving" => by_role.serving = load,
            "candidate" => by_role.candidates = load,
            _ => by_role.retiring = load,
        }
    }
    Ok(all)
}

/// Whether new instances may be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Yes, in this transaction.
    Now,
    /// Only when retiring instances are gone.
    Later,
}

/// Checks the quotas for `new` instances of a service in an environment (`key`), which will replace the serving ones.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn admit_instances(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    quotas: &Quotas,
    key: (Uuid, Uuid),
    new: Load,
) -> Result<Admission, Problem> {
    let all = loads(tx, scope).await?;
    let own = all.iter().find(|(other, _)| *other == key).map(|(_, load)| *load).unwrap_or_default().counted();
    let others = all.iter().filter(|(other, _)| *other != key).fold(Load::default(), |sum, (_, load)| sum.plus(load.counted()));
    let (before, after) = (others.plus(own), others.plus(new));
    quotas.check(Quantity::InstancesPerService, own.count, new.count)?;
    quotas.check(Quantity::Instances, before.count, after.count)?;
    quotas.check(Quantity::MemoryMib, before.mib(), after.mib())?;
    let live = all.iter().fold(new, |sum, (_, load)| sum.plus(load.total()));
    let count = quotas.limit(Quantity::Instances).max(after.count).saturating_mul(2);
    let memory = quotas.limit(Quantity::MemoryMib).max(after.mib()).saturating_mul(2);
    Ok(if live.count <= count && live.mib() <= memory { Admission::Now } else { Admission::Later })
}

/// Deletes the uses that no longer count.
///
/// # Errors
/// If the database does not answer.
pub async fn prune(store: &Store) -> Result<(), Problem> {
    let before = Timestamp::now().plus_seconds(-DAY).0;
    // An hour late, so that not each expired row costs a transaction.
    let much_older = Timestamp::now().plus_seconds(-DAY - HOUR).0;
    let exists = unscoped!("the platform's own work", "SELECT 1 FROM quota_uses WHERE at < :much_older LIMIT 1", much_older);
    let delete = unscoped!("the platform's own work", "DELETE FROM quota_uses WHERE at < :before", before);
    reconcile::delete_if_any(store, exists, delete).await
}

pub async fn count_use(service: Arc<DeployService>, call: Call<CountDeployUse>) -> Result<QuotaUse, Problem> {
    let grant = call.grant.organization(call.message.organization_id, "what an organization uses is counted");
    let tx = service.store.begin().await?;
    let all = loads(&tx, &grant).await?;
    let load = all.iter().fold(Load::default(), |sum, (_, load)| sum.plus(load.counted()));
    let largest = all.iter().map(|(_, load)| load.counted().count).max().unwrap_or_default();
    let building = service.controller.builds.running(grant.organization());
    let numbers = [
        (Quantity::Instances, load.count),
        (Quantity::InstancesPerService, largest),
        (Quantity::MemoryMib, load.mib()),
        (Quantity::ConcurrentBuilds, i64::try_from(building).unwrap_or(i64::MAX)),
        (Quantity::BuildsPerHour, used(&tx, &grant, "build", HOUR).await?),
        (Quantity::BuildsPerDay, used(&tx, &grant, "build", DAY).await?),
        (Quantity::DeploymentsPerHour, used(&tx, &grant, "deployment", HOUR).await?),
        (Quantity::UploadMibPerDay, used(&tx, &grant, "upload", DAY).await? / MIB),
    ];
    Ok(QuotaUse { used: numbers.into_iter().map(|(quantity, used)| (quantity.name().to_owned(), used)).collect() })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use capsule_contracts::quotas::{Quantity, Quotas};
    use capsule_contracts::{Problem, Uuid, new_id};
    use capsule_store::{Databases, Keyring, Store, unscoped};

    use super::{Admission, Load, MIB};
    use crate::tests::TestScope;

    const ONE: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);

    async fn open(folder: &std::path::Path) -> Arc<Store> {
        let keyring = Keyring::open(&folder.join("key")).expect("a key");
        let databases = Databases::Embedded(folder.into());
        Arc::new(Store::open(&databases, crate::NAME, keyring, crate::MIGRATIONS).await.expect("opens"))
    }

    fn quotas(limits: &[(Quantity, u32)]) -> Quotas {
        Quotas(limits.iter().map(|(quantity, limit)| (quantity.name().to_owned(), *limit)).collect())
    }

    fn place(number: u128) -> (Uuid, Uuid) {
        (Uuid::from_u128(100 + number), Uuid::from_u128(200))
    }

    fn load(count: i64) -> Load {
        Load { count, memory: count * 512 * MIB }
    }

    /// Checks the quotas for instances, and inserts them as candidates if they are admitted.
    async fn start(store: &Store, organization: Uuid, limits: &Quotas, at: u128, count: i64) -> Result<Admission, Problem> {
        let tx = store.begin().await?;
        let grant = TestScope(organization);
        let room = super::admit_instances(&tx, &grant, limits, place(at), load(count)).await?;
        for _ in (0..count).filter(|_| room == Admission::Now) {
            let (service, environment) = place(at);
            tx.run(unscoped!(
                "test",
                "INSERT INTO instances (id, organization_id, service_id, environment_id, deployment_id, process, port, role, \
                 created_at, memory_bytes) VALUES (:id, :organization, :service, :environment, :service, 'web', 1, \
                 'candidate', 1, :memory_bytes)",
                id = new_id().to_string(),
                organization,
                service,
                environment,
                memory_bytes = 512 * MIB
            ))
            .await?;
        }
        tx.commit().await?;
        Ok(room)
    }

    async fn change_role(store: &Store, at: u128, from: &str, to: &str) {
        let tx = store.begin().await.expect("begins");
        let update = unscoped!(
            "test",
            "UPDATE instances SET role = :to WHERE role = :from AND service_id = :service_id",
            to,
            from,
            service_id = place(at).0
        );
        tx.run(update).await.expect("turned");
        tx.commit().await.expect("committed");
    }

    fn assert_refused(outcome: Result<Admission, Problem>, quantity: Quantity) {
        let problem = outcome.expect_err("refused");
        assert!(problem.code == "quota_exceeded" && problem.to_string().contains(quantity.name()), "{problem}");
    }

    #[tokio::test]
    async fn a_rollout_counts_once_and_retiring_instances_do_not_count() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        let limits = quotas(&[(Quantity::Instances, 3)]);
        // Several rollouts at the limit.
        for _ in 0..3 {
            change_role(&store, 1, "retiring", "gone").await;
            assert_eq!(start(&store, ONE, &limits, 1, 3).await, Ok(Admission::Now));
            change_role(&store, 1, "serving", "retiring").await;
            change_role(&store, 1, "candidate", "serving").await;
        }
        assert_refused(start(&store, ONE, &limits, 2, 1).await, Quantity::Instances);
        assert_eq!(start(&store, OTHER, &limits, 3, 3).await, Ok(Admission::Now), "another organization has its own");
        // Three serve and three retire: three more have to wait.
        assert_eq!(start(&store, ONE, &limits, 1, 3).await, Ok(Admission::Later));
        change_role(&store, 1, "retiring", "gone").await;
        assert_eq!(start(&store, ONE, &limits, 1, 2).await, Ok(Admission::Now));
        // During a rollout to fewer instances, the larger number counts.
        assert_refused(start(&store, ONE, &limits, 2, 1).await, Quantity::Instances);
        change_role(&store, 1, "serving", "retiring").await;
        change_role(&store, 1, "candidate", "serving").await;
        assert_eq!(start(&store, ONE, &limits, 2, 1).await, Ok(Admission::Now));
    }

    #[tokio::test]
    async fn memory_and_the_instances_of_one_service_have_limits() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        let limits = quotas(&[(Quantity::Instances, 100), (Quantity::InstancesPerService, 3), (Quantity::MemoryMib, 2048)]);
        assert_refused(start(&store, ONE, &limits, 1, 4).await, Quantity::InstancesPerService);
        assert_eq!(start(&store, ONE, &limits, 1, 3).await, Ok(Admission::Now));
        assert_refused(start(&store, ONE, &limits, 2, 2).await, Quantity::MemoryMib);
        assert_eq!(start(&store, ONE, &limits, 2, 1).await, Ok(Admission::Now));
        // Instances above a lowered limit can be replaced by as many, not by more.
        change_role(&store, 1, "candidate", "serving").await;
        let lowered = quotas(&[(Quantity::Instances, 1), (Quantity::InstancesPerService, 1), (Quantity::MemoryMib, 1)]);
        assert_eq!(start(&store, ONE, &lowered, 1, 3).await, Ok(Admission::Now));
        assert_refused(start(&store, ONE, &lowered, 2, 2).await, Quantity::InstancesPerService);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn rollouts_that_race_never_exceed_a_quota() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        let limits = quotas(&[(Quantity::Instances, 5)]);
        let started = (0..16).map(|at| {
            let (store, limits) = (store.clone(), limits.clone());
            tokio::spawn(async move { start(&store, ONE, &limits, at, 2).await.is_ok() })
        });
        let mut count = 0;
        for started in started.collect::<Vec<_>>() {
            count += usize::from(started.await.expect("no panic"));
        }
        assert_eq!(count, 2);
    }

    #[tokio::test]
    async fn builds_count_for_their_period_whatever_their_outcome() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        let limits = quotas(&[(Quantity::BuildsPerHour, 2), (Quantity::BuildsPerDay, 3), (Quantity::DeploymentsPerHour, 4)]);
        let deploy = async |has_build: bool| {
            let tx = store.begin().await.expect("begins");
            super::count_deployment(&tx, &TestScope(ONE), &limits, has_build).await?;
            tx.commit().await
        };
        let shift = async || {
            let tx = store.begin().await.expect("begins");
            let older = unscoped!("test", "UPDATE quota_uses SET at = at - :hour", hour = 3601 * 1_000_000_i64);
            tx.run(older).await.expect("shifted");
            tx.commit().await.expect("committed");
        };
        assert_eq!((deploy(true).await, deploy(true).await), (Ok(()), Ok(())));
        let problem = deploy(true).await.expect_err("refused");
        assert!(problem.to_string().contains("builds_per_hour"), "{problem}");
        assert_eq!((deploy(false).await, deploy(false).await), (Ok(()), Ok(())), "a restart builds nothing");
        assert!(deploy(false).await.expect_err("refused").to_string().contains("deployments_per_hour"));
        shift().await;
        assert_eq!(deploy(true).await, Ok(()));
        assert!(deploy(true).await.expect_err("refused").to_string().contains("builds_per_day"));
        for _ in 0..26 {
            shift().await;
        }
        super::prune(&store).await.expect("pruned");
        let left = store.read().value::<i64>(unscoped!("test", "SELECT COUNT(*) FROM quota_uses")).await;
        assert_eq!(left.expect("answers"), Some(0));
    }

    #[tokio::test]
    async fn uploads_count_as_announced_until_they_are_complete() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        let limits = quotas(&[(Quantity::UploadMibPerDay, 2)]);
        let grant = TestScope(ONE);
        let tx = store.begin().await.expect("begins");
        let upload = new_id();
        super::begin_upload(&tx, &grant, &limits, upload, 2 * MIB).await.expect("fits");
        let problem = super::begin_upload(&tx, &grant, &limits, new_id(), 1).await.expect_err("refused");
        assert!(problem.detail.contains("2 of 2 MiB") && problem.detail.contains("would need 3"), "{problem}");
        super::complete_upload(&tx, &grant, upload, MIB).await.expect("settled");
        super::begin_upload(&tx, &grant, &limits, new_id(), MIB).await.expect("fits by now");
        super::begin_upload(&tx, &grant, &limits, new_id(), 1).await.expect_err("full");
    }
}
