//! One open file: the writer's queue, a thread that reads, a thread that watches other processes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as Atomic};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::sync::{oneshot, watch};

use super::Options;
use super::retention::Trim;
use super::schema::{self, Role};
use super::writer::{Command, Counters, Job, Round, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::transport::kit::queue::Room;
use crate::transport::kit::wall::Wall;

/// How often the file is asked whether another process wrote to it; the call reads one shared page.
const WATCH_EVERY: Duration = Duration::from_millis(5);
const TRIM_EVERY: Duration = Duration::from_secs(10);
/// Topics whose number of partitions is remembered.
const MAX_REMEMBERED: usize = 4_096;

type Read = Box<dyn FnOnce(&mut Connection) + Send>;

pub(super) struct Store {
    pub(super) path: PathBuf,
    pub(super) options: Options,
    pub(super) room: Room,
    pub(super) closed: AtomicBool,
    pub(super) counters: Arc<Counters>,
    pub(super) wall: Arc<Wall>,
    /// The bound of the file, in bytes; `u64::MAX` = the disk decides.
    max_file_bytes: AtomicU64,
    /// How many partitions topics have, as far as it was looked up for events that others store.
    n_partitions: Mutex<HashMap<String, u32>>,
    jobs: mpsc::Sender<Command>,
    reads: Mutex<Option<mpsc::Sender<Read>>>,
    news: watch::Sender<u64>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Store {
    /// Opens the file and starts its threads. Blocks while it does.
    pub(super) fn open(path: &Path, options: Options) -> Result<Arc<Self>> {
        let mut connection = schema::open(path, Role::Writer, options.busy_timeout)?;
        schema::migrate(&mut connection).map_err(|error| error.with("file", path.display()))?;
        let mut reader = schema::open(path, Role::Reader, options.busy_timeout)?;
        let watcher = schema::open(path, Role::Reader, options.busy_timeout)?;
        let (jobs, job_queue) = mpsc::channel();
        let (reads, read_queue) = mpsc::channel::<Read>();
        let news = watch::Sender::new(0);
        let (counters, wall) = (Arc::new(Counters::default()), Arc::<Wall>::default());
        let writer = Writer {
            path: path.to_owned(),
            busy_timeout: options.busy_timeout,
            connection: Some(connection),
            jobs: job_queue,
            news: news.clone(),
            counters: counters.clone(),
            wall: wall.clone(),
            max_bytes: options.max_file_bytes,
            max_pages: None,
            poisoned: false,
        };
        let store = Arc::new(Self {
            path: path.to_owned(),
            options,
            room: Room::default(),
            closed: AtomicBool::new(false),
            counters,
            wall,
            max_file_bytes: AtomicU64::new(u64::MAX),
            n_partitions: Mutex::default(),
            jobs,
            reads: Mutex::new(Some(reads)),
            news: news.clone(),
            threads: Mutex::default(),
        });
        let weak = Arc::downgrade(&store);
        let threads = [
            spawn("eventbus-writer", move || writer.work())?,
            spawn("eventbus-reader", move || read_queue.into_iter().for_each(|read| read(&mut reader)))?,
            spawn("eventbus-watch", move || watch_file(&watcher, &weak, &news))?,
        ];
        store.threads.lock().extend(threads);
        if options.max_file_bytes.is_some() {
            store.bound(options.max_file_bytes)?;
        }
        Ok(store)
    }

    /// Bounds the file, in bytes.
    pub(super) fn bound(&self, bytes: Option<u64>) -> Result<()> {
        self.max_file_bytes.store(bytes.unwrap_or(u64::MAX), Atomic::Relaxed);
        self.send(Command::Bound(bytes))
    }

    /// How many partitions a topic had when that was looked up last.
    pub(super) fn remembered(&self, topic: &Topic) -> Option<u32> {
        self.n_partitions.lock().get(topic.as_str()).copied()
    }

    /// Remembers how many partitions a topic has.
    pub(super) fn remember(&self, topic: &Topic, n_partitions: u32) {
        let mut known = self.n_partitions.lock();
        if known.len() >= MAX_REMEMBERED {
            known.clear();
        }
        known.insert(topic.to_string(), n_partitions);
    }

    /// The bound of the file, in bytes.
    pub(super) fn max_file_bytes(&self) -> Option<u64> {
        Some(self.max_file_bytes.load(Atomic::Relaxed)).filter(|bytes| *bytes < u64::MAX)
    }

    pub(super) fn is_open(&self) -> Result<()> {
        if self.closed.load(Atomic::Acquire) { Err(Error::closed("transport")) } else { Ok(()) }
    }

    pub(super) fn send(&self, command: Command) -> Result<()> {
        self.jobs.send(command).map_err(|_| Error::closed("store"))
    }

    /// Follows what is stored and how groups change; the value itself says nothing.
    pub(super) fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// Has everybody look who follows.
    pub(super) fn has_news(&self) {
        self.news.send_modify(|version| *version += 1);
    }

    /// Runs work in the next transaction and returns when it is durable.
    pub(super) async fn write<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Round<'_>) -> Result<T> + Send + 'static,
    {
        self.submit(work)?.await.map_err(|_| Error::closed("store"))?
    }

    /// Puts work in line and returns at once; what is submitted first runs first.
    pub(super) fn submit<T, F>(&self, work: F) -> Result<oneshot::Receiver<Result<T>>>
    where
        T: Send + 'static,
        F: FnOnce(&mut Round<'_>) -> Result<T> + Send + 'static,
    {
        let (answer, outcome) = oneshot::channel();
        self.send(Command::Job(Box::new(Work { work: Some(work), value: None, answer })))?;
        Ok(outcome)
    }

    /// Runs a query on the reading connection.
    pub(super) async fn read<T, F>(&self, query: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Connection) -> Result<T> + Send + 'static,
    {
        let (answer, outcome) = oneshot::channel();
        let read: Read = Box::new(move |connection| drop(answer.send(query(connection))));
        match &*self.reads.lock() {
            Some(reads) => reads.send(read).map_err(|_| Error::closed("store"))?,
            None => return Err(Error::closed("store")),
        }
        outcome.await.map_err(|_| Error::closed("store"))?
    }

    /// Ends the threads after everything accepted was answered, and waits for them.
    pub(super) async fn close(self: &Arc<Self>) -> Result<()> {
        self.closed.store(true, Atomic::Release);
        drop(self.send(Command::Stop));
        self.reads.lock().take();
        let store = self.clone();
        let join = tokio::task::spawn_blocking(move || {
            // Held while joining, so that a second close waits for the first.
            let mut threads = store.threads.lock();
            threads.drain(..).for_each(|thread| drop(thread.join()));
        });
        join.await
            .map_err(|error| Error::new(ErrorKind::Unexpected, "closing was interrupted").caused_by(error))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // The threads end by themselves: nobody can send to them any more.
        drop(self.jobs.send(Command::Stop));
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map_err(|error| Error::new(ErrorKind::Unavailable, "a thread could not be started").caused_by(error))
}

/// Rings when another connection has committed, in this process or another; has retention enforced.
fn watch_file(connection: &Connection, store: &Weak<Store>, news: &watch::Sender<u64>) {
    let version = || connection.query_row("PRAGMA data_version", [], |row| row.get::<_, i64>(0)).ok();
    let mut seen = version();
    let mut trimmed = Instant::now();
    while let Some(store) = store.upgrade() {
        if store.closed.load(Atomic::Acquire) {
            return;
        }
        let now = version();
        if now != seen {
            seen = now;
            news.send_modify(|version| *version += 1);
        }
        if trimmed.elapsed() >= TRIM_EVERY {
            trimmed = Instant::now();
            drop(store.send(Command::Job(Box::new(Trim))));
        }
        drop(store);
        std::thread::sleep(WATCH_EVERY);
    }
}

struct Work<T, F> {
    work: Option<F>,
    value: Option<T>,
    answer: oneshot::Sender<Result<T>>,
}

impl<T: Send, F: FnOnce(&mut Round<'_>) -> Result<T> + Send> Job for Work<T, F> {
    fn run(&mut self, round: &mut Round<'_>) -> Result<()> {
        if let Some(work) = self.work.take() {
            self.value = Some(work(round)?);
        }
        Ok(())
    }

    fn done(self: Box<Self>, outcome: Result<()>) {
        let Self { value, answer, .. } = *self;
        let unrun = || Error::new(ErrorKind::Unexpected, "the work did not run");
        drop(answer.send(outcome.and_then(|()| value.ok_or_else(unrun))));
    }
}
