//! Appends beside the same transaction without one, and beside the same rows inserted by hand.

use std::time::Instant;

use eventbus::{Envelope, Topic};
use outbox::Outbox;
use sqlx::postgres::PgPool;
use sqlx::{Postgres, Row as _};

use super::{DISKS, Home, SLOW, is_any_wanted, side_by_side, void};
use crate::{Anyhow, is_wanted, order, pair, timed};

const CONNECTIONS: u64 = 8;
const WRITERS: u64 = 16;

pub(super) async fn run(events: &[Envelope]) -> Anyhow<()> {
    for (disk, sync) in DISKS {
        let is_slow = sync == SLOW;
        let bar = if is_slow { 0.98 } else { 0.72 };
        let name = |how: &str| format!("outbox, append of one event ({how}), 8 connections, {disk}");
        let lines = [name("begin"), name("publish in a transaction of one's own")];
        let [begin, own] = &lines;
        let batches = [100usize, 1000].map(|size| (size, format!("outbox, append of {size} events, {disk}")));
        let wakes = format!("outbox, 16 writers while a relay is woken, to one that looks by itself, {disk}");
        let with = format!("outbox, 16 writers while a relay is woken, to none, {disk}");
        let of_batches = batches.iter().filter(|_| !is_slow).map(|(_, line)| line);
        let of_wakes = [&wakes, &with].into_iter().filter(|_| is_slow);
        if !is_any_wanted(lines.iter().chain(of_batches).chain(of_wakes)) {
            continue;
        }
        let home = Home::open(sync).await?;
        let each = if is_slow { 300 } else { 1_500 };
        let n = usize::try_from(CONNECTIONS * each)?;
        let bare = || bare(&home, CONNECTIONS, each);
        pair(begin, bar, n, bare, || publishing(&home, CONNECTIONS, each)).await?;
        pair(own, bar, n, bare, || publishing_in_own(&home, each)).await?;
        if is_slow {
            let n = usize::try_from(WRITERS * each)?;
            let woken = || beside_a_relay(&home, each, true);
            pair(&wakes, 0.97, n, || beside_a_relay(&home, each, false), woken).await?;
            pair(&with, 0.97, n, || publishing(&home, WRITERS, each), woken).await?;
        } else {
            for (size, line) in &batches {
                in_batches(&home, line, events.get(..20_000).unwrap_or(events), *size).await?;
            }
        }
    }
    Ok(())
}

async fn work(connection: &mut sqlx::PgConnection, n: u64) -> Anyhow<()> {
    let insert = sqlx::query("INSERT INTO work (buyer, note) VALUES ($1, $2)");
    insert.bind(n.cast_signed()).bind("an order of a buyer").execute(connection).await?;
    Ok(())
}

async fn bare(home: &Home, n_tasks: u64, each: u64) -> Anyhow<f64> {
    home.clear().await?;
    let pool = home.pool.clone();
    timed(side_by_side(n_tasks, each, move |n| {
        let pool = pool.clone();
        async move {
            let mut tx = pool.begin().await?;
            work(&mut tx, n).await?;
            Ok(tx.commit().await?)
        }
    }))
    .await
}

async fn one(outbox: &Outbox<Postgres>, n: u64) -> Anyhow<()> {
    let mut tx = outbox.begin().await?;
    work(&mut tx, n).await?;
    tx.publish(&Topic::new("orders")?, &order(n))?;
    Ok(tx.commit().await?)
}

async fn publishing(home: &Home, n_tasks: u64, each: u64) -> Anyhow<f64> {
    home.clear().await?;
    let outbox = home.outbox.clone();
    timed(side_by_side(n_tasks, each, move |n| {
        let outbox = outbox.clone();
        async move { one(&outbox, n).await }
    }))
    .await
}

async fn publishing_in_own(home: &Home, each: u64) -> Anyhow<f64> {
    home.clear().await?;
    let (pool, outbox): (PgPool, _) = (home.pool.clone(), home.outbox.clone());
    timed(side_by_side(CONNECTIONS, each, move |n| {
        let (pool, outbox) = (pool.clone(), outbox.clone());
        async move {
            let mut tx = pool.begin().await?;
            work(&mut tx, n).await?;
            outbox.publish(&mut tx, &Topic::new("orders")?, &order(n)).await?;
            tx.commit().await?;
            outbox.wake();
            Ok(())
        }
    }))
    .await
}

