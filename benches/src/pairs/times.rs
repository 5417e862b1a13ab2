//! Bars in units of time: a known sync, keys that fail, a trickle, a consumer that stands still.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use eventbus::transport::memory::{Memory, Options};
use eventbus::transport::sqlite::{self, Sqlite};
use eventbus::{
    Admin, Bus, Envelope, Failure, Group, Meta, Parking, Retry, Service, State, Subscription, Topic,
    TopicSpec, Transport, Waits,
};
use eventbus_tests::disk::Disk;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::{Anyhow, event};

/// Producers that each wait for their confirm before they go on: how long each event took.
pub(crate) async fn awaiting(
    sqlite: &Sqlite,
    topic: &Topic,
    n_producers: usize,
    each: usize,
) -> Anyhow<Vec<Duration>> {
    let mut producing = Vec::new();
    for producer in 0..n_producers {
        let (publisher, topic) = (sqlite.publisher().await?, topic.clone());
        producing.push(tokio::spawn(async move {
            let mut latencies = Vec::with_capacity(each);
            for n in 0..each {
                let started = Instant::now();
                let batch = vec![event((producer * each + n) as u64)];
                publisher.enqueue(&topic, batch).await?.await.single()?;
                latencies.push(started.elapsed());
            }
            eventbus::Result::<Vec<Duration>>::Ok(latencies)
        }));
    }
    let mut latencies = Vec::new();
    for producer in producing {
        latencies.extend(producer.await??);
    }
    Ok(latencies)
}

/// Producers that each wait for their confirm, on a disk whose sync takes a known time.
pub(crate) async fn injected_sync() -> Anyhow<()> {
    println!(
        "\n| awaiting producers, SQLite, sync of | bar | events a second ÷ (N ÷ sync) | median latency ÷ sync (bar 1.30) | events a sync | |"
    );
    println!("|---|---|---|---|---|---|");
    for millis in [1, 5] {
        for n_producers in [16usize, 64, 256] {
            let folder = tempfile::tempdir()?;
            let disk = Disk::below(folder.path());
            let sqlite = Sqlite::open_path(folder.path().join("bus.db"), sqlite::Options::default()).await?;
            let topic = Topic::new("orders")?;
            sqlite.declare(&TopicSpec::new(topic.clone())).await?;
            let sync = Duration::from_millis(millis);
            disk.forget();
            disk.slow_syncs(sync);
            let n_syncs = disk.n_syncs();
            let each = 200;
            let started = Instant::now();
            let mut latencies = awaiting(&sqlite, &topic, n_producers, each).await?;
            let took = started.elapsed().as_secs_f64();
            // The sleep that stands for the sync takes as long as the machine's timer makes it.
            let real = real_sleep(sync).as_secs_f64();
            let part = latencies.len() as f64 / took / (n_producers as f64 / real);
            let median = middle(&mut latencies).as_secs_f64() / real;
            let a_sync = latencies.len() as f64 / (disk.n_syncs() - n_syncs) as f64;
            let verdict = if part >= 0.88 && median <= 1.3 { "met" } else { "missed" };
            println!(
                "| {n_producers}, {millis} ms ({:.2} ms slept) | 0.88 | **{part:.2}** | {median:.2} | {a_sync:.1} | {verdict} |",
                real * 1e3
            );
            sqlite.close().await?;
        }
    }
    Ok(())
}

pub(crate) fn real_sleep(time: Duration) -> Duration {
    let mut slept: Vec<Duration> = (0..21)
        .map(|_| {
            let started = Instant::now();
            std::thread::sleep(time);
            started.elapsed()
        })
        .collect();
    middle(&mut slept)
}

pub(crate) fn middle(times: &mut [Duration]) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[derive(Clone)]
struct Books {
    left: Arc<AtomicUsize>,
    rung: Arc<Notify>,
    failing: bool,
}

/// One key of a hundred fails, for a minute at a time.
async fn mostly(Meta(event): Meta, State(books): State<Books>) -> Result<(), Failure> {
    let bad = event.key().is_some_and(|key| key.as_bytes().ends_with(b"00"));
    if bad && books.failing {
        return Err(Failure::transient("down", "for a minute").retry_after(Duration::from_secs(60)));
    }
    if !bad && books.left.fetch_sub(1, Ordering::AcqRel) == 1 {
        books.rung.notify_one();
    }
    Ok(())
}

/// How long the keys that do not fail take.
pub(crate) async fn healthy_keys(bus: Bus, events: &[Envelope], waits: Waits, failing: bool) -> Anyhow<f64> {
    let topic = Topic::new("orders")?;
    let n_good =
        events.iter().filter(|event| !event.key().is_some_and(|key| key.as_bytes().ends_with(b"00"))).count();
    let books = Books { left: Arc::new(AtomicUsize::new(n_good)), rung: Arc::default(), failing };
    let attempts = NonZeroU32::MIN.saturating_add(7);
    let service = Service::new("bench")
        .retry(Retry::exponential(Duration::from_secs(1), Duration::from_secs(60), attempts))
        .parking(Parking::default().with_waits(waits))
        .on(topic.clone(), mostly)
        .with_state(books.clone());
    let running = service.start(&bus).await?;
    let publisher = bus.transport().publisher().await?;
    let started = Instant::now();
    for batch in events.chunks(500) {
        publisher.enqueue(&topic, batch.to_vec()).await?.await.all()?;
    }
    books.rung.notified().await;
    let took = started.elapsed().as_secs_f64();
    drop(running);
    bus.close().await?;
    Ok(took)
}

