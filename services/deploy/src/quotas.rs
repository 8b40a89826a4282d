//! What quotas allow of deployments, instances and uploads. Each function counts in the transaction that uses what
//! it counts; writers of a service come one after the other.
//!
//! A rollout runs old and new instances side by side. What counts of a placement is therefore the larger of what
//! serves and what is to serve; what drains does not count. So that instances that drain do not pile up, new ones
//! wait while all that live, draining ones included, would be more than twice what may serve.

use std::sync::Arc;

use capsule_buildplan::Plan;
use capsule_bus::{Call, SystemGrant};
use capsule_contracts::quotas::{CountDeployUse, Quantity, QuotaUse, Quotas};
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_store::{Scope, Store, Transaction, scoped, unscoped};
use sea_orm::FromQueryResult;

use crate::instances::memory_limit;
use crate::{Deploys, reconcile};

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;
const MIB: i64 = 1 << 20;

/// The limits of an organization; asked for before the transaction that counts.
///
/// # Errors
/// When they are not known and their owner does not answer.
pub async fn of(deploys: &Deploys, organization: Uuid) -> Result<Quotas, Problem> {
    capsule_bus::quotas(deploys, organization).await
}

/// How much of a kind an organization has used in the last `seconds`.
async fn used(tx: &Transaction<'_>, scope: &impl Scope, kind: &str, seconds: i64) -> Result<i64, Problem> {
    let sum = scoped!(
        scope,
        "SELECT CAST(COALESCE(SUM(amount), 0) AS BIGINT) FROM quota_uses \
         WHERE organization_id = :tenant AND kind = $1 AND at > $2",
        kind,
        Timestamp::now().plus_seconds(-seconds).0
    );
    Ok(tx.read().value::<i64>(sum).await?.unwrap_or_default())
}

async fn note(tx: &Transaction<'_>, scope: &impl Scope, id: Uuid, kind: &str, amount: i64) -> Result<(), Problem> {
    tx.run(scoped!(
        scope,
        "INSERT INTO quota_uses (id, organization_id, kind, amount, at) VALUES ($1, :tenant, $2, $3, $4)",
        id,
        kind,
        amount,
        Timestamp::now().0
    ))
    .await?;
    Ok(())
}

/// Counts another deployment, whatever becomes of it; `builds` says whether it builds.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn another_deployment(tx: &Transaction<'_>, scope: &impl Scope, quotas: &Quotas, builds: bool) -> Result<(), Problem> {
    let deployments = used(tx, scope, "deployment", HOUR).await?;
    quotas.check(Quantity::DeploymentsPerHour, deployments, deployments + 1)?;
    note(tx, scope, new_id(), "deployment", 1).await?;
    if builds {
        for (quantity, seconds) in [(Quantity::BuildsPerHour, HOUR), (Quantity::BuildsPerDay, DAY)] {
            let builds = used(tx, scope, "build", seconds).await?;
            quotas.check(quantity, builds, builds + 1)?;
        }
        note(tx, scope, new_id(), "build", 1).await?;
    }
    Ok(())
}

/// Counts the bytes of an upload before they come: as many as were announced.
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
    // By the byte against the limit; told in MiB.
    if before.saturating_add(bytes) > quotas.limit(Quantity::UploadMibPerDay).saturating_mul(MIB) {
        let after = mib(before.saturating_add(bytes));
        quotas.check(Quantity::UploadMibPerDay, (before / MIB).min(after - 1), after)?;
    }
    note(tx, scope, upload, "upload", bytes).await
}

/// Counts an upload with the bytes that came. One that is not completed goes on counting as it was announced: its
/// bytes were sent and written all the same.
///
/// # Errors
/// When the database does not answer.
pub async fn complete_upload(tx: &Transaction<'_>, scope: &impl Scope, upload: Uuid, bytes: i64) -> Result<(), Problem> {
    let settle = scoped!(scope, "UPDATE quota_uses SET amount = $1 WHERE organization_id = :tenant AND id = $2", bytes, upload);
    tx.run(settle).await?;
    Ok(())
}

/// How many instances, and the memory that they may use together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    count: i64,
    memory: i64,
}

impl Load {
    /// What a plan starts.
    pub fn of(plan: &Plan) -> Self {
        let count = i64::try_from(plan.processes.len()).unwrap_or(i64::MAX);
        let memory = i64::try_from(memory_limit(plan)).unwrap_or(i64::MAX);
        Self { count, memory: count.saturating_mul(memory) }
    }

    fn plus(self, other: Self) -> Self {
        Self { count: self.count.saturating_add(other.count), memory: self.memory.saturating_add(other.memory) }
    }

    fn most(self, other: Self) -> Self {
        Self { count: self.count.max(other.count), memory: self.memory.max(other.memory) }
    }

    fn mib(self) -> i64 {
        self.memory / MIB
    }
}

/// The instances of a placement by what they are for.
#[derive(Clone, Copy, Default)]
struct Placed {
    serving: Load,
    candidates: Load,
    retiring: Load,
}

impl Placed {
    fn counts(self) -> Load {
        self.serving.most(self.candidates)
    }

