//! The cases: each a promise of parking, on any transport.

use std::collections::HashMap;
use std::num::{NonZeroU32, NonZeroUsize};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering as Atomic;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::super::record::{self, Record};
use super::super::{HeldKey, ParkedKeys};
use super::World;
use super::log_cases::*;
use crate::admin::TopicSpec;
use crate::backoff::Retry;
use crate::driver::{Health, Running};
use crate::envelope::Envelope;
use crate::extract::{Meta, State};
use crate::failure::Failure;
use crate::name::{Group, Key, Topic};
use crate::parking::{Followers, Parking};
use crate::service::Service;
use crate::subscription::Start;

pub(super) type Ended = Result<(), String>;

pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) run: fn(World) -> Pin<Box<dyn Future<Output = Ended>>>,
    /// It finds what no planted bug stands for.
    pub(super) is_extra: bool,
}

macro_rules! cases {
    ($($name:ident $(+ $extra:literal)?),+ $(,)?) => {
        pub(super) const CASES: &[Case] = &[$(Case {
            name: stringify!($name),
            run: |world| Box::pin($name(world)),
            is_extra: false $(|| $extra)?,
        }),+];
    };
}

cases! {
    follower_waits_for_parked_head,
    takeover_loads_parked_keys_first,
    crash_between_park_and_settle_parks_once,
    source_settles_after_park_is_confirmed,
    key_is_free_only_after_done,
    crash_loop_is_counted,
    crash_loop_ends_where_nothing_is_held,
    order_inside_a_key_is_the_origin,
    zombie_sweep_moves_nothing,
    sweep_keeps_order_and_state,
    held_sequence_redrives_oldest_first,
    resolved_sequence_goes_on_without_it + true,
    a_redrive_that_fails_leaves_its_key_held + true,
    full_parking_pauses_not_drops,
    full_parking_leaves_workers_for_heads + true,
    outage_opens_breaker_and_parks_nothing,
    zombie_cannot_undo_done,
    takeover_beside_a_sweep_reads_the_mark_again,
}

/// The cases that do not depend on where a failed event waits: they hold in the rows form as well.
pub(super) const IN_EVERY_FORM: &[&str] = &[
    "follower_waits_for_parked_head",
    "crash_loop_ends_where_nothing_is_held",
    "held_sequence_redrives_oldest_first",
    "resolved_sequence_goes_on_without_it",
    "a_redrive_that_fails_leaves_its_key_held",
    "outage_opens_breaker_and_parks_nothing",
];

macro_rules! claim {
    ($holds:expr, $($why:tt)+) => {
        if !$holds {
            return Err(format!($($why)+));
        }
    };
}

pub(super) use claim;

/// What one event does when it is handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    Fail(u32),
    Refuse,
    Abort,
}

/// A shop whose handler does as it is told, and what it did.
#[derive(Clone, Default)]
pub(super) struct Shop(Arc<Inner>);

#[derive(Default)]
struct Inner {
    acts: Mutex<HashMap<String, Act>>,
    /// `start`, `ok`, by event.
    did: Mutex<Vec<(&'static str, String)>>,
    aborted: Notify,
    changed: Notify,
}

impl Shop {
    pub(super) fn act(&self, event: &str, act: Act) {
        self.0.acts.lock().insert(event.to_owned(), act);
    }

    pub(super) fn clear(&self) {
        self.0.acts.lock().clear();
    }

    fn say(&self, word: &'static str, event: &str) {
        self.0.did.lock().push((word, event.to_owned()));
        self.0.changed.notify_waiters();
    }

    pub(super) fn all(&self, word: &str) -> Vec<String> {
        self.0.did.lock().iter().filter(|(w, _)| *w == word).map(|(_, event)| event.clone()).collect()
    }

    pub(super) fn log(&self) -> Vec<(&'static str, String)> {
        self.0.did.lock().clone()
    }

    pub(super) async fn until(&self, word: &str, n: usize) -> Ended {
        self.until_it(|shop| shop.all(word).len() >= n)
            .await
            .map_err(|_| format!("{} of {n} × {word}; {:?}", self.all(word).len(), self.log()))
    }

    async fn until_it(&self, holds: impl Fn(&Self) -> bool) -> Result<(), ()> {
        let reached = async {
            loop {
                let mut changed = std::pin::pin!(self.0.changed.notified());
                changed.as_mut().enable();
                if holds(self) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), reached).await.map_err(drop)
    }

