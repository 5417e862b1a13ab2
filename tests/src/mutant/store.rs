//! Stores that are broken below or beside the transport, for the cases about disks.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use eventbus::transport::sqlite::{Options, Sqlite};
use eventbus::{
    Admin, Capabilities, Confirm, Consumer, Content, Envelope, ErrorKind, PartitionId, Polled, Publisher,
    Result, Settle, Settled, Subscription, Token, Topic, Transport,
};

/// What is wrong with a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The disk says that it synced, and did not.
    DiskLies,
    /// After a failed sync, a second one is trusted.
    TrustsSecondSync,
    /// What is damaged is left out.
    SkipsCorruption,
}

/// A store with a fault beside it.
#[derive(Debug)]
pub(crate) struct Faulty {
    pub(crate) sqlite: Sqlite,
    pub(crate) path: PathBuf,
    pub(crate) options: Options,
    pub(crate) fault: Fault,
}

#[async_trait]
impl Transport for Faulty {
    fn capabilities(&self) -> Capabilities {
        self.sqlite.capabilities()
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        let publisher = self.sqlite.publisher().await?;
        Ok(match self.fault {
            Fault::TrustsSecondSync => {
                Arc::new(Trusting { publisher, path: self.path.clone(), options: self.options })
            }
            _ => publisher,
        })
    }

    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>> {
        let consumer = self.sqlite.subscribe(subscription).await?;
        Ok(match self.fault {
            Fault::SkipsCorruption => Arc::new(Skipping(consumer)),
            _ => consumer,
        })
    }

    fn admin(&self) -> Option<&dyn Admin> {
        self.sqlite.admin()
    }

    async fn close(&self) -> Result<()> {
        self.sqlite.close().await
    }
}

/// Opens the store again when it refuses, and goes on.
#[derive(Debug)]
struct Trusting {
    publisher: Arc<dyn Publisher>,
    path: PathBuf,
    options: Options,
}

#[async_trait]
impl Publisher for Trusting {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        let receipts = self.publisher.enqueue(topic, batch.clone()).await?.await;
        if receipts
            .iter()
            .all(|receipt| !matches!(receipt, Err(error) if error.kind() == ErrorKind::Unavailable))
        {
            return Ok(Confirm::ready(receipts));
        }
        let again = Sqlite::open_path(&self.path, self.options).await?;
        let receipts = again.publisher().await?.enqueue(topic, batch).await?.await;
        again.close().await?;
        Ok(Confirm::ready(receipts))
    }

    async fn flush(&self) -> Result<()> {
        self.publisher.flush().await
    }

    async fn close(&self) -> Result<()> {
        self.publisher.close().await
    }
}

/// Hands out what is whole, and says nothing of the rest.
#[derive(Debug)]
struct Skipping(Arc<dyn Consumer>);

#[async_trait]
impl Consumer for Skipping {
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled> {
        loop {
            let mut deliveries = match self.0.poll(max).await {
                Ok(Polled::Deliveries(deliveries)) => deliveries,
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt) => std::future::pending().await,
                other => return other,
            };
            let damaged: Vec<_> = deliveries
                .iter()
                .filter(|delivery| matches!(delivery.content, Content::Undecodable(_)))
                .map(|delivery| (delivery.token, Settle::Ack))
                .collect();
            self.0.settle(&damaged).await?.all()?;
            deliveries.retain(|delivery| matches!(delivery.content, Content::Envelope(_)));
            if !deliveries.is_empty() {
                return Ok(Polled::Deliveries(deliveries));
            }
        }
    }

    async fn settle(&self, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        self.0.settle(outcomes).await
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
