//! What a case works with: names of its own, events that are easy to compare, members that keep books.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::cases::Case;
use super::check::{Violation, ensure, ensure_eq};
use super::subject::{Settings, Size, Subject};
use crate::capability::Capabilities;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::id::EventId;
use crate::name::{Group, Topic};
use crate::partition::PartitionId;
use crate::subscription::Subscription;
use crate::transport::{Consumer, Delivery, Polled, Publisher, Receipt, Settle, Token, Transport};

/// The surroundings of one case.
#[derive(Debug)]
pub struct Cx {
    id: &'static str,
    pub(super) subject: Subject,
    pub(super) random: fastrand::Rng,
    unique: u64,
}

pub(super) type Checked<T = ()> = Result<T, Violation>;

impl Cx {
    pub(super) fn new(case: &'static Case, subject: Subject) -> Self {
        let random = fastrand::Rng::with_seed(subject.settings().seed);
        // Names must differ between runs on one broker; the seed alone decides everything else.
        Self { id: case.id, subject, random, unique: fastrand::u64(..) }
    }

    pub(super) fn settings(&self) -> Settings {
        self.subject.settings()
    }

    /// Picks the figure of this run's size.
    pub(super) fn size(&self, short: usize, full: usize) -> usize {
        match self.settings().size {
            Size::Short => short,
            Size::Full => full,
        }
    }

    pub(super) fn topic(&self, name: &str) -> Checked<Topic> {
        Ok(Topic::new(format!("{}.{:x}.{name}", self.id, self.unique))?)
    }

    pub(super) fn group(&self, name: &str) -> Checked<Group> {
        Ok(Group::new(format!("{}.{:x}.{name}", self.id, self.unique))?)
    }

    pub(super) async fn connect(&self) -> Checked<Arc<dyn Transport>> {
        Ok(self.subject.connect().await?)
    }

    /// A topic, a group on it with one member, and a publisher: what most cases begin with.
    pub(super) async fn setup(&self) -> Checked<Setup> {
        let transport = self.connect().await?;
        let (topic, group) = (self.topic("events")?, self.group("main")?);
        let member = self.join(&transport, &topic, &group).await?;
        let publisher = transport.publisher().await?;
        Ok(Setup { capabilities: transport.capabilities(), transport, topic, group, member, publisher })
    }

    /// The subscription of most cases: the strongest order the transport claims, short times.
    pub(super) fn subscription(
        &self,
        transport: &Arc<dyn Transport>,
        topic: &Topic,
        group: &Group,
    ) -> Subscription {
        Subscription::group(topic.clone(), group.clone())
            .with_ordering(transport.capabilities().ordering)
            .with_revoke_within(Duration::from_secs(5))
    }

    pub(super) async fn join(
        &self,
        transport: &Arc<dyn Transport>,
        topic: &Topic,
        group: &Group,
    ) -> Checked<Member> {
        self.subscribe(transport, &self.subscription(transport, topic, group)).await
    }

    pub(super) async fn subscribe(
        &self,
        transport: &Arc<dyn Transport>,
        subscription: &Subscription,
    ) -> Checked<Member> {
        Ok(self.member(self.within("subscribe", transport.subscribe(subscription)).await??))
    }

    /// Keeps the books of a consumer.
    pub(super) fn member(&self, consumer: Arc<dyn Consumer>) -> Member {
        Member {
            consumer,
            held: HashMap::new(),
            owned: BTreeSet::new(),
            leaving: BTreeSet::new(),
            settings: self.settings(),
            idle: self.settings().idle,
            is_patient: false,
        }
    }

    /// Polls members that have nothing to do yet until each has partitions, or for a while where nobody says so.
    pub(super) async fn share_out(&self, members: &mut [Member]) -> Checked {
        let end = Instant::now() + self.settings().idle;
        for round in 0.. {
            for member in members.iter_mut() {
                let polled = member.poll_within(1, Duration::from_millis(25)).await?;
                ensure!(polled.is_none(), "an event from nowhere");
            }
            let all_own = members.iter().all(|member| !member.owned.is_empty());
            if (all_own && round >= 4)
                || Instant::now() > end
                || (round >= 8 && members.iter().all(|m| m.owned.is_empty()))
            {
                break;
            }
        }
        Ok(())
    }

    /// Fails the case if something takes longer than the idle time.
    pub(super) async fn within<T>(&self, what: &str, future: impl Future<Output = T>) -> Checked<T> {
        timeout(self.settings().idle, future)
            .await
            .map_err(|_| Violation::new(format!("{what} did not finish within {:?}", self.settings().idle)))
    }

