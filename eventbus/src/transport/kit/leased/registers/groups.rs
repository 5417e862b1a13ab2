//! What operators see and change of groups whose entries are kept by [`Registers`].

use futures_util::future::try_join_all;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::docs::{CursorDoc, GroupDoc};
use super::{Bounds, Entry, Held, Registers, changed_meanwhile};
use crate::admin::{GroupInfo, Offset, TopicInfo};
use crate::error::{Error, ErrorKind, Result};
use crate::name::{Group, Topic};
use crate::partition::PartitionId;

/// So many topics are asked for at once.
const AT_ONCE: usize = 16;

/// The positions of one group of a topic, or of all.
pub(in crate::transport) async fn positions<R: Registers>(
    store: &R,
    topic: &Topic,
    wanted: Option<&Group>,
) -> Result<Vec<GroupInfo>> {
    let n_partitions = existing(store, topic).await?;
    let bounds = store.bounds(topic, n_partitions, false).await?;
    let names = match wanted {
        Some(group) => vec![group.as_str().to_owned()],
        None => store.groups(topic).await?,
    };
    let mut found = Vec::new();
    for name in names {
        let (entry, group) = (Entry::Group(topic, &name), Group::new(&*name)?);
        let Some(Held { value: doc, .. }) = store.get::<GroupDoc>(entry).await? else { continue };
        let dead = store.dead(entry, &doc).await?;
        let cursors = (0..n_partitions).map(|partition| cursor(store, topic, &group, &doc, partition));
        let cursors = try_join_all(cursors).await?;
        for (at, (Bounds { first, next, .. }, cursor)) in bounds.iter().zip(cursors).enumerate() {
            let owner =
                doc.shares.get(at).and_then(|(owner, _)| *owner).filter(|owner| !dead.contains(owner));
            let owner = owner.and_then(|owner| doc.members.get(&owner));
            let (floor, lag) = (Offset(cursor.value.floor), cursor.value.lag(*first, *next));
            let partition = PartitionId(at as u32);
            found.push(
                GroupInfo::new(group.clone(), topic.clone(), partition, floor, Offset(*next), lag)
                    .with_owner(owner.map(|member| member.process.clone())),
            );
        }
    }
    Ok(found)
}

/// The positions of all groups of topics. One that is asked for alone must exist; of all topics, one may be gone since
/// they were listed.
pub(in crate::transport) async fn all<R: Registers>(
    store: &R,
    topics: Vec<Topic>,
    must_exist: bool,
) -> Result<Vec<GroupInfo>> {
    let found = each(topics, |topic| async move {
        match positions(store, &topic, None).await {
            Err(error) if error.kind() == ErrorKind::NotFound && !must_exist => Ok(Vec::new()),
            positions => positions,
        }
    });
    let mut found: Vec<_> = found.await?.into_iter().flatten().collect();
    found.sort_by(|a, b| (&a.group, &a.topic, a.partition).cmp(&(&b.group, &b.topic, b.partition)));
    Ok(found)
}

/// What `describe` says of topics, in their order; one may be gone since they were listed.
pub(in crate::transport) async fn topics<F>(
    topics: Vec<Topic>,
    describe: impl Fn(Topic) -> F,
) -> Result<Vec<TopicInfo>>
where
    F: Future<Output = Result<Option<TopicInfo>>>,
{
    let found = each(topics, |topic| {
        let described = describe(topic);
        async move {
            match described.await {
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                described => described,
            }
        }
    });
    Ok(found.await?.into_iter().flatten().collect())
}

/// Asks for several topics at once, as each answer is a few round trips away. The topics are owned: a borrowed one
/// would make futures that the boxed methods of `Admin` cannot hold.
async fn each<T, F>(topics: Vec<Topic>, ask: impl FnMut(Topic) -> F) -> Result<Vec<T>>
where
    F: Future<Output = Result<T>>,
{
    stream::iter(topics.into_iter().map(ask)).buffered(AT_ONCE).try_collect().await
}

async fn existing<R: Registers>(store: &R, topic: &Topic) -> Result<u32> {
    let found = store.existing(topic).await?;
    found.ok_or_else(|| Error::not_found("there is no such topic").with("topic", topic))
}

/// A group's position, as it is or as it begins.
async fn cursor<R: Registers>(
    store: &R,
    topic: &Topic,
    group: &Group,
    doc: &GroupDoc,
    partition: u32,
) -> Result<Held<CursorDoc>> {
    let found = store.get::<CursorDoc>(Entry::Cursor(topic, group.as_str(), partition)).await?;
    let revision = found.as_ref().map_or(0, |found| found.revision);
    let value = found.map(|found| found.value).filter(|value| value.group == doc.id);
    let value = value.unwrap_or_else(|| doc.beginning(partition));
    Ok(Held { value, revision })
}

/// A group that has no members now, with its revision.
async fn idle<R: Registers>(store: &R, group: &Group, topic: &Topic) -> Result<Held<GroupDoc>> {
    let entry = Entry::Group(topic, group.as_str());
    let Some(mut found) = store.get::<GroupDoc>(entry).await? else {
        return Err(Error::not_found("there is no such group in this topic")
            .with("group", group)
            .with("topic", topic));
    };
    let dead = store.dead(entry, &found.value).await?;
    found.value.bury(&dead);
    if found.value.members.is_empty() {
        return Ok(found);
    }
    Err(Error::new(ErrorKind::Conflict, "the group has members: stop them first")
        .with("group", group)
        .with("members", found.value.members.len()))
}

/// Deletes a group that has no members.
pub(in crate::transport) async fn delete<R: Registers>(
    store: &R,
    group: &Group,
    topic: &Topic,
) -> Result<()> {
    let n_partitions = existing(store, topic).await?;
    let found = idle(store, group, topic).await?;
    let entry = Entry::Group(topic, group.as_str());
    store.remove(entry, found.revision).await?.ok_or_else(changed_meanwhile)?;
    for partition in 0..n_partitions {
        let entry = Entry::Cursor(topic, group.as_str(), partition);
        // One of a new group of this name stays.
        let cursor = store.get::<CursorDoc>(entry).await?;
        if let Some(cursor) = cursor.filter(|cursor| cursor.value.group == found.value.id) {
            store.remove(entry, cursor.revision).await?;
        }
    }
    Ok(())
}

/// Moves a group that has no members; `bounds` are those of the partition.
pub(in crate::transport) async fn seek<R: Registers>(
    store: &R,
    group: &Group,
    topic: &Topic,
    partition: PartitionId,
    to: Offset,
    bounds: Bounds,
) -> Result<()> {
    let Held { value: mut doc, revision } = idle(store, group, topic).await?;
    let Held { mut value, revision: at } = cursor(store, topic, group, &doc, partition.0).await?;
    // A member that joins meanwhile changes the group, or takes the position under an epoch of its own; one that was
    // declared dead and wakes finds an epoch that is not its own.
    let share = doc.shares.get_mut(partition.0 as usize).ok_or_else(changed_meanwhile)?;
    let epoch = share.1.wrapping_add(1);
    *share = (None, epoch);
    doc.generation += 1;
    let entry = Entry::Group(topic, group.as_str());
    store.set(entry, &doc, revision).await?.ok_or_else(changed_meanwhile)?;
    (value.epoch, value.floor) = (epoch, to.0.clamp(bounds.first, bounds.next));
    value.past.clear();
    let entry = Entry::Cursor(topic, group.as_str(), partition.0);
    store.set(entry, &value, at).await?.ok_or_else(changed_meanwhile)?;
    Ok(())
}
