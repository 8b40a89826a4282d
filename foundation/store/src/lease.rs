//! Leadership: of all processes that run a service, one does its background work.
//!
//! A leader holds a lease, a row with a token that rises with every new leader, and renews it. On
//! `PostgreSQL` it holds an advisory lock on a session of its own as well: the server frees it the moment
//! the session ends, so a leader that died is followed at once. One that merely stopped (SIGSTOP, a
//! frozen machine) is followed when others saw no renewal for [`PATIENCE`] by their own clocks.
//!
//! What makes this safe is neither lock nor clock but the token: a transaction begun within a term
//! first reads the lease, under the lock that lets only one writer in. An old leader that wakes up finds
//! another token there and cannot write.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_contracts::Problem;
use sea_orm::{ConnectionTrait, DatabaseConnection, FromQueryResult};

use crate::{Store, Transaction, unscoped};

/// A leader renews its lease this often.
const RENEW: Duration = Duration::from_secs(2);
/// A leader that could not renew for so long steps down.
const STEP_DOWN: Duration = Duration::from_secs(6);
/// Others take a lease over that was not renewed for so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Others look at the lease this often.
const LOOK: Duration = Duration::from_secs(1);
/// The key of the advisory lock that a leader's session holds.
const LOCK: i64 = 7_305_003;

tokio::task_local! {
    static TERM: Term;
}

/// A leader's time in office.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Term {
    service: &'static str,
    token: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, FromQueryResult)]
struct Lease {
    token: i64,
    renewals: i64,
    session: Option<i64>,
}

/// Spawns work that belongs to the term, if any, in which it is spawned: once that is over, it cannot
/// write any more.
pub fn spawn<F>(work: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    match TERM.try_with(|term| *term) {
        Ok(term) => tokio::spawn(TERM.scope(term, work)),
        Err(_) => tokio::spawn(work),
    }
}

/// Refuses to go on where the term that this work belongs to is over.
pub(crate) async fn fence(tx: &Transaction<'_>) -> Result<(), Problem> {
    let Ok(term) = TERM.try_with(|term| *term) else { return Ok(()) };
    if term.service != tx.name() {
        return Ok(());
    }
    let token = tx.read().value::<i64>(token()).await?;
    if token == Some(term.token) {
        return Ok(());
    }
    metrics::counter!("capsule_fenced_writes_total", "service" => term.service).increment(1);
    Err(Problem::unavailable("Another process leads this service now."))
}

fn token() -> crate::Statement {
    unscoped!("one lease for the service", "SELECT token FROM leases WHERE id = 1")
}