pub(crate) async fn sqlite_bus() -> Anyhow<(tempfile::TempDir, Bus)> {
    let folder = tempfile::tempdir()?;
    let sqlite = Sqlite::open_path(folder.path().join("bus.db"), sqlite::Options::default()).await?;
    Ok((folder, Bus::new(sqlite)))
}

pub(crate) fn memory_bus() -> Bus {
    let mut options = Options::default();
    options.replay = 1_000_000;
    Bus::new(Memory::new(options))
}

#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<Instant>>>, Arc<Notify>);

async fn note(Meta(_): Meta, State(Seen(times, rung)): State<Seen>) {
    times.lock().push(Instant::now());
    rung.notify_one();
}

/// Eight events a second: from the confirm to the handler.
pub(crate) async fn trickle(name: &str, bus: Bus) -> Anyhow<()> {
    let (topic, seen) = (Topic::new("orders")?, Seen::default());
    let running = Service::new("bench").on(topic.clone(), note).with_state(seen.clone()).start(&bus).await?;
    let publisher = bus.transport().publisher().await?;
    let mut added = Vec::new();
    for n in 0..24 {
        tokio::time::sleep(Duration::from_millis(125)).await;
        publisher.enqueue(&topic, vec![event(n)]).await?.await.single()?;
        let stored = Instant::now();
        seen.1.notified().await;
        let handled = seen.0.lock().last().copied().unwrap_or(stored);
        added.push(handled.saturating_duration_since(stored));
    }
    let median = middle(&mut added);
    let worst = added.last().copied().unwrap_or_default();
    let verdict = if median < Duration::from_millis(2) { "met" } else { "missed" };
    println!(
        "| trickle of 8 a second, {name}: confirm to handler, median | 2 ms | {median:.2?} (worst {worst:.2?}) | {verdict} |"
    );
    running.stop().await?;
    Ok(bus.close().await?)
}

/// Memory of this process in use now.
pub(crate) fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4_096
}

/// A consumer that never settles, and a gibibyte behind it.
pub(crate) async fn stalled() -> Anyhow<()> {
    let body = vec![7u8; 64 << 10];
    let mib = |bytes: u64| bytes >> 20;
    let (_folder, bus) = sqlite_bus().await?;
    let topic = Topic::new("large")?;
    let subscription = Subscription::group(topic.clone(), Group::new("stalled")?);
    let consumer = bus.transport().subscribe(&subscription).await?;
    let publisher = bus.transport().publisher().await?;
    let before = resident_bytes();
    let mut highest = 0;
    for n in 0..(1u64 << 30) / body.len() as u64 {
        let event = Envelope::new("large", "/bench").with_key(n.to_string()).with_payload(body.clone());
        publisher.enqueue(&topic, vec![event]).await?.await.single()?;
        if n == 64 {
            drop(consumer.poll(Subscription::WINDOW).await?);
        }
        if n % 512 == 0 {
            highest = highest.max(resident_bytes().saturating_sub(before));
        }
    }
    // The window's bytes, and as much again for what is between the file and the window.
    let bound = 2 * Subscription::WINDOW_BYTES.get() as u64;
    let verdict = if highest <= bound { "met" } else { "missed" };
    println!(
        "| stalled consumer, 1 GiB published, SQLite: memory above the start | {} MiB | {} MiB | {verdict} |",
        mib(bound),
        mib(highest)
    );
    bus.close().await?;
    let memory = Memory::new(Options::default());
    let _consumer = memory.subscribe(&subscription).await?;
    let publisher = memory.publisher().await?;
    let before = resident_bytes();
    let mut n_bytes = 0u64;
    loop {
        let event = Envelope::new("large", "/bench").with_payload(body.clone());
        let accepted =
            tokio::time::timeout(Duration::from_millis(200), publisher.enqueue(&topic, vec![event])).await;
        match accepted {
            Ok(confirm) => drop(confirm?.await.all()?),
            Err(_) => break,
        }
        n_bytes += body.len() as u64;
        if n_bytes > 1 << 30 {
            break;
        }
    }
    let grown = resident_bytes().saturating_sub(before);
    let bound = Options::default().max_bytes.get() as u64;
    let verdict = if n_bytes <= bound + (1 << 20) { "met: publishing waits" } else { "missed" };
    println!(
        "| stalled consumer, memory: accepted before publishing waits ({} MiB resident) | {} MiB | {} MiB | {verdict} |",
        mib(grown),
        mib(bound),
        mib(n_bytes)
    );
    Ok(())
}