    fn lives(self) -> Load {
        self.serving.plus(self.candidates).plus(self.retiring)
    }
}

#[derive(FromQueryResult)]
struct Row {
    service_id: Uuid,
    environment_id: Uuid,
    role: String,
    instances: i64,
    memory: i64,
}

/// What lives of an organization, by service and environment.
async fn placed(tx: &Transaction<'_>, scope: &impl Scope) -> Result<Vec<((Uuid, Uuid), Placed)>, Problem> {
    // Instances of earlier versions were all started with this limit, or with twice as much.
    let rows = scoped!(
        scope,
        "SELECT service_id, environment_id, role, COUNT(*) AS instances, \
         CAST(SUM(COALESCE(memory_bytes, 536870912)) AS BIGINT) AS memory \
         FROM instances WHERE organization_id = :tenant AND role <> 'gone' GROUP BY service_id, environment_id, role"
    );
    let mut all: Vec<((Uuid, Uuid), Placed)> = Vec::new();
    for row in tx.read().all::<Row>(rows).await? {
        let place = (row.service_id, row.environment_id);
        let index = all.iter().position(|(known, _)| *known == place).unwrap_or_else(|| {
            all.push((place, Placed::default()));
            all.len() - 1
        });
        let placed = &mut all[index].1;
        let load = Load { count: row.instances, memory: row.memory };
        match row.role.as_str() {
            "serving" => placed.serving = load,
            "candidate" => placed.candidates = load,
            _ => placed.retiring = load,
        }
    }
    Ok(all)
}

/// Whether new instances may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// They may, if they are written down in this transaction.
    Now,
    /// Not before instances that drain are gone.
    Later,
}

/// Counts `new` instances of a service in an environment, which will take the place of those that serve there.
///
/// # Errors
/// [`Problem::quota_exceeded`].
pub async fn more_instances(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    quotas: &Quotas,
    place: (Uuid, Uuid),
    new: Load,
) -> Result<Room, Problem> {
    let all = placed(tx, scope).await?;
    let own = all.iter().find(|(known, _)| *known == place).map(|(_, placed)| *placed).unwrap_or_default().counts();
    let others =
        all.iter().filter(|(known, _)| *known != place).fold(Load::default(), |sum, (_, placed)| sum.plus(placed.counts()));
    let (before, after) = (others.plus(own), others.plus(new));
    quotas.check(Quantity::InstancesPerService, own.count, new.count)?;
    quotas.check(Quantity::Instances, before.count, after.count)?;
    quotas.check(Quantity::MemoryMib, before.mib(), after.mib())?;
    let live = all.iter().fold(new, |sum, (_, placed)| sum.plus(placed.lives()));
    let count = quotas.limit(Quantity::Instances).max(after.count).saturating_mul(2);
    let memory = quotas.limit(Quantity::MemoryMib).max(after.mib()).saturating_mul(2);
    Ok(if live.count <= count && live.mib() <= memory { Room::Now } else { Room::Later })
}

/// Deletes the uses that no longer count.
///
/// # Errors
/// If the database does not answer.
pub async fn prune(store: &Store) -> Result<(), Problem> {
    let before = Timestamp::now().plus_seconds(-DAY).0;
    // An hour late, so that not each expired row costs a transaction.
    let much_older = Timestamp::now().plus_seconds(-DAY - HOUR).0;
    let exists = unscoped!("the platform's own work", "SELECT 1 FROM quota_uses WHERE at < $1 LIMIT 1", much_older);
    let delete = unscoped!("the platform's own work", "DELETE FROM quota_uses WHERE at < $1", before);
    reconcile::delete_if_any(store, exists, delete).await
}

