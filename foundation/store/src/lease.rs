//! Leader election: one of the processes that run a service does its background work.
//!
//! The leader holds a lease, a row whose fencing token grows with every new leader, and renews it. On
//! `PostgreSQL` it also holds an advisory lock in a separate session. The server releases the lock when the
//! session ends, so a leader that died is replaced at once. A leader that only stopped (SIGSTOP, a frozen
//! machine) is replaced once others have seen no renewal for [`LEASE_DURATION`] by their own clocks.
//!
//! Safety depends only on the token, not on the lock or clocks: a transaction begun within a term first reads
//! the lease, under the lock that admits one writer at a time. A former leader that resumes finds another token
//! and cannot write.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_contracts::Problem;

use crate::failure::Failure;
use crate::session::Session;
use crate::{FromRow, Store, Transaction, unscoped};

/// Interval between renewals of the lease.
const RENEW_INTERVAL: Duration = Duration::from_secs(2);
/// A leader that has not renewed its lease for this long steps down.
const RENEW_DEADLINE: Duration = Duration::from_secs(6);
/// A lease that was not renewed for this long can be acquired by another process. Longer than [`RENEW_DEADLINE`].
const LEASE_DURATION: Duration = Duration::from_secs(10);
/// Interval between attempts to acquire the lease.
const RETRY_PERIOD: Duration = Duration::from_secs(1);
/// The key of the advisory lock that a leader's session holds.
const LEADER_LOCK_KEY: i64 = 7_305_003;

tokio::task_local! {
    static TERM: Term;
}

/// The period between acquiring a lease and losing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Term {
    service: &'static str,
    token: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
struct Lease {
    token: i64,
    renewals: i64,
    session: Option<i64>,
}

/// Spawns a task that belongs to the caller's term, if there is one: after the term, the task's writes fail.
pub fn spawn<F>(work: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    match TERM.try_with(|term| *term) {
        Ok(term) => tokio::spawn(TERM.scope(term, work)),
        Err(_) => tokio::spawn(work),
    }
}

/// Fails if the term that the current task belongs to is over.
pub(crate) async fn fence(tx: &Transaction<'_>) -> Result<(), Problem> {
    let Ok(term) = TERM.try_with(|term| *term) else { return Ok(()) };
    if term.service != tx.name() {
        return Ok(());
    }
    let token = tx.read().value::<i64>(select_token()).await?;
    if token == Some(term.token) {
        return Ok(());
    }
    metrics::counter!("capsule_fenced_writes_total", "service" => term.service).increment(1);
    Err(Problem::unavailable("Another process is now the leader of this service."))
}

fn select_token() -> crate::Statement {
    unscoped!("one lease for the service", "SELECT token FROM leases WHERE id = 1")
}

/// Runs `work` whenever this process leads the service. Drops it when leadership is lost, and starts it again when
/// leadership is regained. Never returns.
pub async fn lead<W, F>(store: Arc<Store>, work: W)
where
    W: Fn() -> F,
    F: Future<Output = ()>,
{
    let service = store.name();
    let gauge = metrics::gauge!("capsule_leader", "service" => service);
    gauge.set(0.0);
    let mut observed: Option<(Lease, Instant)> = None;
    loop {
        match try_acquire(&store, &mut observed).await {
            Ok(Some(leadership)) => {
                observed = None;
                tracing::info!(service, term = leadership.term.token, "this process is now the leader");
                gauge.set(1.0);
                tokio::select! {
                    () = TERM.scope(leadership.term, work()) => {}
                    () = leadership.renew_until_lost(&store) => tracing::warn!(service, term = leadership.term.token, "leadership lost"),
                }
                gauge.set(0.0);
            }
            Ok(None) => {}
            Err(problem) => tracing::warn!(service, %problem, "cannot determine the leader; retrying"),
        }
        tokio::time::sleep(RETRY_PERIOD).await;
    }
}

/// A lease held by this process and, on a server, the session that holds the lock.
struct Leadership {
    term: Term,
    session: Option<Session>,
}

/// Acquires the lease if it is free or expired. `observed` is the lease as last read, and since when it is unchanged.
async fn try_acquire(store: &Store, observed: &mut Option<(Lease, Instant)>) -> Result<Option<Leadership>, Problem> {
    let Some(session) = store.session().await? else {
        // Only one process uses an embedded database.
        return acquire(store, None).await.map(Some);
    };
    let lease = unscoped!("one lease for the service", "SELECT token, renewals, session FROM leases WHERE id = 1");
    let lease = store.read().first::<Lease>(lease).await?;
    if !try_lock(&session).await? {
        let Some(lease) = lease else { return Ok(None) };
        let since = match observed.take() {
            Some((known, since)) if known == lease => since,
            _ => Instant::now(),
        };
        let holder = lease.session;
        *observed = Some((lease, since));
        if since.elapsed() < LEASE_DURATION {
            return Ok(None);
        }
        tracing::warn!(service = store.name(), "the lease expired; replacing the leader");
        let end =
            unscoped!("ends the old leader's session", "SELECT pg_terminate_backend(:id::int)", id = holder.unwrap_or_default());
        store.read().value::<bool>(end).await?;
        if !try_lock(&session).await? {
            return Ok(None);
        }
    }
    acquire(store, Some(session)).await.map(Some)
}

