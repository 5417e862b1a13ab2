//! The deliveries in hand, and the outcomes on their way to the transport.

use std::sync::atomic::{AtomicBool, Ordering as Atomic};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::partition::PartitionId;
use crate::transport::{Delivery, Settle, Token};

/// What is in hand, by token.
#[derive(Debug, Default)]
pub(super) struct Books {
    held: Mutex<foldhash::HashMap<Token, PartitionId>>,
    /// Whether anything was ever struck unsettled. Before that, what a worker works on is ours.
    any_lost: AtomicBool,
}

impl Books {
    pub(super) fn enter(&self, deliveries: &[Delivery]) {
        self.held.lock().extend(deliveries.iter().map(|delivery| (delivery.token, delivery.partition)));
    }

    /// Strikes what was settled. Returns how many there were.
    pub(super) fn settle(&self, tokens: impl Iterator<Item = Token>) -> usize {
        let mut held = self.held.lock();
        tokens.filter(|token| held.remove(token).is_some()).count()
    }

    /// Strikes what is no longer ours. Returns how many there were.
    pub(super) fn lose(&self, tokens: impl Iterator<Item = Token>) -> usize {
        let mut held = self.held.lock();
        self.any_lost.store(true, Atomic::Release);
        tokens.filter(|token| held.remove(token).is_some()).count()
    }

    /// Whether a delivery that is not settled is still ours.
    pub(super) fn holds(&self, token: Token) -> bool {
        !self.any_lost.load(Atomic::Acquire) || self.held.lock().contains_key(&token)
    }

    pub(super) fn has_any_of(&self, partition: PartitionId) -> bool {
        self.held.lock().values().any(|held| *held == partition)
    }

    /// What is in hand of some partitions.
    pub(super) fn of(&self, partitions: &[PartitionId]) -> Vec<Token> {
        let held = self.held.lock();
        held.iter().filter(|(_, of)| partitions.contains(of)).map(|(token, _)| *token).collect()
    }

    pub(super) fn tokens(&self) -> Vec<Token> {
        self.held.lock().keys().copied().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.held.lock().len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.lock().is_empty()
    }
}

/// Outcomes that wait for the settler. As many as are in hand at most, which the window bounds.
#[derive(Debug, Default)]
pub(super) struct Settling {
    outcomes: Mutex<Sent>,
    rung: Notify,
}

#[derive(Debug, Default)]
struct Sent {
    waiting: Vec<(Token, Settle)>,
    closed: bool,
}

impl Settling {
    /// Sends outcomes, to be settled in this order.
    pub(super) fn send(&self, outcomes: impl IntoIterator<Item = (Token, Settle)>) {
        let was_empty = {
            let waiting = &mut self.outcomes.lock().waiting;
            let was_empty = waiting.is_empty();
            waiting.extend(outcomes);
            was_empty
        };
        if was_empty {
            self.rung.notify_one();
        }
    }

    /// Waits for outcomes and swaps them into an empty `batch`; false when there will be no more.
    pub(super) async fn next(&self, batch: &mut Vec<(Token, Settle)>) -> bool {
        loop {
            {
                let mut sent = self.outcomes.lock();
                if !sent.waiting.is_empty() {
                    std::mem::swap(&mut sent.waiting, batch);
                    return true;
                }
                if sent.closed {
                    return false;
                }
            }
            self.rung.notified().await;
        }
    }

    /// Says that nobody sends any more.
    pub(super) fn close(&self) {
        self.outcomes.lock().closed = true;
        self.rung.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Content, Envelope};

    #[tokio::test]
    async fn what_was_lost_is_not_held_and_the_rest_is() {
        let books = Books::default();
        let content = || Content::Envelope(Envelope::new("t", "/s"));
        let delivery = |n: u32| Delivery::new(Token::new(1, n.into()), PartitionId(n % 2), content());
        let deliveries: Vec<_> = (0..6).map(delivery).collect();
        books.enter(&deliveries);
        let lost = books.of(&[PartitionId(1)]);
        assert_eq!((lost.len(), books.holds(Token::new(1, 1))), (3, true));
        assert_eq!(books.lose(lost.into_iter()), 3);
        let held: Vec<_> = (0..6).filter(|n| books.holds(Token::new(1, *n))).collect();
        assert_eq!(held, [0, 2, 4]);
        assert!(books.has_any_of(PartitionId(0)) && !books.has_any_of(PartitionId(1)));
        assert_eq!(books.settle([Token::new(1, 0), Token::new(1, 1)].into_iter()), 1);
        assert_eq!((books.len(), books.is_empty()), (2, false));
    }

    #[tokio::test]
    async fn outcomes_keep_their_order_and_end_with_the_last() {
        let (settling, mut batch) = (Settling::default(), Vec::new());
        settling.send([(Token::new(0, 1), Settle::Ack), (Token::new(0, 2), Settle::Return)]);
        settling.send([(Token::new(0, 3), Settle::Ack)]);
        settling.close();
        assert!(settling.next(&mut batch).await);
        assert_eq!(batch.iter().map(|(token, _)| token.low()).collect::<Vec<_>>(), [1, 2, 3]);
        batch.clear();
        assert!(!settling.next(&mut batch).await);
    }
}
