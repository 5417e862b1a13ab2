//! Bugs that a framework may have, planted around a transport or in a role.

use std::num::NonZeroUsize;
use std::sync::Arc;

use async_trait::async_trait;
use eventbus::{Consumer, Polled, Result, Settle, Settled, Token};
use eventbus_tests::around::{Change, Poll, Polls};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    None,
    /// What is delivered is settled before it is handled.
    AckEarly,
    /// What failed is settled with the rest.
    PastAHole,
    /// What failed is published again, at the end.
    RetryToTail,
    /// A publish whose confirm was lost counts as done.
    LostConfirm,
    /// What is parked is forgotten when a partition moves.
    ParkedForgotten,
    /// A task panics, and all goes on.
    Panics,
    /// A producer does not come to an end.
    NeverEnds,
    /// A writer publishes after its commit, without an outbox.
    AfterCommit,
    /// A consumer does not remember what it handled.
    NoInbox,
}

impl Bug {
    const ALL: [(&'static str, Self); 10] = [
        ("none", Self::None),
        ("ack-early", Self::AckEarly),
        ("past-a-hole", Self::PastAHole),
        ("retry-to-tail", Self::RetryToTail),
        ("lost-confirm", Self::LostConfirm),
        ("parked-forgotten", Self::ParkedForgotten),
        ("panics", Self::Panics),
        ("never-ends", Self::NeverEnds),
        ("after-commit", Self::AfterCommit),
        ("no-inbox", Self::NoInbox),
    ];

    pub(crate) fn parse(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, bug)| *bug).ok_or_else(|| format!("there is no bug {name}"))
    }

    pub(crate) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, bug)| *bug == self).map_or("none", |(name, _)| name)
    }
}

/// Plants those bugs that lie in consumers.
#[derive(Debug)]
pub(crate) struct Planted(pub(crate) Bug);

impl Change for Planted {
    fn consumer(&self, consumer: Arc<dyn Consumer>) -> Arc<dyn Consumer> {
        match self.0 {
            Bug::AckEarly | Bug::PastAHole => Arc::new(Polls(consumer, Careless(self.0))),
            _ => consumer,
        }
    }
}

#[derive(Debug)]
struct Careless(Bug);

#[async_trait]
impl Poll for Careless {
    async fn poll(&self, inner: &dyn Consumer, max: NonZeroUsize) -> Result<Polled> {
        let polled = inner.poll(max).await?;
        if self.0 == Bug::AckEarly
            && let Polled::Deliveries(deliveries) = &polled
        {
            let all: Vec<_> = deliveries.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
            drop(inner.settle(&all).await?);
        }
        Ok(polled)
    }

    async fn settle(&self, inner: &dyn Consumer, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        if self.0 == Bug::AckEarly {
            return Ok(Settled::default());
        }
        let all: Vec<_> = outcomes.iter().map(|(token, _)| (*token, Settle::Ack)).collect();
        inner.settle(&all).await
    }
}