/// Writers while a relay publishes to nobody: one that they wake, or one that looks by itself.
async fn beside_a_relay(home: &Home, each: u64, is_woken: bool) -> Anyhow<f64> {
    home.clear().await?;
    // Relays of another value of the same outbox do not hear this one's bell.
    let heard = if is_woken { home.outbox.clone() } else { Outbox::new(home.pool.clone()) };
    let relay = outbox::Relay::new(&heard).start(&void()).await?;
    let outbox = home.outbox.clone();
    let took = timed(side_by_side(WRITERS, each, move |n| {
        let outbox = outbox.clone();
        async move { one(&outbox, n).await }
    }))
    .await?;
    relay.stop().await;
    Ok(took)
}

/// Raw inserts the very rows of ours, of values that were made beforehand.
async fn in_batches(home: &Home, line: &str, events: &[Envelope], size: usize) -> Anyhow<()> {
    if !is_wanted(line) {
        return Ok(());
    }
    let topic = Topic::new("orders")?;
    // A transaction holds at most 512 keys.
    let few_keys = events.iter().enumerate().map(|(n, event)| event.clone().with_key((n % 200).to_string()));
    let events: Vec<Envelope> = few_keys.collect();
    home.fill(&topic, &events).await?;
    let select =
        "SELECT shard, event_id, topic, key, has_key, head::text, payload, size FROM evt.outbox ORDER BY id";
    let mut rows = Vec::new();
    for row in sqlx::query(select).fetch_all(&home.pool).await? {
        rows.push(Stored {
            shard: row.try_get(0)?,
            id: row.try_get(1)?,
            topic: row.try_get(2)?,
            key: row.try_get(3)?,
            has_key: row.try_get(4)?,
            head: row.try_get(5)?,
            payload: row.try_get(6)?,
            size: row.try_get(7)?,
        });
    }
    pair(line, 0.90, events.len(), || unnest(home, &rows, size), || appends(home, &topic, &events, size))
        .await
}

async fn appends(home: &Home, topic: &Topic, events: &[Envelope], size: usize) -> Anyhow<f64> {
    home.clear().await?;
    let started = Instant::now();
    for some in events.chunks(size) {
        let mut tx = home.outbox.begin().await?;
        for event in some {
            tx.publish_envelope(topic, event.clone())?;
        }
        tx.commit().await?;
    }
    Ok(started.elapsed().as_secs_f64())
}

struct Stored {
    shard: i16,
    id: sqlx::types::Uuid,
    topic: String,
    key: Vec<u8>,
    has_key: bool,
    head: String,
    payload: Vec<u8>,
    size: i32,
}

async fn unnest(home: &Home, rows: &[Stored], size: usize) -> Anyhow<f64> {
    home.clear().await?;
    let insert = "INSERT INTO raw (shard, event_id, topic, key, has_key, head, payload, size)
        SELECT s, i, t, k, h, d::json, p, z
        FROM unnest($1::smallint[], $2::uuid[], $3::text[], $4::bytea[], $5::boolean[], $6::text[], $7::bytea[], $8::integer[])
          AS e (s, i, t, k, h, d, p, z)";
    let started = Instant::now();
    for some in rows.chunks(size) {
        let mut tx = home.pool.begin().await?;
        let query = sqlx::query(insert)
            .bind(some.iter().map(|row| row.shard).collect::<Vec<_>>())
            .bind(some.iter().map(|row| row.id).collect::<Vec<_>>())
            .bind(some.iter().map(|row| row.topic.as_str()).collect::<Vec<_>>())
            .bind(some.iter().map(|row| row.key.as_slice()).collect::<Vec<_>>())
            .bind(some.iter().map(|row| row.has_key).collect::<Vec<_>>())
            .bind(some.iter().map(|row| row.head.as_str()).collect::<Vec<_>>())
            .bind(some.iter().map(|row| row.payload.as_slice()).collect::<Vec<_>>())
            .bind(some.iter().map(|row| row.size).collect::<Vec<_>>());
        query.execute(&mut *tx).await?;
        tx.commit().await?;
    }
    Ok(started.elapsed().as_secs_f64())
}
