//! The one writer of a file in this process: transactions take turns, and those that wait for each other are committed
//! together, with one sync.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use eventbus::sql::from_sqlx;
use eventbus::{Error, ErrorKind, Result};
use sqlx::pool::PoolConnection;
use sqlx::{Database, SqlSafeStr as _, Sqlite, SqliteConnection, SqlitePool};
use sqlx_core::transaction::TransactionManager as _;
use tokio::sync::{Mutex, OwnedMutexGuard, oneshot};

use crate::backend::{Backend as _, Uncommitted};

/// Longest wait for those before.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most units that are committed together, and the longest that one of them waits for others to begin.
const MAX_UNITS: usize = 128;
const MAX_WAIT: Duration = Duration::from_millis(10);
/// After a commit of several that failed, so many units are committed alone: whose fault it was is told to that one.
const ALONE: usize = 2 * MAX_UNITS;

/// Who writes now and who waits.
#[derive(Debug)]
pub struct Writer {
    /// The open group, while nobody works in it. It is left open only for one who waits.
    group: Arc<Mutex<Option<Group>>>,
    waiting: AtomicUsize,
    /// Longest wait for those before.
    patience: Duration,
    /// How many units are still to be committed alone.
    alone: AtomicUsize,
}

impl Default for Writer {
    fn default() -> Self {
        let (group, waiting, alone) = Default::default();
        Self { group, waiting, patience: PATIENCE, alone }
    }
}

/// A transaction of the file with a savepoint in it, and who waits for its commit. If it ends in any other way, its connection
/// does too, as nobody knows what users left in it: what is not committed goes back, and those who wait are told so.
struct Group {
    connection: PoolConnection<Sqlite>,
    is_over: bool,
    committed: Vec<oneshot::Sender<Result<(), Uncommitted>>>,
    since: Instant,
}

/// A part of a group, from its savepoint to the next one: for its user, a transaction.
pub struct Unit(Option<Open>);

struct Open {
    writer: Arc<Writer>,
    turn: OwnedMutexGuard<Option<Group>>,
    group: Group,
}

/// One who waits for the turn; the group must not be left to one who went away.
struct Waiting {
    writer: Arc<Writer>,
    came: bool,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.writer.waiting.fetch_sub(1, Ordering::SeqCst);
        if !self.came && tokio::runtime::Handle::try_current().is_ok() {
            let writer = self.writer.clone();
            tokio::spawn(async move {
                let mut turn = writer.group.clone().lock_owned().await;
                if let Some(group) = turn.take() {
                    writer.end(turn, group).await;
                }
            });
        }
    }
}

impl Writer {
    /// Begins a unit when all before it have ended.
    ///
    /// The future must be run to its end: what is given up in the middle takes the units before it along.
    pub(super) async fn begin(self: &Arc<Self>, pool: &SqlitePool) -> Result<Unit> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut waiting = Waiting { writer: self.clone(), came: false };
        let Ok(mut turn) = tokio::time::timeout(self.patience, self.group.clone().lock_owned()).await else {
            let message = "others of this process write to the file for too long";
            return Err(Error::new(ErrorKind::Unavailable, message));
        };
        waiting.came = true;
        drop(waiting);
        let group = match turn.take() {
            Some(mut group) => {
                let next = sqlx::raw_sql("RELEASE evt_unit; SAVEPOINT evt_unit");
                match next.execute(&mut *group.connection).await {
                    Ok(_) => group,
                    // Somebody before ended the transaction by hand.
                    Err(_) => {
                        drop(group);
                        Group::begin(pool).await?
                    }
                }
            }
            None => Group::begin(pool).await?,
        };
        Ok(Unit(Some(Open { writer: self.clone(), turn, group })))
    }

    /// Ends a turn: commits, or leaves the group to the next who waits.
    async fn end(&self, mut turn: OwnedMutexGuard<Option<Group>>, mut group: Group) {
        let is_alone = self.alone.load(Ordering::Relaxed) > 0;
        let is_full = group.committed.len() >= MAX_UNITS || group.since.elapsed() >= MAX_WAIT;
        if self.waiting.load(Ordering::SeqCst) > 0 && !is_alone && !is_full {
            *turn = Some(group);
            return;
        }
        if group.committed.is_empty() {
            group.is_over = Transactions::rollback(&mut group.connection).await.is_ok() && group.is_clean();
            return;
        }
        let mut outcome = Transactions::commit(&mut group.connection).await.map_err(Uncommitted::from);
        group.is_over = outcome.is_ok() && group.is_clean();
        if is_alone {
            self.alone.fetch_sub(1, Ordering::Relaxed);
        }
        if let Err(failed) = &mut outcome
            && group.committed.len() > 1
        {
            self.alone.store(ALONE, Ordering::Relaxed);
            // It may be the fault of one of them, such as of a constraint that is checked at the end: not of each.
            let message = "transactions that were committed together failed";
            let shared = Error::new(ErrorKind::Unavailable, message).caused_by(failed.error.clone());
            failed.error = Arc::new(shared);
        }
        let committed = std::mem::take(&mut group.committed);
        drop(group);
        drop(turn);
        for committed in committed {
            // Who went away does not want to know.
            _ = committed.send(outcome.clone());
        }
    }
}

