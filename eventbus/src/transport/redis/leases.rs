//! The server as a store of groups by leases.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redis::{Pipeline, Value};
use tokio::sync::watch;
use tokio::time::Instant;

use super::store::{LOOK_EVERY, Store, missing, script};
use super::{entry, keys};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::partition::PartitionId;
use crate::subscription::{Audience, Start, Subscription};
use crate::transport::kit::cursor::Past;
use crate::transport::kit::leased::{self, Fetched, Gained, Look, Progress, Share, Standing, Step, Wanted};

/// A group of a topic.
#[derive(Debug, Clone)]
pub(super) struct GroupKey {
    topic: Topic,
    name: String,
    n_partitions: u32,
}

type Seat = leased::Seat<GroupKey>;

impl GroupKey {
    fn key(&self) -> String {
        keys::group(&self.topic, &self.name)
    }

    fn exceptions(&self, partition: u32) -> String {
        keys::exceptions(&self.topic, &self.name, partition)
    }
}

fn text(number: impl ToString) -> Vec<u8> {
    number.to_string().into_bytes()
}

fn millis(duration: Duration) -> Vec<u8> {
    text(duration.as_millis())
}

#[async_trait]
impl leased::Store for Store {
    type Group = GroupKey;

    const NAME: &'static str = "RedisConsumer";

    fn is_open(&self) -> Result<()> {
        self.is_open()
    }

    fn session(&self) -> Duration {
        self.options.session
    }

    fn look_every(&self) -> Option<Duration> {
        Some(LOOK_EVERY)
    }

    fn news(&self, group: &GroupKey) -> watch::Receiver<u64> {
        self.bells.hear(group.topic.clone())
    }

    async fn join(self: &Arc<Self>, subscription: &Subscription) -> Result<Seat> {
        let (store, wanted) = (self.clone(), subscription.clone());
        self.tasks
            .run(async move {
                // A topic that is remembered may have been deleted and created anew.
                match store.enter(&wanted).await {
                    Err(error) if error.kind() == ErrorKind::NotFound => {
                        store.forget(&wanted.topic);
                        store.enter(&wanted).await
                    }
                    entered => entered,
                }
            })
            .await
    }

    async fn stand(self: &Arc<Self>, seat: &Seat, known: BTreeMap<u32, u32>) -> Result<Standing> {
        let (store, seat) = (self.clone(), seat.clone());
        self.tasks.run(async move { store.stand_at(&seat, &known).await }).await
    }

    async fn read(
        self: &Arc<Self>,
        seat: &Seat,
        wanted: Vec<Wanted>,
        max: usize,
        max_bytes: usize,
    ) -> Result<Option<Look>> {
        let group = &seat.group;
        let largest = self.sizes.lock().get(&group.topic).copied();
        // Nothing is known of a topic that is read for the first time: a few entries show what they weigh.
        let count = largest.map_or(4, |largest| max_bytes / largest.max(1)).clamp(1, max.max(1));
        let mut pipeline = Pipeline::with_capacity(wanted.len() + 2);
        for wanted in &wanted {
            let stream = keys::stream(&group.topic, wanted.partition);
            pipeline.cmd("XRANGE").arg(stream).arg(keys::id(wanted.from)).arg("+").arg("COUNT").arg(count);
        }
        // Asked after the events: what is gone by now is noted by now.
        let holes = pipeline.cmd("HMGET").arg(keys::meta(&group.topic)).arg("partitions");
        wanted.iter().for_each(|wanted| _ = holes.arg(format!("first:{}", wanted.partition)));
        pipeline.cmd("HGET").arg(group.key()).arg("gen");
        let answers: Vec<Value> =
            self.with(|mut connection| async move { pipeline.query_async(&mut connection).await }).await?;
        let (Some(Value::BulkString(generation)), Some(Value::Array(holes))) =
            (answers.last(), answers.get(wanted.len()))
        else {
            return Ok(None);
        };
        let number = |bytes: &[u8]| std::str::from_utf8(bytes).ok()?.parse::<u64>().ok();
        let (Some(generation), Some(Value::BulkString(_))) = (number(generation), holes.first()) else {
            return Ok(None);
        };
        let mut fetched = Vec::new();
        let mut heaviest = 0;
        for ((wanted, entries), hole) in wanted.into_iter().zip(&answers).zip(holes.iter().skip(1)) {
            let first = match hole {
                Value::BulkString(id) => keys::offset(id).unwrap_or(0),
                _ => 0,
            };
            if first > wanted.from {
                fetched.push(Fetched { wanted, first, rows: Vec::new() });
                continue;
            }
            let Value::Array(entries) = entries else { continue };
            if entries.is_empty() {
                continue;
            }
            heaviest = entries.iter().map(entry::size).max().unwrap_or(0).max(heaviest);
            let rows: Option<Vec<_>> = entries.iter().map(entry::stored).collect();
            let rows = rows.ok_or_else(|| {
                Error::new(ErrorKind::Corrupt, "an entry's id is out of range")
                    .with("partition", wanted.partition)
            })?;
            fetched.push(Fetched { wanted, first, rows });
        }
        if heaviest > 0 {
            let mut sizes = self.sizes.lock();
            let known = sizes.entry(group.topic.clone()).or_default();
            // Grows at once, shrinks slowly.
            *known = heaviest.max(*known - *known / 8);
        }
        Ok(Some(Look { generation, fetched }))
    }

