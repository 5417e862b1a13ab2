//! What the transports say of brokers that are set up well, and of brokers that break what they promise.

use eventbus::fitness::{Probe, Verdict};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use xtask::brokers::{Broker, Kind};

async fn probes(url: &str) -> Vec<Probe> {
    let bus = eventbus::connect(url).await.unwrap();
    let probes = bus.transport().admin().unwrap().probes().await.unwrap();
    bus.close().await.unwrap();
    assert!(
        probes.iter().all(|probe| (probe.verdict == Verdict::Good) == probe.hint.is_empty()),
        "{probes:?}"
    );
    probes
}

fn verdict(probes: &[Probe], name: &str) -> Verdict {
    let found = probes.iter().find(|probe| probe.name == name);
    found.unwrap_or_else(|| panic!("no probe {name} among {probes:?}")).verdict
}

#[tokio::test]
async fn redis_that_evicts_or_forgets_is_named() {
    let broker = Broker::start(Kind::Redis, None).unwrap();
    let sound = probes(broker.url()).await;
    assert_eq!(verdict(&sound, "eviction"), Verdict::Good);
    assert_eq!(verdict(&sound, "append-only file"), Verdict::Good);
    assert_eq!(verdict(&sound, "role"), Verdict::Good);
    let client = redis::Client::open(broker.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    for (name, value) in [("maxmemory", "100mb"), ("maxmemory-policy", "allkeys-lru"), ("appendonly", "no")] {
        let set = redis::cmd("CONFIG").arg("SET").arg(name).arg(value).query_async(&mut connection).await;
        let () = set.unwrap();
    }
    let broken = probes(broker.url()).await;
    assert_eq!(verdict(&broken, "eviction"), Verdict::Bad);
    assert_eq!(verdict(&broken, "append-only file"), Verdict::Doubtful);
}

#[tokio::test]
async fn postgres_that_does_not_sync_is_named() {
    let broker = Broker::start(Kind::Postgres, None).unwrap();
    assert!(probes(broker.url()).await.iter().all(|probe| probe.verdict == Verdict::Good));
    let pool = sqlx::PgPool::connect(broker.url()).await.unwrap();
    for sql in ["ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()"] {
        sqlx::query(sql).execute(&pool).await.unwrap();
    }
    let reloaded = async {
        while verdict(&probes(broker.url()).await, "fsync") != Verdict::Bad {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), reloaded).await.unwrap();
}

#[tokio::test]
async fn kafka_topics_without_room_are_named() {
    let broker = Broker::start(Kind::Kafka, None).unwrap();
    let sound = probes(broker.url()).await;
    assert_eq!(verdict(&sound, "room for the largest event"), Verdict::Good);
    assert_eq!(verdict(&sound, "unclean leader election"), Verdict::Good);
    assert_eq!(verdict(&sound, "brokers"), Verdict::Doubtful);
    let mut config = rdkafka::ClientConfig::new();
    config.set("bootstrap.servers", format!("127.0.0.1:{}", broker.port()));
    let admin: AdminClient<DefaultClientContext> = config.create().unwrap();
    let narrow = NewTopic::new("narrow", 1, TopicReplication::Fixed(1)).set("max.message.bytes", "1000");
    admin.create_topics([&narrow], &AdminOptions::new()).await.unwrap();
    let known = async {
        loop {
            let broken = probes(broker.url()).await;
            if verdict(&broken, "room for the largest event") == Verdict::Bad {
                return broken;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let broken = tokio::time::timeout(std::time::Duration::from_secs(20), known).await.unwrap();
    assert!(broken.iter().any(|probe| probe.detail.contains("narrow")), "{broken:?}");
    assert_eq!(verdict(&broken, "three copies of topics"), Verdict::Doubtful);
}

#[tokio::test]
async fn what_nats_cannot_tell_is_doubtful() {
    let broker = Broker::start(Kind::Nats, None).unwrap();
    let sound = probes(broker.url()).await;
    assert_eq!(verdict(&sound, "sync of files"), Verdict::Doubtful);
    assert_eq!(verdict(&sound, "server"), Verdict::Good);
}
