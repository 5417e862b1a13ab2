//! The services' tables: one file, one writer thread that commits whatever waits in one transaction.

use std::path::Path;
use std::sync::{Arc, mpsc};

use eventbus::{Error, ErrorKind, Result};
use rusqlite::Connection;
use tokio::sync::oneshot;

/// A unit of work; false undoes it.
type Work = Box<dyn FnOnce(&Connection) -> (Answer, bool) + Send>;
/// Tells the caller, after the commit or its failure.
type Answer = Box<dyn FnOnce(Option<&rusqlite::Error>) + Send>;

/// Most units of work in one transaction.
const MAX_ROUND: usize = 1_024;

/// A handle on the tables; clones share the writer.
#[derive(Clone, Debug)]
pub struct Store {
    work: mpsc::Sender<Work>,
    _thread: Arc<std::thread::JoinHandle<()>>,
}

impl Store {
    /// Opens the file, or tables in memory, and creates what `schema` names.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if the file cannot be used.
    pub fn open(path: Option<&Path>, schema: String) -> Result<Self> {
        let open = || -> rusqlite::Result<Connection> {
            let connection = match path {
                Some(path) => Connection::open(path)?,
                None => Connection::open_in_memory()?,
            };
            connection.busy_timeout(std::time::Duration::from_secs(10))?;
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "synchronous", "FULL")?;
            connection.set_prepared_statement_cache_capacity(64);
            connection.execute_batch(&schema)?;
            Ok(connection)
        };
        let place = || path.map_or_else(|| "memory".into(), |path| path.display().to_string());
        let failed = |error| {
            Error::new(ErrorKind::Config, "the services' tables cannot be opened")
                .with("file", place())
                .caused_by(error)
        };
        let mut connection = open().map_err(failed)?;
        let (work, queue) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("eshop-store".into())
            .spawn(move || commit_rounds(&mut connection, &queue))
            .map_err(|error| {
                Error::new(ErrorKind::Unavailable, "a thread could not be started").caused_by(error)
            })?;
        Ok(Self { work, _thread: Arc::new(thread) })
    }

    /// Runs work in the next transaction; durable when it returns. Work that fails undoes itself alone.
    ///
    /// # Errors
    /// Transient for what the database reports: nothing of the work is stored.
    pub async fn run<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let unit: Work = Box::new(move |connection| {
            let outcome = work(connection);
            let keep = outcome.is_ok();
            let answer: Answer = Box::new(move |broken| {
                let outcome = match (outcome, broken) {
                    (Ok(value), None) => Ok(value),
                    (Err(error), _) => Err(unavailable(&error)),
                    (_, Some(error)) => Err(unavailable(error)),
                };
                drop(sender.send(outcome));
            });
            (answer, keep)
        });
        let gone = || Error::new(ErrorKind::Unavailable, "the services' tables did not take the work");
        self.work.send(unit).map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())?
    }
}

fn unavailable(error: &rusqlite::Error) -> Error {
    Error::new(ErrorKind::Unavailable, "the services' tables failed").caused_by(error.to_string())
}

fn commit_rounds(connection: &mut Connection, queue: &mpsc::Receiver<Work>) {
    while let Ok(first) = queue.recv() {
        let mut answers: Vec<Answer> = Vec::new();
        let outcome = connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .and_then(|mut transaction| {
                for work in std::iter::once(first).chain(queue.try_iter().take(MAX_ROUND)) {
                    let savepoint = transaction.savepoint()?;
                    let (answer, keep) = work(&savepoint);
                    answers.push(answer);
                    // Dropped without a commit it undoes this work alone.
                    if keep {
                        savepoint.commit()?;
                    }
                }
                transaction.commit()
            });
        let broken = outcome.as_ref().err();
        answers.into_iter().for_each(|answer| answer(broken));
    }
}
