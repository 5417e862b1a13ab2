//! The tables of the transport on PostgreSQL: brought up from an older version, and read while somebody holds a snapshot.

use std::num::NonZeroU32;

use eventbus::{
    Bus, Envelope, Group, Offset, PartitionId, Polled, Publisher, Settle, Start, Subscription, Topic,
    TopicSpec,
};
use sqlx::{Connection as _, PgConnection, Row as _};
use xtask::brokers::{Broker, Kind};

/// What version 1 had: a partition's end and a group's position in rows that were updated.
const AS_VERSION_1: &str = r#"
ALTER TABLE eventbus_partition ADD COLUMN next bigint NOT NULL DEFAULT 0, ADD COLUMN last_stored bigint NOT NULL DEFAULT 0;
UPDATE eventbus_partition p SET next = r.next FROM eventbus_range r WHERE r.topic = p.topic AND r.partition = p.partition;
UPDATE eventbus_cursor c SET floor = at.floor FROM eventbus_position at WHERE at.grp = c.grp AND at.partition = c.partition;
UPDATE eventbus_partition SET first = 0 WHERE first = next;
DROP FUNCTION eventbus_head; DROP VIEW eventbus_range, eventbus_position; DROP TABLE eventbus_settled;
UPDATE eventbus_meta SET value = '1' WHERE name = 'version';
"#;

async fn opened(url: &str, partitions: u32) -> (Bus, Topic, Box<dyn Fn(u64) -> Envelope>) {
    let bus = eventbus::connect(url).await.unwrap();
    let topic = Topic::new("orders").unwrap();
    let spec = TopicSpec::new(topic.clone()).with_partitions(NonZeroU32::new(partitions).unwrap());
    bus.transport().admin().unwrap().declare(&spec).await.unwrap();
    (bus, topic, Box::new(|n| Envelope::new("tried", "/test").with_key(format!("k{n}")).with_payload("{}")))
}

