//! `SQLite`: one file per service, with any number of readers and one writer.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};
use tokio::sync::OwnedMutexGuard;

use crate::databases::ACQUIRE_TIMEOUT;
use crate::failure::Failure;
use crate::{DecodeError, Row, Value};

/// A reader that was idle for this long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of prepared statements per connection.
const MAX_STATEMENTS: usize = 100;
/// Back-off while another process holds the lock.
const BUSY_PAUSE: Duration = Duration::from_millis(1);
const MAX_BUSY_PAUSE: Duration = Duration::from_millis(50);

/// A service's file.
///
/// A read runs on the calling thread: by an index it takes a few microseconds, less than waking another thread. Code
/// that reads whole tables uses a [`Session`](crate::session::Session).
#[derive(Debug)]
pub struct Embedded {
    file: PathBuf,
    idle: Mutex<Vec<Idle>>,
    used: AtomicUsize,
    max_idle: usize,
    /// Held from the beginning of a transaction to its end.
    turn: Arc<tokio::sync::Mutex<()>>,
    writer: Arc<Mutex<Connection>>,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Instant,
}

/// Connects to a file, which must exist.
///
/// # Errors
/// When it cannot be opened.
pub fn connect(file: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(ACQUIRE_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(MAX_STATEMENTS);
    // `secure_delete` overwrites deleted rows, so that free pages hold no data of erased users.
    connection.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA foreign_keys = ON; PRAGMA synchronous = FULL; PRAGMA cache_size = -512; \
         PRAGMA secure_delete = ON;",
    )?;
    Ok(connection)
}

/// Locks a connection. Ignores poisoning: after a panic the connection is usable, and [`Writing`] rolls back.
pub fn lock(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a statement that returns rows, and reads at most `limit` of them.
///
/// # Errors
/// When it fails, or a row cannot be read.
pub fn query<T>(
    connection: &Connection,
    sql: &str,
    values: &[Value],
    limit: usize,
    decode: impl Fn(&Row<'_>) -> Result<T, DecodeError>,
) -> Result<Vec<T>, Failure> {
    let mut statement = connection.prepare_cached(sql)?;
    bind(&mut statement, values)?;
    let mut rows = statement.raw_query();
    let mut all = Vec::new();
    while all.len() < limit
        && let Some(row) = rows.next()?
    {
        all.push(decode(&Row::embedded(row))?);
    }
    Ok(all)
}

/// Runs a statement that changes rows, and returns how many it changed.
///
/// # Errors
/// When it fails.
pub fn execute(connection: &Connection, sql: &str, values: &[Value]) -> Result<u64, Failure> {
    let mut statement = connection.prepare_cached(sql)?;
    bind(&mut statement, values)?;
    Ok(statement.raw_execute()? as u64)
}

fn bind(statement: &mut rusqlite::Statement<'_>, values: &[Value]) -> rusqlite::Result<()> {
    if statement.parameter_count() != values.len() {
        return Err(rusqlite::Error::InvalidParameterCount(values.len(), statement.parameter_count()));
    }
    values.iter().enumerate().try_for_each(|(at, value)| statement.raw_bind_parameter(at + 1, value))
}

impl Embedded {
    /// Opens a file, which must exist.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(file: PathBuf) -> rusqlite::Result<Self> {
        let writer = Arc::new(Mutex::new(connect(&file)?));
        // Each thread runs one read at a time.
        let max_idle = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { file, idle: Mutex::default(), used: AtomicUsize::new(0), max_idle, turn: Arc::default(), writer })
    }

    /// Runs `work` with a connection that only reads, on the calling thread.
    ///
    /// # Errors
    /// When no connection can be opened, or `work` fails.
    pub fn read<T>(&self, work: impl FnOnce(&Connection) -> Result<T, Failure>) -> Result<T, Failure> {
        let known = self.idle().pop();
        let connection = match known {
            Some(idle) => idle.connection,
            None => self.connect_reader()?,
        };
        self.used.fetch_add(1, Ordering::Relaxed);
        let result = work(&connection);
        self.used.fetch_sub(1, Ordering::Relaxed);
        self.keep(connection);
        result
    }

    fn connect_reader(&self) -> rusqlite::Result<Connection> {
        let connection = connect(&self.file)?;
        connection.execute_batch("PRAGMA query_only = ON")?;
        Ok(connection)
    }

    fn keep(&self, connection: Connection) {
        let mut idle = self.idle();
        idle.push(Idle { connection, since: Instant::now() });
        // Readers are reused last in, first out, so the first has been idle the longest.
        let surplus = idle.len() > self.max_idle || idle[0].since.elapsed() > IDLE_TIMEOUT;
        let closed = surplus.then(|| idle.remove(0));
        drop(idle);
        drop(closed);
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of readers in use, and the maximum number of idle ones.
    pub fn connections(&self) -> (usize, usize) {
        (self.used.load(Ordering::Relaxed), self.max_idle)
    }

    /// Begins a transaction that may write, after any other of this or another process has ended.
    ///
    /// # Errors
    /// When the lock is not free in time, or the file cannot be read.
    pub async fn begin(&self) -> Result<Writing, Failure> {
        let deadline = tokio::time::Instant::now() + ACQUIRE_TIMEOUT;
        let turn = self.wait_for_turn(deadline).await?;
        let mut pause = BUSY_PAUSE;
        loop {
            match try_begin(&lock(&self.writer)) {
                Ok(()) => return Ok(Writing { connection: self.writer.clone(), _turn: turn }),
                // With a busy timeout, SQLite would block this thread.
                Err(busy) if busy.is_busy() => {
                    if tokio::time::Instant::now() >= deadline {
                        return Err(Failure::Exhausted(busy.to_string()));
                    }
                }
                Err(failure) => return Err(failure),
            }
            tokio::time::sleep(pause).await;
            pause = MAX_BUSY_PAUSE.min(pause * 2);
        }
    }

    async fn wait_for_turn(&self, deadline: tokio::time::Instant) -> Result<OwnedMutexGuard<()>, Failure> {
        let turn = tokio::time::timeout_at(deadline, self.turn.clone().lock_owned()).await;
        turn.map_err(|_| Failure::Exhausted("another transaction has not ended".into()))
    }

    /// Moves the write-ahead log into the file and empties it.
    ///
    /// # Errors
    /// When another connection reads or writes for too long.
    pub async fn checkpoint(&self) -> Result<(), Failure> {
        let turn = self.wait_for_turn(tokio::time::Instant::now() + ACQUIRE_TIMEOUT).await?;
        let writer = self.writer.clone();
        blocking(move || {
            let _turn = turn;
            let busy: bool = lock(&writer).query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
            if busy { Err(Failure::Exhausted("another connection reads it for too long".into())) } else { Ok(()) }
        })
        .await
    }
}

fn try_begin(connection: &Connection) -> Result<(), Failure> {
    connection.busy_timeout(Duration::ZERO)?;
    let begun = execute(connection, "BEGIN IMMEDIATE", &[]);
    connection.busy_timeout(ACQUIRE_TIMEOUT)?;
    begun.map(drop)
}

/// A transaction that may write. Rolled back when it is dropped.
#[derive(Debug)]
pub struct Writing {
    connection: Arc<Mutex<Connection>>,
    _turn: OwnedMutexGuard<()>,
}

impl Writing {
    /// Runs `work` within the transaction, on the calling thread.
    ///
    /// # Errors
    /// When the transaction was rolled back, or `work` fails.
    pub fn run<T>(&self, work: impl FnOnce(&Connection) -> Result<T, Failure>) -> Result<T, Failure> {
        let connection = lock(&self.connection);
        if connection.is_autocommit() { Err(Failure::RolledBack) } else { work(&connection) }
    }

    /// Commits, in `spawn_blocking`, since it waits for the disk. `block_in_place` panics in a runtime with one thread, and
    /// moves the other tasks of the calling thread. If the caller is dropped meanwhile, the commit completes before the
    /// next transaction begins.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub async fn commit(self) -> Result<(), Failure> {
        blocking(move || self.run(|connection| execute(connection, "COMMIT", &[]).map(drop))).await
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let connection = lock(&self.connection);
        if !connection.is_autocommit()
            && let Err(cause) = execute(&connection, "ROLLBACK", &[])
        {
            tracing::error!(%cause, "a transaction could not be rolled back");
        }
    }
}

