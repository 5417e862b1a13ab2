//! Transactions of one process share a file of SQLite: those that wait for each other are committed together, and none is
//! told what became of another.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use eventbus::ErrorKind;
use outbox::{Options, Outbox};
use sqlx::Sqlite;
use sqlx::sqlite::{SqlitePoolOptions, SqliteSynchronous};

use crate::home::Cx;

type Home = Cx<Sqlite>;

async fn insert(outbox: &Outbox<Sqlite>, n: i64) -> eventbus::Result<outbox::Transaction<Sqlite>> {
    let mut tx = outbox.begin().await?;
    sqlx::query("INSERT INTO w VALUES (?)").bind(n).execute(&mut *tx).await.unwrap();
    Ok(tx)
}

/// Many at once need few syncs, and one alone does not wait for others.
pub(crate) async fn commits_are_shared(cx: Home) {
    cx.run("CREATE TABLE w (n INTEGER PRIMARY KEY)").await;
    let n_commits = Arc::new(AtomicU64::new(0));
    let counted = n_commits.clone();
    let pool = SqlitePoolOptions::new().after_connect(move |connection, _| {
        let counted = counted.clone();
        Box::pin(async move {
            connection.lock_handle().await?.set_commit_hook(move || {
                counted.fetch_add(1, Ordering::Relaxed);
                true
            });
            Ok(())
        })
    });
    let outbox = Outbox::new(pool.connect_with((*cx.pool.connect_options()).clone()).await.unwrap());
    for n in 0..20 {
        insert(&outbox, n).await.unwrap().commit().await.unwrap();
    }
    assert_eq!(n_commits.swap(0, Ordering::Relaxed), 20, "one after the other");
    let all: Vec<_> = (20..1_020)
        .map(|n| {
            let outbox = outbox.clone();
            tokio::spawn(async move { insert(&outbox, n).await.unwrap().commit().await.unwrap() })
        })
        .collect();
    for one in all {
        one.await.unwrap();
    }
    let n_commits = n_commits.load(Ordering::Relaxed);
    println!("1,000 transactions in {n_commits} commits");
    assert!(n_commits <= 200, "1,000 at once took {n_commits} commits");
    assert_eq!(cx.number("SELECT count(*) FROM w").await, 1_020);
}

/// What is rolled back, dropped, given up in the middle or refused changes nothing for its neighbours.
pub(crate) async fn neighbours_go_their_own_ways(cx: Home) {
    cx.run("CREATE TABLE w (n INTEGER PRIMARY KEY)").await;
    let all: Vec<_> = (0..600_i64)
        .map(|n| {
            let outbox = cx.outbox.clone();
            tokio::spawn(async move {
                let mut tx = insert(&outbox, n).await.unwrap();
                match n % 6 {
                    0 => tx.rollback().await.unwrap(),
                    1 => drop(tx),
                    2 => {
                        // A number that is there: the statement fails, and the user goes.
                        let again = sqlx::query("INSERT INTO w VALUES (?)").bind(n).execute(&mut *tx).await;
                        again.unwrap_err();
                    }
                    3 => {
                        // In the middle of a statement.
                        let slow = sqlx::query("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 20000) SELECT count(*) FROM c");
                        let slow = slow.execute(&mut *tx);
                        _ = tokio::time::timeout(Duration::from_micros(300), slow).await;
                    }
                    _ => tx.commit().await.unwrap(),
                }
            })
        })
        .collect();
    for one in all {
        one.await.unwrap();
    }
    // Whoever was dropped may still be on their way back.
    insert(&cx.outbox, 600).await.unwrap().commit().await.unwrap();
    let wrong = "SELECT count(*) FROM w WHERE n < 600 AND n % 6 < 4";
    assert_eq!(cx.number(wrong).await, 0);
    assert_eq!(cx.number("SELECT count(*) FROM w").await, 201);
}

