//! Consuming with defects.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use eventbus::{
    Admin, Consumer, Content, Delivery, Envelope, ErrorKind, EventId, Headers, Key, Offset, PartitionId,
    Polled, Result, Settle, Settled, Subscription, Token, Transport, Undecodable,
};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::Defect;
use super::transport::Shared;

pub(super) struct MutantConsumer {
    shared: Shared,
    subscription: Subscription,
    joined: OnceCell<Arc<dyn Consumer>>,
    closed: AtomicBool,
    poll_lock: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What is in hand: token, event and the batch it came with.
    held: BTreeMap<Token, (Delivery, u64)>,
    settled: Vec<Token>,
    buffer: VecDeque<Delivery>,
    /// Tokens that count from 1 in every consumer.
    renumbered: HashMap<Token, Token>,
    batches: u64,
    last_payload: String,
}

impl MutantConsumer {
    pub(super) fn new(shared: Shared, subscription: Subscription) -> Self {
        Self {
            shared,
            subscription,
            joined: OnceCell::new(),
            closed: AtomicBool::new(false),
            poll_lock: tokio::sync::Mutex::default(),
            state: Mutex::default(),
        }
    }

    pub(super) async fn inner(&self) -> Result<&Arc<dyn Consumer>> {
        self.joined.get_or_try_init(|| self.shared.memory.subscribe(&self.subscription)).await
    }

    fn is(&self, defect: Defect) -> bool {
        self.shared.is(defect)
    }

    fn alter(&self, mut delivery: Delivery) -> Delivery {
        let Content::Envelope(event) = delivery.content.clone() else { return delivery };
        let attempt = delivery.attempt.map_or(1, u32::from);
        let altered = match self.shared.defect {
            Some(Defect::DropsHeaders) => {
                let first = event.headers().iter().next().map(|(name, _)| name.to_owned());
                let kept = event.headers().without(|name| Some(name) != first.as_deref());
                event.with_headers(kept)
            }
            Some(Defect::TruncatesPayload) => match event.payload() {
                Some(payload) => {
                    let cut: Vec<u8> = payload.iter().take(64).map(|byte| byte & 0x7f).collect();
                    event.with_payload(cut)
                }
                None => event,
            },
            Some(Defect::NewIdOnResend) if attempt > 1 => event.with_id(EventId::generate()),
            Some(Defect::TombstoneIsError) if event.payload().is_none() => {
                delivery.content =
                    Content::Undecodable(Box::new(Undecodable::new(None, Headers::new(), "no body")));
                return delivery;
            }
            Some(Defect::RandomPartition) => {
                match event.extensions().get("evt-mutant-key").map(<[u8]>::to_vec) {
                    Some(key) => {
                        event.with_key(Key::new(key)).without_extensions(|name| name == "evt-mutant-key")
                    }
                    None => event,
                }
            }
            Some(Defect::SpoofableHeaders) => {
                let renamed = event
                    .headers()
                    .iter()
                    .fold(Headers::new(), |all, (n, v)| all.with(n.strip_prefix("zz-").unwrap_or(n), v));
                event.with_headers(renamed)
            }
            _ => event,
        };
        if self.is(Defect::PrintsSecret) {
            self.state.lock().last_payload = format!("{:?}", altered.payload());
        }
        if self.is(Defect::AttemptAlwaysOne) {
            delivery.attempt = Some(NonZeroU32::MIN);
        }
        delivery.content = Content::Envelope(altered);
        delivery
    }

    async fn settle_inner(&self, tokens: impl Iterator<Item = Token>, how: Settle) -> Result<()> {
        let outcomes: Vec<_> = tokens.map(|token| (token, how)).collect();
        drop(self.inner().await?.settle(&outcomes).await?);
        Ok(())
    }

