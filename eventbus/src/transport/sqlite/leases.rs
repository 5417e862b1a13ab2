//! The file as a store of groups by leases.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::Connection;
use tokio::sync::watch;

use super::membership::{self, GroupRow, Seat};
use super::schema::from_sqlite;
use super::store::Store;
use super::{clock, row};
use crate::error::Result;
use crate::subscription::Subscription;
use crate::transport::kit::leased::{self, Fetched, Look, Progress, Standing, Wanted};

#[async_trait]
impl leased::Store for Store {
    type Group = GroupRow;

    const NAME: &'static str = "SqliteConsumer";

    fn is_open(&self) -> Result<()> {
        self.is_open()
    }

    fn session(&self) -> Duration {
        self.options.session
    }

    fn look_every(&self) -> Option<Duration> {
        None
    }

    fn news(&self, _group: &GroupRow) -> watch::Receiver<u64> {
        self.news()
    }

    async fn join(self: &Arc<Self>, subscription: &Subscription) -> Result<Seat> {
        let (partitions, session) = (self.options.partitions, clock::nanos(self.options.session));
        let wanted = subscription.clone();
        self.write(move |round| membership::join(round, &wanted, partitions, session)).await
    }

    async fn stand(self: &Arc<Self>, seat: &Seat, known: BTreeMap<u32, u32>) -> Result<Standing> {
        let (seat, session) = (seat.clone(), clock::nanos(self.options.session));
        self.write(move |round| membership::stand(round, &seat, &known, session)).await
    }

    async fn read(
        self: &Arc<Self>,
        seat: &Seat,
        wanted: Vec<Wanted>,
        max: usize,
        max_bytes: usize,
    ) -> Result<Option<Look>> {
        let group = seat.group;
        Store::read(self, move |connection| read(connection, group, wanted, max, max_bytes)).await
    }

    async fn save(self: &Arc<Self>, seat: &Seat, progress: Arc<[Progress]>) -> Result<Vec<u32>> {
        let seat = seat.clone();
        self.write(move |round| membership::save(round, &seat, &progress)).await
    }

    async fn release(self: &Arc<Self>, seat: &Seat, partitions: Vec<u32>) -> Result<()> {
        let seat = seat.clone();
        self.write(move |round| membership::release(round, &seat, &partitions)).await
    }

    async fn leave(self: &Arc<Self>, seat: &Seat) -> Result<()> {
        let seat = seat.clone();
        self.write(move |round| membership::leave(round, &seat)).await
    }

    fn leave_soon(self: &Arc<Self>, seat: Seat) {
        drop(self.submit(move |round| membership::leave(round, &seat)));
    }
}

/// One consistent look at the file: the group's generation and the rows of each wanted partition.
fn read(
    connection: &mut Connection,
    group: GroupRow,
    wanted: Vec<Wanted>,
    max: usize,
    max_bytes: usize,
) -> Result<Option<Look>> {
    let view = connection.transaction().map_err(from_sqlite)?;
    let Some(generation) = membership::generation(&view, group.id)? else { return Ok(None) };
    let bounds: HashMap<u32, (u64, u64)> = view
        .prepare_cached("SELECT partition, first, next FROM eventbus_partition WHERE topic = ?1")
        .and_then(|mut statement| {
            statement
                .query_map([group.topic], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))
                .and_then(Iterator::collect)
        })
        .map_err(from_sqlite)?;
    let mut fetched = Vec::new();
    for wanted in wanted {
        let Some((first, next)) = bounds.get(&wanted.partition).copied() else { continue };
        if first <= wanted.from && next <= wanted.from {
            continue;
        }
        let rows = if first > wanted.from {
            Vec::new()
        } else {
            row::read(&view, group.topic, wanted.partition, wanted.from, next, max, max_bytes)?
        };
        fetched.push(Fetched { wanted, first, rows });
    }
    Ok(Some(Look { generation, fetched }))
}
