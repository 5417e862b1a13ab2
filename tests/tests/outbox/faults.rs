//! What goes wrong around an outbox: rights that are missing, connections that are all taken, a disk that is full.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use eventbus::{ErrorKind, Result};
use eventbus_tests::small::Small;
use outbox::{Namespace, Outbox, State};

use crate::home::{Cx, Does, Home};

/// Rights may be given later: keys wait, and nothing is set aside for it.
pub(crate) async fn a_relay_without_rights_loses_nothing<Db: Home>(cx: Cx<Db>) {
    let keys = ["a", "b", "c"];
    keys.iter().for_each(|key| cx.broker.on(key, Does::Refuses(ErrorKind::Unauthorized)));
    let relay = cx.relay_with(|relay| relay.with_permanent(outbox::Permanent::Park)).await;
    for n in 0..30 {
        cx.publish(keys[n as usize % 3], n).await;
    }
    cx.until_rows(3, "EVToutbox_blocked WHERE may_pass").await;
    assert!(matches!(relay.state(), State::Degraded { .. }), "{:?}", relay.state());
    assert_eq!(cx.number("SELECT count(*) FROM EVToutbox_parked").await, 0);
    keys.iter().for_each(|key| cx.broker.on(key, None));
    cx.until_empty().await;
    assert!(cx.broker.firsts().values().all(|of_key| of_key.len() == 10 && of_key.is_sorted()));
    relay.stop().await;
}

pub(crate) async fn connections_that_are_all_taken_are_told<Db: Home>(cx: Cx<Db>)
where
    <Db::Connection as sqlx::Connection>::Options: Clone,
{
    let few = cx.pool.options().clone().max_connections(2).acquire_timeout(Duration::from_millis(500));
    let pool = few.connect_lazy_with((*cx.pool.connect_options()).clone());
    let outbox = Outbox::with_options(pool.clone(), cx.outbox.options().clone());
    let taken = (pool.acquire().await.unwrap(), pool.acquire().await.unwrap());
    let began = Instant::now();
    let error = outbox.begin().await.err().unwrap();
    assert!(error.is_retryable() && began.elapsed() < Duration::from_secs(5), "{error}");
    drop(taken);
    let mut tx = outbox.begin().await.unwrap();
    tx.publish_envelope(&cx.topic, cx.event("a", 1)).unwrap();
    tx.commit().await.unwrap();
    assert_eq!(cx.n_stored().await, 1);
}

async fn attempt<Db: Home>(cx: &Cx<Db>, n: i64) -> Result<()> {
    let mut tx = cx.outbox.begin().await?;
    tx.publish_envelope(&cx.topic, cx.event(&format!("k{}", n % 5), n))?;
    tx.commit().await
}

/// What was committed is published when there is room again, once and in order, and nothing else.
async fn outlives_a_full_disk<Db: Home>(cx: Cx<Db>, disk: &Small, comes_back: impl AsyncFnOnce()) {
    let relay = cx.relay().await;
    let (mut committed, mut unknown) = (BTreeSet::new(), BTreeSet::new());
    for n in 0..20 {
        attempt(&cx, n).await.unwrap();
        committed.insert(n);
    }
    cx.until_empty().await;
    disk.fill_but(0).unwrap();
    let (mut told, end) = (Vec::new(), Instant::now() + Duration::from_secs(8));
    for n in 20.. {
        match attempt(&cx, n).await {
            Ok(()) => _ = committed.insert(n),
            Err(error) => {
                assert!(error.is_retryable() || error.is_unknown(), "{error:?}");
                if error.is_unknown() {
                    unknown.insert(n);
                }
                told.push(error);
            }
        }
        if Instant::now() > end {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let says_it = |error: &eventbus::Error| {
        let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
        std::iter::from_fn(|| {
            let now = source?;
            source = now.source();
            Some(now.to_string())
        })
        .any(|said| said.contains("full") || said.contains("space"))
    };
    assert!(told.iter().any(says_it), "{told:?}");
    disk.free().unwrap();
    comes_back().await;
    for n in 100_000..100_020 {
        let end = Instant::now() + Duration::from_secs(20);
        while let Err(error) = attempt(&cx, n).await {
            assert!(Instant::now() < end, "{error:?}");
            // It may be there, and then it is there twice.
            if error.is_unknown() {
                unknown.insert(n);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        committed.insert(n);
    }
    cx.until_empty().await;
    let firsts = cx.broker.firsts();
    let seen: BTreeSet<i64> = firsts.values().flatten().copied().collect();
    let lost: Vec<_> = committed.difference(&seen).collect();
    let ghosts: Vec<_> = seen.iter().filter(|n| !committed.contains(n) && !unknown.contains(n)).collect();
    assert!(lost.is_empty() && ghosts.is_empty(), "lost {lost:?}, ghosts {ghosts:?}");
    assert!(firsts.values().all(|of_key| of_key.is_sorted()), "{firsts:?}");
    println!("{} committed, {} not, {} unknown", committed.len(), told.len(), unknown.len());
    relay.stop().await;
}

pub(crate) mod full {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn sqlite_outlives_a_full_disk() {
        let Some(disk) = Small::mount() else { return };
        let options = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(disk.folder().join("shop.db"))
            .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal)
            .create_if_missing(true);
        let pool =
            sqlx::sqlite::SqlitePoolOptions::new().max_connections(4).connect_with(options).await.unwrap();
        let cx = Cx::<sqlx::Sqlite>::on(pool, Namespace::default(), Box::new(())).await;
        outlives_a_full_disk(cx, &disk, async || {}).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn postgres_outlives_a_full_disk() {
        use xtask::brokers::{Broker, Kind};
        let Some(disk) = Small::mount() else { return };
        let folder = disk.folder().to_owned();
        let start = move || Broker::start_in(&folder, Kind::Postgres);
        let mut server = Some(tokio::task::spawn_blocking(start).await.unwrap().unwrap());
        let pool = sqlx::postgres::PgPoolOptions::new().acquire_timeout(Duration::from_secs(3));
        let pool = pool.connect(server.as_ref().unwrap().url()).await.unwrap();
        let cx = Cx::<sqlx::Postgres>::on(pool, Namespace::default(), Box::new(())).await;
        // What an operator does who finds it stopped.
        let comes_back = async || {
            let mut stopped = server.take().unwrap();
            let restarting = tokio::task::spawn_blocking(move || stopped.restart().map(|()| stopped));
            server = Some(restarting.await.unwrap().unwrap());
        };
        outlives_a_full_disk(cx, &disk, comes_back).await;
        drop(server);
    }
}