    async fn save(self: &Arc<Self>, seat: &Seat, progress: Arc<[Progress]>) -> Result<Vec<u32>> {
        let now = Instant::now();
        let (mut names, mut arguments) = (vec![seat.group.key()], vec![text(seat.member)]);
        for part in progress.iter() {
            names.push(seat.group.exceptions(part.partition));
            let changes: Vec<_> = part
                .changed
                .iter()
                .filter_map(|(offset, past)| {
                    let memory = match past {
                        Past::Fresh => return None,
                        Past::Settled => "s".to_owned(),
                        Past::Waiting { attempt, due: None } => format!("{attempt}|"),
                        Past::Waiting { attempt, due: Some(due) } => {
                            // Up: an event never returns before its time.
                            let left = due.saturating_duration_since(now).as_micros().div_ceil(1000);
                            format!("{attempt}|{left}")
                        }
                    };
                    Some((keys::id(*offset), memory))
                })
                .collect();
            arguments.extend([
                text(part.partition),
                text(part.epoch),
                keys::id(part.floor).into_bytes(),
                text(part.n_passed),
                text(u8::from(part.has_exceptions)),
                text(changes.len()),
            ]);
            arguments
                .extend(changes.into_iter().flat_map(|(id, memory)| [id.into_bytes(), memory.into_bytes()]));
        }
        self.script(script!("save"), names, arguments).await
    }

    async fn release(self: &Arc<Self>, seat: &Seat, partitions: Vec<u32>) -> Result<()> {
        let (store, seat) = (self.clone(), seat.clone());
        self.tasks
            .run(async move {
                let mut arguments = vec![keys::channel(&seat.group.topic).into_bytes(), text(seat.member)];
                arguments.extend(partitions.into_iter().map(text));
                store.script(script!("release"), vec![seat.group.key()], arguments).await
            })
            .await
    }

    async fn leave(self: &Arc<Self>, seat: &Seat) -> Result<()> {
        let (store, seat) = (self.clone(), seat.clone());
        self.tasks.run(async move { store.leave_at(&seat).await }).await
    }

    fn leave_soon(self: &Arc<Self>, seat: Seat) {
        let store = self.clone();
        self.tasks.leave_soon(async move { store.leave_at(&seat).await });
    }
}

impl Store {
    async fn enter(&self, subscription: &Subscription) -> Result<Seat> {
        let topic = &subscription.topic;
        let n_partitions = self.partitions(topic).await?;
        let (name, ephemeral) = match &subscription.audience {
            Audience::Group(group) => (group.as_str().to_owned(), 0),
            // Not a valid group name, so that no group can ever meet it.
            Audience::Broadcast => (format!("broadcast:{}", crate::EventId::generate()), 1),
        };
        let group = GroupKey { topic: topic.clone(), name, n_partitions };
        let (start, ids) = match &subscription.start {
            Start::Latest => ("latest", Vec::new()),
            Start::Earliest => ("earliest", Vec::new()),
            Start::Offsets(offsets) => {
                let of = |at| keys::id(offsets.get(&PartitionId(at)).map_or(0, |offset| offset.0));
                ("ids", (0..n_partitions).map(of).collect())
            }
            Start::Time(time) => ("ids", vec![keys::since(*time); n_partitions as usize]),
        };
        let names = [keys::meta(topic), keys::groups(topic), group.key()];
        let names = names.into_iter().chain(keys::streams(topic, n_partitions)).collect();
        let mut arguments = vec![
            group.name.clone().into_bytes(),
            text(ephemeral),
            millis(self.options.session),
            leased::process().into_bytes(),
            start.into(),
        ];
        arguments.extend(ids.into_iter().map(String::into_bytes));
        let member: Option<u64> = self.script(script!("join"), names, arguments).await?;
        let member = member.ok_or_else(|| missing(topic))?;
        Ok(Seat { group, member })
    }

