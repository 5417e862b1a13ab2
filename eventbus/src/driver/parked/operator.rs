//! What operators do to parked keys: they write into the log, and the owner reads it and acts.

use std::fmt;

use super::fold::{Fold, Now};
use super::place::{self, PAGE};
use super::record::{self, Record, Sequence};
use crate::admin::{Admin, Offset};
use crate::bus::Bus;
use crate::error::{Error, ErrorKind, Result};
use crate::id::EventId;
use crate::name::{Group, Key, Topic};
use crate::partition::PartitionId;

/// A key whose later events wait, because one of its events was dead-lettered.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeldKey {
    /// The key.
    pub key: Key,
    /// Its partition.
    pub partition: PartitionId,
    /// The event that was dead-lettered.
    pub event: EventId,
    /// Its place in the topic.
    pub offset: Offset,
    /// How often it ran.
    pub attempts: u32,
    /// How many events wait behind it.
    pub n_waiting: usize,
}

/// The parked keys of one group in one topic, as an operator sees them.
///
/// Reading does not disturb the service. Changes are records in the parking log: the service that owns the
/// partition acts on them within a second, or the next one does when it starts. Both may be repeated.
pub struct ParkedKeys<'a> {
    bus: &'a Bus,
    topic: Topic,
    parked: Topic,
    group: Group,
}

/// How often the log is read anew, if it is swept meanwhile.
const MAX_TRIES: u32 = 5;

impl<'a> ParkedKeys<'a> {
    /// Names the topic that was consumed, and the group that parked.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if the derived topic's name is too long.
    pub fn new(bus: &'a Bus, topic: &Topic, group: &Group) -> Result<Self> {
        Ok(Self { bus, topic: topic.clone(), parked: topic.parked(group)?, group: group.clone() })
    }

    fn admin(&self) -> Result<&'a dyn Admin> {
        let unsupported = || Error::new(ErrorKind::Unsupported, "this transport keeps no parking log");
        self.bus.transport().admin().ok_or_else(unsupported)
    }

    /// Lists the keys that wait for an operator, by partition and place.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) without an admin, or what reading reports. A group that never
    /// parked has none.
    ///
    /// # Cancellation
    /// Safe: nothing is changed.
    pub async fn held(&self) -> Result<Vec<HeldKey>> {
        let mut n_tries = 1;
        loop {
            match self.held_now().await {
                // A sweep may have moved the marks since they were read.
                Err(error) if matches!(error.kind(), ErrorKind::DataLoss { .. }) && n_tries < MAX_TRIES => {
                    n_tries += 1
                }
                held => return held,
            }
        }
    }

    async fn held_now(&self) -> Result<Vec<HeldKey>> {
        let admin = self.admin()?;
        let Some(info) = admin.topic(&self.parked).await? else { return Ok(Vec::new()) };
        let groups = admin.groups(Some(&self.parked)).await?;
        let mut held = Vec::new();
        for known in info.partitions {
            let mark = groups.iter().find(|g| g.group == self.group && g.partition == known.partition);
            let mut fold = Fold::from(mark.map_or(known.first, |mark| mark.settled).0);
            loop {
                let records = place::page(admin, &self.parked, known.partition, fold.next).await?;
                for (position, envelope) in &records {
                    fold.read(*position, record::parse(envelope), Now::get());
                }
                if records.len() < PAGE {
                    break;
                }
            }
            held.extend(fold.all_held().into_iter().filter_map(|(parked, n_waiting)| {
                let Sequence::Key(key) = parked.sequence else { return None };
                Some(HeldKey {
                    key,
                    partition: known.partition,
                    event: parked.id,
                    offset: parked.origin,
                    attempts: parked.attempts,
                    n_waiting,
                })
            }));
        }
        Ok(held)
    }

    /// Lets the event that failed run again, and then what waits behind it, oldest first. If another event of
    /// the key is held by then, nothing happens.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if the key is not held by this event any more, or what publishing reports.
    ///
    /// # Cancellation
    /// It may or may not have happened: repeat it, which changes nothing more.
    pub async fn redrive(&self, held: &HeldKey) -> Result<()> {
        let (sequence, id) = (Sequence::Key(held.key.clone()), held.event.clone());
        self.say(held, Record::Redrive { sequence, id }).await
    }

    /// Ends the event that failed without another run; what waits behind it goes on.
    ///
    /// # Errors
    /// As [`redrive`](Self::redrive).
    ///
    /// # Cancellation
    /// It may or may not have happened: repeat it, which changes nothing more.
    pub async fn resolve(&self, held: &HeldKey, reason: &str) -> Result<()> {
        let (sequence, id) = (Sequence::Key(held.key.clone()), held.event.clone());
        self.say(held, Record::Resolve { sequence, id, reason: reason.to_owned() }).await
    }

    async fn say(&self, held: &HeldKey, record: Record) -> Result<()> {
        let is_same = |now: &HeldKey| now.key == held.key && now.event == held.event;
        if !self.held().await?.iter().any(is_same) {
            return Err(Error::not_found("this event is not held any more")
                .with("key", &held.key)
                .with("event", &held.event)
                .with("topic", &self.topic)
                .with("group", &self.group));
        }
        let slots = place::slots(self.admin()?, &self.parked, &[held.partition]).await?;
        let slot = &slots[&held.partition];
        let record = record::control(&record, slot, 0);
        let publisher = self.bus.transport().publisher().await?;
        publisher.enqueue(&self.parked, vec![record]).await?.await.single().map(drop)
    }
}

impl fmt::Debug for ParkedKeys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParkedKeys")
            .field("topic", &self.topic)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}
