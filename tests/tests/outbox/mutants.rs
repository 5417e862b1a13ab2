//! Designs that were refused, each with the case that finds it: what other outboxes do, and what is easily forgotten.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use eventbus::Result;
use futures_util::FutureExt as _;
use outbox::{Blocked, Claim, Leased, Namespace, Pending, RowId, Shard, Store};
use parking_lot::Mutex;
use sqlx::{AssertSqlSafe, PgPool, Postgres};

use crate::crowd::{self, Crowd};
use crate::home::Cx;
use crate::{append, relays};

/// What is wrong with a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bug {
    /// Reads behind the highest number it saw: who commits late with a lower one is lost.
    NumberCursor,
    /// The same for each shard: a floor that does not wait for those who may still commit.
    NaiveFloor,
    /// Takes rows that nobody else has taken, whoever has earlier ones of the key (`SKIP LOCKED`).
    SkipsLocked,
    /// Reads in the order of the transactions' numbers, which is not that of their commits.
    TransactionCursor,
    /// Removes everything up to the highest number that was published.
    RemovesRanges,
    /// Removes and blocks without a look at who owns the shard.
    KnowsNoOwner,
    /// Gives rows of keys that are blocked.
    KnowsNoBlocks,
}

#[derive(Debug)]
struct Broken {
    inner: Arc<dyn Store>,
    pool: PgPool,
    namespace: Namespace,
    bug: Bug,
    cursors: Mutex<HashMap<Option<Shard>, i64>>,
}

impl Broken {
    fn sql(&self, sql: &str) -> String {
        sql.replace("EVT", &format!("{}.", self.namespace))
    }

    fn after_cursor(&self, rows: Vec<Pending>, of: fn(&Pending) -> Option<Shard>) -> Vec<Pending> {
        let mut cursors = self.cursors.lock();
        let fresh: Vec<Pending> = rows
            .into_iter()
            .filter(|row| cursors.get(&of(row)).is_none_or(|cursor| row.id.0 > *cursor))
            .collect();
        for row in &fresh {
            let cursor = cursors.entry(of(row)).or_insert(0);
            *cursor = row.id.0.max(*cursor);
        }
        fresh
    }

    async fn rows(&self, sql: &str) -> Vec<i64> {
        sqlx::query_scalar(AssertSqlSafe(self.sql(sql))).fetch_all(&self.pool).await.unwrap()
    }
}

#[async_trait]
impl Store for Broken {
    async fn identity(&self) -> Result<String> {
        self.inner.identity().await
    }

    async fn lease(&self, relay: &str, ttl: Duration) -> Result<Leased> {
        match self.bug {
            Bug::SkipsLocked => {
                Ok(Leased { shards: (0..64).map(|n| (Shard(n), 0)).collect(), surplus: Vec::new() })
            }
            _ => self.inner.lease(relay, ttl).await,
        }
    }

    async fn release(&self, relay: &str, shards: &[Shard]) -> Result<()> {
        self.inner.release(relay, shards).await
    }

    async fn leave(&self, relay: &str) -> Result<()> {
        self.inner.leave(relay).await
    }

