//! Publishing with defects, and the simulated `cut` and `fill` hooks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::Duration;

use async_trait::async_trait;
use eventbus::{
    Confirm, Envelope, Error, ErrorKind, Headers, Offset, PartitionId, Publisher, Receipt, Receipts, Result,
    Topic, header,
};
use parking_lot::Mutex;

use super::Defect;
use super::transport::Shared;

#[derive(Debug)]
pub(super) struct MutantPublisher {
    shared: Shared,
    inner: Arc<dyn Publisher>,
    closed: AtomicBool,
    dead: AtomicBool,
    buffer: Mutex<Vec<(Topic, Vec<Envelope>)>>,
}

fn invented(n: usize) -> Receipts {
    (0..n).map(|at| Ok(Receipt::new(PartitionId(0), Offset(at as u64)))).collect()
}

impl MutantPublisher {
    pub(super) fn new(shared: Shared, inner: Arc<dyn Publisher>) -> Self {
        let closed = AtomicBool::new(false);
        Self { shared, inner, closed, dead: AtomicBool::new(false), buffer: Mutex::default() }
    }

    fn is(&self, defect: Defect) -> bool {
        self.shared.is(defect)
    }

    /// Changes the events of a batch as the defect does.
    fn altered(&self, batch: Vec<Envelope>) -> Vec<Envelope> {
        let world = &self.shared.world;
        batch
            .into_iter()
            .filter(|event| {
                let payload = event.payload().map(|payload| payload.to_vec()).unwrap_or_default();
                let repeated_payload =
                    self.is(Defect::DedupByPayload) && !world.seen_payloads.lock().insert(payload);
                let repeated_id = (self.is(Defect::HiddenDedup) || self.is(Defect::DedupForEver))
                    && !world.seen_ids.lock().insert(event.id().clone());
                !repeated_payload && !repeated_id
            })
            .map(|event| {
                if self.is(Defect::RandomPartition)
                    && let Some(key) = event.key().cloned()
                {
                    let hidden = event.with_extension("evt-mutant-key", key.as_bytes());
                    return hidden.clone().with_key(hidden.id().to_string());
                }
                if self.is(Defect::SpoofableHeaders) {
                    let name = |name: &str| {
                        if header::is_reserved(name) { format!("zz-{name}") } else { name.to_owned() }
                    };
                    let renamed =
                        event.headers().iter().fold(Headers::new(), |all, (n, v)| all.with(name(n), v));
                    return event.with_headers(renamed);
                }
                event
            })
            .collect()
    }
}

#[async_trait]
impl Publisher for MutantPublisher {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        let world = &self.shared.world;
        let n = batch.len();
        if self.is(Defect::OkAfterClose) && self.closed.load(Atomic::SeqCst) {
            return Ok(Confirm::ready(invented(n)));
        }
        if self.is(Defect::CloseClosesPeers) && world.any_closed.load(Atomic::SeqCst)
            || self.dead.load(Atomic::SeqCst)
        {
            return Err(Error::new(ErrorKind::Closed, "the connection is gone"));
        }
        if world.full.load(Atomic::SeqCst) {
            if self.is(Defect::FullIsOk) {
                return Ok(Confirm::ready(invented(n)));
            }
            return Ok(Confirm::ready((0..n).map(|_| Err(Error::new(ErrorKind::Full, "no room"))).collect()));
        }
        let known = world.topics.lock().contains(topic);
        if self.is(Defect::UnroutableIsOk) && !known {
            return Ok(Confirm::ready(invented(n)));
        }
        if self.is(Defect::ConfirmBeforeStore) && !self.closed.load(Atomic::SeqCst) {
            let earlier: Vec<_> = std::mem::take(&mut *self.buffer.lock());
            self.buffer.lock().push((topic.clone(), batch));
            for (topic, batch) in earlier {
                drop(self.inner.enqueue(&topic, batch).await?.await);
            }
            return Ok(Confirm::ready(invented(n)));
        }
        if self.is(Defect::PrefixMatch) {
            let shorter: Vec<_> = world
                .topics
                .lock()
                .iter()
                .filter(|t| topic.as_str().starts_with(&format!("{t}.")))
                .cloned()
                .collect();
            for prefix in shorter {
                drop(self.inner.enqueue(&prefix, batch.clone()).await?.await);
            }
        }
        if self.is(Defect::CancelPublishesHalf) && n > 1 {
            let (first, second) = batch.split_at(n / 2);
            let mut receipts: Vec<_> =
                self.inner.enqueue(topic, first.to_vec()).await?.await.into_iter().collect();
            receipts.extend(self.inner.enqueue(topic, second.to_vec()).await?.await);
            return Ok(Confirm::ready(receipts.into_iter().collect()));
        }
        let altered = self.altered(batch);
        let mut outcomes: Vec<_> = self.inner.enqueue(topic, altered).await?.await.into_iter().collect();
        outcomes.extend((outcomes.len()..n).map(|at| Ok(Receipt::new(PartitionId(0), Offset(at as u64)))));
        if world.cut.load(Atomic::SeqCst) {
            if self.is(Defect::TimeoutIsOk) {
                return Ok(Confirm::ready(outcomes.into_iter().collect()));
            }
            let lost = || Err(Error::new(ErrorKind::Unknown, "no answer"));
            return Ok(Confirm::ready(outcomes.iter().map(|_| lost()).collect()));
        }
        if self.is(Defect::OversizeKillsConnection)
            && outcomes.iter().any(|o| o.as_ref().is_err_and(|e| e.kind() == ErrorKind::TooLarge))
        {
            self.dead.store(true, Atomic::SeqCst);
        }
        let failed = outcomes.iter().position(Result::is_err);
        match (self.shared.defect, failed) {
            (Some(Defect::ReturnOnWrongConfirm), Some(at)) if n > 1 => outcomes.swap(at, (at + 1) % n),
            (Some(Defect::BatchVerdictIsOne), Some(at)) => {
                let Some(Err(error)) = outcomes.get(at) else {
                    return Ok(Confirm::ready(outcomes.into_iter().collect()));
                };
                let error = error.duplicate();
                outcomes.iter_mut().for_each(|outcome| *outcome = Err(error.duplicate()));
            }
            (Some(Defect::SwapsReceipts), None) if n > 10 => outcomes.swap(1, 10),
            _ => {}
        }
        if self.is(Defect::FlushLies) {
            let (confirm, resolver) = Confirm::waiting(n);
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                resolver.resolve(outcomes.into_iter().collect());
            });
            return Ok(confirm);
        }
        Ok(Confirm::ready(outcomes.into_iter().collect()))
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }

    async fn close(&self) -> Result<()> {
        self.closed.store(true, Atomic::SeqCst);
        self.shared.world.any_closed.store(true, Atomic::SeqCst);
        if self.is(Defect::CloseLeavesWaiting) {
            // Later calls are refused; who waits already is forgotten.
            self.dead.store(true, Atomic::SeqCst);
            return Ok(());
        }
        self.inner.close().await
    }
}
