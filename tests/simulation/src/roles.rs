//! What the processes do.

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use eventbus::{Bus, Envelope, Error, Failure, Meta, Result, Retry, Service, Start, State, Topic, Typed};
use outbox::Relay;
use parking_lot::Mutex;
use tokio::time::sleep;

use crate::bug::Bug;
use crate::ledger::Tx;
use crate::step::{Step, applied, ordered};
use crate::wire::{Tables, Wire};
use crate::world::{Far, Node};

/// Keys of all writers.
const N_KEYS: u64 = 12;
/// Between two transactions of a writer's task at most.
const PACE: Duration = Duration::from_secs(24);
/// For how long a relay owns without a word.
pub(crate) const LEASE: Duration = Duration::from_secs(15);
const AGAIN: Duration = Duration::from_millis(500);

async fn begin(node: &Arc<Node>) -> Result<Tx> {
    node.call(Far::Database, "begin", std::future::ready(Ok(()))).await?;
    Ok(Tx::begin(&node.world.ledger, node.id))
}

async fn commit(node: &Node, tx: Tx) -> Result<()> {
    tx.ledger.ending(tx.id);
    node.call(Far::Database, "commit", async move { tx.ledger.commit(tx.id) }).await
}

/// Has a process think for a while, in the middle of something.
async fn think(node: &Node, one_in: u64, most: Duration) {
    if node.world.one_in(one_in) {
        let time = most.mul_f64(node.world.random.lock().f64());
        sleep(time).await;
    }
    node.pass().await;
}

async fn write_one(node: &Arc<Node>, bus: &Bus) -> Result<()> {
    let (world, topic, tx) = (&node.world, ordered()?, begin(node).await?);
    let keys: BTreeSet<u64> = (0..=world.draw(3)).map(|_| world.draw(N_KEYS)).collect();
    let early = (world.bug == Bug::NoKeyLocks)
        .then(|| keys.iter().map(|_| world.ledger.next_row()).collect::<Vec<_>>());
    think(node, 10, Duration::from_secs(5)).await;
    let mut steps = Vec::new();
    for (at, key) in keys.into_iter().enumerate() {
        let key = format!("k{key}");
        world.ledger.hold(tx.id, topic.as_str(), &key).await?;
        let n = world.ledger.count_up(tx.id, &key)?;
        let step = Step { key, n, token: world.draw(u64::MAX) };
        match world.bug {
            Bug::AfterCommit | Bug::BeforeCommit => world.ledger.note_committed(tx.id, step.noted(&topic))?,
            _ => {
                let id = early.as_ref().and_then(|early| early.get(at).copied());
                let id = id.unwrap_or_else(|| world.ledger.next_row());
                let envelope = Envelope::of(&step, "/simulation")?;
                world.ledger.append(tx.id, id, &topic, step.noted(&topic), envelope)?;
            }
        }
        steps.push(step);
        think(node, 30, Duration::from_secs(30)).await;
    }
    if world.bug == Bug::BeforeCommit {
        publish(bus, &topic, &steps).await?;
    }
    if world.one_in(10) {
        // It is undone.
        return Ok(());
    }
    commit(node, tx).await?;
    if world.bug == Bug::AfterCommit {
        publish(bus, &topic, &steps).await?;
    }
    Ok(())
}

async fn publish(bus: &Bus, topic: &Topic, steps: &[Step]) -> Result<()> {
    let publisher = bus.publisher().await?;
    for step in steps {
        publisher.publish(topic, step).await?;
    }
    Ok(())
}

/// Commits events until it is asked to end.
pub(crate) async fn write(node: Arc<Node>) -> Result<()> {
    let bus = Bus::new(Wire { node: node.clone(), is_relay: false });
    let task = async || {
        while !node.is_asked_to_end() {
            // What became of it is in the database.
            _ = write_one(&node, &bus).await;
            let pace = PACE.mul_f64(node.world.random.lock().f64());
            sleep(pace).await;
            node.pass().await;
        }
    };
    tokio::join!(task(), task());
    Ok(())
}

/// Publishes until it is asked to end.
pub(crate) async fn relay(node: Arc<Node>) -> Result<()> {
    let bus = Bus::new(Wire { node: node.clone(), is_relay: true });
    let relaying = loop {
        let tables = Tables { node: node.clone(), cursor: Mutex::default() };
        match Relay::over(Arc::new(tables)).with_lease(LEASE).start(&bus).await {
            Err(error) if error.is_retryable() => sleep(AGAIN).await,
            started => break started?,
        }
    };
    node.asked_to_end().await;
    relaying.stop().await;
    Ok(())
}

/// Has an effect, once.
async fn handle(
    node: &Arc<Node>,
    consumer: &'static str,
    topic: &Topic,
    step: &Step,
    event: &Envelope,
) -> Result<(), Failure> {
    let (world, id) = (&node.world, event.id().as_uuid().unwrap_or_default());
    if world.bug == Bug::InboxApart {
        let tx = begin(node).await?;
        if !world.ledger.remember(tx.id, consumer, id).await? {
            return Ok(());
        }
        commit(node, tx).await?;
    }
    let tx = begin(node).await?;
    if !matches!(world.bug, Bug::NoInbox | Bug::InboxApart)
        && !world.ledger.remember(tx.id, consumer, id).await?
    {
        world.n_repeated.fetch_add(1, Relaxed);
        return Ok(());
    }
    think(node, 12, Duration::from_secs(20)).await;
    world.ledger.note_effect(tx.id, step.noted(topic))?;
    let next = applied()?;
    if *topic != next {
        world.ledger.hold(tx.id, next.as_str(), &step.key).await?;
        let envelope = Envelope::of(step, "/simulation")?;
        world.ledger.append(tx.id, world.ledger.next_row(), &next, step.noted(&next), envelope)?;
    }
    if world.one_in(15) {
        return Err(Failure::transient("simulation", "one in fifteen"));
    }
    Ok(commit(node, tx).await?)
}

async fn apply(
    Typed(step): Typed<Step>,
    Meta(event): Meta,
    State(node): State<Arc<Node>>,
) -> Result<(), Failure> {
    handle(&node, "apply", &ordered()?, &step, &event).await
}

async fn finish(
    Typed(step): Typed<Step>,
    Meta(event): Meta,
    State(node): State<Arc<Node>>,
) -> Result<(), Failure> {
    handle(&node, "finish", &applied()?, &step, &event).await
}

/// Has the effects of events until it is asked to end.
pub(crate) async fn serve(node: Arc<Node>) -> Result<()> {
    let bus = Bus::new(Wire { node: node.clone(), is_relay: false });
    loop {
        let retry = Retry::exponential(Duration::from_millis(200), Duration::from_secs(10), NonZeroU32::MAX);
        let service = Service::new("simulation")
            .retry(retry.with_in_lane(NonZeroU32::MIN))
            .start_at(Start::Earliest)
            .on(ordered()?, apply)
            .on(applied()?, finish);
        let mut running = match service.with_state(node.clone()).start(&bus).await {
            Err(error) if error.is_retryable() => {
                sleep(AGAIN).await;
                continue;
            }
            started => started?,
        };
        let failed: Option<Error> = tokio::select! {
            biased;
            () = node.asked_to_end() => None,
            error = running.failed() => Some(error),
        };
        match failed {
            None => return running.stop().await,
            Some(error) if error.is_retryable() => sleep(AGAIN).await,
            Some(error) => return Err(error),
        }
    }
}
