//! Paired runs: the raw thing and ours in one process, in the order A B B A, so that what the machine
//! does to one it does to the other. The figure is the median of the pairs' ratios, with its range.

mod brokers;
mod outbox;
mod times;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use eventbus::transport::memory::{Memory, Options};
use eventbus::transport::sqlite::{self, Sqlite};
use eventbus::{
    Admin, Bus, Envelope, Event, Group, Meta, Offset, PartitionId, Polled, Service, Settle, State,
    Subscription, Topic, TopicSpec, Transport, Typed, Waits,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, broadcast, mpsc};

use self::times::{healthy_keys, injected_sync, memory_bus, sqlite_bus, stalled, trickle};

type Anyhow<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Rounds of A B B A.
const ROUNDS: usize = 5;

#[derive(Debug, Clone, Event, Serialize, Deserialize)]
#[event(type = "shop.order.placed", version = 1, key = buyer)]
struct Order {
    order: u64,
    buyer: u64,
    sku: String,
    note: String,
    quantity: u32,
    amount_cents: u64,
}

fn order(n: u64) -> Order {
    Order {
        order: n,
        buyer: n % 1_000,
        sku: format!("sku-{}", n % 50),
        note: "x".repeat(150),
        quantity: 1,
        amount_cents: 1_999,
    }
}

fn event(n: u64) -> Envelope {
    let body = serde_json::to_vec(&order(n)).unwrap_or_default();
    Envelope::new("shop.order.placed", "/bench")
        .with_version(1)
        .with_key((n % 1_000).to_string())
        .with_payload(body)
}

/// Whether a line of the tables is to be measured: those whose name holds the first argument, or all.
fn is_wanted(name: &str) -> bool {
    std::env::args().nth(1).is_none_or(|only| name.contains(&only))
}

/// One side of a pair: handles `n` events and returns how long it took.
async fn timed<F: Future<Output = Anyhow<()>>>(work: F) -> Anyhow<f64> {
    let started = Instant::now();
    work.await?;
    Ok(started.elapsed().as_secs_f64())
}

async fn pair<A, B, FA, FB>(name: &str, bar: f64, n: usize, mut raw: A, mut ours: B) -> Anyhow<()>
where
    A: FnMut() -> FA,
    B: FnMut() -> FB,
    FA: Future<Output = Anyhow<f64>>,
    FB: Future<Output = Anyhow<f64>>,
{
    if !is_wanted(name) {
        return Ok(());
    }
    raw().await?;
    ours().await?;
    let (mut ratios, mut raw_rates, mut our_rates) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (a, b) = (raw().await?, ours().await?);
        let (b2, a2) = (ours().await?, raw().await?);
        ratios.extend([a / b, a2 / b2]);
        raw_rates.extend([n as f64 / a, n as f64 / a2]);
        our_rates.extend([n as f64 / b, n as f64 / b2]);
    }
    for values in [&mut ratios, &mut raw_rates, &mut our_rates] {
        values.sort_by(f64::total_cmp);
    }
    let middle = |values: &[f64]| values.get(values.len() / 2).copied().unwrap_or_default();
    let (low, high) =
        (ratios.first().copied().unwrap_or_default(), ratios.last().copied().unwrap_or_default());
    let verdict = if middle(&ratios) >= bar { "met" } else { "missed" };
    println!(
        "| {name} | {bar:.2} | **{:.2}** [{low:.2}..{high:.2}] | {:.0} k/s | {:.0} k/s | {verdict} |",
        middle(&ratios),
        middle(&raw_rates) / 1e3,
        middle(&our_rates) / 1e3
    );
    Ok(())
}

#[derive(Clone)]
struct Done {
    left: Arc<AtomicUsize>,
    rung: Arc<Notify>,
}

impl Done {
    fn after(n: usize) -> Self {
        Self { left: Arc::new(AtomicUsize::new(n)), rung: Arc::default() }
    }

