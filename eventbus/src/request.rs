//! Commands with an answer: sent to the one owner, answered into an inbox of this instance.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::admin::TopicSpec;
use crate::bus::Bus;
use crate::envelope::{Envelope, extension};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Command;
use crate::id::EventId;
use crate::name::Topic;
use crate::subscription::Subscription;
use crate::time::to_rfc3339;
use crate::transport::{Consumer, Polled, Publisher, Settle};

/// The type of an answer that says that the command failed for good.
pub(crate) const FAILED: &str = "evt.failed";
pub(crate) const FAILURE_CODE: &str = "evt-failure-code";
pub(crate) const FAILURE_MESSAGE: &str = "evt-failure-message";

/// Answers are kept no longer than this, should an instance end without deleting its inbox.
const INBOX_AGE: Duration = Duration::from_secs(3_600);

type Waiting = Arc<Mutex<HashMap<EventId, oneshot::Sender<Envelope>>>>;

/// Sends commands and waits for their answers, in an inbox topic `replies.<id>` of its own.
///
/// The inbox is a broadcast: its position ends with this value. Dropping the value deletes the topic in the
/// background; [`close`](Self::close) waits for that.
pub struct Requests {
    bus: Bus,
    publisher: Arc<dyn Publisher>,
    inbox: Topic,
    waiting: Waiting,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

impl Bus {
    /// Opens an inbox for answers to commands.
    ///
    /// # Errors
    /// As [`Transport::subscribe`](crate::Transport::subscribe).
    ///
    /// # Cancellation
    /// An inbox that was made is deleted by the transport's retention, or by whoever opens the next.
    pub async fn requests(&self) -> Result<Requests> {
        let inbox = Topic::new(format!("replies.{}", EventId::generate()))?;
        if let Some(admin) = self.transport().admin() {
            let spec = TopicSpec::new(inbox.clone()).with_partitions(NonZeroU32::MIN).with_max_age(INBOX_AGE);
            admin.declare(&spec).await?;
        }
        let consumer = self.transport().subscribe(&Subscription::broadcast(inbox.clone())).await?;
        let waiting = Waiting::default();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(receive(self.clone(), inbox.clone(), consumer, waiting.clone(), stopped));
        Ok(Requests {
            publisher: self.transport().publisher().await?,
            bus: self.clone(),
            inbox,
            waiting,
            stop: Some(stop),
            task: Some(task),
        })
    }
}

/// Hands answers to those who wait, until the value is dropped.
async fn receive(
    bus: Bus,
    inbox: Topic,
    consumer: Arc<dyn Consumer>,
    waiting: Waiting,
    mut stopped: oneshot::Receiver<()>,
) {
    loop {
        let polled = tokio::select! {
            _ = &mut stopped => break,
            polled = consumer.poll(Subscription::WINDOW) => polled,
        };
        match polled {
            Ok(Polled::Deliveries(deliveries)) => {
                for delivery in &deliveries {
                    let Some(answer) = delivery.content.envelope() else { continue };
                    let cause = answer.extension(extension::CAUSATION_ID).map(EventId::parse);
                    let sender = cause.and_then(|cause| waiting.lock().remove(&cause));
                    // Nobody waits any more: the answer came after the time was over.
                    drop(sender.map(|sender| sender.send(answer.clone())));
                }
                let done: Vec<_> = deliveries.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
                if let Err(error) = consumer.settle(&done).await {
                    tracing::warn!(%error, %inbox, "answers could not be settled; they may come twice");
                }
            }
            Ok(Polled::Closed) => break,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, %inbox, "the inbox could not be read; trying again");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    waiting.lock().clear();
    let closed = consumer.close((Instant::now() + Duration::from_secs(5)).into_std()).await;
    let deleted = match bus.transport().admin() {
        Some(admin) => admin.delete_topic(&inbox).await,
        None => Ok(()),
    };
    if let Err(error) = closed.and(deleted) {
        tracing::debug!(%error, %inbox, "the inbox stays until its age ends it");
    }
}

impl Requests {
    /// Returns the topic that answers come to.
    pub fn inbox(&self) -> &Topic {
        &self.inbox
    }

    /// Sends a command and waits for its answer.
    ///
    /// The command carries its deadline: an owner that meets it later does not run it.
    ///
    /// # Errors
    /// [`Timeout`](ErrorKind::Timeout) if no answer came in time: it may have run, or run still.
    /// [`Failed`](ErrorKind::Failed) if its owner gave it up, with the failure's code and words. What publishing
    /// reports, where it was not accepted. [`Undecodable`](ErrorKind::Undecodable) for an answer that is not
    /// of the command's reply type.
    ///
    /// # Cancellation
    /// The command stays sent; its answer is dropped.
    pub async fn request<C: Command>(
        &self,
        topic: &Topic,
        command: &C,
        within: Duration,
    ) -> Result<C::Reply> {
        let deadline = Instant::now() + within;
        let expiry = SystemTime::now().checked_add(within).unwrap_or(SystemTime::UNIX_EPOCH);
        let envelope = Envelope::of(command, self.bus.source())?
            .with_extension(extension::REPLY_TO, self.inbox.as_str())
            .with_extension(extension::EXPIRY_TIME, to_rfc3339(expiry));
        let id = envelope.id().clone();
        let (sender, answer) = oneshot::channel();
        self.waiting.lock().insert(id.clone(), sender);
        // However this ends, nobody waits for it afterwards.
        let _waiting = Forget { waiting: &self.waiting, id: &id };
        let late = || {
            Error::new(ErrorKind::Timeout, "no answer in time")
                .with("command", C::TYPE)
                .with("topic", topic)
                .with("id", &id)
        };
        let sent = async { self.publisher.enqueue(topic, vec![envelope]).await?.await.single() };
        tokio::time::timeout_at(deadline, sent).await.map_err(|_| late())??;
        let answer = tokio::time::timeout_at(deadline, answer).await.map_err(|_| late())?;
        let answer = answer.map_err(|_| Error::closed("inbox"))?;
        if answer.event_type() == FAILED {
            let said = |name| answer.extension(name).unwrap_or("unknown").to_owned();
            return Err(Error::new(ErrorKind::Failed, said(FAILURE_MESSAGE))
                .with("code", said(FAILURE_CODE))
                .with("command", C::TYPE));
        }
        answer.decode()
    }

    /// Deletes the inbox and waits for it. Commands that wait for an answer end with
    /// [`Closed`](ErrorKind::Closed).
    ///
    /// # Cancellation
    /// The inbox may stay until its retention ends.
    pub async fn close(mut self) {
        drop(self.stop.take());
        if let Some(task) = self.task.take() {
            drop(task.await);
        }
    }
}

struct Forget<'a> {
    waiting: &'a Waiting,
    id: &'a EventId,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.waiting.lock().remove(self.id);
    }
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Requests").field("inbox", &self.inbox).finish_non_exhaustive()
    }
}
