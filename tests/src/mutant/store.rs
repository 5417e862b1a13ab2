//! Stores that are broken below or beside the transport, for the cases about disks.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use eventbus::transport::sqlite::{Options, Sqlite};
use eventbus::{
    Confirm, Consumer, Content, Envelope, ErrorKind, Polled, Publisher, Result, Settle, Topic, Transport,
};

use crate::around::{Change, Enqueue, Enqueues, Poll, Polls};

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

/// A fault beside a store.
#[derive(Debug)]
pub(crate) struct Faulty {
    pub(crate) path: PathBuf,
    pub(crate) options: Options,
    pub(crate) fault: Fault,
}

impl Change for Faulty {
    fn publisher(&self, publisher: Arc<dyn Publisher>) -> Arc<dyn Publisher> {
        match self.fault {
            Fault::TrustsSecondSync => {
                let trusting = Trusting { path: self.path.clone(), options: self.options };
                Arc::new(Enqueues(publisher, trusting))
            }
            _ => publisher,
        }
    }

    fn consumer(&self, consumer: Arc<dyn Consumer>) -> Arc<dyn Consumer> {
        match self.fault {
            Fault::SkipsCorruption => Arc::new(Polls(consumer, Skipping)),
            _ => consumer,
        }
    }
}

/// Opens the store again when it refuses, and goes on.
#[derive(Debug)]
struct Trusting {
    path: PathBuf,
    options: Options,
}

#[async_trait]
impl Enqueue for Trusting {
    async fn enqueue(&self, inner: &dyn Publisher, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        let receipts = inner.enqueue(topic, batch.clone()).await?.await;
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
}

/// Hands out what is whole, and says nothing of the rest.
#[derive(Debug)]
struct Skipping;

#[async_trait]
impl Poll for Skipping {
    async fn poll(&self, inner: &dyn Consumer, max: NonZeroUsize) -> Result<Polled> {
        loop {
            let mut deliveries = match inner.poll(max).await {
                Ok(Polled::Deliveries(deliveries)) => deliveries,
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt) => std::future::pending().await,
                other => return other,
            };
            let damaged: Vec<_> = deliveries
                .iter()
                .filter(|delivery| matches!(delivery.content, Content::Undecodable(_)))
                .map(|delivery| (delivery.token, Settle::Ack))
                .collect();
            inner.settle(&damaged).await?.all()?;
            deliveries.retain(|delivery| matches!(delivery.content, Content::Envelope(_)));
            if !deliveries.is_empty() {
                return Ok(Polled::Deliveries(deliveries));
            }
        }
    }
}