async fn try_lock(session: &Session) -> Result<bool, Problem> {
    let locked = session.rows("SELECT pg_try_advisory_lock($1)", vec![LEADER_LOCK_KEY.into()], |row| row.at(0)).await;
    Ok(locked.map_err(Failure::into_problem)?.pop().unwrap_or_default())
}

async fn acquire(store: &Store, session: Option<Session>) -> Result<Leadership, Problem> {
    let holder = match &session {
        Some(session) => {
            let id = session.rows("SELECT pg_backend_pid()::bigint", Vec::new(), |row| row.at::<i64>(0)).await;
            id.map_err(Failure::into_problem)?.pop()
        }
        None => None,
    };
    let tx = store.begin().await?;
    tx.run(unscoped!(
        "one lease for the service",
        "INSERT INTO leases (id, token, renewals, session) VALUES (1, 1, 0, :holder) \
         ON CONFLICT (id) DO UPDATE SET token = leases.token + 1, renewals = 0, session = excluded.session",
        holder
    ))
    .await?;
    let token = tx.read().value::<i64>(select_token()).await?.ok_or_else(Problem::internal)?;
    tx.commit().await?;
    Ok(Leadership { term: Term { service: store.name(), token }, session })
}

impl Leadership {
    /// Renews the lease until it is lost.
    async fn renew_until_lost(&self, store: &Store) {
        let Some(session) = &self.session else { return std::future::pending().await };
        let mut renewed = Instant::now();
        while renewed.elapsed() < RENEW_DEADLINE {
            tokio::time::sleep(RENEW_INTERVAL).await;
            let began = Instant::now();
            let renewal = "UPDATE leases SET renewals = renewals + 1 WHERE id = 1 AND token = $1";
            let renewal = session.run_each(renewal, vec![vec![self.term.token.into()]]);
            match tokio::time::timeout(RENEW_DEADLINE.saturating_sub(renewed.elapsed()), renewal).await {
                Ok(Ok(1)) => renewed = began,
                Ok(Ok(_)) => return,
                Ok(Err(cause)) => tracing::warn!(service = store.name(), %cause, "cannot renew the lease"),
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{TERM, acquire, lead};
    use crate::{Databases, Keyring, Migration, Store, unscoped};
    use std::sync::Arc;

    const TABLES: Migration = Migration {
        version: 1,
        name: "create_leases",
        sql: "CREATE TABLE leases (id INTEGER PRIMARY KEY NOT NULL, token BIGINT NOT NULL, renewals BIGINT NOT NULL, session BIGINT); \
              CREATE TABLE things (id BIGINT PRIMARY KEY);",
    };

    async fn open(directory: &std::path::Path) -> Arc<Store> {
        let keyring = Keyring::open(&directory.join("key")).expect("keyring");
        let databases = Databases::Embedded(directory.into());
        Arc::new(Store::open(&databases, "test", keyring, &[("test", &[TABLES])]).await.expect("opens"))
    }

    async fn write(store: &Store, id: i64) -> Result<(), capsule_contracts::Problem> {
        let tx = store.begin().await?;
        tx.run(unscoped!("test", "INSERT INTO things (id) VALUES (:id)", id)).await?;
        tx.commit().await
    }

    #[tokio::test]
    async fn a_leader_can_write_until_it_is_replaced() {
        let directory = tempfile::tempdir().expect("tempdir");
        let (one, other) = (open(directory.path()).await, open(directory.path()).await);
        let old = acquire(&one, None).await.expect("leads").term;
        TERM.scope(old, write(&one, 1)).await.expect("it leads");
        let new = acquire(&other, None).await.expect("leads").term;
        assert_eq!(TERM.scope(old, write(&one, 2)).await.expect_err("it leads no more").code, "unavailable");
        TERM.scope(new, write(&other, 2)).await.expect("it leads");
        write(&one, 3).await.expect("what belongs to no term is not fenced");
    }

    #[tokio::test]
    async fn a_task_spawned_within_a_term_cannot_write_after_it() {
        let directory = tempfile::tempdir().expect("tempdir");
        let (one, other) = (open(directory.path()).await, open(directory.path()).await);
        let (send, receive) = tokio::sync::oneshot::channel();
        let send = std::sync::Mutex::new(Some(send));
        let leading = tokio::spawn(lead(one.clone(), move || {
            let (one, send) = (one.clone(), send.lock().expect("alive").take());
            async move {
                let (go, waits) = tokio::sync::oneshot::channel::<()>();
                let spawned = super::spawn(async move {
                    let _ = waits.await;
                    write(&one, 1).await
                });
                let _ = send.expect("once").send((go, spawned));
                std::future::pending::<()>().await;
            }
        }));
        let (go, spawned) = receive.await.expect("it leads");
        acquire(&other, None).await.expect("leads");
        go.send(()).expect("waited for");
        spawned.await.expect("ends").expect_err("its term is over");
        leading.abort();
    }
}
