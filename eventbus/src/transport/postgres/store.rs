//! One open database: its connections, who waits for news, and the tasks that work on it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{Executor, PgPool};
use tokio::sync::mpsc;

use super::Options;
use super::publisher;
use super::schema;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::sql::from_sqlx;
use crate::transport::kit::bells::Bells;
use crate::transport::kit::queue::Queue;
use crate::transport::kit::tasks::Tasks;
use crate::transport::kit::tls;

/// The channel on which processes tell each other the ids of topics that changed.
pub(super) const CHANNEL: &str = "eventbus";

/// How often members look although nobody told them anything: a word on the channel may be lost.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(1);
/// When a connection that failed is tried again.
const AGAIN: Duration = Duration::from_millis(500);

pub(super) struct Store {
    pub(super) pool: PgPool,
    pub(super) options: Options,
    /// Where it is, without secrets.
    pub(super) place: String,
    pub(super) queue: Arc<Queue>,
    /// Topics by name: id and number of partitions.
    pub(super) topics: Mutex<HashMap<Topic, (i64, u32)>>,
    pub(super) bells: Bells<i64>,
    /// Tells the task that speaks on the channel which topics changed.
    pub(super) told: mpsc::UnboundedSender<i64>,
    pub(super) tasks: Tasks,
}

impl Store {
    pub(super) async fn open(connect: PgConnectOptions, options: Options) -> Result<Arc<Self>> {
        // Commits are flushed whatever the server's default is, or are not, and that is said.
        let commit = if options.flushed { "on" } else { "off" };
        if !options.flushed {
            tracing::warn!(
                "commits are not flushed: confirmed events may be lost if the server's machine fails"
            );
        }
        // An end is looked for when its lock is held, not when the transaction began. A plan that was made while a table was
        // small reads all of it, long after it is not; a plan for which there is no index looks dear, and is not worth compiling.
        let connect = connect.options([
            ("synchronous_commit", commit),
            ("lock_timeout", "10s"),
            ("default_transaction_isolation", "read committed"),
            ("enable_seqscan", "off"),
            ("jit", "off"),
        ]);
        let place = format!(
            "{}:{}/{}",
            connect.get_host(),
            connect.get_port(),
            connect.get_database().unwrap_or_default()
        );
        let pool = PgPoolOptions::new()
            .max_connections(options.max_connections)
            .acquire_timeout(options.timeout)
            .test_before_acquire(false)
            .max_lifetime(None)
            .connect_lazy_with(connect);
        let opening = {
            let pool = pool.clone();
            tokio::spawn(async move {
                let mut connection = pool.acquire().await.map_err(from_sqlx)?;
                schema::migrate(&mut connection).await
            })
        };
        let opened = opening.await.map_err(interrupted).and_then(|opened| opened);
        if let Err(error) = opened {
            pool.close().await;
            return Err(tls::at_opening(error).with("place", place));
        }
        let (queue, rounds) = Queue::new(options.max_event_bytes);
        let (told, tell) = mpsc::unbounded_channel();
        let store = Arc::new(Self {
            pool,
            options,
            place,
            queue,
            topics: Mutex::default(),
            bells: Bells::default(),
            told,
            tasks: Tasks::default(),
        });
        let weak = Arc::downgrade(&store);
        let tasks = [
            tokio::spawn(publisher::write(weak.clone(), rounds)),
            tokio::spawn(tell_others(store.pool.clone(), tell)),
            tokio::spawn(listen(store.pool.clone(), weak.clone())),
            tokio::spawn(super::retention::keep(weak)),
        ];
        tasks.into_iter().for_each(|task| store.tasks.keep(task));
        Ok(store)
    }

    pub(super) fn is_open(&self) -> Result<()> {
        self.queue.is_open()
    }

    /// Runs a unit of work on a task of its own, which a caller who goes away does not end: a connection that is
    /// dropped in the middle of a statement is lost.
    pub(super) async fn run<T, F, Fut>(self: &Arc<Self>, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(Arc<Self>) -> Fut,
        Fut: Future<Output = Result<T>> + Send + 'static,
    {
        self.is_open()?;
        self.tasks.run(work(self.clone())).await
    }

    /// Rings in this process and tells the others.
    pub(super) fn ring(&self, topic: i64) {
        self.bells.ring(&topic);
        _ = self.told.send(topic);
    }

    /// Ends what was opened, after everything accepted was answered. May be repeated.
    pub(super) async fn close(self: &Arc<Self>) {
        self.queue.stop().await;
        self.tasks.end().await;
        // Whoever polls is woken to see that it is closed.
        self.bells.end();
        self.pool.close().await;
    }
}

fn interrupted(error: tokio::task::JoinError) -> Error {
    Error::new(ErrorKind::Unexpected, "the work on the database was interrupted").caused_by(error)
}

/// Tells other processes which topics changed. Outside of the transactions that changed them: a notification takes
/// a lock of the whole server until its commit (manual, NOTIFY), so nothing that matters must wait behind it.
async fn tell_others(pool: PgPool, mut changed: mpsc::UnboundedReceiver<i64>) {
    while let Some(first) = changed.recv().await {
        let mut topics = vec![first];
        while let Ok(more) = changed.try_recv() {
            topics.push(more);
        }
        topics.sort_unstable();
        topics.dedup();
        let telling = async {
            let mut connection = pool.acquire().await?;
            let sql = "WITH fast AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
                SELECT pg_notify($1, topic::text) FROM fast, unnest($2::bigint[]) AS topic";
            connection.execute(sqlx::query(sql).bind(CHANNEL).bind(topics)).await
        };
        if let Err(error) = telling.await {
            tracing::debug!(%error, "other processes were not told of news; they look by themselves");
        }
    }
}

/// Hears what other processes tell; readers look for themselves whenever words may have been missed.
async fn listen(pool: PgPool, store: std::sync::Weak<Store>) {
    loop {
        let listening = async {
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.listen(CHANNEL).await?;
            if let Some(store) = store.upgrade() {
                store.bells.ring_all();
            }
            loop {
                let heard = listener.try_recv().await?;
                let Some(store) = store.upgrade() else { return Ok(()) };
                match heard.map(|heard| heard.payload().parse()) {
                    Some(Ok(topic)) => store.bells.ring(&topic),
                    // The connection was renewed: words may have been missed.
                    None | Some(Err(_)) => store.bells.ring_all(),
                }
            }
        };
        let ended: Result<(), sqlx::Error> = listening.await;
        let Some(store) = store.upgrade() else { return };
        if let Err(error) = ended {
            tracing::debug!(%error, "news of other processes are not heard; readers look by themselves");
        }
        store.bells.ring_all();
        drop(store);
        tokio::time::sleep(AGAIN).await;
    }
}