/// Does `work` whenever this process leads the service, for as long as the process lives. The work is
/// dropped when leadership is lost, and begun anew when it is won again.
pub async fn lead<W, F>(store: Arc<Store>, work: W)
where
    W: Fn() -> F,
    F: Future<Output = ()>,
{
    let service = store.name();
    let gauge = metrics::gauge!("capsule_leader", "service" => service);
    gauge.set(0.0);
    let mut seen: Option<(Lease, Instant)> = None;
    loop {
        match campaign(&store, &mut seen).await {
            Ok(Some(office)) => {
                seen = None;
                tracing::info!(service, term = office.term.token, "this process leads the service");
                gauge.set(1.0);
                tokio::select! {
                    () = TERM.scope(office.term, work()) => {}
                    () = office.keep(&store) => tracing::warn!(service, term = office.term.token, "leadership is lost"),
                }
                gauge.set(0.0);
            }
            Ok(None) => {}
            Err(problem) => tracing::warn!(service, %problem, "who leads cannot be found out; trying again"),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// A lease that is held, and on a server the session that holds the lock.
struct Office {
    term: Term,
    session: Option<DatabaseConnection>,
}

/// Takes the lease if it is free. `seen` remembers since when it has not been renewed.
async fn campaign(store: &Store, seen: &mut Option<(Lease, Instant)>) -> Result<Option<Office>, Problem> {
    let Some(session) = store.session().await? else {
        // An embedded database has one process.
        return take(store, None).await.map(Some);
    };
    let lease = unscoped!("one lease for the service", "SELECT token, renewals, session FROM leases WHERE id = 1");
    let lease = store.read().first::<Lease>(lease).await?;
    if !lock(&session).await? {
        let Some(lease) = lease else { return Ok(None) };
        let since = match seen.take() {
            Some((known, since)) if known == lease => since,
            _ => Instant::now(),
        };
        let holder = lease.session;
        *seen = Some((lease, since));
        if since.elapsed() < PATIENCE {
            return Ok(None);
        }
        tracing::warn!(service = store.name(), "the leader does not renew its lease: it is replaced");
        let end = unscoped!("ends the old leader's session", "SELECT pg_terminate_backend($1::int)", holder.unwrap_or_default());
        store.read().value::<bool>(end).await?;
        if !lock(&session).await? {
            return Ok(None);
        }
    }
    take(store, Some(session)).await.map(Some)
}

async fn lock(session: &DatabaseConnection) -> Result<bool, Problem> {
    let reader = crate::Reader { connection: session };
    let locked = unscoped!("one lease for the service", "SELECT pg_try_advisory_lock($1)", LOCK);
    Ok(reader.value::<bool>(locked).await?.unwrap_or_default())
}

async fn take(store: &Store, session: Option<DatabaseConnection>) -> Result<Office, Problem> {
    let holder = match &session {
        Some(session) => {
            let id = unscoped!("names the session", "SELECT pg_backend_pid()::bigint");
            crate::Reader { connection: session }.value::<i64>(id).await?
        }
        None => None,
    };
    let tx = store.begin().await?;
    tx.run(unscoped!(
        "one lease for the service",
        "INSERT INTO leases (id, token, renewals, session) VALUES (1, 1, 0, $1) \
         ON CONFLICT (id) DO UPDATE SET token = leases.token + 1, renewals = 0, session = excluded.session",
        holder
    ))
    .await?;
    let token = tx.read().value::<i64>(token()).await?.ok_or_else(Problem::internal)?;
    tx.commit().await?;
    Ok(Office { term: Term { service: store.name(), token }, session })
}

impl Office {
    /// Renews the lease; returns once it is lost.
    async fn keep(&self, store: &Store) {
        let Some(session) = &self.session else { return std::future::pending().await };
        let mut renewed = Instant::now();
        while renewed.elapsed() < STEP_DOWN {
            tokio::time::sleep(RENEW).await;
            let renewal = unscoped!(
                "one lease for the service",
                "UPDATE leases SET renewals = renewals + 1 WHERE id = 1 AND token = $1",
                self.term.token
            );
            let began = Instant::now();
            let renewal = session.execute_raw(renewal.build(session));
            match tokio::time::timeout(STEP_DOWN.saturating_sub(renewed.elapsed()), renewal).await {
                Ok(Ok(done)) if done.rows_affected() == 1 => renewed = began,
                Ok(Ok(_)) => return,
                Ok(Err(cause)) => tracing::warn!(service = store.name(), %cause, "the lease could not be renewed"),
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{TERM, lead, take};
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
        tx.run(unscoped!("test", "INSERT INTO things (id) VALUES ($1)", id)).await?;
        tx.commit().await
    }

    #[tokio::test]
    async fn a_leader_writes_until_another_has_followed_it() {
        let directory = tempfile::tempdir().expect("tempdir");
        let (one, other) = (open(directory.path()).await, open(directory.path()).await);
        let old = take(&one, None).await.expect("leads").term;
        TERM.scope(old, write(&one, 1)).await.expect("it leads");
        let new = take(&other, None).await.expect("leads").term;
        assert_eq!(TERM.scope(old, write(&one, 2)).await.expect_err("it leads no more").code, "unavailable");
        TERM.scope(new, write(&other, 2)).await.expect("it leads");
        write(&one, 3).await.expect("what belongs to no term is not fenced");
    }

    #[tokio::test]
    async fn what_is_spawned_within_a_term_ends_with_it() {
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
        take(&other, None).await.expect("leads");
        go.send(()).expect("waited for");
        spawned.await.expect("ends").expect_err("its term is over");
        leading.abort();
    }
}
