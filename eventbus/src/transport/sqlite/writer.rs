//! The one writer: a thread that puts whatever is waiting into one transaction, syncs once, then
//! answers everybody.
//!
//! Producers that wait for their confirm come back right after a sync, but not all at the same
//! instant. A round therefore waits, at most a tenth of the measured sync time, until as many jobs
//! are there as in the round before; without that half of them would miss each sync.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering as Atomic};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rusqlite::{Connection, params};
use tokio::sync::watch;

use super::schema::{self, Role, from_sqlite};
use crate::error::{Error, ErrorKind, Result};
use crate::transport::kit::wall::Wall;

/// Work for one transaction.
pub(super) trait Job: Send {
    /// Does the work. An error undoes this job alone, or the round where it says so.
    fn run(&mut self, round: &mut Round<'_>) -> Result<()>;

    /// Whether it needs a savepoint to be undone: not if it writes nothing before it knows that it may.
    fn needs_savepoint(&self) -> bool {
        true
    }

    /// Answers, after the commit or the failure.
    fn done(self: Box<Self>, outcome: Result<()>);

    /// What the job counts against the size of a round, in bytes.
    fn size_bytes(&self) -> usize {
        0
    }
}

/// One transaction, with what was looked up in it.
pub(super) struct Round<'a> {
    pub(super) connection: &'a Connection,
    /// Topics by name: id and partitions.
    pub(super) topics: HashMap<String, (i64, u32)>,
    /// Whether readers should look: events were stored or a group changed.
    pub(super) news: bool,
    /// The bound of the file for new events, in pages. SQLite's own bound lies above: what settles,
    /// trims and keeps seats must go on when publishing is refused.
    pub(super) max_pages: Option<u64>,
    pub(super) wall: &'a Wall,
    /// Where partitions end after what this round appended, by topic and partition. Stored before anything else
    /// looks, so that a thousand appends are not a thousand updates.
    ends: HashMap<(i64, u32), End>,
    /// Set by a job that failed in the middle of its writes and has no savepoint.
    pub(super) is_broken: bool,
}

/// Where a partition ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct End {
    /// The next offset.
    pub(super) next: u64,
    /// The newest time stored in it, in nanoseconds.
    pub(super) last_stored: i64,
}

impl<'a> Round<'a> {
    fn new(connection: &'a Connection, max_pages: Option<u64>, wall: &'a Wall) -> Self {
        let (topics, ends) = (HashMap::new(), HashMap::new());
        Self { connection, topics, news: false, max_pages, wall, ends, is_broken: false }
    }

    /// Where a partition ends now.
    pub(super) fn end(&self, topic: i64, partition: u32) -> Result<End> {
        match self.ends.get(&(topic, partition)) {
            Some(end) => Ok(*end),
            None => super::topics::end(self, topic, partition),
        }
    }

    /// Moves the end of a partition.
    pub(super) fn set_end(&mut self, topic: i64, partition: u32, end: End) {
        self.ends.insert((topic, partition), end);
    }

    /// Stores the ends that moved; a failure is the round's, which must not keep events that it did not count.
    fn store_ends(&mut self) -> Result<()> {
        if self.ends.is_empty() {
            return Ok(());
        }
        let sql =
            "UPDATE eventbus_partition SET next = ?3, last_stored = ?4 WHERE topic = ?1 AND partition = ?2";
        let ends = std::mem::take(&mut self.ends);
        let stored = self.connection.prepare_cached(sql).and_then(|mut update| {
            ends.iter().try_for_each(|((topic, partition), end)| {
                update.execute(params![topic, partition, end.next, end.last_stored]).map(drop)
            })
        });
        self.is_broken |= stored.is_err();
        stored.map_err(from_sqlite)
    }
}

pub(super) enum Command {
    Job(Box<dyn Job>),
    /// Bounds the file, in bytes.
    Bound(Option<u64>),
    Stop,
}

/// Counters that tests gate on.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) commits: AtomicU64,
    pub(super) jobs: AtomicU64,
}

