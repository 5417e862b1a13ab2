//! Relays of other processes hear of commits, and no commit waits for that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox::{Options, Outbox, Store};
use sqlx::Postgres;
use sqlx::postgres::PgListener;

use crate::home::{Cx, SOON};

/// For how long it must stay silent.
const SILENT: Duration = Duration::from_millis(500);

/// An outbox as another process has it.
fn elsewhere(cx: &Cx<Postgres>, doorbell: bool) -> Outbox<Postgres> {
    let options = Options::default().with_namespace(cx.namespace.clone()).with_doorbell(doorbell);
    Outbox::with_options(cx.pool.clone(), options)
}

async fn commit(cx: &Cx<Postgres>, outbox: &Outbox<Postgres>, n: i64) {
    let mut tx = outbox.begin().await.unwrap();
    tx.publish_envelope(&cx.topic, cx.event("a", n)).unwrap();
    tx.commit().await.unwrap();
}

/// A listener in place.
async fn listening(cx: &Cx<Postgres>) -> PgListener {
    let mut listener = PgListener::connect_with(&cx.pool).await.unwrap();
    listener.listen(&format!("{}.outbox", cx.namespace)).await.unwrap();
    listener
}

async fn hears(listener: &mut PgListener, within: Duration) -> bool {
    tokio::time::timeout(within, listener.recv()).await.is_ok_and(|heard| heard.is_ok())
}

pub(crate) async fn a_commit_by_itself_tells_nobody(cx: Cx<Postgres>) {
    let mut listener = listening(&cx).await;
    let outbox = elsewhere(&cx, true);
    let mut transaction = cx.pool.begin().await.unwrap();
    outbox.publish_all(&mut transaction, [(cx.topic.clone(), cx.event("a", 1))]).await.unwrap();
    transaction.commit().await.unwrap();
    assert!(!hears(&mut listener, SILENT).await, "the commit took the lock of all who notify");
    outbox.wake();
    assert!(hears(&mut listener, SOON).await);
    commit(&cx, &elsewhere(&cx, false), 2).await;
    assert!(!hears(&mut listener, SILENT).await, "it was told not to");
}

pub(crate) async fn a_commit_elsewhere_is_heard(cx: Cx<Postgres>) {
    let store: Arc<dyn Store> = cx.outbox.store().await.unwrap();
    let outbox = elsewhere(&cx, true);
    // From the first news on it listens, and what comes between two calls is not missed.
    let first = tokio::spawn({
        let store = store.clone();
        async move { store.news().await }
    });
    let mut n = 0;
    while !first.is_finished() {
        n += 1;
        commit(&cx, &outbox, n).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(n < 300, "nothing is heard");
    }
    while tokio::time::timeout(SILENT, store.news()).await.is_ok() {}
    commit(&cx, &outbox, n + 1).await;
    tokio::time::sleep(SILENT).await;
    assert!(tokio::time::timeout(SOON, store.news()).await.is_ok(), "it was rung before the call");
    // A connection that ends is replaced.
    cx.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE application_name = 'outbox-relay' AND query LIKE 'LISTEN%' AND datname = current_database()",
    )
    .await;
    let again = tokio::spawn({
        let store = store.clone();
        async move { store.news().await }
    });
    let began = Instant::now();
    while !again.is_finished() {
        n += 1;
        commit(&cx, &outbox, n + 1).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(began.elapsed() < SOON, "nothing is heard again");
    }
    let began = Instant::now();
    store.close().await;
    assert!(began.elapsed() < Duration::from_secs(5), "the listener holds its connection");
}

pub(crate) async fn many_commits_ring_once(cx: Cx<Postgres>) {
    let mut listener = listening(&cx).await;
    let outbox = elsewhere(&cx, true);
    let began = Instant::now();
    for n in 0..200 {
        commit(&cx, &outbox, n).await;
    }
    let took = began.elapsed();
    let mut heard = 0;
    while hears(&mut listener, SILENT).await {
        heard += 1;
    }
    let most = took.as_millis() / 50 + 2;
    assert!(heard >= 1 && heard <= most, "rung {heard} times in {took:?}");
}