/// One that waits for its turn, works or commits, and whose task is ended there, leaves nobody behind.
pub(crate) async fn who_goes_away_leaves_nobody_behind(cx: Home) {
    cx.run("CREATE TABLE w (n INTEGER PRIMARY KEY)").await;
    let told = Arc::new(AtomicU64::new(0));
    for round in 0..60_i64 {
        let all: Vec<_> = (0..20)
            .map(|n| {
                let (outbox, told, n) = (cx.outbox.clone(), told.clone(), round * 20 + n);
                tokio::spawn(async move {
                    insert(&outbox, n).await.unwrap().commit().await.unwrap();
                    told.fetch_add(1, Ordering::Relaxed);
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_micros(fastrand::u64(100..4_000))).await;
        all.iter().skip(1).step_by(2).for_each(tokio::task::JoinHandle::abort);
        for one in all.into_iter().step_by(2) {
            let one = tokio::time::timeout(Duration::from_secs(5), one).await;
            assert!(matches!(one, Ok(Ok(()))), "nobody committed for one who waits: {one:?}");
        }
    }
    let (told, there) = (told.load(Ordering::Relaxed), cx.number("SELECT count(*) FROM w").await);
    assert!(told >= 600 && there >= i64::try_from(told).unwrap(), "{told} were told, {there} are there");
}

/// A constraint that is checked at the commit is the fault of one, and becomes nobody else's.
pub(crate) async fn a_commit_that_fails_is_told_to_the_one(cx: Home) {
    cx.run("CREATE TABLE p (id INTEGER PRIMARY KEY)").await;
    cx.run("CREATE TABLE c (n INTEGER, p INTEGER REFERENCES p DEFERRABLE INITIALLY DEFERRED)").await;
    let attempts = Arc::new(AtomicU64::new(0));
    let work = async |outbox: Outbox<Sqlite>, attempts: Arc<AtomicU64>, n: i64| loop {
        attempts.fetch_add(1, Ordering::Relaxed);
        let mut tx = outbox.begin().await.unwrap();
        let parent = (n == 25).then_some(7);
        sqlx::query("INSERT INTO c VALUES (?, ?)").bind(n).bind(parent).execute(&mut *tx).await.unwrap();
        match tx.commit().await {
            Err(error) if error.is_retryable() => {}
            done => return done,
        }
    };
    let all: Vec<_> = (0..50).map(|n| tokio::spawn(work(cx.outbox.clone(), attempts.clone(), n))).collect();
    for (n, one) in all.into_iter().enumerate() {
        let done = one.await.unwrap();
        assert_eq!(done.is_ok(), n != 25, "{n}: {done:?}");
    }
    // Those that failed together are committed alone, so that nobody meets that one again.
    let attempts = attempts.load(Ordering::Relaxed);
    assert!(attempts <= 100, "{attempts} attempts");
    assert_eq!(cx.number("SELECT count(DISTINCT n) FROM c").await, 49);
    assert_eq!(cx.number("SELECT count(*) FROM c").await, 49);
}

/// A user who ends the transaction by hand takes it from under everybody: nobody is told that it was committed.
pub(crate) async fn a_transaction_ended_by_hand_is_nobodys(cx: Home) {
    cx.run("CREATE TABLE w (n INTEGER PRIMARY KEY)").await;
    let all: Vec<_> = (0..200_i64)
        .map(|n| {
            let outbox = cx.outbox.clone();
            tokio::spawn(async move {
                let mut tx = insert(&outbox, n).await.unwrap();
                if n % 20 == 3 {
                    sqlx::raw_sql("ROLLBACK").execute(&mut *tx).await.unwrap();
                }
                (n, tx.commit().await)
            })
        })
        .collect();
    let (mut told, mut refused) = (Vec::new(), 0);
    for one in all {
        match one.await.unwrap() {
            (n, Ok(())) => told.push(n),
            (n, Err(error)) if n % 20 != 3 => {
                assert!(error.is_retryable(), "{error}");
                refused += 1;
            }
            _ => {}
        }
    }
    println!("{} told, {refused} neighbours refused", told.len());
    assert!(told.iter().all(|n| n % 20 != 3));
    let there = cx.number("SELECT count(*) FROM w").await;
    assert_eq!(there, i64::try_from(told.len()).unwrap(), "what was told is there, and nothing else");
    insert(&cx.outbox, 1_000).await.unwrap().commit().await.unwrap();
}

/// What was told could be lost with the power.
pub(crate) async fn a_connection_that_does_not_sync_is_refused(cx: Home) {
    let options = (*cx.pool.connect_options()).clone().synchronous(SqliteSynchronous::Normal);
    let pool = SqlitePoolOptions::new().connect_with(options).await.unwrap();
    let outbox = Outbox::with_options(pool.clone(), Options::default());
    assert_eq!(outbox.begin().await.unwrap_err().kind(), ErrorKind::Config);
    let mut own = pool.begin().await.unwrap();
    let refused = outbox.publish_all(&mut own, [(cx.topic.clone(), cx.event("a", 1))]).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Config);
}

/// A transaction inside of one's own that does not begin takes the outer one along, and leaves nothing open behind.
pub(crate) async fn one_inside_that_does_not_begin_leaves_nothing_open(cx: Home) {
    use sqlx::Connection as _;
    cx.run("CREATE TABLE w (n INTEGER PRIMARY KEY)").await;
    for round in 0..20 {
        let mut tx = insert(&cx.outbox, 2 * round).await.unwrap();
        assert!(tx.begin_with("BEGIN IMMEDIATE").await.is_err());
        tx.publish_envelope(&cx.topic, cx.event("a", round)).unwrap();
        assert!(tx.commit().await.is_err());
        // One that is given up while it begins.
        let mut tx = insert(&cx.outbox, 2 * round + 1).await.unwrap();
        _ = tokio::time::timeout(Duration::from_micros(fastrand::u64(0..60)), tx.begin()).await;
        _ = tx.rollback().await;
    }
    assert_eq!(cx.n_stored().await, 0, "an event of a transaction that is none");
    // Every connection of the pool is free, and writes for good.
    for n in 0..30 {
        let mut all = Vec::new();
        for _ in 0..6 {
            all.push(cx.pool.acquire().await.unwrap());
        }
        for connection in &mut all {
            let began = connection.begin_with("BEGIN IMMEDIATE").await.unwrap();
            began.rollback().await.unwrap();
        }
        drop(all);
        insert(&cx.outbox, 1_000 + n).await.unwrap().commit().await.unwrap();
    }
    assert_eq!(cx.number("SELECT count(*) FROM w").await, 30);
}

/// What a transaction read of its neighbours before it was given up is committed when it returns.
pub(crate) async fn what_was_read_before_a_rollback_is_true(cx: Home) {
    cx.run("CREATE TABLE w (n INTEGER PRIMARY KEY)").await;
    let holder = cx.outbox.begin().await.unwrap();
    let writer = tokio::spawn({
        let outbox = cx.outbox.clone();
        async move { insert(&outbox, 1).await.unwrap().commit().await.unwrap() }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut readers = Vec::new();
    for _ in 0..5 {
        let (outbox, pool) = (cx.outbox.clone(), cx.pool.clone());
        readers.push(tokio::spawn(async move {
            let mut tx = outbox.begin().await.unwrap();
            let seen: i64 = sqlx::query_scalar("SELECT count(*) FROM w").fetch_one(&mut *tx).await.unwrap();
            tx.rollback().await.unwrap();
            let stored: i64 = sqlx::query_scalar("SELECT count(*) FROM w").fetch_one(&pool).await.unwrap();
            assert!(stored >= seen, "{seen} were seen, and {stored} are stored");
        }));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    holder.rollback().await.unwrap();
    writer.await.unwrap();
    for reader in readers {
        reader.await.unwrap();
    }
}