    /// Events that differ in everything: payloads of any bytes, keys from a few. Where keys repeat,
    /// neighbours share one, so that a batch always holds an order to get wrong.
    pub(super) fn events(&mut self, n_events: usize, n_keys: usize) -> Vec<Envelope> {
        (0..n_events)
            .map(|at| {
                let mut payload = vec![0u8; 96 + at % 7];
                self.random.fill(&mut payload);
                payload.extend([0, 0x7f, 0x80, 0xff]);
                Envelope::new("conformance.event", "/conformance")
                    .with_version(1)
                    .with_key(format!("key-{}", if n_events > n_keys { at / 2 % n_keys } else { at }))
                    .with_subject(format!("subject {at} ü"))
                    .with_content_type("application/octet-stream")
                    .with_schema("urn:conformance:1")
                    .with_extension("correlationid", format!("c-{at}"))
                    .with_header("n", at.to_string())
                    .with_header("twice", "a")
                    .with_header("twice", "b")
                    .with_header("binary", [0, 255, 128])
                    .with_header("empty", "")
                    .with_payload(payload)
            })
            .collect()
    }
}

pub(super) struct Setup {
    pub(super) transport: Arc<dyn Transport>,
    pub(super) capabilities: Capabilities,
    pub(super) topic: Topic,
    pub(super) group: Group,
    pub(super) member: Member,
    pub(super) publisher: Arc<dyn Publisher>,
}

impl Setup {
    pub(super) async fn publish(&self, events: &[Envelope]) -> Checked<Vec<Receipt>> {
        publish(&self.publisher, &self.topic, events).await
    }
}

/// Publishes one batch and waits until all of it is confirmed.
pub(super) async fn publish(
    publisher: &Arc<dyn Publisher>,
    topic: &Topic,
    events: &[Envelope],
) -> Checked<Vec<Receipt>> {
    let receipts = publisher.enqueue(topic, events.to_vec()).await?.await;
    ensure_eq!(receipts.len(), events.len(), "one outcome for each event of the batch");
    Ok(receipts.all()?)
}

pub(super) fn some(n: usize) -> NonZeroUsize {
    NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN)
}

/// A consumer with the books a well-behaved program keeps: what it holds, what it must hand back.
pub(super) struct Member {
    pub(super) consumer: Arc<dyn Consumer>,
    held: HashMap<Token, PartitionId>,
    owned: BTreeSet<PartitionId>,
    leaving: BTreeSet<PartitionId>,
    settings: Settings,
    pub(super) idle: Duration,
    /// Whether a transient error is tried again, as after a fault on the wire.
    pub(super) is_patient: bool,
}

/// How long after a transient error something is tried again.
const AGAIN: Duration = Duration::from_millis(20);

/// Repeats what fails transiently, as a program does, until the idle time is over.
pub(super) async fn persist<T, F>(cx: &Cx, mut work: impl FnMut() -> F) -> Checked<T>
where
    F: Future<Output = Result<T>>,
{
    let end = Instant::now() + cx.settings().idle;
    loop {
        match work().await {
            Err(error) if error.is_retryable() && Instant::now() < end => pass(AGAIN).await,
            outcome => return Ok(outcome?),
        }
    }
}

impl Member {
    /// Polls until there are deliveries; `None` after `within` without any.
    pub(super) async fn poll_within(
        &mut self,
        max: usize,
        within: Duration,
    ) -> Checked<Option<Vec<Delivery>>> {
        let end = Instant::now() + within;
        loop {
            let polled = match tokio::time::timeout_at(end, self.consumer.poll(some(max))).await {
                Err(_) => return Ok(None),
                Ok(Err(error)) if self.is_patient && error.is_retryable() => {
                    pass(AGAIN).await;
                    continue;
                }
                Ok(polled) => polled?,
            };
            match polled {
                Polled::Deliveries(deliveries) => {
                    ensure!(!deliveries.is_empty(), "a poll returned an empty list");
                    ensure!(deliveries.len() <= max, "asked for {max}, was handed {}", deliveries.len());
                    for delivery in &deliveries {
                        let old = self.held.insert(delivery.token, delivery.partition);
                        ensure!(old.is_none(), "a token was handed out twice: {:?}", delivery.token);
                    }
                    return Ok(Some(deliveries));
                }
                Polled::Assigned(partitions) => {
                    self.leaving.retain(|leaving| !partitions.contains(leaving));
                    self.owned.extend(partitions);
                }
                Polled::Revoking { partitions, .. } => {
                    self.leaving.extend(partitions);
                    self.hand_back().await?;
                }
                Polled::Lost(partitions) => {
                    self.held.retain(|_, partition| !partitions.contains(partition));
                    self.owned.retain(|owned| !partitions.contains(owned));
                    self.leaving.retain(|leaving| !partitions.contains(leaving));
                }
                Polled::Closed => return Err(Violation::new("the consumer closed by itself")),
            }
        }
    }

