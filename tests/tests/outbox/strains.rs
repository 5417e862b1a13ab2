//! What a store has to stand: clocks that jump, a snapshot that is held, a dump that is brought back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use eventbus::ErrorKind;
use outbox::{Claim, Namespace, Operator as _, Options, Outbox, Store};
use sqlx::Postgres;

use crate::home::{Cx, Does, Home, SOON};

/// A jump of the database's clock is one of all that it has noted, the other way.
pub(crate) async fn a_clock_that_jumps_stops_nothing<Db: Home>(cx: Cx<Db>) {
    for (round, jump) in [-3600, 3600, -600, 600, -10].into_iter().enumerate() {
        // One that ends without a word owns half, and one that lives the rest; a key is blocked.
        let dead = cx.store().await;
        let relay = cx.relay().await;
        let (mut owned, end) = (0, Instant::now() + SOON);
        while owned < 32 {
            assert!(Instant::now() < end, "it owns {owned} shards");
            owned = dead.lease("dead", Duration::from_secs(5)).await.unwrap().shards.len();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        cx.broker.on("bad", Does::Refuses(ErrorKind::Full));
        let n = 100 * i64::try_from(round).unwrap();
        for key in 0..40 {
            cx.publish(&format!("k{key}"), n).await;
        }
        cx.publish("bad", n).await;
        cx.until_rows(1, "EVToutbox_blocked").await;
        for sql in Db::shifted(-jump) {
            cx.run(&sql).await;
        }
        for key in 0..40 {
            cx.publish(&format!("k{key}"), n + 1).await;
        }
        cx.broker.on("bad", None);
        let began = Instant::now();
        cx.until_empty().await;
        assert!(began.elapsed() < SOON, "{jump} s: it took {:?}", began.elapsed());
        relay.stop().await;
        dead.close().await;
        cx.run("DELETE FROM EVToutbox_relay").await;
    }
    let firsts = cx.broker.firsts();
    assert!(firsts.len() == 41 && firsts.values().all(|of_key| of_key.is_sorted()), "{firsts:?}");
}

/// For a minute nothing that is removed can be vacuumed: what a relay reads from its floor on stays as little as it was.
pub(crate) async fn a_snapshot_that_is_held_costs_a_relay_nothing(cx: Cx<Postgres>) {
    const HELD: Duration = Duration::from_secs(60);
    let mut held = cx.pool.begin().await.unwrap();
    let snapshot = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class";
    Postgres::run(&mut held, snapshot.to_owned()).await.unwrap();
    let relay = cx.relay().await;
    let (began, mut n) = (Instant::now(), 0);
    while began.elapsed() < HELD {
        let mut tx = cx.outbox.begin().await.unwrap();
        for key in 0..200 {
            tx.publish_envelope(&cx.topic, cx.event(&format!("k{key}"), n)).unwrap();
        }
        tx.commit().await.unwrap();
        n += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cx.until_empty().await;
    let firsts = cx.broker.firsts();
    assert!(firsts.len() == 200 && firsts.values().all(|of_key| of_key.iter().copied().eq(0..n)));
    relay.stop().await;
    // One event waits; a store that has worked knows from where to read, and one that begins looks at everything.
    cx.publish("late", 1).await;
    let claim = Claim::new((0..64).map(outbox::Shard).collect(), 500, 1 << 20);
    let claiming = async |store: &dyn Store| {
        let began = Instant::now();
        assert_eq!(store.claim(&claim).await.unwrap().len(), 1);
        began.elapsed()
    };
    let worked = cx.store().await;
    for _ in 0..10 {
        claiming(&*worked).await;
        tokio::time::sleep(Duration::from_millis(120)).await;
    }
    let (mut with_floor, mut without_floor) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        with_floor.push(claiming(&*worked).await);
        let fresh = cx.store().await;
        // It connects.
        fresh.identity().await.unwrap();
        without_floor.push(claiming(&*fresh).await);
        fresh.close().await;
    }
    with_floor.sort_unstable();
    without_floor.sort_unstable();
    let (with_floor, without_floor) = (with_floor[4], without_floor[4]);
    println!("{} dead rows: a claim takes {with_floor:?} with a floor, {without_floor:?} without", n * 200);
    assert!(with_floor * 3 < without_floor, "{with_floor:?} with a floor, {without_floor:?} without");
    worked.close().await;
    held.rollback().await.unwrap();
}

/// What waits, is blocked and is set aside is there after a copy is brought back, and goes on where it stood.
async fn goes_on_from_a_copy<Db: Home>(cx: Cx<Db>, copy: impl AsyncFnOnce(Cx<Db>) -> Cx<Db>) {
    let relay = cx.relay().await;
    cx.publish("a", 1).await;
    cx.until_empty().await;
    let before: i64 = cx.broker.seen()[0].seq;
    cx.broker.on("bad", Does::Refuses(ErrorKind::Full));
    cx.publish("bad", 1).await;
    cx.until_rows(1, "EVToutbox_blocked").await;
    relay.stop().await;
    for n in 2..5 {
        cx.publish("a", n).await;
        cx.publish("bad", n).await;
        cx.publish("aside", n).await;
    }
    let operator = cx.outbox.operator();
    let entries = operator.entries(outbox::Which::Pending, None, Duration::ZERO, 100).await.unwrap();
    let ids: BTreeMap<i64, String> = entries.iter().map(|entry| (entry.id, entry.event_id.clone())).collect();
    let aside = entries.iter().find(|entry| entry.key.as_deref() == Some("6173696465")).unwrap().id;
    assert!(operator.park(outbox::RowId(aside), "it can wait").await.unwrap());

    let cx = copy(cx).await;
    let relay = cx.relay().await;
    cx.until_empty().await;
    cx.until_rows(0, "EVToutbox_blocked").await;
    let seen = cx.broker.seen();
    assert_eq!((seen.len(), cx.number("SELECT count(*) FROM EVToutbox_parked").await), (9, 1));
    for seen in &seen {
        assert_eq!(seen.id.replace('-', ""), ids[&seen.seq], "another id");
    }
    assert_eq!(cx.broker.firsts()["bad"], [1, 2, 3, 4]);
    // Numbers go on.
    cx.publish("a", 5).await;
    cx.until_empty().await;
    let last = cx.broker.seen().last().unwrap().seq;
    assert!(last > before && ids.keys().all(|id| last > *id), "{last} after {ids:?}");
    relay.stop().await;
}

pub(crate) mod copies {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;
    use std::process::{Command, Stdio};

    use xtask::brokers::{Broker, Kind, postgres_program};

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn sqlite_goes_on_from_a_copy() {
        let cx = Cx::<sqlx::Sqlite>::open().await;
        goes_on_from_a_copy(cx, async |cx| {
            let folder = tempfile::tempdir().unwrap();
            let copy = folder.path().join("copy.db");
            cx.run(&format!("VACUUM INTO '{}'", copy.display())).await;
            let options = sqlx::sqlite::SqliteConnectOptions::new()
                .filename(copy)
                .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal);
            let pool = sqlx::sqlite::SqlitePoolOptions::new().connect_with(options).await.unwrap();
            Cx::on(pool, Namespace::default(), Box::new(folder)).await
        })
        .await;
    }

    /// A server of its own.
    fn server(folder: &Path) -> Broker {
        std::fs::create_dir(folder).unwrap();
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
        Broker::start_in(folder, Kind::Postgres).unwrap()
    }

    async fn on(server: Broker, folder: Box<tempfile::TempDir>) -> Cx<Postgres> {
        let pool = sqlx::postgres::PgPoolOptions::new().max_connections(12);
        let pool = pool.connect(server.url()).await.unwrap();
        Cx::on(pool, Namespace::default(), Box::new((server, folder))).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn postgres_goes_on_from_a_dump() {
        let folder = Box::new(tempfile::tempdir().unwrap());
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let (first, second) = tokio::task::block_in_place(|| {
            (server(&folder.path().join("first")), server(&folder.path().join("second")))
        });
        let from = first.url().to_owned();
        let cx = on(first, Box::new(tempfile::tempdir().unwrap())).await;
        goes_on_from_a_copy(cx, async move |_first| {
            let to = second.url().to_owned();
            tokio::task::block_in_place(|| {
                let mut dump = Command::new(postgres_program("pg_dump").unwrap())
                    .args(["--schema=evt", &from])
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap();
                let restored = Command::new(postgres_program("psql").unwrap())
                    .args(["--quiet", "--set=ON_ERROR_STOP=1", &to])
                    .stdin(dump.stdout.take().unwrap())
                    .stdout(Stdio::null())
                    .status();
                assert!(dump.wait().unwrap().success() && restored.unwrap().success());
            });
            on(second, folder).await
        })
        .await;
    }
}

/// After a restore of something older, numbers are given out again: under another name, as operators are told to do.
pub(crate) async fn a_name_that_is_given_up_is_another_one<Db: Home>(cx: Cx<Db>) {
    let store = cx.store().await;
    let before = store.identity().await.unwrap();
    assert_eq!(cx.store().await.identity().await.unwrap(), before);
    cx.run("DELETE FROM EVTmeta WHERE name = 'identity'").await;
    let outbox =
        Outbox::with_options(cx.pool.clone(), Options::default().with_namespace(cx.namespace.clone()));
    assert_ne!(outbox.store().await.unwrap().identity().await.unwrap(), before);
    store.close().await;
}