/// Pages above the bound of new events, for everything else.
const SPARE_PAGES: u64 = 4_096;
/// A round takes no more than this, so that one commit stays short.
const MAX_ROUND_JOBS: usize = 8_192;
const MAX_ROUND_BYTES: usize = 8 << 20;
/// A round waits for company at most this part of a sync, and never longer than the cap.
const GATHER_PART: u32 = 10;
const GATHER_CAP: Duration = Duration::from_millis(1);

pub(super) struct Writer {
    pub(super) path: PathBuf,
    pub(super) busy_timeout: Duration,
    pub(super) connection: Option<Connection>,
    pub(super) jobs: Receiver<Command>,
    pub(super) news: watch::Sender<u64>,
    pub(super) counters: Arc<Counters>,
    pub(super) wall: Arc<Wall>,
    pub(super) max_bytes: Option<u64>,
    pub(super) max_pages: Option<u64>,
    /// A sync failed: what the disk dropped with it nobody knows, so nothing is accepted before a reopen.
    pub(super) poisoned: bool,
}

impl Writer {
    /// Works until it is told to stop or nobody can send any more.
    pub(super) fn work(mut self) {
        let mut sync_time = Duration::ZERO;
        let mut last_round = 0;
        while let Ok(first) = self.jobs.recv() {
            let Some(round) = self.gather(first, last_round, (sync_time / GATHER_PART).min(GATHER_CAP))
            else {
                return;
            };
            last_round = round.jobs.len();
            if !round.jobs.is_empty() {
                let took = self.commit(round.jobs);
                sync_time = if sync_time.is_zero() { took } else { (sync_time * 7 + took) / 8 };
            }
            if round.stop {
                return;
            }
        }
    }

    fn gather(&mut self, first: Command, wanted: usize, patience: Duration) -> Option<Gathered> {
        let mut round = Gathered { jobs: Vec::new(), n_bytes: 0, stop: false };
        let started = Instant::now();
        let mut next = Some(first);
        loop {
            match next.take() {
                Some(Command::Job(job)) => {
                    round.n_bytes += job.size_bytes();
                    round.jobs.push(job);
                }
                Some(Command::Bound(bytes)) => {
                    self.max_bytes = bytes;
                    self.bound();
                }
                Some(Command::Stop) => {
                    round.stop = true;
                    return Some(round);
                }
                None => {}
            }
            if round.jobs.len() >= MAX_ROUND_JOBS || round.n_bytes >= MAX_ROUND_BYTES {
                return Some(round);
            }
            next = match self.jobs.try_recv() {
                Ok(command) => Some(command),
                Err(_) if round.jobs.len() >= wanted || round.jobs.is_empty() => return Some(round),
                Err(_) => match self.jobs.recv_timeout(patience.saturating_sub(started.elapsed())) {
                    Ok(command) => Some(command),
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Some(round),
                },
            };
        }
    }

    /// Runs one transaction and answers every job. Returns how long the commit took.
    fn commit(&mut self, jobs: Vec<Box<dyn Job>>) -> Duration {
        self.counters.jobs.fetch_add(jobs.len() as u64, Atomic::Relaxed);
        if self.poisoned {
            let error =
                Error::new(ErrorKind::Unavailable, "a sync of this file failed: close it and open it again")
                    .with("file", self.path.display());
            return answer(jobs, || Err(error.duplicate()));
        }
        let max_pages = self.max_pages;
        let wall = self.wall.clone();
        let connection = match self.connection() {
            Ok(connection) => connection,
            Err(error) => return answer(jobs, || Err(error.duplicate())),
        };
        if let Err(error) = connection.execute_batch("BEGIN IMMEDIATE") {
            let error = from_sqlite(error);
            return answer(jobs, || Err(error.duplicate()));
        }
        let mut round = Round::new(connection, max_pages, &wall);
        let mut finished: Vec<(Box<dyn Job>, Result<()>)> = Vec::with_capacity(jobs.len());
        let mut broken: Option<Error> = None;
        for mut job in jobs {
            if let Some(error) = &broken {
                finished.push((job, Err(error.duplicate())));
                continue;
            }
            let outcome = if job.needs_savepoint() {
                round.store_ends().and_then(|()| savepoint(&mut round, job.as_mut()))
            } else {
                job.run(&mut round)
            };
            if round.is_broken && !round.connection.is_autocommit() {
                drop(round.connection.execute_batch("ROLLBACK"));
            }
            if round.connection.is_autocommit() {
                // The whole transaction is given up: what ran before is undone as well, through no fault of its
                // own. It may be repeated.
                let cause = outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
                let error =
                    Error::new(ErrorKind::Unavailable, "another write of the same transaction failed")
                        .caused_by(cause);
                finished.iter_mut().for_each(|(_, earlier)| *earlier = Err(error.duplicate()));
                broken = Some(error);
            }
            finished.push((job, outcome));
        }
        let news = round.news;
        if broken.is_none()
            && let Err(error) = round.store_ends()
        {
            drop(round.connection.execute_batch("ROLLBACK"));
            broken = Some(error);
        }
        let started = Instant::now();
        if broken.is_none() {
            broken = self.end_transaction();
        }
        let took = started.elapsed();
        if broken.is_none() && news {
            self.news.send_modify(|version| *version += 1);
        }
        for (job, outcome) in finished {
            match &broken {
                Some(error) => job.done(outcome.and_then(|()| Err(error.duplicate()))),
                None => job.done(outcome),
            }
        }
        took
    }