    /// Polls until there are deliveries; waiting longer than the idle time fails the case.
    pub(super) async fn poll(&mut self, max: usize) -> Checked<Vec<Delivery>> {
        let idle = self.idle;
        let polled = self.poll_within(max, idle).await?;
        polled.ok_or_else(|| Violation::new(format!("nothing was delivered within {idle:?}")))
    }

    /// Polls until `n` deliveries are in hand.
    pub(super) async fn take(&mut self, n: usize) -> Checked<Vec<Delivery>> {
        let mut taken = Vec::with_capacity(n);
        while taken.len() < n {
            let got = self
                .poll(n - taken.len())
                .await
                .map_err(|v| Violation::new(format!("{v}; had {} of {n}", taken.len())))?;
            taken.extend(got);
        }
        Ok(taken)
    }

    pub(super) async fn settle(&mut self, deliveries: &[Delivery], how: Settle) -> Checked {
        let outcomes: Vec<_> = deliveries.iter().map(|delivery| (delivery.token, how)).collect();
        self.settle_each(&outcomes).await
    }

    pub(super) async fn ack(&mut self, deliveries: &[Delivery]) -> Checked {
        self.settle(deliveries, Settle::Ack).await
    }

    pub(super) async fn settle_each(&mut self, outcomes: &[(Token, Settle)]) -> Checked {
        let settled = loop {
            match self.consumer.settle(outcomes).await {
                Err(error) if self.is_patient && error.is_retryable() => pass(AGAIN).await,
                settled => break settled?,
            }
        };
        ensure!(settled.lost.is_empty(), "tokens in hand were lost at settle: {:?}", settled.lost);
        for (token, _) in outcomes {
            self.held.remove(token);
        }
        self.hand_back().await
    }

    /// Releases partitions that are to move, once nothing of them is in hand.
    async fn hand_back(&mut self) -> Checked {
        let ready: Vec<_> =
            self.leaving.iter().copied().filter(|p| !self.held.values().any(|held| held == p)).collect();
        if !ready.is_empty() {
            self.consumer.release(&ready).await?;
            self.owned.retain(|owned| !ready.contains(owned));
            self.leaving.retain(|leaving| !ready.contains(leaving));
        }
        Ok(())
    }

    /// Fails the case if anything arrives during the quiet period.
    pub(super) async fn stays_quiet(&mut self, what: &str) -> Checked {
        let quiet = self.settings.quiet;
        match self.poll_within(16, quiet).await? {
            None => Ok(()),
            Some(got) => Err(Violation::new(format!(
                "{what}: {} unexpected deliveries, first {:?}",
                got.len(),
                got.first()
            ))),
        }
    }

    /// Reads and settles everything until it stays quiet.
    pub(super) async fn drain(&mut self) -> Checked<Vec<Delivery>> {
        let mut all = Vec::new();
        while let Some(got) = self.poll_within(64, self.settings.quiet).await? {
            self.ack(&got).await?;
            all.extend(got);
        }
        Ok(all)
    }

    pub(super) async fn close(&self) -> Checked {
        Ok(self.consumer.close((Instant::now() + self.idle).into_std()).await?)
    }
}

/// Who got which event how often, over all members of one group.
pub(super) struct Book {
    index: HashMap<EventId, usize>,
    sent: Vec<Envelope>,
    pub(super) copies: Vec<usize>,
    /// Indices in the order of first delivery.
    pub(super) first: Vec<usize>,
}

impl Book {
    pub(super) fn new(sent: &[Envelope]) -> Self {
        let index = sent.iter().enumerate().map(|(at, event)| (event.id().clone(), at)).collect();
        Self { index, sent: sent.to_vec(), copies: vec![0; sent.len()], first: Vec::new() }
    }

