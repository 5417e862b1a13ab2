//! Transactions that publish into a bus in the same file, with nobody between them.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use eventbus::transport::sqlite::{Options as BusOptions, Sqlite as SqliteBus};
use eventbus::{
    Bus, Envelope, ErrorKind, Event, EventId, Failure, Offset, Service, Topic, TopicSpec, Transport as _,
    Typed,
};
use outbox::{Inbox, Memory, Namespace, Options, Outbox, Relay, Tx};
use serde::{Deserialize, Serialize};
use sqlx::Sqlite;

use crate::home::{Cx, Home, SOON};

/// The file of a test, with a bus in it.
struct Shared {
    cx: Cx<Sqlite>,
    bus: Bus,
    file: SqliteBus,
}

async fn path(cx: &Cx<Sqlite>) -> String {
    let path = sqlx::query_scalar("SELECT file FROM pragma_database_list WHERE name = 'main'");
    path.fetch_one(&cx.pool).await.unwrap()
}

impl Shared {
    async fn of(cx: Cx<Sqlite>) -> Self {
        Self::with(cx, BusOptions::default()).await
    }

    async fn with(cx: Cx<Sqlite>, options: BusOptions) -> Self {
        let file = SqliteBus::open_path(path(&cx).await, options).await.unwrap();
        Self { cx, bus: Bus::new(file.clone()), file }
    }

    async fn relay(&self) -> outbox::Relaying {
        Relay::new(&self.cx.outbox).with_lease(Duration::from_secs(5)).start(&self.bus).await.unwrap()
    }

    /// What a topic holds, partition by partition: a hole would be an error.
    async fn events(&self, topic: &Topic) -> Vec<Envelope> {
        let admin = self.file.admin().unwrap();
        let Some(info) = admin.topic(topic).await.unwrap() else { return Vec::new() };
        let mut found = Vec::new();
        for partition in &info.partitions {
            assert_eq!(partition.first, Offset(0));
            let records = admin.read(topic, partition.partition, Offset(0), 10_000).await.unwrap();
            assert_eq!(records.len() as u64, partition.next.0, "there are as many as numbers were given out");
            found.extend(records.iter().map(|record| record.content.envelope().unwrap().clone()));
        }
        found
    }

    /// The numbers of each key, in the order of the topic.
    async fn numbers(&self) -> BTreeMap<String, Vec<i64>> {
        let mut numbers: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for event in self.events(&self.cx.topic).await {
            let n = std::str::from_utf8(event.payload().unwrap()).unwrap().parse().unwrap();
            let numbers = numbers.entry(event.key().unwrap().to_string()).or_default();
            // A relay may publish one twice.
            if !numbers.contains(&n) {
                numbers.push(n);
            }
        }
        numbers
    }

