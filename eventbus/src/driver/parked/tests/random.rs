//! Random schedules: owners that end without a word at any moment, short logs, events that fail.

use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use super::World;
use super::cases::{ATTEMPTS, Act, Shop, event, lag, parking, publish, source, start};
use crate::parking::Followers;
use crate::transport::memory::{Memory, Options};

/// Nothing is lost, and in each key the first runs begin in the order of the source.
async fn schedule(mut world: World) -> Result<(), String> {
    let shop = Shop::default();
    let (n_keys, each) = (6, 20);
    for key in 0..n_keys {
        for n in 0..each {
            if world.random.u8(..4) == 0 {
                shop.act(&format!("k{key}/{n}"), Act::Fail(world.random.u32(1..=ATTEMPTS + 1)));
            }
        }
    }
    let short = parking(&world)
        .with_followers(Followers::Skip)
        .with_sweep_after(NonZeroUsize::new(world.random.usize(5..40)).unwrap());
    let mut running = start(&world, &shop, short).await;
    for n in 0..each {
        publish(&world, (0..n_keys).map(|key| event(&format!("k{key}"), &format!("k{key}/{n}"))).collect())
            .await;
        if world.random.u8(..3) == 0 {
            tokio::time::sleep(Duration::from_millis(world.random.u64(..900))).await;
            if world.random.bool() {
                drop(running);
            } else {
                running.stop().await.map_err(|error| error.to_string())?;
            }
            running = start(&world, &shop, short).await;
        }
    }
    let all: BTreeSet<String> =
        (0..n_keys).flat_map(|key| (0..each).map(move |n| format!("k{key}/{n}"))).collect();
    let end = tokio::time::Instant::now() + Duration::from_secs(600);
    loop {
        let ended: BTreeSet<String> = shop.all("ok").into_iter().chain(dead_letters(&world).await).collect();
        if ended == all && lag(&world).await == 0 && running.counts().parked == 0 {
            break;
        }
        if tokio::time::Instant::now() > end {
            let lost: Vec<_> = all.difference(&ended).collect();
            return Err(format!("lost {lost:?}, lag {}, {:?}", lag(&world).await, running.counts()));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    running.stop().await.map_err(|error| error.to_string())?;
    let mut first: HashMap<String, u32> = HashMap::new();
    for (word, name) in shop.log() {
        let (key, n) = name.split_once('/').ok_or("a name is key/n")?;
        let n: u32 = n.parse().map_err(|_| "n")?;
        let next = first.entry(key.to_owned()).or_default();
        if word == "start" && n >= *next {
            if n > *next {
                return Err(format!("{name} began before {key}/{next}"));
            }
            *next += 1;
        }
    }
    Ok(())
}

async fn dead_letters(world: &World) -> Vec<String> {
    let (admin, dead) = (world.bus.transport().admin().unwrap(), source().dead_letters().unwrap());
    let mut names = Vec::new();
    for partition in admin.topic(&dead).await.unwrap().map(|info| info.partitions).unwrap_or_default() {
        let letters = admin.read(&dead, partition.partition, partition.first, 10_000).await.unwrap();
        names.extend(letters.iter().filter_map(|r| Some(r.content.envelope()?.subject()?.to_owned())));
    }
    names
}

#[test]
fn random_schedules_lose_nothing_and_keep_order() {
    for seed in 0..150 {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let options = Options { replay: 1_000_000, ..Options::default() };
        let world = World::new(Arc::new(Memory::new(options)), crate::parking::Waits::Log, seed);
        let ended = runtime.block_on(schedule(world));
        assert_eq!(ended, Ok(()), "seed {seed}");
    }
}