    async fn claim(&self, claim: &Claim) -> Result<Vec<Pending>> {
        match self.bug {
            Bug::NumberCursor => Ok(self.after_cursor(self.inner.claim(claim).await?, |_| None)),
            Bug::NaiveFloor => Ok(self.after_cursor(self.inner.claim(claim).await?, |row| Some(row.shard))),
            Bug::SkipsLocked => {
                let mut found = self.inner.claim(&Claim::new(claim.shards.clone(), 1000, 1 << 20)).await?;
                fastrand::shuffle(&mut found);
                found.truncate(5);
                let ids: Vec<String> = found.iter().map(|row| format!("({})", row.id.0)).collect();
                if ids.is_empty() {
                    return Ok(found);
                }
                let take = format!(
                    "INSERT INTO taken VALUES {} ON CONFLICT DO NOTHING RETURNING id",
                    ids.join(", ")
                );
                let taken = self.rows(&take).await;
                Ok(found.into_iter().filter(|row| taken.contains(&row.id.0)).collect())
            }
            Bug::TransactionCursor => {
                let order = "SELECT id FROM EVToutbox WHERE xmin::text::bigint < pg_snapshot_xmin(pg_current_snapshot())::text::bigint
                    ORDER BY xmin::text::bigint, id LIMIT 3";
                let next = self.rows(order).await;
                let found = self.inner.claim(&Claim::new(claim.shards.clone(), 1000, 1 << 20)).await?;
                let is_next = |row: &Pending| next.contains(&row.id.0) && !claim.held.contains(&row.id);
                Ok(found.into_iter().filter(is_next).collect())
            }
            Bug::KnowsNoBlocks => {
                // What is blocked is due at any time.
                sqlx::query(AssertSqlSafe(self.sql("UPDATE EVToutbox_blocked SET retry_at = '-infinity'")))
                    .execute(&self.pool)
                    .await
                    .unwrap();
                self.inner.claim(claim).await
            }
            _ => self.inner.claim(claim).await,
        }
    }

    async fn settle(
        &self,
        relay: &str,
        owned: &[(Shard, i64)],
        published: &[(Shard, RowId)],
    ) -> Result<Vec<Shard>> {
        let ids: Vec<String> = published.iter().map(|(_, id)| id.0.to_string()).collect();
        let delete = match self.bug {
            Bug::RemovesRanges => {
                let highest = published.iter().map(|(_, id)| id.0).max().unwrap();
                format!("DELETE FROM EVToutbox WHERE id <= {highest}")
            }
            Bug::KnowsNoOwner | Bug::SkipsLocked => {
                format!("DELETE FROM EVToutbox WHERE id IN ({})", ids.join(", "))
            }
            _ => return self.inner.settle(relay, owned, published).await,
        };
        sqlx::query(AssertSqlSafe(self.sql(&delete))).execute(&self.pool).await.unwrap();
        Ok(owned.iter().map(|(shard, _)| *shard).collect())
    }

    async fn block(&self, relay: &str, owned: &[(Shard, i64)], blocked: &[Blocked]) -> Result<()> {
        self.inner.block(relay, owned, blocked).await
    }

    async fn park(&self, relay: &str, owned: &[(Shard, i64)], parked: &[Blocked]) -> Result<()> {
        self.inner.park(relay, owned, parked).await
    }

    async fn unblock(&self, shards: &[Shard]) -> Result<()> {
        self.inner.unblock(shards).await
    }

    async fn news(&self) {
        self.inner.news().await;
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

async fn place() -> Cx<Postgres> {
    let cx = Cx::open().await;
    cx.run("CREATE TABLE taken (id bigint PRIMARY KEY)").await;
    cx
}

/// Puts a bug around each store of a test.
macro_rules! broken {
    ($bug:ident) => {{
        let mut cx = place().await;
        cx.broken = Some(|inner, pool, namespace| {
            let (pool, namespace) = (pool.clone(), namespace.clone());
            Arc::new(Broken { inner, pool, namespace, bug: Bug::$bug, cursors: Mutex::default() })
        });
        cx
    }};
}

/// Whether a case fails.
async fn fails(case: impl Future<Output = ()>) -> bool {
    AssertUnwindSafe(case).catch_unwind().await.is_err()
}

macro_rules! crowd_finds {
    ($($name:ident $bug:ident $n_relays:literal $word:literal)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            for seed in 1..=5 {
                let crowd = Crowd { relays: $n_relays, transactions: 40, seed, n_keys: crowd::FEW, loses_one_in: 0 };
                let wrong = crowd::run(broken!($bug), crowd).await;
                if wrong.iter().any(|wrong| wrong.contains($word) && !wrong.contains(": 0 of")) {
                    return;
                }
            }
            panic!("{:?} was not found", Bug::$bug);
        }
    )*};
}

