//! Relays on a store, with everything that they do to each other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use eventbus::transport::memory::{Memory, Options};
use eventbus::{Bus, Offset, Topic, Transport as _};

use super::{Cx, Outcome, Subject, Violation, ensure};
use crate::relay::Relay;

const N_KEYS: i64 = 7;
const N_WRITERS: u64 = 4;
const N_EACH: u64 = 30;

/// Transactions of one writer, whose keys are its own: some are undone, some of two events. Returns what was committed.
async fn write(
    subject: Arc<dyn Subject>,
    topic: Topic,
    writer: u64,
) -> eventbus::Result<BTreeMap<String, i64>> {
    let mut random = fastrand::Rng::with_seed(writer);
    let mut committed = BTreeMap::new();
    for _ in 0..N_EACH {
        let key = format!("{writer}-{}", random.i64(0..N_KEYS));
        let (before, n) = (committed.get(&key).copied().unwrap_or(0), random.i64(1..=2));
        let mut transaction = subject.begin().await?;
        for n in before + 1..=before + n {
            transaction.append(&topic, Cx::event(&key, n)).await?;
        }
        tokio::time::sleep(Duration::from_millis(random.u64(..4))).await;
        match random.u8(..6) {
            0 => transaction.rollback().await?,
            _ => {
                transaction.commit().await?;
                committed.insert(key, before + n);
            }
        }
    }
    Ok(committed)
}

/// The events of a topic: of each key its numbers, each at its first time.
async fn published(memory: &Memory, topic: &Topic) -> Result<BTreeMap<String, Vec<i64>>, Violation> {
    let mut numbers: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    let Some(admin) = memory.admin() else { return Ok(numbers) };
    let Some(info) = admin.topic(topic).await? else { return Ok(numbers) };
    for partition in &info.partitions {
        for record in admin.read(topic, partition.partition, Offset(0), 10_000).await? {
            let Some(event) = record.content.envelope() else { continue };
            let n = event.payload().and_then(|payload| std::str::from_utf8(payload).ok()?.parse().ok());
            let (Some(key), Some(n)) = (event.key(), n) else { continue };
            let of_key = numbers.entry(String::from_utf8_lossy(key.as_bytes()).into_owned()).or_default();
            if !of_key.contains(&n) {
                of_key.push(n);
            }
        }
    }
    Ok(numbers)
}

/// Writers and three relays, of which one ends without a word and one stops: what was committed is published, in the order of
/// each key, and nothing else is.
pub(super) async fn loses_and_overtakes_nothing(cx: &Cx) -> Outcome {
    let mut kept = Options::default();
    kept.replay = 10_000;
    let (memory, topic) = (Memory::new(kept), Cx::topic()?);
    let bus = Bus::new(memory.clone());
    let mut relays = Vec::new();
    for _ in 0..3 {
        let relay = Relay::over(cx.store().await?).with_lease(Duration::from_secs(2)).with_batch(10, 1 << 20);
        relays.push(relay.start(&bus).await?);
    }
    let writers = (0..N_WRITERS).map(|writer| tokio::spawn(write(cx.subject.clone(), topic.clone(), writer)));
    let writers: Vec<_> = writers.collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(relays.pop());
    tokio::time::sleep(Duration::from_millis(50)).await;
    if let Some(relay) = relays.pop() {
        relay.stop().await;
    }
    let mut committed = BTreeMap::new();
    for writer in writers {
        let written = writer.await.map_err(|error| Violation::new(format!("a writer panicked: {error}")))?;
        committed.extend(written?);
    }
    let n_committed: i64 = committed.values().sum();
    let began = tokio::time::Instant::now();
    while n_committed > published(&memory, &topic).await?.values().map(Vec::len).sum::<usize>() as i64
        && began.elapsed() < cx.soon()
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // What comes now was never committed.
    tokio::time::sleep(Duration::from_millis(100)).await;
    for relay in relays {
        relay.stop().await;
    }
    let found = published(&memory, &topic).await?;
    for (key, n) in &committed {
        let expected: Vec<i64> = (1..=*n).collect();
        ensure!(
            found.get(key) == Some(&expected),
            "of {key} {n} were committed, published is {:?}",
            found.get(key)
        );
    }
    let ghosts: Vec<_> = found.keys().filter(|key| !committed.contains_key(*key)).collect();
    ensure!(ghosts.is_empty(), "nothing was committed of {ghosts:?}");
    Ok(())
}