    pub(super) async fn aborted(&self) {
        self.0.aborted.notified().await;
    }
}

async fn handle(Meta(event): Meta, State(shop): State<Shop>) -> Result<(), Failure> {
    let name = event.subject().unwrap_or_default().to_owned();
    shop.say("start", &name);
    tokio::task::yield_now().await;
    let act = shop.0.acts.lock().get(&name).copied();
    match act {
        Some(Act::Fail(left)) if left > 0 => {
            shop.act(&name, Act::Fail(left - 1));
            Err(Failure::transient("flaky", "not yet").retry_after(Duration::from_millis(20)))
        }
        Some(Act::Refuse) => Err(Failure::permanent("never", "will not work")),
        Some(Act::Abort) => {
            shop.0.aborted.notify_one();
            std::future::pending().await
        }
        _ => {
            shop.say("ok", &name);
            Ok(())
        }
    }
}

pub(super) const ATTEMPTS: u32 = 5;

pub(super) fn source() -> Topic {
    Topic::new("steps").unwrap()
}

pub(super) fn group() -> Group {
    Group::new("orders").unwrap()
}

pub(super) fn parking(world: &World) -> Parking {
    Parking::default().with_waits(world.waits)
}

fn retry() -> Retry {
    Retry::exponential(
        Duration::from_millis(20),
        Duration::from_millis(100),
        NonZeroU32::new(ATTEMPTS).unwrap(),
    )
    .with_in_lane(NonZeroU32::MIN)
}

pub(super) async fn start(world: &World, shop: &Shop, parking: Parking) -> Running {
    let service = Service::new("orders")
        .retry(retry())
        .parking(parking)
        .start_at(Start::Earliest)
        .on(source(), handle)
        .with_state(shop.clone());
    service.start(&world.bus).await.unwrap()
}

/// An event of a key with a name.
pub(super) fn event(key: &str, name: &str) -> Envelope {
    Envelope::new("test.step", "/t")
        .with_version(1)
        .with_key(Key::new(key.as_bytes().to_vec()))
        .with_subject(name.to_owned())
}

pub(super) async fn publish(world: &World, events: Vec<Envelope>) {
    let publisher = world.bus.transport().publisher().await.unwrap();
    publisher.enqueue(&source(), events).await.unwrap().await.all().unwrap();
}

pub(super) async fn declare(world: &World, topic: &Topic) {
    world.bus.transport().admin().unwrap().declare(&TopicSpec::new(topic.clone())).await.unwrap();
}

/// Every record of the parking log, by partition and position.
pub(super) async fn records(world: &World) -> Vec<Record> {
    let admin = world.bus.transport().admin().unwrap();
    let topic = source().parked(&group()).unwrap();
    let mut all = Vec::new();
    for partition in admin.topic(&topic).await.unwrap().unwrap().partitions {
        let found = admin.read(&topic, partition.partition, partition.first, 100_000).await.unwrap();
        let entries = found.iter().filter_map(|found| record::parse(found.content.envelope()?));
        all.extend(entries.map(|entry| entry.record));
    }
    all
}

async fn until(mut holds: impl AsyncFnMut() -> bool) -> Ended {
    for _ in 0..3_000 {
        if holds().await {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err("it never came true".into())
}

pub(super) async fn lag(world: &World) -> u64 {
    let admin = world.bus.transport().admin().unwrap();
    admin.groups(Some(&source())).await.unwrap().iter().map(|info| info.lag).sum()
}

/// In each key, an event begins only after every earlier one has ended well.
fn in_order(shop: &Shop) -> Ended {
    let mut next: HashMap<String, u32> = HashMap::new();
    for (word, name) in shop.log() {
        let (key, n) = name.split_once('/').ok_or("a name is key/n")?;
        let (n, expected) =
            (n.parse::<u32>().map_err(|e| e.to_string())?, next.entry(key.to_owned()).or_default());
        claim!(n <= *expected, "{word} {name} before {key}/{expected} ended");
        if word == "ok" {
            claim!(n == *expected, "{name} ended twice");
            *expected += 1;
        }
    }
    Ok(())
}

async fn follower_waits_for_parked_head(mut world: World) -> Ended {
    let shop = Shop::default();
    let (n_keys, each) = (200, 5);
    for key in 0..n_keys {
        for n in 0..each {
            if world.random.u8(..3) == 0 {
                shop.act(&format!("k{key}/{n}"), Act::Fail(world.random.u32(1..ATTEMPTS)));
            }
        }
    }
    let running = start(&world, &shop, parking(&world)).await;
    for n in 0..each {
        publish(&world, (0..n_keys).map(|key| event(&format!("k{key}"), &format!("k{key}/{n}"))).collect())
            .await;
    }
    shop.until("ok", n_keys * each).await?;
    let counts = running.counts();
    running.stop().await.map_err(|error| error.to_string())?;
    claim!(counts.dead_lettered == 0, "dead letters: {counts:?}");
    claim!(lag(&world).await == 0, "the source is not settled");
    in_order(&shop)
}

async fn takeover_loads_parked_keys_first(world: World) -> Ended {
    let shop = Shop::default();
    shop.act("k/0", Act::Fail(3));
    world.gate.stalls.send_replace(Some("done"));
    let running = start(&world, &shop, parking(&world)).await;
    publish(&world, (0..4).map(|n| event("k", &format!("k/{n}"))).collect()).await;
    until(async || running.counts().parked == 4 && lag(&world).await == 0).await?;
    shop.act("k/0", Act::Fail(0));
    // It ends without a word.
    drop(running);
    world.gate.stalls.send_replace(None);
    publish(&world, vec![event("k", "k/4")]).await;
    let before = shop.all("ok").len();
    let running = start(&world, &shop, parking(&world)).await;
    shop.until("ok", before + 5).await?;
    running.stop().await.map_err(|error| error.to_string())?;
    let ok: Vec<_> = shop.all("ok").split_off(before);
    claim!(ok == ["k/0", "k/1", "k/2", "k/3", "k/4"], "after the takeover: {ok:?}");
    Ok(())
}

async fn crash_between_park_and_settle_parks_once(world: World) -> Ended {
    let shop = Shop::default();
    shop.act("k/0", Act::Fail(1));
    world.gate.keeps_settles.send_replace(true);
    let running = start(&world, &shop, parking(&world)).await;
    publish(&world, vec![event("k", "k/0")]).await;
    until(async || running.counts().parked == 1).await?;
    drop(running);
    claim!(lag(&world).await == 1, "the source was settled");
    world.gate.keeps_settles.send_replace(false);
    let running = start(&world, &shop, parking(&world)).await;
    until(async || lag(&world).await == 0 && running.counts().parked == 0).await?;
    running.stop().await.map_err(|error| error.to_string())?;
    let n_parks = records(&world).await.iter().filter(|record| matches!(record, Record::Park(_))).count();
    let n_ok = shop.all("ok").len();
    claim!((n_parks, n_ok) == (1, 1), "parked {n_parks} times, handled {n_ok} times");
    Ok(())
}

async fn source_settles_after_park_is_confirmed(world: World) -> Ended {
    let shop = Shop::default();
    shop.act("k/0", Act::Fail(1));
    let running = start(&world, &shop, parking(&world)).await;
    world.gate.refuses.store(true, Atomic::SeqCst);
    publish(&world, vec![event("k", "k/0")]).await;
    shop.until("start", 1).await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    claim!(lag(&world).await == 1, "the source was settled before its event was parked");
    drop(running);
    world.gate.refuses.store(false, Atomic::SeqCst);
    let running = start(&world, &shop, parking(&world)).await;
    shop.until("ok", 1).await?;
    running.stop().await.map_err(|error| error.to_string())
}

async fn key_is_free_only_after_done(world: World) -> Ended {
    let shop = Shop::default();
    shop.act("k/0", Act::Fail(1));
    world.gate.stalls.send_replace(Some("done"));
    let running = start(&world, &shop, parking(&world)).await;
    publish(&world, vec![event("k", "k/0")]).await;
    shop.until("ok", 1).await?;
    publish(&world, vec![event("k", "k/1")]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = shop.all("start");
    claim!(!begun.contains(&"k/1".to_owned()), "the key was free before the end of its event was stored");
    world.gate.stalls.send_replace(None);
    shop.until("ok", 2).await?;
    running.stop().await.map_err(|error| error.to_string())?;
    in_order(&shop)
}

async fn crash_loop_is_counted(world: World) -> Ended {
    for as_head in [false, true] {
        let shop = Shop::default();
        let (bad, key) = (format!("bad{as_head}/0"), format!("bad{as_head}"));
        shop.act(&bad, if as_head { Act::Fail(1) } else { Act::Abort });
        let others: Vec<_> =
            (0..20).map(|n| event(&format!("{as_head}o{n}"), &format!("{as_head}o{n}/0"))).collect();
        // A parked head begins only when its attempt is noted.
        world.gate.stalls.send_replace(as_head.then_some("attempt"));
        let mut running = start(&world, &shop, parking(&world)).await;
        publish(&world, [vec![event(&key, &bad)], others].concat()).await;
        if as_head {
            until(async || running.counts().parked == 1 + u64::from(as_head)).await?;
            shop.act(&bad, Act::Abort);
            world.gate.stalls.send_replace(None);
        }
        let mut n_crashes = 0;
        loop {
            tokio::select! {
                () = shop.aborted() => {}
                held = until(async || running.counts().held == 1 + u64::from(as_head)) => {
                    held?;
                    break;
                }
            }
            n_crashes += 1;
            claim!(n_crashes <= 2 * ATTEMPTS, "an event that ends the process is run without end");
            drop(running);
            running = start(&world, &shop, parking(&world)).await;
        }
        shop.until("ok", 20).await?;
        let counts = running.counts();
        running.stop().await.map_err(|error| error.to_string())?;
        let n_runs = shop.all("start").iter().filter(|name| **name == bad).count();
        // The first run of a lane is not counted: the owner before had left by itself.
        claim!(n_runs <= ATTEMPTS as usize + 1, "{n_runs} runs of {ATTEMPTS}");
        claim!(counts.dead_lettered == 1, "an innocent event was given up: {counts:?}");
    }
    Ok(())
}

async fn crash_loop_ends_where_nothing_is_held(world: World) -> Ended {
    let shop = Shop::default();
    shop.act("bad/0", Act::Abort);
    let skip = parking(&world).with_followers(Followers::Skip);
    let mut running = start(&world, &shop, skip).await;
    let others = (0..20).map(|n| event(&format!("o{n}"), &format!("o{n}/0")));
    publish(&world, [vec![event("bad", "bad/0")], others.collect()].concat()).await;
    let mut n_crashes = 0;
    loop {
        tokio::select! {
            () = shop.aborted() => {}
            given_up = until(async || running.counts().dead_lettered == 1) => {
                given_up?;
                break;
            }
        }
        n_crashes += 1;
        claim!(n_crashes <= 2 * ATTEMPTS, "an event that ends the process is run without end");
        drop(running);
        running = start(&world, &shop, skip).await;
    }
    shop.until("ok", 20).await?;
    let counts = running.counts();
    running.stop().await.map_err(|error| error.to_string())?;
    let n_runs = shop.all("start").iter().filter(|name| **name == "bad/0").count();
    claim!(n_runs <= ATTEMPTS as usize + 1, "{n_runs} runs of {ATTEMPTS}");
    claim!(counts.dead_lettered == 1 && counts.held == 0, "{counts:?}");
    Ok(())
}

async fn hold_a_key(world: &World, shop: &Shop) -> Result<Running, String> {
    shop.act("k/0", Act::Refuse);
    let running = start(world, shop, parking(world).with_followers(Followers::Hold)).await;
    publish(world, (0..3).map(|n| event("k", &format!("k/{n}"))).collect()).await;
    publish(world, vec![event("other", "other/0")]).await;
    until(async || running.counts().held == 1 && running.counts().parked == 3).await?;
    shop.until("ok", 1).await?;
    claim!(shop.all("start").iter().all(|name| name != "k/1"), "a follower ran");
    Ok(running)
}

async fn held_sequence_redrives_oldest_first(world: World) -> Ended {
    let shop = Shop::default();
    let running = hold_a_key(&world, &shop).await?;
    let keys = ParkedKeys::new(&world.bus, &source(), &group()).unwrap();
    let held = keys.held().await.map_err(|error| error.to_string())?;
    claim!(held.len() == 1 && held[0].n_waiting == 2 && held[0].attempts == 1, "{held:?}");
    let nobody = HeldKey { key: Key::new("nobody"), ..held[0].clone() };
    claim!(keys.redrive(&nobody).await.is_err(), "a key that is not held was redriven");
    // It fails again: it is held again, with nothing lost.
    keys.redrive(&held[0]).await.map_err(|error| error.to_string())?;
    until(async || running.counts().dead_lettered == 2 && running.counts().held == 1).await?;
    running.stop().await.map_err(|error| error.to_string())?;
    shop.clear();
    // The command waits in the log for whoever starts next.
    keys.redrive(&held[0]).await.map_err(|error| error.to_string())?;
    let running = start(&world, &shop, parking(&world)).await;
    shop.until("ok", 4).await?;
    until(async || running.counts().parked == 0).await?;
    running.stop().await.map_err(|error| error.to_string())?;
    in_order(&shop)
}

async fn resolved_sequence_goes_on_without_it(world: World) -> Ended {
    let shop = Shop::default();
    let running = hold_a_key(&world, &shop).await?;
    let keys = ParkedKeys::new(&world.bus, &source(), &group()).unwrap();
    let held = keys.held().await.map_err(|error| error.to_string())?;
    keys.resolve(&held[0], "paid by phone").await.map_err(|error| error.to_string())?;
    shop.until("ok", 3).await?;
    until(async || running.counts().parked == 0).await?;
    running.stop().await.map_err(|error| error.to_string())?;
    claim!(shop.all("ok") == ["other/0", "k/1", "k/2"], "{:?}", shop.all("ok"));
    Ok(())
}

async fn a_redrive_that_fails_leaves_its_key_held(world: World) -> Ended {
    let shop = Shop::default();
    let running = hold_a_key(&world, &shop).await?;
    let keys = ParkedKeys::new(&world.bus, &source(), &group()).unwrap();
    let held = keys.held().await.map_err(|error| error.to_string())?;
    let again = event("k", "k/0").with_id(held[0].event.clone()).with_extension("evt-replay-group", "orders");
    publish(&world, vec![again.clone()]).await;
    until(async || running.counts().dead_lettered == 2 && lag(&world).await == 0).await?;
    let counts = running.counts();
    claim!((counts.held, counts.parked) == (1, 3), "a failed redrive freed the key: {counts:?}");
    shop.clear();
    publish(&world, vec![again]).await;
    shop.until("ok", 4).await?;
    until(async || running.counts().parked == 0).await?;
    running.stop().await.map_err(|error| error.to_string())?;
    in_order(&shop)
}

async fn full_parking_leaves_workers_for_heads(world: World) -> Ended {
    let shop = Shop::default();
    let one = NonZeroUsize::MIN;
    for key in 0..12 {
        shop.act(&format!("k{key}/0"), Act::Fail(2));
    }
    let service = Service::new("orders")
        .retry(retry())
        .lanes(one)
        .parking(parking(&world).with_max_keys(one))
        .start_at(Start::Earliest)
        .on(source(), handle)
        .with_state(shop.clone());
    let running = service.start(&world.bus).await.unwrap();
    // More keys of each partition fail than may be parked, and there is one worker for all of them.
    let events =
        (0..2).flat_map(|n| (0..12).map(move |key| event(&format!("k{key}"), &format!("k{key}/{n}"))));
    publish(&world, events.collect()).await;
    shop.until("ok", 24).await?;
    running.stop().await.map_err(|error| error.to_string())?;
    in_order(&shop)
}

async fn full_parking_pauses_not_drops(world: World) -> Ended {
    let shop = Shop::default();
    shop.act("k/0", Act::Fail(2));
    world.gate.stalls.send_replace(Some("done"));
    let two = NonZeroUsize::new(2).unwrap();
    let running = start(&world, &shop, parking(&world).with_max_per_key(two)).await;
    publish(&world, (0..6).map(|n| event("k", &format!("k/{n}"))).collect()).await;
    until(async || running.health().iter().any(|health| health.reason().is_some())).await?;
    claim!(running.counts().parked <= 2, "over the bound: {:?}", running.counts());
    world.gate.stalls.send_replace(None);
    shop.until("ok", 6).await?;
    until(async || running.health().iter().all(Health::is_running)).await?;
    running.stop().await.map_err(|error| error.to_string())?;
    in_order(&shop)
}

async fn outage_opens_breaker_and_parks_nothing(world: World) -> Ended {
    async fn down(Meta(event): Meta, State(shop): State<Shop>) -> Result<(), Failure> {
        let name = event.subject().unwrap_or_default().to_owned();
        shop.say("start", &name);
        if shop.0.acts.lock().is_empty() {
            shop.say("ok", &name);
            return Ok(());
        }
        Err(Failure::transient("db.down", "connection refused"))
    }
    let shop = Shop::default();
    shop.act("everything", Act::Refuse);
    let service = Service::new("orders").retry(retry()).parking(parking(&world)).on(source(), down);
    let running = service.with_state(shop.clone()).start(&world.bus).await.unwrap();
    publish(&world, (0..100).map(|n| event(&format!("k{n}"), &format!("k{n}/0"))).collect()).await;
    let before = SystemTime::now();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let counts = running.counts();
    claim!(counts.parked < 40 && counts.dead_lettered == 0, "{counts:?} {:?}", before.elapsed());
    shop.clear();
    shop.until("ok", 100).await?;
    running.stop().await.map_err(|error| error.to_string())
}