crowd_finds! {
    skipping_what_is_locked_is_found SkipsLocked 3 "overtaken"
    a_cursor_of_transactions_is_found TransactionCursor 1 "overtaken"
    removing_ranges_is_found RemovesRanges 2 " lost"
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sound_store_passes_where_they_fail() {
    for seed in 1..=2 {
        let crowd = Crowd {
            relays: 3,
            transactions: 40,
            seed,
            n_keys: if seed == 1 { crowd::FEW } else { crowd::MANY },
            loses_one_in: 0,
        };
        assert_eq!(crowd::run(place().await, crowd).await, Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_that_are_not_heeded_are_found() {
    // How often an event is tried, at most so often and for so long.
    let tries = async |cx: Cx<Postgres>, most: u64, within: Duration| {
        cx.broker.on("bad", crate::home::Does::Refuses(eventbus::ErrorKind::Full));
        let relay = cx.relay().await;
        cx.publish("bad", 1).await;
        cx.publish("good", 1).await;
        let began = Instant::now();
        while relay.counts().failed < most && began.elapsed() < within {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let failed = relay.counts().failed;
        relay.stop().await;
        (failed, began.elapsed())
    };
    // At every look, instead of after half a second at least and then less and less often: that is a minute for eight.
    let (broken, time) = tries(broken!(KnowsNoBlocks), 8, crate::home::SOON).await;
    let (sound, _) = tries(place().await, 8, time * 2).await;
    assert!(
        broken == 8 && sound < 8,
        "{broken} tries with the bug in {time:?}, {sound} without it in twice as long"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_of_numbers_is_found() {
    assert!(fails(append::postgres::a_late_commit_is_published(broken!(NumberCursor))).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_naive_floor_is_found() {
    assert!(fails(append::postgres::a_late_commit_is_published(broken!(NaiveFloor))).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_heeds_no_owner_is_found() {
    assert!(fails(relays::a_relay_that_lost_its_lease_changes_nothing(broken!(KnowsNoOwner))).await);
}

/// The function that appends, changed.
async fn appending(changes: &[(&str, &str)]) -> Cx<Postgres> {
    let cx = place().await;
    let tables = include_str!("../../../outbox/sql/postgres/1.sql");
    let begin = tables.find("CREATE FUNCTION").unwrap();
    let end = begin + tables[begin..].find("END $$;").unwrap() + "END $$;".len();
    let mut function = tables[begin..end].replacen("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", 1);
    for (from, to) in changes {
        assert!(function.contains(from), "the function has no {from:?}");
        function = function.replace(from, to);
    }
    cx.run(&function.replace("evt.", "EVT")).await;
    cx
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_are_not_held_are_found() {
    let cx = appending(&[("pg_advisory_xact_lock(", "pg_advisory_xact_lock_shared(")]).await;
    assert!(fails(append::postgres::a_key_is_held_until_the_commit(cx)).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_are_held_in_any_order_are_found() {
    let changes = [
        ("SELECT DISTINCT (", "SELECT s FROM (SELECT DISTINCT ("),
        ("WHERE has ORDER BY 1", "WHERE has) AS q (s) ORDER BY random()"),
    ];
    let cx = appending(&changes).await;
    assert!(fails(crowd::writers_of_the_same_keys_do_not_lock_each_other(cx)).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_that_are_not_flushed_are_found() {
    let cx = appending(&[("IN ('off', 'local')", "IN ('nothing')")]).await;
    assert!(fails(append::postgres::an_asynchronous_commit_is_made_one_that_waits(cx)).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_that_notify_are_found() {
    let cx = place().await;
    let channel = format!("{}.outbox", cx.namespace);
    cx.run(&format!(
        "CREATE FUNCTION EVTtell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_notify('{channel}', ''); RETURN NULL; END $$;
        CREATE TRIGGER tell AFTER INSERT ON EVToutbox FOR EACH STATEMENT EXECUTE FUNCTION EVTtell()"
    ))
    .await;
    assert!(fails(crate::doorbell::a_commit_by_itself_tells_nobody(cx)).await);
}
