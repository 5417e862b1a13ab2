//! Orders of one database become effects in another, over each broker, on a wire that fails: each once, and of each key in
//! its order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use eventbus::admin::TopicSpec;
use eventbus::{Envelope, Failure, Meta, Retry, Service, Topic, connect};
use eventbus_tests::brokers::behind;
use eventbus_tests::proxy::{Proxy, Wire};
use outbox::{Inbox, Outbox, Relay, Tx};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions};
use xtask::brokers::Kind;

const WRITERS: i64 = 4;
const TRANSACTIONS: i64 = 150;
const KEYS: i64 = 8;

async fn file(path: &std::path::Path) -> SqlitePool {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(20))
        .create_if_missing(true);
    SqlitePoolOptions::new().max_connections(8).connect_with(options).await.unwrap()
}

async fn apply(mut tx: Tx<sqlx::Sqlite>, Meta(event): Meta) -> Result<(), Failure> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let key = event.key().map(|key| text(key.as_bytes())).unwrap_or_default();
    let n: i64 = event.payload().map(|body| text(body)).unwrap_or_default().parse().unwrap_or(-1);
    sqlx::query("INSERT INTO effects (k, n) VALUES ($1, $2)").bind(key).bind(n).execute(&mut *tx).await?;
    Ok(())
}

/// Commits a counted event for each of its transactions, but for some that it gives up.
async fn write(outbox: Outbox<sqlx::Sqlite>, topic: Topic, writer: i64) {
    let mut random = fastrand::Rng::with_seed(writer.unsigned_abs());
    for _ in 0..TRANSACTIONS {
        let key = random.i64(0..KEYS);
        let mut tx = outbox.begin().await.unwrap();
        let sql = "UPDATE counter SET n = n + 1 WHERE k = $1 RETURNING n";
        let n: i64 = sqlx::query_scalar(sql).bind(key).fetch_one(&mut *tx).await.unwrap();
        let event =
            Envelope::new("test.counted", "/test").with_key(key.to_string()).with_payload(n.to_string());
        tx.publish_envelope(&topic, event).unwrap();
        match random.u8(..10) {
            0 => tx.rollback().await.unwrap(),
            _ => tx.commit().await.unwrap(),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Disturbs the wire until it is told to stop, and heals it.
async fn disturb(wire: Arc<Proxy>, mut stop: tokio::sync::oneshot::Receiver<()>) {
    for fault in [Wire::DropAnswers, Wire::Stall, Wire::Cut].into_iter().cycle() {
        for (state, millis) in [(Wire::Whole, 500), (fault, 300)] {
            wire.set(state);
            if state == Wire::Whole {
                // Where bytes were dropped, no connection can go on.
                wire.reset();
            }
            if tokio::time::timeout(Duration::from_millis(millis), &mut stop).await.is_ok() {
                wire.set(Wire::Whole);
                wire.reset();
                return;
            }
        }
    }
}

async fn effects_happen_once(kind: Kind) {
    let (_broker, wire, url) = behind(kind).unwrap();
    let wire = Arc::new(wire);
    let folder = tempfile::tempdir().unwrap();
    let bus = connect(&format!("{url}?declare=create&timeout=5s")).await.unwrap();
    let topic = Topic::new("orders").unwrap();
    bus.transport().admin().unwrap().declare(&TopicSpec::new(topic.clone())).await.unwrap();

    let shop = file(&folder.path().join("shop.db")).await;
    let outbox = Outbox::new(shop.clone());
    outbox.migrate().await.unwrap();
    sqlx::raw_sql("CREATE TABLE counter (k INTEGER PRIMARY KEY, n INTEGER NOT NULL)")
        .execute(&shop)
        .await
        .unwrap();
    for key in 0..KEYS {
        sqlx::query("INSERT INTO counter VALUES ($1, 0)").bind(key).execute(&shop).await.unwrap();
    }
    let books = file(&folder.path().join("books.db")).await;
    let inbox = Inbox::new(&Outbox::new(books.clone()));
    inbox.outbox().migrate().await.unwrap();
    let table = "CREATE TABLE effects (place INTEGER PRIMARY KEY AUTOINCREMENT, k TEXT, n INTEGER)";
    sqlx::raw_sql(table).execute(&books).await.unwrap();
    let retry =
        Retry::exponential(Duration::from_millis(50), Duration::from_millis(500), 20.try_into().unwrap());
    let service = Service::new("books").on(topic.clone(), apply).retry(retry).with_state(inbox);
    let service = service.start(&bus).await.unwrap();
    let mut relays = Vec::new();
    for _ in 0..2 {
        relays.push(Relay::new(&outbox).with_lease(Duration::from_secs(3)).start(&bus).await.unwrap());
    }

    let (stop, stopped) = tokio::sync::oneshot::channel();
    let nemesis = tokio::spawn(disturb(wire.clone(), stopped));
    let writers: Vec<_> =
        (0..WRITERS).map(|writer| tokio::spawn(write(outbox.clone(), topic.clone(), writer))).collect();
    for writer in writers {
        writer.await.unwrap();
    }
    drop(stop);
    nemesis.await.unwrap();

    let sql = "SELECT CAST(k AS TEXT), n FROM counter";
    let truth: BTreeMap<String, i64> =
        sqlx::query_as(sql).fetch_all(&shop).await.unwrap().into_iter().collect();
    let expected: i64 = truth.values().sum();
    let all = async {
        loop {
            let n: i64 = sqlx::query_scalar("SELECT count(*) FROM effects").fetch_one(&books).await.unwrap();
            if n >= expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let is_all = tokio::time::timeout(Duration::from_secs(60), all).await.is_ok();
    let effects: Vec<(String, i64)> =
        sqlx::query_as("SELECT k, n FROM effects ORDER BY place").fetch_all(&books).await.unwrap();
    assert!(is_all, "{} of {expected} effects; {relays:?} {:?}", effects.len(), service.counts());
    for (key, last) in truth {
        let of_key: Vec<i64> = effects.iter().filter(|(k, _)| *k == key).map(|(_, n)| *n).collect();
        assert_eq!(of_key, (1..=last).collect::<Vec<_>>(), "key {key}");
    }
    let repeated: u64 = relays.iter().map(|relay| relay.counts().failed).sum();
    println!("{kind:?}: {expected} effects, {repeated} attempts failed, {:?}", service.counts());
    for relay in relays {
        relay.stop().await;
    }
    service.stop().await.unwrap();
}

macro_rules! on_each {
    ($($name:ident $kind:ident)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            effects_happen_once(Kind::$kind).await;
        }
    )*};
}

on_each! {
    kafka Kafka
    nats Nats
    postgres Postgres
    rabbitmq Rabbitmq
    redis Redis
}