/// How `sqlx` begins and ends what it counts as transactions: with it a user's transaction inside of ours is a savepoint.
type Transactions = <Sqlite as Database>::TransactionManager;

impl Group {
    async fn begin(pool: &SqlitePool) -> Result<Self> {
        let mut connection = pool.acquire().await.map_err(from_sqlx)?;
        let begin = Some("BEGIN IMMEDIATE; SAVEPOINT evt_unit".into_sql_str());
        Transactions::begin(&mut connection, begin).await.map_err(from_sqlx)?;
        let mut group = Self { connection, is_over: false, committed: Vec::new(), since: Instant::now() };
        Sqlite::sound(&mut group.connection).await?;
        Ok(group)
    }

    /// Whether nothing is open on the connection, as far as `sqlx` knows.
    fn is_clean(&self) -> bool {
        Transactions::get_transaction_depth(&self.connection) == 0
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.is_over {
            self.connection.close_on_drop();
        }
    }
}

impl Open {
    /// Makes it part of what the group commits; returns when that is done.
    async fn commit(self) -> Result<(), Uncommitted> {
        self.with_group().await
    }

    /// Undoes it. Whoever was told what it read must know that it is true: if there are units before it in the group, it
    /// returns when they are committed.
    async fn rollback(mut self) -> Result<(), Uncommitted> {
        // What cannot be undone by itself is undone with all of it.
        sqlx::raw_sql("ROLLBACK TO evt_unit").execute(&mut *self.group.connection).await?;
        if self.group.committed.is_empty() {
            self.writer.end(self.turn, self.group).await;
            return Ok(());
        }
        self.with_group().await
    }

    async fn with_group(mut self) -> Result<(), Uncommitted> {
        let (sender, committed) = oneshot::channel();
        self.group.committed.push(sender);
        self.writer.end(self.turn, self.group).await;
        committed.await.unwrap_or_else(|_| {
            let message = "it was rolled back with another transaction of this process";
            Err(Uncommitted::refused(Error::new(ErrorKind::Unavailable, message)))
        })
    }
}

impl Unit {
    pub(super) async fn commit(mut self) -> Result<(), Uncommitted> {
        match self.0.take() {
            Some(open) => open.commit().await,
            None => Err(Uncommitted::refused(Error::new(ErrorKind::Closed, "it ended before"))),
        }
    }

    pub(super) async fn rollback(mut self) -> Result<(), Uncommitted> {
        match self.0.take() {
            Some(open) => open.rollback().await,
            None => Ok(()),
        }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // Without a runtime the group goes back as a whole.
        if let (Some(open), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(open.rollback());
        }
    }
}

impl Deref for Unit {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        match &self.0 {
            Some(open) => &open.group.connection,
            None => unreachable!("a unit is open until it is consumed"),
        }
    }
}

impl DerefMut for Unit {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        match &mut self.0 {
            Some(open) => &mut open.group.connection,
            None => unreachable!("a unit is open until it is consumed"),
        }
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("n_units", &self.committed.len()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unit").field("is_open", &self.0.is_some()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group is left to one who waits, who may be the one whose patience ends now.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_group_is_never_left_to_one_who_gave_up() {
        let folder = tempfile::tempdir().unwrap();
        let options = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(folder.path().join("w.db"))
            .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal)
            .create_if_missing(true);
        let pool = SqlitePool::connect_with(options).await.unwrap();
        sqlx::query("CREATE TABLE w (n INTEGER)").execute(&pool).await.unwrap();
        let writer = Arc::new(Writer { patience: Duration::from_micros(200), ..Writer::default() });
        let (mut committed, mut gave_up) = (0, 0);
        for _ in 0..200 {
            let some = [(); 6].map(|()| {
                let (writer, pool) = (writer.clone(), pool.clone());
                tokio::spawn(async move {
                    let Ok(mut unit) = writer.begin(&pool).await else { return false };
                    sqlx::query("INSERT INTO w VALUES (1)").execute(&mut *unit).await.unwrap();
                    unit.commit().await.unwrap();
                    true
                })
            });
            for one in some {
                let one = tokio::time::timeout(Duration::from_secs(5), one);
                match one.await {
                    Ok(Ok(true)) => committed += 1,
                    Ok(Ok(false)) => gave_up += 1,
                    stuck => unreachable!("nobody commits the group: {stuck:?}"),
                }
            }
        }
        assert!(committed > 100 && gave_up > 10, "{committed} committed, {gave_up} gave up");
    }
}
