//! A transport whose parking log can be refused or held up, as a broker in trouble would.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::watch;

use super::super::record::RECORD;
use crate::admin::Admin;
use crate::capability::Capabilities;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::partition::PartitionId;
use crate::subscription::Subscription;
use crate::transport::{Confirm, Consumer, InFile, Polled, Publisher, Settle, Settled, Token, Transport};

/// What is held up.
#[derive(Debug)]
pub(super) struct Gate {
    inner: Arc<dyn Transport>,
    /// Records of the parking log are refused.
    pub(super) refuses: AtomicBool,
    /// The word of a record that waits before it is stored.
    pub(super) stalls: watch::Sender<Option<&'static str>>,
    /// Settles wait.
    pub(super) keeps_settles: watch::Sender<bool>,
}

impl Gate {
    pub(super) fn new(inner: Arc<dyn Transport>) -> Self {
        Self {
            inner,
            refuses: AtomicBool::new(false),
            stalls: watch::channel(None).0,
            keeps_settles: watch::channel(false).0,
        }
    }
}

#[derive(Debug)]
pub(super) struct Gated(pub(super) Arc<Gate>);

#[async_trait]
impl Transport for Gated {
    fn capabilities(&self) -> Capabilities {
        self.0.inner.capabilities()
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        Ok(Arc::new(GatedPublisher { gate: self.0.clone(), inner: self.0.inner.publisher().await? }))
    }

    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>> {
        let inner = self.0.inner.subscribe(subscription).await?;
        Ok(Arc::new(GatedConsumer { gate: self.0.clone(), inner }))
    }

    fn admin(&self) -> Option<&dyn Admin> {
        self.0.inner.admin()
    }

    fn in_file(&self) -> Option<&dyn InFile> {
        None
    }

    async fn close(&self) -> Result<()> {
        self.0.inner.close().await
    }
}

#[derive(Debug)]
struct GatedPublisher {
    gate: Arc<Gate>,
    inner: Arc<dyn Publisher>,
}

#[async_trait]
impl Publisher for GatedPublisher {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        if let Some(word) = batch.first().and_then(|record| record.extension(RECORD)) {
            if self.gate.refuses.load(Atomic::SeqCst) && word == "park" {
                return Err(Error::new(ErrorKind::Unavailable, "refused by the test"));
            }
            let mut stalls = self.gate.stalls.subscribe();
            // The sender is as long-lived as this.
            drop(stalls.wait_for(|stalled| *stalled != Some(word)).await);
        }
        self.inner.enqueue(topic, batch).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct GatedConsumer {
    gate: Arc<Gate>,
    inner: Arc<dyn Consumer>,
}

#[async_trait]
impl Consumer for GatedConsumer {
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled> {
        self.inner.poll(max).await
    }

    async fn settle(&self, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        drop(self.gate.keeps_settles.subscribe().wait_for(|kept| !*kept).await);
        self.inner.settle(outcomes).await
    }

    async fn release(&self, partitions: &[PartitionId]) -> Result<()> {
        self.inner.release(partitions).await
    }

    async fn renew(&self, tokens: &[Token], lease: Duration) -> Result<Settled> {
        self.inner.renew(tokens, lease).await
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        self.inner.close(deadline).await
    }
}