    fn one(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.rung.notify_one();
        }
    }
}

async fn on_body(Meta(envelope): Meta, State(done): State<Done>) {
    std::hint::black_box(envelope.payload().map(|body| body.len()));
    done.one();
}

async fn on_order(Typed(order): Typed<Order>, State(done): State<Done>) {
    std::hint::black_box(order.amount_cents);
    done.one();
}

/// The raw loop: a bounded channel of the same envelopes, one producer, one consumer.
async fn raw_channel(events: &[Envelope], decode: bool) -> Anyhow<f64> {
    let (sender, mut receiver) = mpsc::channel::<Envelope>(1024);
    let events = events.to_vec();
    timed(async move {
        let sending = tokio::spawn(async move {
            for event in events {
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        });
        while let Some(event) = receiver.recv().await {
            let body = event.payload().ok_or("no body")?;
            if decode {
                std::hint::black_box(serde_json::from_slice::<Order>(body)?.amount_cents);
            } else {
                std::hint::black_box(body.len());
            }
        }
        sending.await?;
        Ok(())
    })
    .await
}

/// Runs one side on a thread of its own, and nothing beside it.
async fn on_one_thread<F, W>(work: W) -> Anyhow<f64>
where
    W: FnOnce() -> F + Send + 'static,
    F: Future<Output = Anyhow<f64>>,
{
    tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(work())
    })
    .await?
}

async fn memory_service(events: &[Envelope], batch: usize, typed: bool) -> Anyhow<f64> {
    let bus = Bus::new(Memory::new(Options::default()));
    let topic = Topic::new("orders")?;
    let done = Done::after(events.len());
    let service = Service::new("bench").lanes(std::num::NonZeroUsize::MIN);
    let service =
        if typed { service.on(topic.clone(), on_order) } else { service.on(topic.clone(), on_body) };
    let running = service.with_state(done.clone()).start(&bus).await?;
    let publisher = bus.transport().publisher().await?;
    let batches: Vec<Vec<Envelope>> = events.chunks(batch).map(<[Envelope]>::to_vec).collect();
    let took = timed(async {
        let sending = tokio::spawn(async move {
            for batch in batches {
                publisher.enqueue(&topic, batch).await?.await.all()?;
            }
            eventbus::Result::<()>::Ok(())
        });
        done.rung.notified().await;
        Ok(sending.await??)
    })
    .await?;
    running.stop().await?;
    Ok(took)
}

/// The transport alone: one producer, one consumer that polls and settles.
async fn memory_raw_consumer(events: &[Envelope], batch: usize) -> Anyhow<f64> {
    let memory = Memory::new(Options::default());
    let topic = Topic::new("orders")?;
    let consumer = memory.subscribe(&Subscription::group(topic.clone(), Group::new("bench")?)).await?;
    let publisher = memory.publisher().await?;
    let batches: Vec<Vec<Envelope>> = events.chunks(batch).map(<[Envelope]>::to_vec).collect();
    let n = events.len();
    timed(async move {
        let sending = tokio::spawn(async move {
            for batch in batches {
                publisher.enqueue(&topic, batch).await?.await.all()?;
            }
            eventbus::Result::<()>::Ok(())
        });
        drain(&*consumer, n).await?;
        Ok(sending.await??)
    })
    .await
}

async fn drain(consumer: &dyn eventbus::Consumer, n: usize) -> Anyhow<()> {
    let (mut left, max) = (n, std::num::NonZeroUsize::MIN.saturating_add(255));
    while left > 0 {
        if let Polled::Deliveries(deliveries) = consumer.poll(max).await? {
            let outcomes: Vec<_> = deliveries.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
            left -= deliveries.len();
            std::hint::black_box(&deliveries);
            consumer.settle(&outcomes).await?.all()?;
        }
    }
    Ok(())
}

