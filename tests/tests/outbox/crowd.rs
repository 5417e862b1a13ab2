//! Many writers and several relays at once: nothing is lost, invented or overtaken.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::home::{Cx, Home};

const WRITERS: u64 = 8;
/// So few that writers meet at them.
pub(crate) const FEW: i64 = 6;
/// So many that a shard has several.
pub(crate) const MANY: i64 = 300;

/// What the run is made of.
#[derive(Clone, Copy)]
pub(crate) struct Crowd {
    pub(crate) relays: usize,
    pub(crate) transactions: u64,
    pub(crate) seed: u64,
    /// How many keys there are.
    pub(crate) n_keys: i64,
    /// One of so many answers of the broker is lost; none with 0.
    pub(crate) loses_one_in: u32,
}

/// What is wrong after a run; nothing, if it is sound.
pub(crate) async fn run<Db: Home>(cx: Cx<Db>, crowd: Crowd) -> Vec<String> {
    cx.run("CREATE TABLE counter (k bigint PRIMARY KEY, n bigint NOT NULL); CREATE TABLE truth (k bigint, n bigint); CREATE TABLE noise (x bigint)").await;
    let counters: Vec<String> = (0..crowd.n_keys).map(|key| format!("({key}, 0)")).collect();
    cx.run(&format!("INSERT INTO counter VALUES {}", counters.join(", "))).await;
    cx.broker.loses_one_in(crowd.loses_one_in);
    cx.broker.answers_after(Duration::from_millis(2));
    let cx = Arc::new(cx);
    let mut relays = Vec::new();
    for _ in 0..crowd.relays {
        relays.push(
            cx.relay_with(|relay| relay.with_lease(Duration::from_secs(5)).with_batch(20, 1 << 20)).await,
        );
    }
    let writers: Vec<_> = (0..WRITERS).map(|writer| tokio::spawn(write(cx.clone(), crowd, writer))).collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let mut connection = cx.pool.acquire().await.unwrap();
    let sql = "SELECT CAST(k AS text), n FROM truth ORDER BY k, n".to_owned();
    let mut truth: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for (key, n) in Db::pairs(&mut connection, sql).await.unwrap() {
        truth.entry(key).or_default().push(n);
    }
    drop(connection);
    // Until everything is there, or nothing has moved for a while.
    let (mut before, mut still) = (usize::MAX, 0);
    while cx.broker.firsts().values().map(Vec::len).sum::<usize>() < truth.values().map(Vec::len).sum()
        && still < 160
    {
        let n = cx.broker.seen().len();
        still = if n == before { still + 1 } else { 0 };
        before = n;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut left = Vec::new();
    if cx.n_stored().await > 0 {
        let mut connection = cx.pool.acquire().await.unwrap();
        for sql in [
            "SELECT 'shard ' || CAST(shard AS text) || ' of ' || coalesce(owner, 'nobody'), count(*) FROM EVToutbox JOIN EVToutbox_shard USING (shard) GROUP BY 1",
            "SELECT 'blocked in shard ' || CAST(shard AS text) || ' until ' || CAST(retry_at AS text) || ': ' || error, CAST(attempts AS bigint) FROM EVToutbox_blocked",
        ] {
            left.push(format!("{:?}", Db::pairs(&mut connection, cx.sql(sql)).await.unwrap()));
        }
        left.extend(relays.iter().map(|relay| format!("{relay:?}")));
    }
    for relay in relays {
        relay.stop().await;
    }
    let firsts = cx.broker.firsts();
    let mut wrong = Vec::new();
    for (key, written) in &truth {
        let published = firsts.get(key).cloned().unwrap_or_default();
        let lost = written.iter().filter(|n| !published.contains(n)).count();
        let ghosts = published.iter().filter(|n| !written.contains(n)).count();
        if lost > 0 || ghosts > 0 {
            wrong.push(format!("key {key}: {lost} of {} lost, {ghosts} invented", written.len()));
        }
        if !published.is_sorted() {
            wrong.push(format!("key {key}: overtaken: {published:?}"));
        }
    }
    let invented = firsts.keys().filter(|key| !truth.contains_key(*key));
    wrong.extend(invented.map(|key| format!("key {key}: nothing of it was committed")));
    if !wrong.is_empty() {
        wrong.extend(left);
    }
    wrong
}

/// Transactions of one writer: some wait, some are given up, some have their number before they touch the key.
async fn write<Db: Home>(cx: Arc<Cx<Db>>, crowd: Crowd, writer: u64) {
    let mut random = fastrand::Rng::with_seed(crowd.seed << 8 | writer);
    for _ in 0..crowd.transactions {
        let key = random.i64(0..crowd.n_keys);
        let mut tx = cx.outbox.begin().await.unwrap();
        if random.u8(..3) == 0 {
            Db::run(&mut tx, "INSERT INTO noise VALUES (1)".to_owned()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(random.u64(..15))).await;
        }
        let counted =
            Db::number(&mut tx, format!("UPDATE counter SET n = n + 1 WHERE k = {key} RETURNING n")).await;
        let n = counted.unwrap();
        Db::run(&mut tx, format!("INSERT INTO truth VALUES ({key}, {n})")).await.unwrap();
        tx.publish_envelope(&cx.topic, cx.event(&key.to_string(), n)).unwrap();
        tx.flush().await.unwrap();
        if random.u8(..4) == 0 {
            tokio::time::sleep(Duration::from_millis(random.u64(..10))).await;
        }
        match random.u8(..10) {
            0 => tx.rollback().await.unwrap(),
            _ => tx.commit().await.unwrap(),
        }
    }
}

pub(crate) async fn nothing_is_lost_or_invented_or_overtaken<Db: Home>(cx: Cx<Db>) {
    let wrong = run(cx, Crowd { relays: 3, transactions: 60, seed: 1, n_keys: FEW, loses_one_in: 50 }).await;
    assert!(wrong.is_empty(), "{wrong:#?}");
}

pub(crate) async fn writers_of_the_same_keys_do_not_lock_each_other<Db: Home>(cx: Cx<Db>) {
    let cx = Arc::new(cx);
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let cx = cx.clone();
            tokio::spawn(async move {
                for n in 0..30 {
                    let mut tx = cx.outbox.begin().await.unwrap();
                    // The same keys, each writer in an order of its own.
                    let mut keys: Vec<i64> = (0..20).collect();
                    fastrand::Rng::with_seed(writer * 100 + n).shuffle(&mut keys);
                    for key in keys {
                        tx.publish_envelope(&cx.topic, cx.event(&key.to_string(), n as i64)).unwrap();
                    }
                    tx.commit().await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(cx.n_stored().await, WRITERS as i64 * 30 * 20);
}
