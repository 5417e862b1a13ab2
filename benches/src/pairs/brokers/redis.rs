//! Redis Streams: pipelines of XADD, and XREADGROUP with XACK.

use std::time::Instant;

use eventbus::Envelope;
use futures_util::{StreamExt as _, TryStreamExt as _};
use redis::aio::MultiplexedConnection;
use redis::streams::StreamReadReply;
use xtask::brokers::Broker;

use super::{FIRST, PARTITIONS, Wire, consume, decode, filled, fresh, publish};
use crate::{Anyhow, pair};

const PUBLISH: &str = "Redis publish, window 1024";
const CONSUME: &str = "Redis consume to typed events";
pub(super) const LINES: &[&str] = &[PUBLISH, CONSUME];
/// Commands in a pipeline.
const PIPELINE: usize = 64;

pub(super) async fn run(broker: &Broker, events: &[Envelope], wires: &[Wire]) -> Anyhow<()> {
    let bus = eventbus::connect(broker.url()).await?;
    let redis = redis::Client::open(broker.url())?.get_multiplexed_async_connection().await?;
    let n = events.len();
    pair(PUBLISH, 0.90, n, || raw_publish(&redis, wires), || publish(&bus, events, 1024)).await?;
    let (ours, raw) = (filled(&bus, events).await?, fresh("raw"));
    send(&redis, &raw, wires).await?;
    pair(CONSUME, 0.85, n, || raw_consume(&redis, &raw, n), || consume(&bus, &ours, n)).await?;
    bus.transport().close().await?;
    Ok(())
}

fn stream(name: &str, partition: u32) -> String {
    format!("{name}:{partition}")
}

/// Pipelines in the order of the events, as many at once as fill the window.
async fn send(redis: &MultiplexedConnection, name: &str, wires: &[Wire]) -> Anyhow<()> {
    futures_util::stream::iter(wires.chunks(PIPELINE))
        .map(|wires| {
            let mut pipeline = redis::pipe();
            for wire in wires {
                let command = pipeline.cmd("XADD").arg(stream(name, wire.partition)).arg("*");
                for (name, value) in &wire.headers {
                    command.arg(format!("ce_{name}")).arg(value);
                }
                command.arg("key").arg(wire.key.as_ref()).arg("data").arg(wire.body.as_ref());
            }
            let mut redis = redis.clone();
            async move { pipeline.query_async::<Vec<String>>(&mut redis).await }
        })
        .buffered(1024 / PIPELINE)
        .try_for_each(|_| std::future::ready(Ok(())))
        .await?;
    Ok(())
}

async fn raw_publish(redis: &MultiplexedConnection, wires: &[Wire]) -> Anyhow<f64> {
    let name = fresh("raw");
    let (first, rest) = wires.split_at(FIRST.min(wires.len()));
    send(redis, &name, first).await?;
    let started = Instant::now();
    send(redis, &name, rest).await?;
    let took = started.elapsed().as_secs_f64();
    let mut removed = redis::cmd("DEL");
    removed.arg((0..PARTITIONS).map(|partition| stream(&name, partition)).collect::<Vec<_>>());
    removed.query_async::<u64>(&mut redis.clone()).await?;
    Ok(took * wires.len() as f64 / rest.len().max(1) as f64)
}

async fn raw_consume(redis: &MultiplexedConnection, name: &str, n: usize) -> Anyhow<f64> {
    let (mut redis, group) = (redis.clone(), fresh("raw"));
    for partition in 0..PARTITIONS {
        let mut create = redis::cmd("XGROUP");
        create.arg("CREATE").arg(stream(name, partition)).arg(&group).arg("0");
        create.query_async::<()>(&mut redis).await?;
    }
    let (mut left, mut started) = (n, None);
    let mut done: Vec<(String, Vec<String>)> = Vec::new();
    while left > 0 {
        // What was read before is acknowledged with the next read.
        let mut both = redis::pipe();
        for (stream, ids) in done.drain(..) {
            both.cmd("XACK").arg(stream).arg(&group).arg(ids).ignore();
        }
        let read = both.cmd("XREADGROUP").arg("GROUP").arg(&group).arg("c").arg("COUNT").arg(256);
        read.arg("STREAMS").arg((0..PARTITIONS).map(|partition| stream(name, partition)).collect::<Vec<_>>());
        read.arg((0..PARTITIONS).map(|_| ">").collect::<Vec<_>>());
        let (answer,): (StreamReadReply,) = both.query_async(&mut redis).await?;
        started.get_or_insert_with(Instant::now);
        for key in answer.keys {
            for entry in &key.ids {
                std::hint::black_box((entry.map.get("ce_id"), entry.map.get("ce_type")));
                decode(&entry.get::<Vec<u8>>("data").ok_or("no body")?)?;
            }
            left -= key.ids.len();
            done.push((key.key, key.ids.into_iter().map(|entry| entry.id).collect()));
        }
    }
    let mut rest = redis::pipe();
    for (stream, ids) in done {
        rest.cmd("XACK").arg(stream).arg(&group).arg(ids).ignore();
    }
    rest.query_async::<()>(&mut redis).await?;
    Ok(started.map(|started| started.elapsed().as_secs_f64()).unwrap_or_default())
}
