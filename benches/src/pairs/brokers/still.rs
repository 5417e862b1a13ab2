//! Services at rest on a broker: what ten subscriptions cost without events, and what a backlog costs in memory when the
//! handler stands still.

use std::future::pending;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::{Duration, Instant};

use eventbus::{Bus, Envelope, Meta, Service, Topic, TopicSpec};
use xtask::brokers::Kind;

use super::{broker, fresh};
use crate::times::resident_bytes;
use crate::{Anyhow, is_wanted};

const N_SUBSCRIPTIONS: usize = 10;
/// Until everybody is in, and has looked around.
const SETTLING: Duration = Duration::from_secs(10);
const MEASURED: Duration = Duration::from_secs(20);
const KINDS: [Kind; 5] = [Kind::Kafka, Kind::Rabbitmq, Kind::Nats, Kind::Redis, Kind::Postgres];

/// Prints a table of its own.
pub(crate) async fn all() -> Anyhow<()> {
    let line = |what: &str, kind: Kind| format!("{what}, {kind}");
    let lines: Vec<_> = KINDS
        .into_iter()
        .map(|kind| (kind, line("idle service of ten subscriptions", kind), line("stalled handler", kind)))
        .filter(|(_, idle, stalled)| is_wanted(idle) || is_wanted(stalled))
        .collect();
    if lines.is_empty() {
        return Ok(());
    }
    println!("| path | bar | measured | |\n|---|---|---|---|");
    for (kind, idle_line, stalled_line) in lines {
        let broker = broker(kind).await?;
        let bus = eventbus::connect(broker.url()).await?;
        if is_wanted(&idle_line) {
            let share = idle(&bus).await? * 100.0;
            let verdict = if share < 1.0 { "met" } else { "missed" };
            println!("| {idle_line}: processor time of a core | 1 % | {share:.2} % | {verdict} |");
        }
        if is_wanted(&stalled_line) {
            let highest = stalled(&bus).await? >> 20;
            let verdict = if highest < 256 { "met" } else { "missed" };
            println!(
                "| {stalled_line}, 1 GiB in the topic: memory above the start | 256 MiB | {highest} MiB | {verdict} |"
            );
        }
        bus.close().await?;
    }
    println!();
    Ok(())
}

async fn declared(bus: &Bus) -> Anyhow<Topic> {
    let topic = Topic::new(fresh("still"))?;
    let four = NonZeroU32::new(4).unwrap_or(NonZeroU32::MIN);
    let spec = TopicSpec::new(topic.clone()).with_partitions(four);
    bus.transport().admin().ok_or("no administration")?.declare(&spec).await?;
    Ok(topic)
}

async fn nothing(_: Meta) {}

/// The share of a core that this process uses.
async fn idle(bus: &Bus) -> Anyhow<f64> {
    let mut running = Vec::new();
    for n in 0..N_SUBSCRIPTIONS {
        let topic = declared(bus).await?;
        running.push(Service::new(format!("idle-{n}")).on(topic, nothing).start(bus).await?);
    }
    tokio::time::sleep(SETTLING).await;
    let (before, started) = (processor_seconds()?, Instant::now());
    tokio::time::sleep(MEASURED).await;
    let share = (processor_seconds()? - before) / started.elapsed().as_secs_f64();
    for running in running {
        running.stop().await?;
    }
    Ok(share)
}

/// User and system time of this process, from the kernel's count in hundredths of a second.
fn processor_seconds() -> Anyhow<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit_once(')').ok_or("no name")?.1.split_whitespace().collect();
    let ticks = |at: usize| -> Anyhow<f64> { Ok(fields.get(at).ok_or("a short line")?.parse()?) };
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}

async fn for_ever(_: Meta) {
    pending::<()>().await;
}

/// The most memory that a service takes while its handler stands still before a gibibyte.
async fn stalled(bus: &Bus) -> Anyhow<u64> {
    let (topic, body) = (declared(bus).await?, vec![7u8; 64 << 10]);
    let publisher = bus.transport().publisher().await?;
    for batch in 0..(1u64 << 30) / (body.len() as u64 * 16) {
        let event =
            |n| Envelope::new("large", "/bench").with_key(format!("{batch}-{n}")).with_payload(body.clone());
        publisher.enqueue(&topic, (0..16).map(event).collect()).await?.await.all()?;
    }
    let service = Service::new("stalled").lanes(NonZeroUsize::new(4).unwrap_or(NonZeroUsize::MIN));
    let service = service.start_at(eventbus::Start::Earliest);
    let before = resident_bytes();
    let running = service.on(topic, for_ever).start(bus).await?;
    let (mut highest, end) = (0, Instant::now() + MEASURED);
    while Instant::now() < end {
        highest = highest.max(resident_bytes().saturating_sub(before));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(running);
    Ok(highest)
}