    /// Compares a delivery with what was sent, in everything.
    pub(super) fn record(&mut self, delivery: &Delivery) -> Checked<usize> {
        let Some(found) = delivery.content.envelope() else {
            return Err(Violation::new(format!("undecodable: {:?}", delivery.content)));
        };
        let Some(at) = self.index.get(found.id()).copied() else {
            return Err(Violation::new(format!("an event that was never sent: {found:?}")));
        };
        if let Some(sent) = self.sent.get(at) {
            same(sent, found)?;
        }
        if let Some(copies) = self.copies.get_mut(at) {
            *copies += 1;
            if *copies == 1 {
                self.first.push(at);
            }
        }
        Ok(at)
    }

    pub(super) fn record_all(&mut self, deliveries: &[Delivery]) -> Checked {
        deliveries.iter().try_for_each(|delivery| self.record(delivery).map(drop))
    }

    pub(super) fn n_seen(&self) -> usize {
        self.first.len()
    }

    pub(super) fn complete(&self) -> Checked {
        let missing: Vec<_> =
            self.copies.iter().enumerate().filter(|(_, n)| **n == 0).map(|(at, _)| at).collect();
        ensure!(
            missing.is_empty(),
            "{} of {} events never arrived, first index {:?}",
            missing.len(),
            self.sent.len(),
            missing.first()
        );
        Ok(())
    }

    pub(super) fn exactly_once(&self) -> Checked {
        self.complete()?;
        let repeated = self.copies.iter().filter(|n| **n > 1).count();
        ensure_eq!(repeated, 0, "events delivered more than once without a fault");
        Ok(())
    }

    /// First deliveries ascend per key, or over all where the topic is one sequence.
    pub(super) fn in_order(&self, over_all: bool) -> Checked {
        let mut last: HashMap<Vec<u8>, usize> = HashMap::new();
        for at in &self.first {
            let key = match self.sent.get(*at).and_then(Envelope::key) {
                Some(key) if !over_all => key.as_bytes().to_vec(),
                _ => Vec::new(),
            };
            if let Some(before) = last.insert(key, *at) {
                ensure!(before < *at, "event {at} of its key arrived after event {before}");
            }
        }
        Ok(())
    }
}

/// Everything of an event must come back.
pub(super) fn same(sent: &Envelope, found: &Envelope) -> Checked {
    ensure_eq!(sent.headers(), found.headers(), "headers of {}", sent.id());
    ensure_eq!(sent.payload(), found.payload(), "payload of {}", sent.id());
    ensure_eq!(sent.time(), found.time(), "time of {}", sent.id());
    ensure!(sent == found, "the event changed: {sent:?} became {found:?}");
    Ok(())
}

/// Polls several members in turn, settles with `how`, until the book is complete or nothing comes.
pub(super) async fn run_members(
    cx: &Cx,
    members: &mut [Member],
    book: &mut Book,
    mut seen: impl FnMut(usize, &Delivery),
) -> Checked {
    let mut last_progress = Instant::now();
    let n_events = book.copies.len();
    while book.n_seen() < n_events {
        for (at, member) in members.iter_mut().enumerate() {
            if let Some(got) = member.poll_within(16, Duration::from_millis(5)).await? {
                last_progress = Instant::now();
                for delivery in &got {
                    book.record(delivery)?;
                    seen(at, delivery);
                }
                member.ack(&got).await?;
            }
        }
        ensure!(
            last_progress.elapsed() < cx.settings().idle,
            "no progress: {} of {n_events} after {:?}",
            book.n_seen(),
            cx.settings().idle
        );
    }
    Ok(())
}

/// The distinct partitions of some deliveries.
pub(super) fn partitions(deliveries: &[Delivery]) -> HashSet<PartitionId> {
    deliveries.iter().map(|delivery| delivery.partition).collect()
}

/// Lets time pass where passing time is the subject: a lease, a window, a quiet period.
pub(super) async fn pass(time: Duration) {
    // Timers are the only clock a case uses, so that a paused one works as well.
    drop(timeout(time, std::future::pending::<()>()).await);
}

/// Checks the kind of an error that must be there.
pub(super) fn fails_as<T: std::fmt::Debug>(
    what: &str,
    result: Result<T>,
    kinds: &[ErrorKind],
) -> Checked<Error> {
    match result {
        Ok(value) => Err(Violation::new(format!("{what} succeeded: {value:?}"))),
        Err(error) if kinds.contains(&error.kind()) => Ok(error),
        Err(error) => Err(Violation::new(format!("{what}: expected one of {kinds:?}, got {error}"))),
    }
}