pub async fn count_use(deploys: Arc<Deploys>, call: Call<CountDeployUse>) -> Result<QuotaUse, Problem> {
    let grant = SystemGrant::new(call.message.organization_id, "what an organization uses is counted");
    let tx = deploys.store.begin().await?;
    let all = placed(&tx, &grant).await?;
    let load = all.iter().fold(Load::default(), |sum, (_, placed)| sum.plus(placed.counts()));
    let most = all.iter().map(|(_, placed)| placed.counts().count).max().unwrap_or_default();
    let building = deploys.controller.builds.running(grant.organization());
    let numbers = [
        (Quantity::Instances, load.count),
        (Quantity::InstancesPerService, most),
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

    use capsule_bus::SystemGrant;
    use capsule_contracts::quotas::{Quantity, Quotas};
    use capsule_contracts::{Problem, Uuid, new_id};
    use capsule_store::{Databases, Keyring, Store, unscoped};

    use super::{Load, MIB, Room};

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

    /// Counts instances of a placement, and writes them down as candidates if they may be.
    async fn start(store: &Store, organization: Uuid, limits: &Quotas, at: u128, count: i64) -> Result<Room, Problem> {
        let tx = store.begin().await?;
        let grant = SystemGrant::new(organization, "test");
        let room = super::more_instances(&tx, &grant, limits, place(at), load(count)).await?;
        for _ in (0..count).filter(|_| room == Room::Now) {
            let (service, environment) = place(at);
            tx.run(unscoped!(
                "test",
                "INSERT INTO instances (id, organization_id, service_id, environment_id, deployment_id, process, port, role, \
                 created_at, memory_bytes) VALUES ($1, $2, $3, $4, $3, 'web', 1, 'candidate', 1, $5)",
                new_id().to_string(),
                organization,
                service,
                environment,
                512 * MIB
            ))
            .await?;
        }
        tx.commit().await?;
        Ok(room)
    }

    async fn turn(store: &Store, at: u128, from: &str, to: &str) {
        let tx = store.begin().await.expect("begins");
        let turn = unscoped!("test", "UPDATE instances SET role = $1 WHERE role = $2 AND service_id = $3", to, from, place(at).0);
        tx.run(turn).await.expect("turned");
        tx.commit().await.expect("committed");
    }

    fn refused(outcome: Result<Room, Problem>, quantity: Quantity) {
        let problem = outcome.expect_err("refused");
        assert!(problem.code == "quota_exceeded" && problem.to_string().contains(quantity.name()), "{problem}");
    }

    #[tokio::test]
    async fn a_rollout_counts_once_and_what_drains_does_not_count() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        let limits = quotas(&[(Quantity::Instances, 3)]);
        // A rollout over another at the very limit, again and again.
        for _ in 0..3 {
            turn(&store, 1, "retiring", "gone").await;
            assert_eq!(start(&store, ONE, &limits, 1, 3).await, Ok(Room::Now));
            turn(&store, 1, "serving", "retiring").await;
            turn(&store, 1, "candidate", "serving").await;
        }
        refused(start(&store, ONE, &limits, 2, 1).await, Quantity::Instances);
        assert_eq!(start(&store, OTHER, &limits, 3, 3).await, Ok(Room::Now), "another organization has its own");
        // Three serve and three drain: three more would be a crowd.
        assert_eq!(start(&store, ONE, &limits, 1, 3).await, Ok(Room::Later));
        turn(&store, 1, "retiring", "gone").await;
        assert_eq!(start(&store, ONE, &limits, 1, 2).await, Ok(Room::Now));
        // While a rollout to fewer goes on, the more count.
        refused(start(&store, ONE, &limits, 2, 1).await, Quantity::Instances);
        turn(&store, 1, "serving", "retiring").await;
        turn(&store, 1, "candidate", "serving").await;
        assert_eq!(start(&store, ONE, &limits, 2, 1).await, Ok(Room::Now));
    }

    #[tokio::test]
    async fn memory_and_the_instances_of_one_service_count_as_well() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        let limits = quotas(&[(Quantity::Instances, 100), (Quantity::InstancesPerService, 3), (Quantity::MemoryMib, 2048)]);
        refused(start(&store, ONE, &limits, 1, 4).await, Quantity::InstancesPerService);
        assert_eq!(start(&store, ONE, &limits, 1, 3).await, Ok(Room::Now));
        refused(start(&store, ONE, &limits, 2, 2).await, Quantity::MemoryMib);
        assert_eq!(start(&store, ONE, &limits, 2, 1).await, Ok(Room::Now));
        // What is above a limit that was lowered is replaced by as much, not by more.
        turn(&store, 1, "candidate", "serving").await;
        let lowered = quotas(&[(Quantity::Instances, 1), (Quantity::InstancesPerService, 1), (Quantity::MemoryMib, 1)]);
        assert_eq!(start(&store, ONE, &lowered, 1, 3).await, Ok(Room::Now));
        refused(start(&store, ONE, &lowered, 2, 2).await, Quantity::InstancesPerService);
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
    async fn builds_count_within_their_time_whatever_becomes_of_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        let limits = quotas(&[(Quantity::BuildsPerHour, 2), (Quantity::BuildsPerDay, 3), (Quantity::DeploymentsPerHour, 4)]);
        let deploy = async |builds: bool| {
            let tx = store.begin().await.expect("begins");
            super::another_deployment(&tx, &SystemGrant::new(ONE, "test"), &limits, builds).await?;
            tx.commit().await
        };
        let shift = async || {
            let tx = store.begin().await.expect("begins");
            let older = unscoped!("test", "UPDATE quota_uses SET at = at - $1", 3601 * 1_000_000_i64);
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
        let grant = SystemGrant::new(ONE, "test");
        let tx = store.begin().await.expect("begins");
        let upload = new_id();
        super::begin_upload(&tx, &grant, &limits, upload, 2 * MIB).await.expect("fits");
        let problem = super::begin_upload(&tx, &grant, &limits, new_id(), 1).await.expect_err("refused");
        assert!(problem.detail.contains("2 of 2 MiB") && problem.detail.contains("would be 3"), "{problem}");
        super::complete_upload(&tx, &grant, upload, MIB).await.expect("settled");
        super::begin_upload(&tx, &grant, &limits, new_id(), MIB).await.expect("fits by now");
        super::begin_upload(&tx, &grant, &limits, new_id(), 1).await.expect_err("full");
    }
}