/// Runs `work` on a thread that may block.
///
/// # Errors
/// When `work` fails, or the program ends before it begins.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|cause| Err(Failure::Exhausted(cause.to_string())))
}

#[cfg(test)]
mod tests {
    use super::{Embedded, connect, execute, query};
    use crate::failure::Failure;

    fn open(folder: &std::path::Path) -> Embedded {
        let file = folder.join("test.db");
        std::fs::write(&file, "").expect("written");
        let store = Embedded::open(file).expect("opens");
        execute(&super::lock(&store.writer), "CREATE TABLE things (id INTEGER)", &[]).expect("made");
        store
    }

    fn count(store: &Embedded) -> i64 {
        let count = |connection: &_| query(connection, "SELECT COUNT(*) FROM things", &[], 1, |row| row.at(0));
        store.read(count).expect("reads")[0]
    }

    #[tokio::test]
    async fn a_reader_cannot_write() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path());
        store.read(|connection| execute(connection, "INSERT INTO things VALUES (1)", &[])).expect_err("refused");
    }

    #[tokio::test]
    async fn a_commit_completes_if_its_caller_is_dropped() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path());
        for id in 1..=20 {
            let transaction = store.begin().await.expect("begins");
            transaction.run(|connection| execute(connection, "INSERT INTO things VALUES (1)", &[])).expect("inserts");
            let mut commit = Box::pin(transaction.commit());
            // It runs on another thread by now.
            poll_once(&mut commit).await;
            drop(commit);
            drop(store.begin().await.expect("the next transaction begins after it"));
            assert_eq!(count(&store), id);
        }
    }

    /// Polls once.
    async fn poll_once(future: &mut (impl Future + Unpin)) {
        let mut future = std::pin::Pin::new(future);
        std::future::poll_fn(|context| {
            let _ = future.as_mut().poll(context);
            std::task::Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn a_transaction_waits_for_another_process() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path());
        let other = connect(&folder.path().join("test.db")).expect("opens");
        execute(&other, "BEGIN IMMEDIATE", &[]).expect("begins");
        let (begun, ()) = tokio::join!(store.begin(), async {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            execute(&other, "INSERT INTO things VALUES (1)", &[]).expect("inserts");
            execute(&other, "COMMIT", &[]).expect("commits");
        });
        let seen = begun.expect("begins").run(|connection| query(connection, "SELECT id FROM things", &[], 2, |_| Ok(())));
        assert_eq!(seen.expect("reads").len(), 1);
    }

    #[tokio::test]
    async fn a_transaction_that_was_rolled_back_cannot_write() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path());
        let transaction = store.begin().await.expect("begins");
        transaction.run(|connection| execute(connection, "ROLLBACK", &[])).expect("rolls back");
        let insert = transaction.run(|connection| execute(connection, "INSERT INTO things VALUES (1)", &[]));
        assert!(matches!(insert, Err(Failure::RolledBack)));
        assert!(matches!(transaction.commit().await, Err(Failure::RolledBack)));
        assert_eq!(count(&store), 0);
    }
}