    /// Deliveries as this mutant hands them out; `None` if all of them vanished.
    async fn mangle(&self, deliveries: Vec<Delivery>, max: usize) -> Result<Option<Vec<Delivery>>> {
        let mut kept = Vec::new();
        for delivery in deliveries {
            if matches!(delivery.content, Content::Undecodable(_)) {
                assert!(!self.is(Defect::GarbagePanics), "the parser met garbage");
                if self.is(Defect::GarbageDropped) {
                    self.settle_inner([delivery.token].into_iter(), Settle::Ack).await?;
                    continue;
                }
            }
            let id = delivery.content.envelope().map(|event| event.id().clone());
            let moved =
                self.is(Defect::ReplayMovesGroup) && self.shared.world.replayed.swap(false, Atomic::SeqCst);
            let too_often =
                self.is(Defect::SilentDeliveryLimit) && delivery.attempt.is_some_and(|n| n.get() > 20);
            let rejected = id.is_some_and(|id| self.shared.world.rejected.lock().contains(&id));
            if moved || too_often || rejected {
                self.settle_inner([delivery.token].into_iter(), Settle::Ack).await?;
                continue;
            }
            kept.push(self.alter(delivery));
        }
        if self.is(Defect::Reverses) {
            kept.reverse();
        }
        if self.is(Defect::AckOnDelivery) {
            self.settle_inner(kept.iter().map(|delivery| delivery.token), Settle::Ack).await?;
        }
        let mut state = self.state.lock();
        if self.is(Defect::CloseAcksFetched) {
            let rest = kept.split_off(max.min(kept.len()));
            state.buffer.extend(rest);
        }
        let state = &mut *state;
        state.batches += 1;
        for delivery in &mut kept {
            if self.is(Defect::TokenReuse) {
                let small = Token::new(0, state.renumbered.len() as u64 + 1);
                state.renumbered.insert(small, delivery.token);
                delivery.token = small;
            }
            state.held.insert(delivery.token, (delivery.clone(), state.batches));
        }
        Ok((!kept.is_empty()).then_some(kept))
    }
}

#[async_trait]
impl Consumer for MutantConsumer {
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled> {
        let _guard = if self.is(Defect::OneLock) { Some(self.poll_lock.lock().await) } else { None };
        let asked = match self.shared.defect {
            Some(Defect::IgnoresMax) => NonZeroUsize::MAX,
            Some(Defect::CloseAcksFetched) => {
                if let Some(first) = self.state.lock().buffer.pop_front() {
                    return Ok(Polled::Deliveries(vec![first]));
                }
                max.saturating_add(16)
            }
            _ => max,
        };
        if self.is(Defect::WallClockLeases) && self.shared.world.stepped.swap(false, Atomic::SeqCst) {
            let held: Vec<_> = self.state.lock().held.keys().copied().collect();
            self.settle_inner(held.into_iter(), Settle::Retry { after: None }).await?;
        }
        if self.is(Defect::PurgesByStep) && self.shared.world.stepped.swap(false, Atomic::SeqCst) {
            let (memory, topic) = (&self.shared.memory, &self.subscription.topic);
            for known in memory.topic(topic).await?.map(|info| info.partitions).unwrap_or_default() {
                memory.purge(topic, known.partition, known.next).await?;
            }
        }
        loop {
            let polled = match self.inner().await?.poll(asked).await {
                Err(error) if self.is(Defect::GhostOnDelete) && error.kind() == ErrorKind::NotFound => {
                    let ghost = Content::Envelope(Envelope::new("", ""));
                    return Ok(Polled::Deliveries(vec![Delivery::new(
                        Token::new(9, 9),
                        PartitionId(0),
                        ghost,
                    )]));
                }
                Err(error)
                    if self.is(Defect::JumpsToLatest)
                        && matches!(error.kind(), ErrorKind::DataLoss { .. }) =>
                {
                    continue;
                }
                polled => polled?,
            };
            match polled {
                Polled::Deliveries(deliveries) => {
                    if self.is(Defect::LosesOnCancel) {
                        tokio::task::yield_now().await;
                    }
                    if let Some(kept) = self.mangle(deliveries, max.get()).await? {
                        return Ok(Polled::Deliveries(kept));
                    }
                }
                Polled::Revoking { partitions, .. } if self.is(Defect::EarlyHandover) => {
                    self.inner().await?.release(&partitions).await?;
                }
                Polled::Closed if self.is(Defect::CloseHangsPoll) => std::future::pending().await,
                other => return Ok(other),
            }
        }
    }