async fn raw_broadcast(events: &[Envelope]) -> Anyhow<f64> {
    // Large enough to lose nothing, which the raw thing cannot promise otherwise.
    let (sender, _) = broadcast::channel::<Envelope>(events.len().next_power_of_two());
    let readers: Vec<_> = (0..4).map(|_| sender.subscribe()).collect();
    let events = events.to_vec();
    timed(async move {
        let reading: Vec<_> = readers
            .into_iter()
            .map(|mut reader| {
                tokio::spawn(async move {
                    while let Ok(event) = reader.recv().await {
                        std::hint::black_box(event);
                    }
                })
            })
            .collect();
        for event in events {
            drop(sender.send(event));
        }
        drop(sender);
        for reader in reading {
            reader.await?;
        }
        Ok(())
    })
    .await
}

async fn memory_fan_out(events: &[Envelope], batch: usize) -> Anyhow<f64> {
    let memory = Memory::new(Options::default());
    let topic = Topic::new("orders")?;
    let mut consumers = Vec::new();
    for number in 0..4 {
        consumers.push(
            memory.subscribe(&Subscription::group(topic.clone(), Group::new(format!("g{number}"))?)).await?,
        );
    }
    let publisher = memory.publisher().await?;
    let batches: Vec<Vec<Envelope>> = events.chunks(batch).map(<[Envelope]>::to_vec).collect();
    let n = events.len();
    timed(async move {
        let reading: Vec<_> = consumers
            .into_iter()
            .map(|consumer| tokio::spawn(async move { drain(&*consumer, n).await }))
            .collect();
        for batch in batches {
            publisher.enqueue(&topic, batch).await?.await.all()?;
        }
        for reader in reading {
            reader.await??;
        }
        Ok(())
    })
    .await
}

/// The same table, and the same row ids, as the transport's: only the way there differs.
fn raw_table(path: &std::path::Path) -> Anyhow<rusqlite::Connection> {
    let file = rusqlite::Connection::open(path)?;
    file.pragma_update(None, "journal_mode", "WAL")?;
    file.pragma_update(None, "synchronous", "FULL")?;
    file.pragma_update(None, "wal_autocheckpoint", 4000)?;
    file.execute_batch(
        "CREATE TABLE IF NOT EXISTS event (
           position INTEGER PRIMARY KEY, stored_at INTEGER NOT NULL, id ANY, source TEXT, type TEXT, version INTEGER,
           subject TEXT, time INTEGER, content_type TEXT, schema TEXT, key BLOB, extensions BLOB, headers BLOB, payload BLOB) STRICT",
    )?;
    Ok(file)
}

fn raw_rows(
    transaction: &rusqlite::Transaction<'_>,
    events: &[Envelope],
    ends: &mut [i64; 16],
) -> Anyhow<()> {
    let mut insert = transaction.prepare_cached(
        "INSERT INTO event VALUES (?1, ?2, ?3, ?4, ?5, ?6, NULL, ?7, NULL, NULL, ?8, NULL, NULL, ?9)",
    )?;
    for event in events {
        let partition = eventbus::partition::of_envelope(event, 16).0;
        let end = ends.get_mut(partition as usize).ok_or("no such partition")?;
        let id = event.id().as_uuid().ok_or("no uuid")?;
        insert.execute(rusqlite::params![
            i64::from(partition) << 36 | *end,
            0,
            id.as_bytes().as_slice(),
            event.source(),
            event.event_type(),
            event.version(),
            0,
            event.key().map(eventbus::Key::as_bytes),
            event.payload().map(|payload| payload.as_ref()),
        ])?;
        *end += 1;
    }
    Ok(())
}

/// Raw: prepared inserts of the same rows, 1,000 in a transaction, one sync each.
fn raw_insert(events: &[Envelope]) -> Anyhow<f64> {
    let folder = tempfile::tempdir()?;
    let mut file = raw_table(&folder.path().join("raw.db"))?;
    let started = Instant::now();
    let mut ends = [0; 16];
    for batch in events.chunks(1_000) {
        let transaction = file.transaction()?;
        raw_rows(&transaction, batch, &mut ends)?;
        transaction.commit()?;
    }
    Ok(started.elapsed().as_secs_f64())
}

