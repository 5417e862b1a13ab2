//! The way to the broker, and to the database, as a process has it.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus::{
    Admin, Capabilities, Confirm, Consumer, Envelope, Error, ErrorKind, EventId, InFile, PartitionId, Polled,
    Publisher, Receipt, Receipts, Result, Settle, Settled, Subscription, Token, Topic, Transport,
};
use outbox::{Blocked, Claim, Leased, Pending, RowId, Shard, Store};
use parking_lot::Mutex;

use crate::bug::Bug;
use crate::step::Step;
use crate::world::{Far, Node};

/// The broker as a process sees it.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) node: Arc<Node>,
    /// Whether what is published comes of an outbox: only that may be refused, as all else is the framework's own.
    pub(crate) is_relay: bool,
}

#[async_trait]
impl Transport for Wire {
    fn capabilities(&self) -> Capabilities {
        self.node.world.broker.capabilities()
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        let broker = self.node.world.broker.clone();
        let inner = self.node.call(Far::Broker, "publisher", async move { broker.publisher().await }).await?;
        Ok(Arc::new(Publishes {
            node: self.node.clone(),
            inner,
            is_relay: self.is_relay,
            turn: Arc::default(),
        }))
    }

    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>> {
        let (broker, subscription) = (self.node.world.broker.clone(), subscription.clone());
        let joining = async move { broker.subscribe(&subscription).await };
        let inner = self.node.call(Far::Broker, "subscribe", joining).await?;
        Ok(Arc::new(Consumes { node: self.node.clone(), inner, kept: Mutex::default() }))
    }

    fn admin(&self) -> Option<&dyn Admin> {
        self.node.world.broker.admin()
    }

    fn in_file(&self) -> Option<&dyn InFile> {
        None
    }

    async fn close(&self) -> Result<()> {
        self.node.pass().await;
        Ok(())
    }
}

#[derive(Debug)]
struct Publishes {
    node: Arc<Node>,
    inner: Arc<dyn Publisher>,
    is_relay: bool,
    /// What was accepted earlier goes first.
    turn: Arc<tokio::sync::Mutex<()>>,
}

#[async_trait]
impl Publisher for Publishes {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        self.node.pass().await;
        let turn = self.turn.clone().lock_owned().await;
        let n_events = batch.len();
        let (confirm, resolver) = Confirm::waiting(n_events);
        let (node, inner, topic, is_relay) =
            (self.node.clone(), self.inner.clone(), topic.clone(), self.is_relay);
        tokio::spawn(async move {
            let world = node.world.clone();
            let refused = |event: &Envelope| {
                let step: Option<Step> = event.decode().ok();
                is_relay && step.is_some_and(|step| world.refuses(&format!("{topic} {}", step.key), step.n))
            };
            let refused: Vec<bool> = batch.iter().map(refused).collect();
            let change = |event: Envelope| match world.bug {
                Bug::NewId if is_relay => event.with_id(EventId::generate()),
                _ => event,
            };
            let kept = batch.into_iter().zip(&refused).filter(|(_, refused)| !**refused);
            let kept: Vec<Envelope> = kept.map(|(event, _)| change(event)).collect();
            let of = topic.clone();
            let publishing = async move {
                let accepted = inner.enqueue(&of, kept).await;
                drop(turn);
                Ok(accepted?.await)
            };
            let is_careless = world.bug == Bug::LostConfirm && is_relay;
            let receipts: Receipts = match node.call(Far::Broker, "publish", publishing).await {
                Ok(receipts) => {
                    let mut receipts = receipts.into_iter();
                    let missing = || Err(Error::new(ErrorKind::Unexpected, "a receipt is missing"));
                    let refusal = || Err(Error::new(ErrorKind::Invalid, "the broker does not take this"));
                    let outcome =
                        |refused| if refused { refusal() } else { receipts.next().unwrap_or_else(missing) };
                    refused.into_iter().map(outcome).collect()
                }
                Err(_) if is_careless => {
                    (0..n_events).map(|_| Ok(Receipt::new(PartitionId(0), None))).collect()
                }
                Err(error) => (0..n_events).map(|_| Err(error.duplicate())).collect(),
            };
            resolver.resolve(receipts);
        });
        Ok(confirm)
    }

    async fn flush(&self) -> Result<()> {
        self.node.pass().await;
        drop(self.turn.lock().await);
        self.inner.flush().await
    }

    async fn close(&self) -> Result<()> {
        self.flush().await?;
        self.inner.close().await
    }
}

#[derive(Debug)]
struct Consumes {
    node: Arc<Node>,
    inner: Arc<dyn Consumer>,
    /// What came while the process was stopped.
    kept: Mutex<Option<Polled>>,
}

#[async_trait]
impl Consumer for Consumes {
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled> {
        loop {
            self.node.pass().await;
            if let Some(polled) = self.kept.lock().take() {
                return Ok(polled);
            }
            if self.node.world.one_in(200) {
                return Err(Error::new(ErrorKind::Unavailable, "the connection was reset"));
            }
            let polled = self.inner.poll(max).await?;
            if let Polled::Deliveries(deliveries) = &polled {
                self.node.world.note("polled", deliveries.len() as u64);
                if self.node.world.bug == Bug::AckEarly {
                    let all: Vec<_> =
                        deliveries.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
                    drop(self.inner.settle(&all).await?);
                }
            }
            // Without a wait between the answer and its return: a poll that is given up must strand nothing.
            if self.node.is_free() {
                return Ok(polled);
            }
            *self.kept.lock() = Some(polled);
        }
    }

