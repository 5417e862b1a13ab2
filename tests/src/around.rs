//! Transports around others: a test changes the one call it is about, the rest is passed on.

use std::fmt::Debug;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use eventbus::{
    Admin, Capabilities, Confirm, Consumer, Envelope, InFile, PartitionId, Polled, Publisher, Result, Settle,
    Settled, Subscription, Token, Topic, Transport,
};

/// What is put around publishers and consumers; around neither, unless it says so.
pub trait Change: Debug + Send + Sync + 'static {
    /// Wraps a publisher.
    fn publisher(&self, publisher: Arc<dyn Publisher>) -> Arc<dyn Publisher> {
        publisher
    }

    /// Wraps a consumer.
    fn consumer(&self, consumer: Arc<dyn Consumer>) -> Arc<dyn Consumer> {
        consumer
    }
}

/// A transport with a change.
#[derive(Debug)]
pub struct Around<C> {
    /// What is changed.
    pub inner: Arc<dyn Transport>,
    /// How.
    pub change: C,
}

#[async_trait]
impl<C: Change> Transport for Around<C> {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        Ok(self.change.publisher(self.inner.publisher().await?))
    }

    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>> {
        Ok(self.change.consumer(self.inner.subscribe(subscription).await?))
    }

    fn admin(&self) -> Option<&dyn Admin> {
        self.inner.admin()
    }

    fn in_file(&self) -> Option<&dyn InFile> {
        None
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

/// Another way to enqueue.
#[async_trait]
pub trait Enqueue: Debug + Send + Sync + 'static {
    /// Enqueues a batch through `inner`.
    async fn enqueue(&self, inner: &dyn Publisher, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm>;
}

/// A publisher that enqueues in another way.
#[derive(Debug)]
pub struct Enqueues<E>(pub Arc<dyn Publisher>, pub E);

#[async_trait]
impl<E: Enqueue> Publisher for Enqueues<E> {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        self.1.enqueue(&*self.0, topic, batch).await
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    async fn close(&self) -> Result<()> {
        self.0.close().await
    }
}

/// Another way to poll, or to settle.
#[async_trait]
pub trait Poll: Debug + Send + Sync + 'static {
    /// Polls `inner`.
    async fn poll(&self, inner: &dyn Consumer, max: NonZeroUsize) -> Result<Polled> {
        inner.poll(max).await
    }

    /// Settles through `inner`.
    async fn settle(&self, inner: &dyn Consumer, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        inner.settle(outcomes).await
    }
}

/// A consumer that polls in another way.
#[derive(Debug)]
pub struct Polls<P>(pub Arc<dyn Consumer>, pub P);

#[async_trait]
impl<P: Poll> Consumer for Polls<P> {
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled> {
        self.1.poll(&*self.0, max).await
    }

    async fn settle(&self, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        self.1.settle(&*self.0, outcomes).await
    }

    async fn release(&self, partitions: &[PartitionId]) -> Result<()> {
        self.0.release(partitions).await
    }

    async fn renew(&self, tokens: &[Token], lease: Duration) -> Result<Settled> {
        self.0.renew(tokens, lease).await
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        self.0.close(deadline).await
    }
}
