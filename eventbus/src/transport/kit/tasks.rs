//! The tasks of one open transport value: units of work that nobody may interrupt, and those that run all the time.

use std::future::Future;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::error::{Error, ErrorKind, Result};

#[derive(Debug)]
pub(crate) struct Tasks {
    n_busy: watch::Sender<usize>,
    always: Mutex<Vec<JoinHandle<()>>>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self { n_busy: watch::Sender::new(0), always: Mutex::default() }
    }
}

/// A unit of work in progress, which closing waits for.
#[derive(Debug)]
pub(crate) struct Busy(watch::Sender<usize>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

impl Tasks {
    /// Notes that a unit of work begins.
    pub(crate) fn begin(&self) -> Busy {
        self.n_busy.send_modify(|n| *n += 1);
        Busy(self.n_busy.clone())
    }

    /// Runs a unit of work on a task of its own, which a caller who goes away does not end.
    pub(crate) async fn run<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let busy = self.begin();
        let working = tokio::spawn(async move {
            let outcome = work.await;
            drop(busy);
            outcome
        });
        working.await.map_err(|error| {
            Error::new(ErrorKind::Unexpected, "the work on the store was interrupted").caused_by(error)
        })?
    }

    /// Lets a member leave without waiting; closing waits for it. Outside of a runtime nothing can be sent, and what
    /// fails is not tried again: the session's end takes the seat.
    pub(crate) fn leave_soon(&self, leaving: impl Future<Output = Result<()>> + Send + 'static) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let busy = self.begin();
        runtime.spawn(async move {
            if let Err(error) = leaving.await {
                tracing::debug!(%error, "a member could not leave; it is gone when its session ends");
            }
            drop(busy);
        });
    }

    /// Takes a task that runs until the end.
    pub(crate) fn keep(&self, task: JoinHandle<()>) {
        self.always.lock().push(task);
    }

    /// Waits for the units of work, then ends the tasks that run all the time.
    pub(crate) async fn end(&self) {
        let mut busy = self.n_busy.subscribe();
        drop(busy.wait_for(|n| *n == 0).await);
        let tasks = std::mem::take(&mut *self.always.lock());
        tasks.iter().for_each(JoinHandle::abort);
        for task in tasks {
            drop(task.await);
        }
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.always.get_mut().iter().for_each(JoinHandle::abort);
    }
}
