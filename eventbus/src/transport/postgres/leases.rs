//! The database as a store of groups by leases.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::{PgConnection, Row};
use tokio::sync::watch;

use super::membership::{self, GroupRow, Seat};
use super::row::{event_columns, stored};
use super::store::{LOOK_EVERY, Store};
use crate::error::{Error, ErrorKind, Result};
use crate::sql::from_sqlx;
use crate::subscription::Subscription;
use crate::transport::kit::leased::{self, Fetched, Look, Progress, Standing, Wanted};
use crate::transport::kit::texts::Texts;

#[async_trait]
impl leased::Store for Store {
    type Group = GroupRow;

    const NAME: &'static str = "PostgresConsumer";

    fn is_open(&self) -> Result<()> {
        self.is_open()
    }

    fn session(&self) -> Duration {
        self.options.session
    }

    fn look_every(&self) -> Option<Duration> {
        Some(LOOK_EVERY)
    }

    fn news(&self, group: &GroupRow) -> watch::Receiver<u64> {
        self.bells.hear(group.topic)
    }

    async fn join(self: &Arc<Self>, subscription: &Subscription) -> Result<Seat> {
        let wanted = subscription.clone();
        let seat = self
            .run(move |store| async move {
                let mut connection = store.pool.acquire().await.map_err(from_sqlx)?;
                let mut topic = store.resolve(&mut connection, &wanted.topic).await?;
                // A topic that is remembered may have been deleted and created anew.
                match membership::join(&mut connection, topic, &wanted, store.options.session).await {
                    Err(error) if error.kind() == ErrorKind::NotFound => {
                        store.topics.lock().remove(&wanted.topic);
                        topic = store.resolve(&mut connection, &wanted.topic).await?;
                        membership::join(&mut connection, topic, &wanted, store.options.session).await
                    }
                    joined => joined,
                }
            })
            .await?;
        self.ring(seat.group.topic);
        Ok(seat)
    }

    async fn stand(self: &Arc<Self>, seat: &Seat, known: BTreeMap<u32, u32>) -> Result<Standing> {
        let seat = seat.clone();
        self.run(move |store| async move {
            let mut connection = store.pool.acquire().await.map_err(from_sqlx)?;
            membership::stand(&mut connection, &seat, &known, store.options.session).await
        })
        .await
    }

    async fn read(
        self: &Arc<Self>,
        seat: &Seat,
        wanted: Vec<Wanted>,
        max: usize,
        max_bytes: usize,
    ) -> Result<Option<Look>> {
        let group = seat.group;
        self.run(move |store| async move {
            let mut connection = store.pool.acquire().await.map_err(from_sqlx)?;
            read(&mut connection, group, wanted, max, max_bytes).await
        })
        .await
    }

    async fn save(self: &Arc<Self>, seat: &Seat, progress: Arc<[Progress]>) -> Result<Vec<u32>> {
        let seat = seat.clone();
        self.run(move |store| async move {
            let mut connection = store.pool.acquire().await.map_err(from_sqlx)?;
            membership::save(&mut connection, &seat, &progress).await
        })
        .await
    }

    async fn release(self: &Arc<Self>, seat: &Seat, partitions: Vec<u32>) -> Result<()> {
        let (seat, topic) = (seat.clone(), seat.group.topic);
        self.run(move |store| async move {
            let mut connection = store.pool.acquire().await.map_err(from_sqlx)?;
            membership::release(&mut connection, &seat, partitions).await
        })
        .await?;
        self.ring(topic);
        Ok(())
    }

    async fn leave(self: &Arc<Self>, seat: &Seat) -> Result<()> {
        let (seat, topic) = (seat.clone(), seat.group.topic);
        self.run(move |store| async move {
            let mut connection = store.pool.acquire().await.map_err(from_sqlx)?;
            membership::leave(&mut connection, &seat).await
        })
        .await?;
        self.ring(topic);
        Ok(())
    }

    fn leave_soon(self: &Arc<Self>, seat: Seat) {
        let store = self.clone();
        // Also while the store closes, which waits for this.
        self.tasks.leave_soon(async move {
            let mut connection = store.pool.acquire().await.map_err(from_sqlx)?;
            membership::leave(&mut connection, &seat).await
        });
    }
}

/// One statement, and so one consistent look: the group's generation, the beginning of each partition, and the events
/// of the wanted ones.
const READ: &str = concat!(
    r#"SELECT g.generation, p.partition, p.first, "#,
    event_columns!(),
    r#" FROM eventbus_group g
    JOIN eventbus_partition p ON p.topic = g.topic
    LEFT JOIN unnest($2::integer[], $3::bigint[]) AS w (partition, low) ON w.partition = p.partition
    LEFT JOIN LATERAL (
      SELECT * FROM (
        SELECT e.*, sum(e.size) OVER (ORDER BY e."offset") - e.size AS before FROM (
          SELECT * FROM eventbus_event e
          WHERE p.first <= w.low AND e.topic = p.topic AND e.partition = p.partition AND e."offset" >= w.low
          ORDER BY e."offset" LIMIT $4
        ) e
      ) e WHERE e.before < $5
    ) e ON true
    WHERE g.id = $1 ORDER BY p.partition, e."offset""#
);

async fn read(
    connection: &mut PgConnection,
    group: GroupRow,
    wanted: Vec<Wanted>,
    max: usize,
    max_bytes: usize,
) -> Result<Option<Look>> {
    let (partitions, lows): (Vec<i32>, Vec<i64>) =
        wanted.iter().map(|wanted| (wanted.partition as i32, wanted.from as i64)).unzip();
    let rows = sqlx::query(READ)
        .bind(group.id)
        .bind(partitions)
        .bind(lows)
        .bind(max as i64)
        .bind(i64::try_from(max_bytes.max(1)).unwrap_or(i64::MAX))
        .fetch_all(connection)
        .await
        .map_err(from_sqlx)?;
    let Some(first) = rows.first() else { return Ok(None) };
    let generation = first.try_get::<i64, _>(0).map_err(from_sqlx)?.unsigned_abs();
    let mut texts = Texts::default();
    let mut fetched: BTreeMap<u32, Fetched> = BTreeMap::new();
    for row in &rows {
        let number =
            |at: usize| row.try_get::<Option<i64>, _>(at).map(|number| number.map(i64::unsigned_abs));
        let partition = row.try_get::<i32, _>(1).map_err(from_sqlx)?.unsigned_abs();
        let Some(wanted) = wanted.iter().find(|wanted| wanted.partition == partition) else { continue };
        let first = number(2).map_err(from_sqlx)?.unwrap_or_default();
        if number(3).map_err(from_sqlx)?.is_none() {
            if first > wanted.from {
                fetched.insert(partition, Fetched { wanted: *wanted, first, rows: Vec::new() });
            }
            continue;
        }
        let found = stored(row, 3, &mut texts).map_err(from_sqlx)?;
        let of = fetched.entry(partition).or_insert(Fetched { wanted: *wanted, first, rows: Vec::new() });
        if found.offset != wanted.from + of.rows.len() as u64 {
            return Err(Error::new(ErrorKind::Corrupt, "events are missing between others")
                .with("partition", partition)
                .with("offset", wanted.from + of.rows.len() as u64));
        }
        of.rows.push(found);
    }
    Ok(Some(Look { generation, fetched: fetched.into_values().collect() }))
}