/// Handles so many events of a group; returns their places.
async fn handle(bus: &Bus, topic: &Topic, mut n: usize) -> Vec<(u32, u64)> {
    let group =
        Subscription::group(topic.clone(), Group::new("billing").unwrap()).with_start(Start::Earliest);
    let consumer = bus.transport().subscribe(&group).await.unwrap();
    let mut places = Vec::new();
    let handling = async {
        while n > 0 {
            let most = std::num::NonZeroUsize::new(n.min(16)).unwrap();
            if let Polled::Deliveries(found) = consumer.poll(most).await.unwrap() {
                let acks: Vec<_> = found.iter().map(|one| (one.token, Settle::Ack)).collect();
                consumer.settle(&acks).await.unwrap().all().unwrap();
                places.extend(found.iter().map(|one| (one.partition.0, one.offset.unwrap().0)));
                n -= found.len();
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), handling).await.unwrap();
    consumer.close(std::time::Instant::now() + std::time::Duration::from_secs(5)).await.unwrap();
    places
}

#[tokio::test]
async fn tables_of_version_1_are_brought_up() {
    let broker = Broker::start(Kind::Postgres, None).unwrap();
    let (bus, topic, event) = opened(broker.url(), 3).await;
    let publisher = bus.transport().publisher().await.unwrap();
    publisher.enqueue(&topic, (0..30).map(&event).collect()).await.unwrap().await.all().unwrap();
    let mut handled = handle(&bus, &topic, 10).await;
    let admin = bus.transport().admin().unwrap();
    // One partition holds nothing any more.
    let part = &admin.topic(&topic).await.unwrap().unwrap().partitions[0];
    let (emptied, end) = (part.partition, part.next);
    assert!(end.0 > 0);
    admin.purge(&topic, emptied, end).await.unwrap();
    bus.close().await.unwrap();
    let mut connection = PgConnection::connect(broker.url()).await.unwrap();
    sqlx::raw_sql(AS_VERSION_1).execute(&mut connection).await.unwrap();

    // Several programs start at once.
    let (one, other) = tokio::join!(eventbus::connect(broker.url()), eventbus::connect(broker.url()));
    other.unwrap().close().await.unwrap();
    let bus = one.unwrap();
    let admin = bus.transport().admin().unwrap();
    let parts = admin.topic(&topic).await.unwrap().unwrap().partitions;
    assert_eq!((parts[0].first, parts[0].next), (end, end), "no offset is given out twice");
    assert_eq!(parts.iter().map(|part| part.next.0).sum::<u64>(), 30);
    // The group goes on where it was: each event once, but for those that were removed.
    let removed = (0..end.0).filter(|offset| !handled.contains(&(emptied.0, *offset))).count();
    handled.extend(handle(&bus, &topic, 30 - 10 - removed).await);
    handled.sort_unstable();
    assert_eq!(handled.len(), 30 - removed);
    handled.dedup();
    assert_eq!(handled.len(), 30 - removed, "an event was handled twice");
    let receipts = bus.transport().publisher().await.unwrap();
    let more: Vec<_> = (0..30).map(&event).collect();
    let receipts = receipts.enqueue(&topic, more).await.unwrap().await.all().unwrap();
    let first = receipts.iter().filter(|one| one.partition == emptied).filter_map(|one| one.offset).min();
    assert_eq!(first, Some(end));
    bus.close().await.unwrap();
}

/// While somebody holds a snapshot, nothing that was overwritten or deleted is removed: neither the end of a partition nor the
/// position of a group may be found by reading through it.
#[tokio::test]
async fn a_snapshot_that_is_held_does_not_make_it_slow() {
    let broker = Broker::start(Kind::Postgres, None).unwrap();
    let (bus, topic, event) = opened(broker.url(), 1).await;
    let mut connection = PgConnection::connect(broker.url()).await.unwrap();
    let mut holder = PgConnection::connect(broker.url()).await.unwrap();
    let mut snapshot = holder.begin().await.unwrap();
    let hold = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM eventbus_event";
    sqlx::raw_sql(hold).execute(&mut *snapshot).await.unwrap();
    let publisher = bus.transport().publisher().await.unwrap();
    let publish = async |publisher: &dyn Publisher| {
        for n in 0..600 {
            publisher.enqueue(&topic, vec![event(n)]).await.unwrap().await.all().unwrap();
        }
    };
    publish(&*publisher).await;
    handle(&bus, &topic, 600).await;
    let admin = bus.transport().admin().unwrap();
    // What is removed stays as well, and is below everything that is looked for.
    admin.purge(&topic, PartitionId(0), Offset(600)).await.unwrap();
    publish(&*publisher).await;
    handle(&bus, &topic, 600).await;
    let groups = admin.groups(Some(&topic)).await.unwrap();
    assert_eq!((groups[0].settled, groups[0].lag), (Offset(1_200), 0));
    admin.purge(&topic, PartitionId(0), Offset(1_200)).await.unwrap();
    for (what, sql) in [
        (
            "the end",
            "SELECT h.* FROM eventbus_partition p CROSS JOIN LATERAL eventbus_head(p.topic, p.partition, p.first) h",
        ),
        ("the range", "SELECT * FROM eventbus_range"),
        ("the position", "SELECT * FROM eventbus_position"),
    ] {
        // At its first run a session reads the catalogue too.
        let explain =
            format!("SET jit = off; SET enable_seqscan = off; {sql}; EXPLAIN (ANALYZE, BUFFERS) {sql}");
        let lines = sqlx::raw_sql(sqlx::AssertSqlSafe(explain)).fetch_all(&mut connection).await.unwrap();
        let lines: Vec<String> = lines.iter().filter_map(|line| line.try_get("QUERY PLAN").ok()).collect();
        // The first is of the whole: "Buffers: shared hit=7 read=1".
        let buffers = lines.iter().find(|line| line.contains("Buffers: shared")).unwrap();
        let pages: u64 =
            buffers.split('=').skip(1).filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok()).sum();
        assert!((1..=20).contains(&pages), "{what} is {pages} pages away: {lines:?}");
    }
    snapshot.rollback().await.unwrap();
    bus.close().await.unwrap();
}
