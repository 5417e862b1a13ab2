//! The cases about the log alone: what two owners of a partition do to each other.

use std::sync::Arc;
use std::time::Duration;

use super::super::place::{Log, Place, slots};
use super::super::record::{Parked, Sequence};
use super::World;
use super::cases::{Ended, claim, declare, event, group, source};
use crate::admin::Offset;
use crate::id::EventId;
use crate::name::Key;
use crate::partition::PartitionId;
use crate::subscription::Start;
use crate::transport::Transport;

/// A log without a service, for what two owners do to each other.
async fn log(world: &World) -> Arc<Log> {
    let topic = source().parked(&group()).unwrap();
    declare(world, &source()).await;
    declare(world, &topic).await;
    let transport: Arc<dyn Transport> = world.bus.transport().clone();
    let mark = crate::Subscription::group(topic.clone(), group()).with_start(Start::Earliest);
    let member = transport.subscribe(&mark).await.unwrap();
    member.close(std::time::Instant::now() + Duration::from_secs(5)).await.unwrap();
    Arc::new(Log {
        publisher: transport.publisher().await.unwrap(),
        transport,
        topic,
        group: group(),
        source: source(),
        bodies: super::super::bodies::Taken::default(),
    })
}

async fn gain(log: &Arc<Log>) -> Result<Place, String> {
    let (admin, partition) = (log.admin().unwrap(), PartitionId(3));
    let slot = slots(admin, &log.topic, &[partition]).await.unwrap()[&partition].clone();
    let low = log.lows().await.unwrap()[&partition];
    let place = Place::gain(log.clone(), partition, slot, low).await.map_err(|error| error.to_string())?;
    place.begin(None, 10);
    Ok(place)
}

async fn park(place: &Place, name: &str, origin: u64, attempts: u32) -> Result<EventId, String> {
    let event = event("k", name);
    let parked = Parked {
        id: event.id().clone(),
        sequence: Sequence::of(&event),
        origin: Offset(origin),
        attempts,
        due: None,
        held: false,
    };
    place.park(&event, parked).await.map_err(|error| error.to_string())?;
    Ok(event.id().clone())
}

/// What a new owner finds, in the order in which it would run it: names, attempts.
async fn found(log: &Arc<Log>) -> Result<Vec<(String, u32)>, String> {
    let place = gain(log).await?;
    let mut found = Vec::new();
    while let Some(head) = place.head(&Sequence::Key(Key::new("k"))) {
        let body = place.body(&head).await.map_err(|error| error.to_string())?;
        found.push((body.subject().unwrap_or_default().to_owned(), head.parked.attempts));
        place.done(&head.parked.id).await.map_err(|error| error.to_string())?;
    }
    Ok(found)
}

pub(super) async fn order_inside_a_key_is_the_origin(world: World) -> Ended {
    let log = log(&world).await;
    let zombie = gain(&log).await?;
    let owner = gain(&log).await?;
    park(&owner, "second", 7, 0).await?;
    park(&zombie, "first", 5, 1).await?;
    owner.read_on().await.map_err(|error| error.to_string())?;
    let head = owner.head(&Sequence::Key(Key::new("k"))).ok_or("nothing is parked")?;
    claim!(head.parked.origin == Offset(5), "{:?} runs first", head.parked);
    let found = found(&log).await?;
    claim!(found == [("first".to_owned(), 1), ("second".to_owned(), 0)], "{found:?}");
    Ok(())
}

pub(super) async fn zombie_sweep_moves_nothing(world: World) -> Ended {
    let log = log(&world).await;
    let zombie = gain(&log).await?;
    park(&zombie, "old", 1, 2).await?;
    let owner = gain(&log).await?;
    park(&owner, "new", 2, 0).await?;
    zombie.sweep().await.map_err(|error| error.to_string())?;
    // A sweep that ends in the middle, with its process.
    world.gate.stalls.send_replace(Some("park"));
    let cut = tokio::time::timeout(Duration::from_millis(200), owner.sweep()).await;
    claim!(cut.is_err(), "the sweep was not cut off");
    world.gate.stalls.send_replace(None);
    let found = found(&log).await?;
    claim!(found == [("old".to_owned(), 2), ("new".to_owned(), 0)], "{found:?}");
    Ok(())
}

pub(super) async fn sweep_keeps_order_and_state(world: World) -> Ended {
    let log = log(&world).await;
    let owner = gain(&log).await?;
    let first = park(&owner, "a", 10, 3).await?;
    let ended = park(&owner, "x", 11, 0).await?;
    park(&owner, "b", 12, 0).await?;
    park(&owner, "c", 13, 1).await?;
    let note = |place: Place, id: EventId| async move {
        place.attempt(&id, 4, None, false).await.map_err(|error| error.to_string())?;
        place.done(&ended).await.map_err(|error| error.to_string())?;
        place.sweep().await.map_err(|error| error.to_string())?;
        Ok::<_, String>(place)
    };
    let owner = note(owner, first).await?;
    claim!(!owner.is_long(20), "the log was not made short");
    // Its own Takeover lies below the mark now: whoever comes knows that it never left.
    let next = gain(&log).await?;
    claim!(next.is_cautious(), "the next owner does not know that the last one did not leave");
    let found = found(&log).await?;
    let expected = [("a".to_owned(), 4), ("b".to_owned(), 0), ("c".to_owned(), 1)];
    claim!(found == expected, "{found:?}");
    Ok(())
}

pub(super) async fn zombie_cannot_undo_done(world: World) -> Ended {
    let log = log(&world).await;
    let zombie = gain(&log).await?;
    let pending = park(&zombie, "pending", 1, 0).await?;
    let owner = gain(&log).await?;
    // The zombie ends what the owner still has to run: the owner's word counts.
    zombie.done(&pending).await.map_err(|error| error.to_string())?;
    owner.read_on().await.map_err(|error| error.to_string())?;
    claim!(owner.head(&Sequence::Key(Key::new("k"))).is_some(), "a zombie ended an event of its successor");
    zombie.read_on().await.map_err(|error| error.to_string())?;
    claim!(!zombie.is_ours(), "the zombie does not know that it is one");
    owner.done(&pending).await.map_err(|error| error.to_string())?;
    zombie.attempt(&pending, 1, None, false).await.map_err(|error| error.to_string())?;
    let found = found(&log).await?;
    claim!(found.is_empty(), "a zombie brought back {found:?}");
    Ok(())
}

pub(super) async fn takeover_beside_a_sweep_reads_the_mark_again(world: World) -> Ended {
    let log = log(&world).await;
    let zombie = gain(&log).await?;
    for n in 0..4 {
        let ended = park(&zombie, "ended", n, 0).await?;
        zombie.done(&ended).await.map_err(|error| error.to_string())?;
    }
    park(&zombie, "pending", 9, 0).await?;
    world.gate.stalls.send_replace(Some("takeover"));
    // It has read the mark, and is about to read from there.
    let gaining = tokio::spawn({
        let log = log.clone();
        async move { found(&log).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    zombie.sweep().await.map_err(|error| error.to_string())?;
    claim!(zombie.next() > 9, "the sweep moved nothing");
    world.gate.stalls.send_replace(None);
    let found = gaining.await.map_err(|panic| panic.to_string())??;
    claim!(found == [("pending".to_owned(), 0)], "{found:?}");
    Ok(())
}
