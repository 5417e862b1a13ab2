//! PostgreSQL: rows in batches of 1,000, one statement and one transaction each.

use std::time::Instant;

use eventbus::Envelope;
use sqlx::{Connection as _, PgConnection, Row as _};
use xtask::brokers::Broker;

use super::{FIRST, PARTITIONS, Wire, consume, decode, filled, fresh, publish_batches};
use crate::{Anyhow, pair};

const PUBLISH: &str = "PostgreSQL publish, batches of 1000";
const CONSUME: &str = "PostgreSQL consume to typed events";
pub(super) const LINES: &[&str] = &[PUBLISH, CONSUME];
const BATCH: usize = 1000;

pub(super) async fn run(broker: &Broker, events: &[Envelope], wires: &[Wire]) -> Anyhow<()> {
    let bus = eventbus::connect(broker.url()).await?;
    let url = broker.url();
    let n = events.len();
    let ours = || publish_batches(&bus, events, BATCH, 1);
    pair(PUBLISH, 0.85, n, || raw_publish(url, wires), ours).await?;
    let ours = filled(&bus, events).await?;
    let mut connection = PgConnection::connect(url).await?;
    let raw = raw_table(&mut connection).await?;
    send(&mut connection, &raw, wires, &mut [0; PARTITIONS as usize]).await?;
    pair(CONSUME, 0.85, n, || raw_consume(url, &raw), || consume(&bus, &ours, n)).await?;
    bus.transport().close().await?;
    Ok(())
}

fn sql(text: String) -> sqlx::AssertSqlSafe<String> {
    sqlx::AssertSqlSafe(text)
}

/// A table of the columns that ours has and these events fill, and one of positions.
async fn raw_table(connection: &mut PgConnection) -> Anyhow<String> {
    let name = fresh("raw").replace('-', "_");
    let tables = format!(
        "CREATE TABLE {name} (partition integer NOT NULL, \"offset\" bigint NOT NULL, stored_at bigint NOT NULL,
           id text, source text, type text, version bigint, key bytea, payload bytea, PRIMARY KEY (partition, \"offset\"));
         CREATE TABLE {name}_at (grp text NOT NULL, partition integer NOT NULL, floor bigint NOT NULL,
           PRIMARY KEY (grp, partition)) WITH (fillfactor = 50);"
    );
    sqlx::raw_sql(sql(tables)).execute(&mut *connection).await?;
    Ok(name)
}

async fn send(
    connection: &mut PgConnection,
    table: &str,
    wires: &[Wire],
    ends: &mut [i64; PARTITIONS as usize],
) -> Anyhow<()> {
    let insert = format!(
        "INSERT INTO {table} SELECT p, o, 0, i, '/bench', 'shop.order.placed', 1, k, b
         FROM UNNEST($1::integer[], $2::bigint[], $3::text[], $4::bytea[], $5::bytea[]) AS rows (p, o, i, k, b)"
    );
    for batch in wires.chunks(BATCH) {
        let (mut partitions, mut offsets) = (Vec::new(), Vec::new());
        for wire in batch {
            let end = ends.get_mut(wire.partition as usize).ok_or("no such partition")?;
            partitions.push(wire.partition.cast_signed());
            offsets.push(*end);
            *end += 1;
        }
        let ids: Vec<&str> = batch.iter().map(|wire| wire.id.as_str()).collect();
        let keys: Vec<&[u8]> = batch.iter().map(|wire| wire.key.as_ref()).collect();
        let bodies: Vec<&[u8]> = batch.iter().map(|wire| wire.body.as_ref()).collect();
        sqlx::query(sql(insert.clone()))
            .bind(partitions)
            .bind(offsets)
            .bind(ids)
            .bind(keys)
            .bind(bodies)
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

async fn raw_publish(url: &str, wires: &[Wire]) -> Anyhow<f64> {
    let mut connection = PgConnection::connect(url).await?;
    let table = raw_table(&mut connection).await?;
    let (first, rest) = wires.split_at(FIRST.min(wires.len()));
    let mut ends = [0; PARTITIONS as usize];
    send(&mut connection, &table, first, &mut ends).await?;
    let started = Instant::now();
    send(&mut connection, &table, rest, &mut ends).await?;
    let took = started.elapsed().as_secs_f64();
    sqlx::raw_sql(sql(format!("DROP TABLE {table}, {table}_at"))).execute(&mut connection).await?;
    Ok(took * wires.len() as f64 / rest.len().max(1) as f64)
}

/// Reads each partition in pages, and moves its position after each.
async fn raw_consume(url: &str, table: &str) -> Anyhow<f64> {
    let (mut connection, group) = (PgConnection::connect(url).await?, fresh("raw"));
    let select = format!(
        "SELECT \"offset\", id, type, key, payload FROM {table} WHERE partition = $1 AND \"offset\" >= $2
         ORDER BY \"offset\" LIMIT 256"
    );
    let save = format!(
        "INSERT INTO {table}_at VALUES ($1, $2, $3) ON CONFLICT (grp, partition) DO UPDATE SET floor = excluded.floor"
    );
    let started = Instant::now();
    for partition in 0..PARTITIONS.cast_signed() {
        let mut from = 0i64;
        loop {
            let page = sqlx::query(sql(select.clone())).bind(partition).bind(from);
            let rows = page.fetch_all(&mut connection).await?;
            let Some(last) = rows.last() else { break };
            from = last.try_get::<i64, _>(0)? + 1;
            for row in &rows {
                std::hint::black_box((row.try_get::<&str, _>(1)?, row.try_get::<&str, _>(2)?));
                decode(row.try_get(4)?)?;
            }
            let save = sqlx::query(sql(save.clone())).bind(&group).bind(partition).bind(from);
            save.execute(&mut connection).await?;
        }
    }
    Ok(started.elapsed().as_secs_f64())
}