async fn open_sqlite() -> Anyhow<(tempfile::TempDir, Sqlite)> {
    let folder = tempfile::tempdir()?;
    let sqlite = Sqlite::open_path(folder.path().join("bus.db"), sqlite::Options::default()).await?;
    Ok((folder, sqlite))
}

async fn sqlite_publish(events: &[Envelope]) -> Anyhow<f64> {
    let (_folder, sqlite) = open_sqlite().await?;
    let topic = Topic::new("orders")?;
    sqlite.declare(&TopicSpec::new(topic.clone())).await?;
    let publisher = sqlite.publisher().await?;
    let batches: Vec<Vec<Envelope>> = events.chunks(1_000).map(<[Envelope]>::to_vec).collect();
    let took = timed(async {
        for batch in batches {
            publisher.enqueue(&topic, batch).await?.await.all()?;
        }
        Ok(())
    })
    .await?;
    sqlite.close().await?;
    Ok(took)
}

/// Raw: one ordered scan that decodes the same JSON.
fn raw_scan(path: &std::path::Path) -> Anyhow<f64> {
    let file = raw_table(path)?;
    let started = Instant::now();
    let mut select = file.prepare("SELECT * FROM event ORDER BY position")?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let body = row.get_ref(13)?.as_blob()?;
        std::hint::black_box(serde_json::from_slice::<Order>(body)?.amount_cents);
    }
    Ok(started.elapsed().as_secs_f64())
}

async fn sqlite_replay(sqlite: &Sqlite, topic: &Topic) -> Anyhow<f64> {
    timed(async {
        for partition in 0..16 {
            let mut from = Offset(0);
            loop {
                let records = sqlite.read(topic, PartitionId(partition), from, 1_000).await?;
                let Some(last) = records.last() else { break };
                from = Offset(last.offset.0 + 1);
                for record in &records {
                    let event = record.content.envelope().ok_or("undecodable")?;
                    std::hint::black_box(event.decode::<Order>()?.amount_cents);
                }
            }
        }
        Ok(())
    })
    .await
}