    async fn stand_at(&self, seat: &Seat, known: &BTreeMap<u32, u32>) -> Result<Standing> {
        type Found = (String, u64, Vec<u64>, Vec<(u32, String, u32, String)>);
        let group = &seat.group;
        let arguments = vec![text(seat.member), millis(self.options.session), leased::process().into_bytes()];
        let found: Option<Found> = self.script(script!("stand"), vec![group.key()], arguments).await?;
        let (member, generation, mut members, mut cursors) =
            found.ok_or_else(|| Error::not_found("the topic or group was deleted"))?;
        let member: u64 = member.parse().map_err(|_| damaged())?;
        members.sort_unstable();
        cursors.sort_unstable_by_key(|(partition, ..)| *partition);
        let shares: Vec<Share> = cursors
            .iter()
            .map(|(partition, _, epoch, owner)| Share {
                partition: *partition,
                owner: owner.parse().ok(),
                epoch: *epoch,
            })
            .collect();
        let (steps, mut lost) = leased::steps(member, &members, &shares, known);
        let (mut wanted, mut to_release) = (Vec::new(), Vec::new());
        for (share, step) in shares.iter().zip(steps) {
            match step {
                Step::Keep => {}
                Step::Release => to_release.push(share.partition),
                Step::Load => wanted.push((*share, 0)),
                Step::Take => wanted.push((*share, 1)),
            }
        }
        let mut gained = Vec::new();
        if !wanted.is_empty() {
            let (mut names, mut arguments) = (vec![group.key()], vec![text(member)]);
            for (share, grows) in &wanted {
                names.push(group.exceptions(share.partition));
                arguments.extend([text(share.partition), text(share.epoch), text(grows)]);
            }
            let taken: Vec<Vec<String>> = self.script(script!("take"), names, arguments).await?;
            let now = Instant::now();
            for one in taken {
                let (partition, past) = one.split_first().ok_or_else(damaged)?;
                let partition: u32 = partition.parse().map_err(|_| damaged())?;
                let (share, grows) =
                    wanted.iter().find(|(share, _)| share.partition == partition).ok_or_else(damaged)?;
                let floor =
                    cursors.iter().find(|(known, ..)| *known == partition).map(|(_, floor, ..)| floor);
                let floor = floor.and_then(|floor| keys::offset(floor.as_bytes())).ok_or_else(damaged)?;
                let exceptions = past.as_chunks::<2>().0.iter().map(|pair| remembered(pair, now));
                gained.push(Gained {
                    partition,
                    epoch: share.epoch.wrapping_add(*grows),
                    floor,
                    exceptions: exceptions.collect::<Option<HashMap<_, _>>>().ok_or_else(damaged)?,
                });
            }
            // What somebody else was quicker to take is not ours.
            for (share, _) in &wanted {
                let taken = gained.iter().any(|gained| gained.partition == share.partition);
                if !taken && known.contains_key(&share.partition) && !lost.contains(&share.partition) {
                    lost.push(share.partition);
                }
            }
        }
        Ok(Standing { member, generation, gained, lost, to_release })
    }

    async fn leave_at(&self, seat: &Seat) -> Result<()> {
        let group = &seat.group;
        let exceptions = (0..group.n_partitions).map(|partition| group.exceptions(partition));
        let names = [keys::groups(&group.topic), group.key()].into_iter().chain(exceptions).collect();
        let channel = keys::channel(&group.topic).into_bytes();
        self.script(
            script!("leave"),
            names,
            vec![channel, group.name.clone().into_bytes(), text(seat.member)],
        )
        .await
    }
}

fn damaged() -> Error {
    Error::new(ErrorKind::Corrupt, "what is kept of a group cannot be read")
}

/// What is remembered of one event: its offset, and whether it is settled or waits.
fn remembered([id, memory]: &[String; 2], now: Instant) -> Option<(u64, Past)> {
    let offset = keys::offset(id.as_bytes())?;
    let Some((attempt, left)) = memory.split_once('|') else { return Some((offset, Past::Settled)) };
    let attempt: NonZeroU32 = attempt.parse().ok()?;
    let due = match left {
        "" => None,
        left => Some(now.checked_add(Duration::from_millis(left.parse().ok()?))?),
    };
    Some((offset, Past::Waiting { attempt, due }))
}