    async fn settle(&self, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        if self.node.world.bug == Bug::AckEarly {
            return Ok(Settled::default());
        }
        let (inner, outcomes) = (self.inner.clone(), outcomes.to_vec());
        self.node.call(Far::Broker, "settle", async move { inner.settle(&outcomes).await }).await
    }

    async fn release(&self, partitions: &[PartitionId]) -> Result<()> {
        let (inner, partitions) = (self.inner.clone(), partitions.to_vec());
        self.node.call(Far::Broker, "release", async move { inner.release(&partitions).await }).await
    }

    async fn renew(&self, tokens: &[Token], lease: Duration) -> Result<Settled> {
        let (inner, tokens) = (self.inner.clone(), tokens.to_vec());
        self.node.call(Far::Broker, "renew", async move { inner.renew(&tokens, lease).await }).await
    }

    async fn close(&self, deadline: std::time::Instant) -> Result<()> {
        self.node.pass().await;
        self.inner.close(deadline).await
    }
}

/// The database as a relay sees it.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) node: Arc<Node>,
    /// Of the bug that reads behind it.
    pub(crate) cursor: Mutex<i64>,
}

impl Tables {
    async fn ask<T: Send + 'static>(
        &self,
        name: &'static str,
        ask: impl FnOnce(&Node) -> T + Send + 'static,
    ) -> Result<T> {
        let node = self.node.clone();
        self.node.call(Far::Database, name, async move { Ok(ask(&node)) }).await
    }
}

#[async_trait]
impl Store for Tables {
    async fn identity(&self) -> Result<String> {
        self.ask("identity", |_| "simulated".to_owned()).await
    }

    async fn lease(&self, relay: &str, ttl: Duration) -> Result<Leased> {
        let relay = relay.to_owned();
        let lease = move |node: &Node| match node.world.bug {
            Bug::SkipsLocked => {
                Leased { shards: (0..Shard::COUNT).map(|n| (Shard(n), 0)).collect(), surplus: Vec::new() }
            }
            _ => {
                let shuffle = |free: &mut [Shard]| node.world.random.lock().shuffle(free);
                node.world.ledger.lease(&relay, ttl, shuffle)
            }
        };
        self.ask("lease", lease).await
    }

    async fn release(&self, relay: &str, shards: &[Shard]) -> Result<()> {
        let (relay, shards) = (relay.to_owned(), shards.to_vec());
        let release = move |node: &Node| node.world.ledger.release(&relay, |shard| shards.contains(&shard));
        self.ask("release", release).await
    }

    async fn leave(&self, relay: &str) -> Result<()> {
        let relay = relay.to_owned();
        self.ask("leave", move |node| node.world.ledger.leave(&relay)).await
    }

    async fn claim(&self, claim: &Claim) -> Result<Vec<Pending>> {
        let claim = claim.clone();
        let found = self.ask("claim", move |node| match node.world.bug {
            Bug::SkipsLocked => node.world.ledger.take_any(&node.id.to_string(), &claim),
            bug => node.world.ledger.claim(&claim, bug == Bug::BlocksOneEvent),
        });
        let mut found = found.await?;
        if self.node.world.bug == Bug::NumberCursor {
            let mut cursor = self.cursor.lock();
            found.retain(|pending| pending.id.0 > *cursor);
            *cursor = found.iter().map(|pending| pending.id.0).max().unwrap_or(*cursor);
        }
        Ok(found)
    }

    async fn settle(
        &self,
        relay: &str,
        owned: &[(Shard, i64)],
        published: &[(Shard, RowId)],
    ) -> Result<Vec<Shard>> {
        let (relay, owned, published) = (relay.to_owned(), owned.to_vec(), published.to_vec());
        let settle = move |node: &Node| {
            let ledger = &node.world.ledger;
            match node.world.bug {
                Bug::SkipsLocked => {
                    ledger.remove(&published);
                    owned.iter().map(|(shard, _)| *shard).collect()
                }
                bug => ledger.settle(&relay, &owned, &published, bug == Bug::RemovesRanges),
            }
        };
        self.ask("settle outbox", settle).await
    }

    async fn block(&self, relay: &str, owned: &[(Shard, i64)], blocked: &[Blocked]) -> Result<()> {
        let (relay, owned, blocked) = (relay.to_owned(), owned.to_vec(), blocked.to_vec());
        let block = move |node: &Node| {
            let notes_what_is_gone = node.world.bug == Bug::BlocksWhatIsGone;
            node.world.ledger.block(&relay, &owned, &blocked, notes_what_is_gone);
        };
        self.ask("block", block).await
    }

    async fn park(&self, relay: &str, owned: &[(Shard, i64)], parked: &[Blocked]) -> Result<()> {
        let (relay, owned, parked) = (relay.to_owned(), owned.to_vec(), parked.to_vec());
        self.ask("park", move |node| node.world.ledger.park(&relay, &owned, &parked)).await
    }

    async fn unblock(&self, shards: &[Shard]) -> Result<()> {
        let shards = shards.to_vec();
        self.ask("unblock", move |node| node.world.ledger.unblock(&shards)).await
    }

    async fn news(&self) {
        std::future::pending().await
    }

    async fn close(&self) {
        self.node.pass().await;
    }
}