/// Producers that each wait for their confirm: how many commits they share.
async fn group_commit() -> Anyhow<()> {
    println!(
        "\n| awaiting producers | events a second | events a sync | median latency |\n|---|---|---|---|"
    );
    for n_producers in [1usize, 16, 64, 256] {
        let (_folder, sqlite) = open_sqlite().await?;
        let topic = Topic::new("orders")?;
        sqlite.declare(&TopicSpec::new(topic.clone())).await?;
        let each = (20_000 / n_producers).clamp(50, 2_000);
        let commits = sqlite.n_commits();
        let started = Instant::now();
        let mut latencies = times::awaiting(&sqlite, &topic, n_producers, each).await?;
        let took = started.elapsed().as_secs_f64();
        latencies.sort();
        let n = latencies.len() as f64;
        let median: Duration = latencies.get(latencies.len() / 2).copied().unwrap_or_default();
        let a_sync = n / (sqlite.n_commits() - commits) as f64;
        println!("| {n_producers} | {:.0} | {a_sync:.1} | {:.2} ms |", n / took, median.as_secs_f64() * 1e3);
        sqlite.close().await?;
    }
    Ok(())
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Anyhow<()> {
    // First, in a process that has not used memory yet.
    if is_wanted("stalled consumer") {
        println!("| path | bar | measured | |\n|---|---|---|---|");
        stalled().await?;
        println!();
    }
    brokers::still::all().await?;
    let events: Vec<Envelope> = (0..200_000).map(event).collect();
    brokers::held::all(&events).await?;
    let n = events.len();
    println!("| path | bar | ratio to raw, median [min..max] | raw | ours | |\n|---|---|---|---|---|---|");
    let raw = || raw_channel(&events, false);
    pair("memory, transport alone, one at a time", 0.90, n, raw, || memory_raw_consumer(&events, 1)).await?;
    pair("memory, transport alone, batch 64", 1.70, n, raw, || memory_raw_consumer(&events, 64)).await?;
    let shared = Arc::new(events.clone());
    let raw = || {
        let events = shared.clone();
        on_one_thread(async move || raw_channel(&events, false).await)
    };
    pair("memory, transport alone, batch 64, one thread", 3.0, n, raw, || {
        let events = shared.clone();
        on_one_thread(async move || memory_raw_consumer(&events, 64).await)
    })
    .await?;
    pair("memory, service on the undecoded body, batch 64, one thread", 3.0, n, raw, || {
        let events = shared.clone();
        on_one_thread(async move || memory_service(&events, 64, false).await)
    })
    .await?;
    let raw = || raw_channel(&events, false);
    pair("memory, service on the undecoded body, one at a time", 0.90, n, raw, || {
        memory_service(&events, 1, false)
    })
    .await?;
    pair("memory, service on the undecoded body, batch 64", 1.70, n, raw, || {
        memory_service(&events, 64, false)
    })
    .await?;
    let raw_json = || raw_channel(&events, true);
    pair("memory, service with a typed JSON handler, batch 64", 0.95, n, raw_json, || {
        memory_service(&events, 64, true)
    })
    .await?;
    let raw = || raw_broadcast(&events);
    pair("memory, fan-out 1 to 4, one at a time", 1.00, n, raw, || memory_fan_out(&events, 1)).await?;
    pair("memory, fan-out 1 to 4, batch 64", 10.0, n, raw, || memory_fan_out(&events, 64)).await?;
    let some: Vec<Envelope> = events.iter().take(50_000).cloned().collect();
    let raw = || std::future::ready(raw_insert(&some));
    pair("SQLite publish, batch 1000, FULL", 0.85, some.len(), raw, || sqlite_publish(&some)).await?;

    let (_folder, sqlite) = open_sqlite().await?;
    let topic = Topic::new("orders")?;
    sqlite.publisher().await?.enqueue(&topic, some.clone()).await?.await.all()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("raw.db");
    let mut file = raw_table(&path)?;
    let transaction = file.transaction()?;
    raw_rows(&transaction, &some, &mut [0; 16])?;
    transaction.commit()?;
    let raw = || std::future::ready(raw_scan(&path));
    pair("SQLite replay to typed events", 0.70, some.len(), raw, || sqlite_replay(&sqlite, &topic)).await?;
    sqlite.close().await?;
    for (name, waits) in [("handed back", Waits::Transport), ("in the parking log", Waits::Log)] {
        let run = async |failing| healthy_keys(memory_bus(), &some, waits, failing).await;
        let name = format!("memory, 1 % of keys failing ({name}), rate of the others");
        pair(&name, 0.95, some.len(), || run(false), || run(true)).await?;
    }
    for (name, waits) in [("handed back", Waits::Transport), ("in the parking log", Waits::Log)] {
        let run = async |failing| {
            let (_folder, bus) = sqlite_bus().await?;
            healthy_keys(bus, &some, waits, failing).await
        };
        let name = format!("SQLite, 1 % of keys failing ({name}), rate of the others");
        pair(&name, 0.95, some.len(), || run(false), || run(true)).await?;
    }
    brokers::all(&events).await?;
    outbox::all(&events).await?;
    if is_wanted("awaiting producers") {
        group_commit().await?;
    }
    if is_wanted("sync") {
        injected_sync().await?;
    }
    if is_wanted("trickle") {
        println!("\n| path | bar | measured | |\n|---|---|---|---|");
        trickle("memory", memory_bus()).await?;
        let (_folder, bus) = sqlite_bus().await?;
        trickle("SQLite", bus).await?;
    }
    Ok(())
}
