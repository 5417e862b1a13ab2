//! A broker that is short of memory, or whose disk is full: publishing fails in time, with an error that says so where
//! the broker does, what was confirmed is not lost, and everything goes on when there is room again.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use eventbus::{Bus, ErrorKind, Running, Service, Topic, TopicSpec, TypedPublisher};
use eventbus_tests::small::Small;
use xtask::brokers::{Broker, Kind};

use super::away::{LATE, Seen, Step, handle, publish, until};

/// A service on a broker of its own, and a publisher.
struct Shop {
    bus: Bus,
    topic: Topic,
    publisher: TypedPublisher,
    running: Running,
    seen: Seen,
}

impl Shop {
    async fn open(kind: Kind, url: &str) -> Self {
        let more = if kind == Kind::Kafka { "&delivery_timeout=3s" } else { "" };
        let bus = eventbus::connect(&format!("{url}?timeout=3s&session=4s{more}")).await.unwrap();
        let topic = Topic::new("short").unwrap();
        let spec = TopicSpec::new(topic.clone()).with_partitions(NonZeroU32::new(3).unwrap());
        bus.transport().admin().unwrap().declare(&spec).await.unwrap();
        let seen = Seen::default();
        let service = Service::new("orders").on(topic.clone(), handle).with_state(seen.clone());
        let running = service.start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        publish(&publisher, &topic, 0..30).await;
        until("the first events", || seen.lock().len() == 30).await;
        Self { bus, topic, publisher, running, seen }
    }

    /// Publishes one event; the error comes in time.
    async fn try_one(&self, n: u32) -> eventbus::Result<()> {
        let begun = Instant::now();
        let outcome = self.publisher.publish(&self.topic, &Step { key: format!("k{}", n % 7), n }).await;
        assert!(begun.elapsed() < Duration::from_secs(10), "told after {:?}", begun.elapsed());
        outcome.map(drop)
    }

    /// All goes on, and what was confirmed meanwhile is there.
    async fn goes_on(self, confirmed: Vec<u32>) {
        let back = Instant::now();
        publish(&self.publisher, &self.topic, 30..60).await;
        let is_complete = || {
            let seen = self.seen.lock();
            (0..60).chain(confirmed.iter().copied()).all(|n| seen.contains(&n))
        };
        until("what was confirmed", is_complete).await;
        assert!(back.elapsed() < LATE, "all goes on after {:?}", back.elapsed());
        until("being well again", || self.running.health()[0].is_running()).await;
        self.running.stop().await.unwrap();
        self.bus.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rabbitmq_short_of_memory() {
    let here = std::env::temp_dir();
    let start = move || Broker::start_in(&here, Kind::Rabbitmq);
    let broker = tokio::task::spawn_blocking(start).await.unwrap().unwrap();
    let shop = Shop::open(Kind::Rabbitmq, broker.url()).await;
    broker.control(&["set_vm_memory_high_watermark", "absolute", "1MB"]).unwrap();
    let mut failed = 0;
    for n in 1_000..1_004 {
        // What was on its way when the broker stopped reading is not known.
        let error = shop.try_one(n).await.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Full | ErrorKind::Unknown), "{error:?}");
        failed += usize::from(error.kind() == ErrorKind::Full);
    }
    assert!(failed > 0, "nothing told of the alarm");
    broker.control(&["set_vm_memory_high_watermark", "0.4"]).unwrap();
    shop.goes_on(Vec::new()).await;
}

async fn redis_is_short_of_memory(kind: Kind) {
    let broker = tokio::task::spawn_blocking(move || Broker::start(kind, None)).await.unwrap().unwrap();
    let shop = Shop::open(kind, broker.url()).await;
    let client = redis::Client::open(broker.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut bound = async |bytes: &str| {
        let mut set = redis::cmd("CONFIG");
        set.arg("SET").arg("maxmemory").arg(bytes);
        set.query_async::<()>(&mut connection).await.unwrap();
    };
    bound("1mb").await;
    for n in 1_000..1_004 {
        let error = shop.try_one(n).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{error:?}");
    }
    bound("0").await;
    shop.goes_on(Vec::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_short_of_memory() {
    redis_is_short_of_memory(Kind::Redis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn valkey_short_of_memory() {
    redis_is_short_of_memory(Kind::Valkey).await;
}

async fn has_a_full_disk(kind: Kind) {
    let Some(disk) = Small::mount() else { return };
    let folder = disk.folder().to_owned();
    let start = move || Broker::start_in(&folder, kind);
    let mut broker = tokio::task::spawn_blocking(start).await.unwrap().unwrap();
    let shop = Shop::open(kind, broker.url()).await;
    // RabbitMQ is to stop before it is full: it takes nothing when less than 50 MB are free.
    disk.fill_but(if kind == Kind::Rabbitmq { 20 << 20 } else { 0 }).unwrap();
    let (mut confirmed, mut told, end) = (Vec::new(), Vec::new(), Instant::now() + Duration::from_secs(15));
    for n in 1_000.. {
        match shop.try_one(n).await {
            Ok(()) => confirmed.push(n),
            Err(error) => {
                assert!(error.is_retryable(), "{error:?}");
                told.push(error);
            }
        }
        if Instant::now() > end {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!told.is_empty(), "a disk that is full stores everything");
    // These say what it is; the others stop, or say nothing.
    if matches!(kind, Kind::Postgres | Kind::Rabbitmq | Kind::Redis) {
        assert!(told.iter().any(|error| error.kind() == ErrorKind::Full), "{told:?}");
    }
    println!("{kind}: {} confirmed, {} not, the last: {:?}", confirmed.len(), told.len(), told.last());
    disk.free().unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    println!("{kind}: it {}", if broker.lives() { "lives" } else { "ended" });
    if kind != Kind::Rabbitmq {
        // What an operator does who finds it stopped, or without its storage.
        let restarting = tokio::task::spawn_blocking(move || broker.restart().map(|()| broker));
        broker = restarting.await.unwrap().unwrap();
    }
    shop.goes_on(confirmed).await;
    drop(broker);
}

macro_rules! full {
    ($($name:ident $kind:ident)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            has_a_full_disk(Kind::$kind).await;
        }
    )*};
}

full! {
    kafka_full Kafka
    nats_full Nats
    postgres_full Postgres
    rabbitmq_full Rabbitmq
    redis_full Redis
}
