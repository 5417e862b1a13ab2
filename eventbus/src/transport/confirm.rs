//! The second step of publishing: a future of one receipt or error for each event of a batch.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use smallvec::SmallVec;
use tokio::sync::oneshot;

use crate::admin::Offset;
use crate::error::{Error, ErrorKind, Result};
use crate::partition::PartitionId;

/// Where an event was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Receipt {
    /// The partition.
    pub partition: PartitionId,
    /// The offset, where the transport has positions.
    pub offset: Option<Offset>,
    /// Whether the id was already stored inside the deduplication window; then this is its place.
    pub duplicate: bool,
}

impl Receipt {
    /// Reports a place.
    pub fn new(partition: PartitionId, offset: impl Into<Option<Offset>>) -> Self {
        Self { partition, offset: offset.into(), duplicate: false }
    }

    /// Marks that the id had been stored before.
    #[must_use]
    pub fn duplicate(mut self) -> Self {
        self.duplicate = true;
        self
    }
}

/// One receipt or error for each event of a batch, in the batch's order.
#[derive(Debug, Default)]
pub struct Receipts(SmallVec<[Result<Receipt>; 1]>);

impl Receipts {
    /// Returns the number of events.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Tells whether the batch was empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the outcomes in order.
    pub fn iter(&self) -> impl Iterator<Item = &Result<Receipt>> {
        self.0.iter()
    }

    /// Appends the outcome of the next event.
    pub fn push(&mut self, outcome: Result<Receipt>) {
        self.0.push(outcome);
    }

    #[cfg_attr(
        not(feature = "memory"),
        allow(dead_code, reason = "what uses it depends on the transports that are built")
    )]
    pub(crate) fn extend_from(&mut self, outcomes: impl Iterator<Item = Result<Receipt>>) {
        self.0.extend(outcomes);
    }

    /// Returns all receipts, or the first error.
    ///
    /// # Errors
    /// The first event's error that was not stored; the others may be.
    pub fn all(self) -> Result<Vec<Receipt>> {
        self.0.into_iter().collect()
    }

    /// Returns the outcome of a batch of one.
    ///
    /// # Errors
    /// The event's own; [`Unexpected`](ErrorKind::Unexpected) if the batch did not hold exactly one.
    pub fn single(mut self) -> Result<Receipt> {
        match (self.0.pop(), self.0.len()) {
            (Some(outcome), 0) => outcome,
            (_, others) => {
                Err(Error::new(ErrorKind::Unexpected, "not a batch of one").with("others", others))
            }
        }
    }
}

impl FromIterator<Result<Receipt>> for Receipts {
    fn from_iter<I: IntoIterator<Item = Result<Receipt>>>(outcomes: I) -> Self {
        Self(outcomes.into_iter().collect())
    }
}

impl IntoIterator for Receipts {
    type Item = Result<Receipt>;
    type IntoIter = smallvec::IntoIter<[Result<Receipt>; 1]>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// Resolves when every event of a batch is stored or refused.
///
/// Dropping it loses only the knowledge: what was accepted is still published.
#[must_use = "a publish is durable when its confirm has resolved"]
#[derive(Debug)]
pub struct Confirm(State);

#[derive(Debug)]
enum State {
    Ready(Receipts),
    Waiting { outcomes: oneshot::Receiver<Receipts>, n_events: usize },
    Taken,
}

impl Confirm {
    /// Creates a confirm that is already resolved.
    pub fn ready(receipts: Receipts) -> Self {
        Self(State::Ready(receipts))
    }

    /// Creates a confirm for `n_events` and the side that resolves it. A resolver that is dropped
    /// resolves every event to [`Unknown`](ErrorKind::Unknown), never to success.
    pub fn waiting(n_events: usize) -> (Self, Resolver) {
        let (sender, outcomes) = oneshot::channel();
        (Self(State::Waiting { outcomes, n_events }), Resolver(sender))
    }
}

impl Future for Confirm {
    type Output = Receipts;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Receipts> {
        match std::mem::replace(&mut self.0, State::Taken) {
            State::Ready(receipts) => Poll::Ready(receipts),
            State::Waiting { mut outcomes, n_events } => match Pin::new(&mut outcomes).poll(cx) {
                Poll::Ready(Ok(receipts)) => Poll::Ready(receipts),
                Poll::Ready(Err(_)) => {
                    let unknown =
                        || Err(Error::new(ErrorKind::Unknown, "the publisher ended before the confirm"));
                    Poll::Ready((0..n_events).map(|_| unknown()).collect())
                }
                Poll::Pending => {
                    self.0 = State::Waiting { outcomes, n_events };
                    Poll::Pending
                }
            },
            // A future is not polled after it is ready; staying pending is the harmless answer.
            State::Taken => Poll::Pending,
        }
    }
}

/// The transport's side of a waiting [`Confirm`].
#[derive(Debug)]
pub struct Resolver(oneshot::Sender<Receipts>);

impl Resolver {
    /// Resolves the confirm. Nobody may be waiting any more; that is fine.
    pub fn resolve(self, receipts: Receipts) {
        drop(self.0.send(receipts));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dropped_resolver_means_unknown() {
        let (confirm, resolver) = Confirm::waiting(3);
        drop(resolver);
        let receipts = confirm.await;
        assert_eq!(receipts.len(), 3);
        assert!(receipts.into_iter().all(|outcome| outcome.unwrap_err().is_unknown()));
    }

    #[tokio::test]
    async fn a_resolved_confirm_keeps_the_order() {
        let (confirm, resolver) = Confirm::waiting(2);
        resolver.resolve((0..2).map(|at| Ok(Receipt::new(PartitionId(at), Offset(u64::from(at))))).collect());
        let receipts = confirm.await.all().unwrap();
        assert_eq!(receipts.iter().map(|receipt| receipt.partition.0).collect::<Vec<_>>(), [0, 1]);
    }
}