    async fn until_published(&self, key: &str, numbers: &[i64]) {
        let waiting = async {
            while self.numbers().await.get(key).is_none_or(|found| found != numbers) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let outcome = tokio::time::timeout(SOON, waiting).await;
        assert!(outcome.is_ok(), "{key} has {:?}", self.numbers().await.get(key));
    }
}

pub(crate) async fn what_is_committed_is_in_its_topic(cx: Cx<Sqlite>) {
    let shared = Shared::of(cx).await;
    let cx = &shared.cx;
    assert!(cx.outbox.publish_into(&shared.bus).await.unwrap());
    assert!(cx.outbox.clone().publish_into(&shared.bus).await.unwrap(), "it may be said again");
    let mut tx = cx.outbox.begin().await.unwrap();
    for (key, n) in [("a", 1), ("b", 1), ("a", 2)] {
        tx.publish_envelope(&cx.topic, cx.event(key, n)).unwrap();
    }
    let other = Topic::new("other").unwrap();
    tx.publish_envelope(&other, Envelope::new("test.bare", "/test").with_id(EventId::parse("of ours")))
        .unwrap();
    tx.flush().await.unwrap();
    assert_eq!(shared.events(&cx.topic).await, []);
    tx.commit().await.unwrap();
    let expected = BTreeMap::from([("a".to_owned(), vec![1, 2]), ("b".to_owned(), vec![1])]);
    assert_eq!((shared.numbers().await, cx.n_stored().await), (expected, 0));
    assert_eq!(shared.events(&other).await[0].id().to_string(), "of ours");
    // What handlers with `Memory::Sequences` go by: one source, and numbers that ascend along each key.
    let identity = cx.outbox.store().await.unwrap().identity().await.unwrap();
    let mut marks = Vec::new();
    for event in shared.events(&cx.topic).await {
        assert_eq!(event.extension("evt-source"), Some(identity.as_str()));
        marks.push((
            event.key().unwrap().to_string(),
            event.extension("evt-seq").unwrap().parse::<i64>().unwrap(),
        ));
    }
    marks.sort();
    assert!(marks.windows(2).all(|pair| pair[0] < pair[1]), "{marks:?}");
    // Many in one transaction are as many statements as it takes.
    let mut tx = cx.outbox.begin().await.unwrap();
    (1..=103).for_each(|n| tx.publish_envelope(&cx.topic, cx.event("many", n)).unwrap());
    tx.commit().await.unwrap();
    assert_eq!(shared.numbers().await["many"], (1..=103).collect::<Vec<_>>());
}

/// Places that were given out and given back are given out again: there are no holes, whoever publishes next.
pub(crate) async fn what_is_rolled_back_leaves_no_hole(cx: Cx<Sqlite>) {
    let shared = Arc::new(Shared::of(cx).await);
    assert!(shared.cx.outbox.publish_into(&shared.bus).await.unwrap());
    let tasks: Vec<_> = (0..40)
        .map(|n: i64| {
            let shared = shared.clone();
            tokio::spawn(async move {
                let cx = &shared.cx;
                let mut tx = cx.outbox.begin().await.unwrap();
                tx.publish_envelope(&cx.topic, cx.event("k", n)).unwrap();
                tx.flush().await.unwrap();
                match n % 4 {
                    0 => tx.rollback().await.unwrap(),
                    1 => drop(tx),
                    _ => tx.commit().await.unwrap(),
                }
                let publisher = shared.bus.publisher().await.unwrap();
                publisher.publish_envelope(&cx.topic, cx.event("k", 100 + n)).await.unwrap();
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let mut found = shared.numbers().await["k"].clone();
    found.sort_unstable();
    let expected: Vec<i64> = (0..40).filter(|n| n % 4 > 1).chain(100..140).collect();
    assert_eq!(found, expected);
}

pub(crate) async fn what_waits_in_the_outbox_goes_first(cx: Cx<Sqlite>) {
    let shared = Shared::of(cx).await;
    let cx = &shared.cx;
    cx.publish("k", 1).await;
    assert!(cx.outbox.publish_into(&shared.bus).await.unwrap());
    cx.publish("k", 2).await;
    assert_eq!(cx.n_stored().await, 2, "the second is behind the first");
    let relay = shared.relay().await;
    shared.until_published("k", &[1, 2]).await;
    cx.until_empty().await;
    relay.stop().await;
    cx.publish("k", 3).await;
    assert_eq!((shared.numbers().await["k"].clone(), cx.n_stored().await), (vec![1, 2, 3], 0));
}

pub(crate) async fn a_bus_elsewhere_is_left_to_relays(cx: Cx<Sqlite>) {
    assert!(!cx.outbox.publish_into(&cx.bus).await.unwrap(), "in memory");
    let folder = tempfile::tempdir().unwrap();
    let elsewhere =
        Bus::new(SqliteBus::open_path(folder.path().join("bus.db"), BusOptions::default()).await.unwrap());
    assert!(!cx.outbox.publish_into(&elsewhere).await.unwrap(), "in another file");
    cx.publish("k", 1).await;
    assert_eq!(cx.n_stored().await, 1);
    let shared = Shared::of(cx).await;
    assert!(shared.cx.outbox.publish_into(&shared.bus).await.unwrap());
    let another =
        Bus::new(SqliteBus::open_path(path(&shared.cx).await, BusOptions::default()).await.unwrap());
    let error = shared.cx.outbox.publish_into(&another).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
}

/// What is remembered of a topic is looked at: it may be another one by now, or none.
pub(crate) async fn a_topic_that_is_made_anew_is_noticed(cx: Cx<Sqlite>) {
    let shared = Shared::of(cx).await;
    let (cx, admin) = (&shared.cx, shared.file.admin().unwrap());
    assert!(cx.outbox.publish_into(&shared.bus).await.unwrap());
    let steady = Topic::new("steady").unwrap();
    let publish = async |n: i64| {
        let mut tx = cx.outbox.begin().await.unwrap();
        // Places in this one are given out by then.
        tx.publish_envelope(&steady, cx.event("k", n)).unwrap();
        (0..30).for_each(|key| tx.publish_envelope(&cx.topic, cx.event(&key.to_string(), n)).unwrap());
        tx.commit().await.unwrap();
    };
    // One that made the topic is undone.
    let mut tx = cx.outbox.begin().await.unwrap();
    tx.publish_envelope(&cx.topic, cx.event("k", 1)).unwrap();
    tx.flush().await.unwrap();
    tx.rollback().await.unwrap();
    publish(1).await;
    for (n, partitions) in [(2, 40), (3, 3)] {
        admin.delete_topic(&cx.topic).await.unwrap();
        let spec = TopicSpec::new(cx.topic.clone()).with_partitions(NonZeroU32::new(partitions).unwrap());
        admin.declare(&spec).await.unwrap();
        publish(n).await;
        publish(n + 10).await;
        let numbers = shared.numbers().await;
        assert!(
            numbers.len() == 30 && numbers.values().all(|numbers| *numbers == [n, n + 10]),
            "{numbers:?}"
        );
        let info = admin.topic(&cx.topic).await.unwrap().unwrap();
        assert_eq!(info.partitions.len() as u32, partitions);
    }
    admin.delete_topic(&cx.topic).await.unwrap();
    publish(4).await;
    assert_eq!((shared.numbers().await.len(), shared.events(&steady).await.len()), (30, 6));
}

/// A bound of the bus is none of the business: its transactions go on, and their events wait.
pub(crate) async fn a_bus_without_room_is_waited_for(cx: Cx<Sqlite>) {
    let shared = Shared::of(cx).await;
    let cx = &shared.cx;
    assert!(cx.outbox.publish_into(&shared.bus).await.unwrap());
    cx.publish("k", 1).await;
    shared.file.set_max_file_bytes(Some(4096)).unwrap();
    cx.publish("k", 2).await;
    assert_eq!(cx.n_stored().await, 1);
    let relay = shared.relay().await;
    cx.until_rows(1, "EVToutbox_blocked").await;
    shared.file.set_max_file_bytes(None).unwrap();
    shared.until_published("k", &[1, 2]).await;
    cx.until_empty().await;
    relay.stop().await;
}

/// One that is too large for the bus is refused before the commit, and nothing of it is left in a transaction of one's own.
pub(crate) async fn what_is_too_large_for_the_bus_is_refused(cx: Cx<Sqlite>) {
    let small = BusOptions::from_url(&"sqlite://x?max_event_bytes=1000".parse().unwrap()).unwrap();
    let shared = Shared::with(cx, small).await;
    let cx = &shared.cx;
    assert!(cx.outbox.publish_into(&shared.bus).await.unwrap());
    let large = cx.event("k", 2).with_payload(vec![7; 1200]);
    let mut own = cx.pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let both = [(cx.topic.clone(), cx.event("k", 1)), (cx.topic.clone(), large)];
    let error = cx.outbox.publish_all(&mut own, both).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    cx.outbox.publish_all(&mut own, [(cx.topic.clone(), cx.event("k", 3))]).await.unwrap();
    own.commit().await.unwrap();
    cx.outbox.wake();
    assert_eq!((shared.numbers().await["k"].clone(), cx.n_stored().await), (vec![3], 0));
}

pub(crate) async fn a_published_commit_can_be_asked_for(cx: Cx<Sqlite>) {
    let shared = Shared::of(cx).await;
    let cx = &shared.cx;
    assert!(cx.outbox.publish_into(&shared.bus).await.unwrap());
    let mut tx = cx.outbox.begin().await.unwrap();
    tx.publish_envelope(&cx.topic, cx.event("k", 1)).unwrap();
    let gone = tx.flush().await.unwrap().unwrap();
    assert_eq!(cx.outbox.resolve(gone).await.unwrap(), None);
    tx.rollback().await.unwrap();
    assert_eq!(cx.outbox.resolve(gone).await.unwrap(), None);
    let mut tx = cx.outbox.begin().await.unwrap();
    tx.publish_envelope(&cx.topic, cx.event("k", 2)).unwrap();
    let there = tx.flush().await.unwrap().unwrap();
    tx.commit().await.unwrap();
    assert_eq!(cx.outbox.resolve(there).await.unwrap(), Some(true));
    assert_eq!(cx.outbox.resolve(gone).await.unwrap(), Some(false), "another one is in its place");
}

#[derive(Debug, Clone, Event, Serialize, Deserialize)]
#[event(type = "test.asked", version = 1, key = key)]
struct Asked {
    key: String,
}

#[derive(Debug, Clone, Event, Serialize, Deserialize)]
#[event(type = "test.answered", version = 1, key = key)]
struct Answered {
    key: String,
}

async fn answer(mut tx: Tx<Sqlite>, Typed(asked): Typed<Asked>) -> Result<(), Failure> {
    sqlx::query("INSERT INTO answers VALUES (?)").bind(&asked.key).execute(&mut *tx).await?;
    tx.publish(&Topic::new("answers")?, &Answered { key: asked.key })?;
    Ok(())
}

/// A chain of handlers without a relay: each step is committed with the event that begins the next one.
pub(crate) async fn handlers_publish_into_their_bus(cx: Cx<Sqlite>) {
    const N_KEYS: usize = 30;
    let shared = Shared::of(cx).await;
    let cx = &shared.cx;
    cx.run("CREATE TABLE answers (key TEXT)").await;
    assert!(cx.outbox.publish_into(&shared.bus).await.unwrap());
    let inbox = Inbox::with_memory(&cx.outbox, Memory::Sequences);
    let service = Service::new("answering").on(cx.topic.clone(), answer).with_state(inbox);
    let service = service.start(&shared.bus).await.unwrap();
    for n in 0..N_KEYS {
        let mut tx = cx.outbox.begin().await.unwrap();
        tx.publish(&cx.topic, &Asked { key: n.to_string() }).unwrap();
        tx.commit().await.unwrap();
    }
    cx.until_rows(N_KEYS as i64, "answers").await;
    service.stop().await.unwrap();
    let answers = shared.events(&Topic::new("answers").unwrap()).await;
    assert_eq!((answers.len(), cx.n_stored().await), (N_KEYS, 0));
}

/// Writers that publish by themselves beside writers that do not, and relays of these; each key counts. Returns what is wrong.
async fn meet(cx: Cx<Sqlite>, apart: bool) -> Vec<String> {
    const N_KEYS: i64 = 4;
    const N_EACH: i64 = 40;
    let shared = Arc::new(Shared::of(cx).await);
    let cx = &shared.cx;
    cx.run("CREATE TABLE counter (k INTEGER PRIMARY KEY, n INTEGER NOT NULL)").await;
    let counters: Vec<String> = (0..N_KEYS).map(|key| format!("({key}, 0)")).collect();
    cx.run(&format!("INSERT INTO counter VALUES {}", counters.join(", "))).await;
    // As another program that does not publish into the bus; apart = one with an outbox of its own.
    let namespace = if apart { Namespace::new("apart").unwrap() } else { cx.namespace.clone() };
    let other = Outbox::with_options(cx.pool.clone(), Options::default().with_namespace(namespace));
    other.migrate().await.unwrap();
    assert!(cx.outbox.publish_into(&shared.bus).await.unwrap());
    let mut relays = Vec::new();
    for _ in 0..2 {
        relays.push(Relay::new(&other).with_lease(Duration::from_secs(5)).start(&shared.bus).await.unwrap());
    }
    let writers: Vec<_> = (0..6)
        .map(|writer: u64| {
            let shared = shared.clone();
            let outbox = if writer.is_multiple_of(2) { shared.cx.outbox.clone() } else { other.clone() };
            tokio::spawn(async move {
                let mut random = fastrand::Rng::with_seed(writer);
                for _ in 0..N_EACH {
                    let key = random.i64(0..N_KEYS);
                    let mut tx = outbox.begin().await.unwrap();
                    let sql = format!("UPDATE counter SET n = n + 1 WHERE k = {key} RETURNING n");
                    let n = Sqlite::number(&mut tx, sql).await.unwrap();
                    tx.publish_envelope(&shared.cx.topic, shared.cx.event(&key.to_string(), n)).unwrap();
                    match random.u8(..8) {
                        0 => tx.rollback().await.unwrap(),
                        _ => tx.commit().await.unwrap(),
                    }
                    tokio::time::sleep(Duration::from_millis(random.u64(..4))).await;
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let waiting = format!("SELECT count(*) FROM {}outbox", if apart { "apart_" } else { "EVT" });
    let empty = async {
        while cx.number(&waiting).await > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, empty).await.unwrap();
    for relay in relays {
        relay.stop().await;
    }
    let mut wrong = Vec::new();
    for (key, numbers) in shared.numbers().await {
        let last = cx.number(&format!("SELECT n FROM counter WHERE k = {key}")).await;
        let mut sorted = numbers.clone();
        sorted.sort_unstable();
        if sorted != (1..=last).collect::<Vec<_>>() {
            wrong.push(format!("{key}: lost or invented: {numbers:?} of {last}"));
        }
        if !numbers.is_sorted() {
            wrong.push(format!("{key}: overtaken: {numbers:?}"));
        }
    }
    wrong
}

pub(crate) async fn writers_of_both_kinds_keep_the_order(cx: Cx<Sqlite>) {
    assert_eq!(meet(cx, false).await, Vec::<String>::new());
}

/// What the case above is worth: writers that do not see what waits in the outbox of others overtake it.
pub(crate) async fn writers_that_see_nothing_of_the_outbox_are_found(cx: Cx<Sqlite>) {
    let wrong = meet(cx, true).await;
    assert!(wrong.iter().any(|wrong| wrong.contains("overtaken")), "{wrong:?}");
}