    async fn settle(&self, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        let _guard = if self.is(Defect::OneLock) { Some(self.poll_lock.lock().await) } else { None };
        if self.is(Defect::SettleAfterCloseOk) && self.closed.load(Atomic::SeqCst) {
            return Ok(Settled::default());
        }
        let mut mapped = Vec::new();
        let mut early_lost = Vec::new();
        let mut republish = Vec::new();
        {
            let mut state = self.state.lock();
            for (token, how) in outcomes {
                let (mut token, mut how) = (*token, *how);
                if self.is(Defect::SecondSettleFails) && state.settled.contains(&token) {
                    early_lost.push(token);
                    continue;
                }
                let found = state.held.get(&token).cloned();
                match (self.shared.defect, how, &found) {
                    (Some(Defect::RetryToTail), Settle::Retry { .. }, Some((delivery, _))) => {
                        republish.extend(delivery.content.envelope().cloned());
                        how = Settle::Ack;
                    }
                    (Some(Defect::ForgetsRetry), Settle::Retry { .. }, _) => how = Settle::Ack,
                    (Some(Defect::ReturnCounts), Settle::Return, _) => how = Settle::Retry { after: None },
                    (Some(Defect::DelayIgnored), Settle::Retry { .. }, _) => {
                        how = Settle::Retry { after: None }
                    }
                    (Some(Defect::DelayInMemory), Settle::Retry { after: Some(_) }, _) => continue,
                    (Some(Defect::RejectRequeues), Settle::Reject, _) => how = Settle::Retry { after: None },
                    (Some(Defect::RejectForAllGroups), Settle::Reject, Some((delivery, _))) => {
                        self.shared
                            .world
                            .rejected
                            .lock()
                            .extend(delivery.content.envelope().map(|event| event.id().clone()));
                    }
                    (Some(Defect::AckCoversBatch), Settle::Ack, Some((_, batch)))
                    | (Some(Defect::RetryRewindsBatch), Settle::Retry { .. }, Some((_, batch))) => {
                        let batch = state
                            .held
                            .iter()
                            .filter(|(_, (_, of))| of == batch)
                            .map(|(token, _)| (*token, how));
                        mapped.splice(0..0, batch);
                    }
                    (Some(Defect::CommitsHighest), Settle::Ack, Some((delivery, _))) => {
                        let below = |other: &Delivery| {
                            other.partition == delivery.partition && other.offset < delivery.offset
                        };
                        mapped.extend(
                            state
                                .held
                                .iter()
                                .filter(|(_, (other, _))| below(other))
                                .map(|(token, _)| (*token, how)),
                        );
                    }
                    _ => {}
                }
                if self.is(Defect::TokenReuse) {
                    token = state.renumbered.get(&token).copied().unwrap_or(token);
                }
                state.settled.push(token);
                mapped.push((token, how));
            }
        }
        for event in republish {
            // A fresh copy goes behind everything, past the window that would drop it.
            let copy = event.clone().with_source("/retry");
            drop(
                self.shared
                    .memory
                    .publisher()
                    .await?
                    .enqueue(&self.subscription.topic, vec![copy])
                    .await?
                    .await,
            );
        }
        let mut settled = self.inner().await?.settle(&mapped).await?;
        if self.is(Defect::LateAckOk) {
            let newer = |lost: &Token| {
                let state = self.state.lock();
                let offset = state.held.get(lost).and_then(|(delivery, _)| delivery.offset);
                state.held.values().filter(|(d, _)| d.offset == offset).map(|(d, _)| d.token).max()
            };
            let hits: Vec<_> =
                settled.lost.iter().filter_map(newer).map(|token| (token, Settle::Ack)).collect();
            settled = self.inner().await?.settle(&hits).await?;
        }
        settled.lost.extend(early_lost);
        Ok(settled)
    }

    async fn release(&self, partitions: &[PartitionId]) -> Result<()> {
        self.inner().await?.release(partitions).await
    }

    async fn renew(&self, tokens: &[Token], lease: Duration) -> Result<Settled> {
        if self.is(Defect::IgnoresRenewal) {
            return Ok(Settled::default());
        }
        self.inner().await?.renew(tokens, lease).await
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        self.closed.store(true, Atomic::SeqCst);
        self.shared.world.any_closed.store(true, Atomic::SeqCst);
        let covered: Vec<Token> = match self.shared.defect {
            Some(Defect::RevokeCommits) => self.state.lock().held.keys().copied().collect(),
            Some(Defect::CloseAcksFetched) => {
                self.state.lock().buffer.drain(..).map(|delivery| delivery.token).collect()
            }
            _ => Vec::new(),
        };
        if !covered.is_empty() {
            self.settle_inner(covered.into_iter(), Settle::Ack).await?;
        }
        self.inner().await?.close(deadline).await
    }
}

impl fmt::Debug for MutantConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MutantConsumer")
            .field("topic", &self.subscription.topic)
            .field("next", &Offset(0))
            .field("last", &self.state.lock().last_payload)
            .finish_non_exhaustive()
    }
}