    /// Commits; an error says what the jobs' outcome is.
    fn end_transaction(&mut self) -> Option<Error> {
        let connection = self.connection.as_ref()?;
        let (error, of_disk) = match connection.execute_batch("COMMIT") {
            Ok(()) => {
                self.counters.commits.fetch_add(1, Atomic::Relaxed);
                return None;
            }
            Err(error) => {
                let of_disk = error.sqlite_error_code() == Some(rusqlite::ErrorCode::SystemIoFailure);
                (from_sqlite(error), of_disk)
            }
        };
        let undone = connection.execute_batch("ROLLBACK").is_ok() && connection.is_autocommit();
        if undone && matches!(error.kind(), ErrorKind::Full) {
            return Some(error);
        }
        // A failed sync may have written what it says it did not (fsyncgate): the handle is not
        // trusted any more, and nobody is told more than is known.
        self.connection = None;
        self.poisoned = of_disk;
        Some(
            Error::new(ErrorKind::Unknown, "the commit failed in the file system: it may have happened")
                .caused_by(error),
        )
    }

    fn connection(&mut self) -> Result<&Connection> {
        if self.connection.is_none() {
            self.connection = Some(schema::open(&self.path, Role::Writer, self.busy_timeout)?);
            self.bound();
        }
        self.connection.as_ref().ok_or_else(|| Error::closed("store"))
    }

    fn bound(&mut self) {
        let Some(connection) = &self.connection else { return };
        let page: u64 = connection.query_row("PRAGMA page_size", [], |row| row.get(0)).unwrap_or(4096);
        let max_pages = self.max_bytes.map(|bytes| bytes / page.max(1));
        self.max_pages = max_pages;
        let pages = max_pages.map_or(u64::from(u32::MAX - 1), |pages| pages.saturating_add(SPARE_PAGES));
        let set: rusqlite::Result<i64> =
            connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |row| row.get(0));
        if let Err(error) = set {
            tracing::warn!(%error, "the bound of the file could not be set");
        }
    }
}

struct Gathered {
    jobs: Vec<Box<dyn Job>>,
    n_bytes: usize,
    stop: bool,
}

fn answer(jobs: Vec<Box<dyn Job>>, outcome: impl Fn() -> Result<()>) -> Duration {
    jobs.into_iter().for_each(|job| job.done(outcome()));
    Duration::ZERO
}

/// Runs a job so that its failure undoes it alone.
fn savepoint(round: &mut Round<'_>, job: &mut dyn Job) -> Result<()> {
    let run = |sql: &str, round: &Round<'_>| {
        round
            .connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute([]))
            .map_err(from_sqlite)
    };
    run("SAVEPOINT job", round)?;
    match job.run(round) {
        Ok(()) => run("RELEASE job", round).map(drop),
        Err(error) => {
            // Topics that were looked up may have been created by this job.
            round.topics.clear();
            if !round.connection.is_autocommit() {
                run("ROLLBACK TO job", round)?;
                run("RELEASE job", round)?;
            }
            Err(error)
        }
    }
}
