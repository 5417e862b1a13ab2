//! The wrapper itself.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering as Atomic;
use std::time::Duration;

use async_trait::async_trait;
use eventbus::capability::Members;
use eventbus::transport::memory::Memory;
use eventbus::{
    Admin, Audience, Capabilities, Consumer, Error, ErrorKind, Group, InFile, Offset, Publisher, Result,
    Start, Subscription, Topic, Transport,
};

use super::admin::MutantAdmin;
use super::consumer::MutantConsumer;
use super::publisher::MutantPublisher;
use super::{Defect, World, claims};

/// What every part of a mutant knows.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) memory: Memory,
    pub(super) defect: Option<Defect>,
    pub(super) world: Arc<World>,
}

impl Shared {
    pub(super) fn is(&self, defect: Defect) -> bool {
        self.defect == Some(defect)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mutant").field("defect", &self.defect).finish_non_exhaustive()
    }
}

/// A transport with one defect.
#[derive(Debug)]
pub(crate) struct Mutant {
    shared: Shared,
    admin: MutantAdmin,
}

impl Mutant {
    pub(crate) fn new(memory: Memory, defect: Option<Defect>, world: Arc<World>) -> Self {
        let shared = Shared { memory, defect, world };
        Self { admin: MutantAdmin(shared.clone()), shared }
    }

    async fn altered(&self, subscription: &Subscription) -> Result<Subscription> {
        let (shared, mut sub) = (&self.shared, subscription.clone());
        let is = |defect| shared.is(defect);
        if is(Defect::EveryoneGetsEverything) {
            let base = subscription.group_name().map_or("g", |group| group.as_str());
            sub.audience = Audience::Group(Group::new(format!("{base}.{}", shared.world.next()))?);
        }
        if is(Defect::BroadcastIsShared) && sub.audience == Audience::Broadcast {
            sub.audience = Audience::Group(Group::new("everybody")?);
        }
        if is(Defect::SharedGroups) {
            sub.audience = Audience::Group(Group::new("everybody")?);
        }
        if is(Defect::SilentUnsupported) {
            sub.start = Start::Latest;
            sub.ordering = sub.ordering.min(self.capabilities().ordering);
        }
        if is(Defect::UnboundedPrefetch)
            || (is(Defect::WindowLostOnResume) && shared.world.restarted.load(Atomic::SeqCst))
        {
            sub.window = 1_000_000.try_into().unwrap_or(sub.window);
            sub.window_bytes = (1 << 30).try_into().unwrap_or(sub.window_bytes);
        }
        if is(Defect::LeaseNeverExpires) {
            sub.lease = Duration::from_secs(1 << 30);
        }
        if is(Defect::StartIgnored) {
            sub.start = Start::Latest;
        }
        if is(Defect::SilentMissingTopic) {
            let exists = shared.memory.topic(&sub.topic).await?.is_some();
            if !exists && sub.topic.as_str().ends_with("missing") {
                sub.topic = Topic::new(format!("{}.shadow", sub.topic))?;
            }
        }
        if is(Defect::HistoryGap) && sub.start == Start::Earliest {
            let info = shared.memory.topic(&sub.topic).await?;
            let partitions = info.map(|info| info.partitions).unwrap_or_default();
            let skip = |first: Offset, next: Offset| if next > first { Offset(first.0 + 1) } else { first };
            sub.start =
                Start::Offsets(partitions.iter().map(|p| (p.partition, skip(p.first, p.next))).collect());
        }
        if is(Defect::ForgetsPosition)
            && let Some(group) = subscription.group_name()
            && shared.memory.delete_group(group, &sub.topic).await.is_ok()
        {
            sub.start = Start::Earliest;
        }
        Ok(sub)
    }
}

#[async_trait]
impl Transport for Mutant {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = claims(self.shared.memory.capabilities());
        match self.shared.defect {
            Some(Defect::DedupIgnored) => capabilities.dedup = Some(Duration::from_millis(500)),
            Some(Defect::SecondActiveMember) => capabilities.order_members = Members::One,
            Some(Defect::CapabilityFlips) => capabilities.delay = self.shared.world.next().is_multiple_of(2),
            _ => {}
        }
        capabilities
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        Ok(Arc::new(MutantPublisher::new(self.shared.clone(), self.shared.memory.publisher().await?)))
    }

    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>> {
        if !self.shared.is(Defect::SilentUnsupported) {
            subscription.check(&self.capabilities())?;
        }
        self.shared.world.topics.lock().push(subscription.topic.clone());
        if self.shared.is(Defect::CloseClosesPeers) && self.shared.world.any_closed.load(Atomic::SeqCst) {
            return Err(Error::new(ErrorKind::Closed, "a peer was closed"));
        }
        let subscription = self.altered(subscription).await?;
        let consumer = MutantConsumer::new(self.shared.clone(), subscription);
        if self.shared.is(Defect::GhostSubscribe) {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            tokio::spawn(async move {
                consumer.inner().await?;
                // Nobody listens any more: it stays, and nobody has it.
                if let Err(ghost) = sender.send(consumer) {
                    std::mem::forget(ghost);
                }
                Ok::<_, Error>(())
            });
            let gone = |_| Error::new(ErrorKind::Closed, "the task is gone");
            return Ok(Arc::new(receiver.await.map_err(gone)?));
        }
        if !self.shared.is(Defect::EarlySubscribe) {
            consumer.inner().await?;
        }
        Ok(Arc::new(consumer))
    }

    fn admin(&self) -> Option<&dyn Admin> {
        Some(&self.admin)
    }

    fn in_file(&self) -> Option<&dyn InFile> {
        None
    }

    async fn close(&self) -> Result<()> {
        self.shared.memory.close().await
    }
}
