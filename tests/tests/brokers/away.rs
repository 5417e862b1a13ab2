//! A broker that is away at first, and then for a while: what callers and health say, that nobody hammers at it, and
//! that nothing is lost.

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use eventbus::{ErrorKind, Event, Service, State, Topic, TopicSpec, Typed, TypedPublisher};
use eventbus_tests::brokers::behind;
use eventbus_tests::proxy::Wire;
use parking_lot::Mutex;
use xtask::brokers::Kind;

#[derive(Debug, Clone, Event, serde::Serialize, serde::Deserialize)]
#[event(type = "test.step", version = 1, key = key)]
pub(crate) struct Step {
    pub(crate) key: String,
    pub(crate) n: u32,
}

pub(crate) type Seen = Arc<Mutex<BTreeSet<u32>>>;

/// How long the broker is away at least, and how many connections a service and a publisher may try in a second of that.
/// Kafka's client makes one for each of its own, and tries each ten times a second.
const AWAY: Duration = Duration::from_secs(8);
const MAX_TRIALS: f64 = 25.0;
/// How long it may take until all goes on when the broker is back: pauses between trials and the time of a session.
pub(crate) const LATE: Duration = Duration::from_secs(15);
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn handle(Typed(step): Typed<Step>, State(seen): State<Seen>) {
    seen.lock().insert(step.n);
}

pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "{what} in vain");
}

/// Publishes until the broker confirms.
pub(crate) async fn publish(publisher: &TypedPublisher, topic: &Topic, numbers: std::ops::Range<u32>) {
    let batch: Vec<_> = numbers.map(|n| Step { key: format!("k{}", n % 7), n }).collect();
    let trying = async {
        while publisher.enqueue(topic, &batch).await.unwrap().await.all().is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, trying).await.is_ok(), "nothing is confirmed any more");
}

async fn comes_back(kind: Kind) {
    let (_broker, wire, url) = tokio::task::spawn_blocking(move || behind(kind)).await.unwrap().unwrap();
    let more = if kind == Kind::Kafka { "&delivery_timeout=3s" } else { "" };
    let url = format!("{url}?timeout=3s&session=4s{more}");
    wire.set(Wire::Cut);
    let begun = Instant::now();
    let error = match eventbus::connect(&url).await {
        Err(error) => error,
        Ok(bus) => bus.transport().admin().unwrap().topics().await.unwrap_err(),
    };
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(10), "told after {:?}", begun.elapsed());
    wire.set(Wire::Whole);
    let bus = eventbus::connect(&url).await.unwrap();
    let topic = Topic::new("away").unwrap();
    let spec = TopicSpec::new(topic.clone()).with_partitions(NonZeroU32::new(3).unwrap());
    bus.transport().admin().unwrap().declare(&spec).await.unwrap();
    let seen = Seen::default();
    let service = Service::new("orders").on(topic.clone(), handle).with_state(seen.clone());
    let running = service.start(&bus).await.unwrap();
    let publisher = bus.publisher().await.unwrap();
    publish(&publisher, &topic, 0..30).await;
    until("the first events", || seen.lock().len() == 30).await;
    until("being well at first", || running.health()[0].is_running()).await;
    wire.set(Wire::Cut);
    let (before, begun) = (wire.n_accepted(), Instant::now());
    let failed = publisher.publish(&topic, &Step { key: "k".into(), n: 1_000 }).await.unwrap_err();
    assert!(matches!(failed.kind(), ErrorKind::Unavailable | ErrorKind::Unknown), "{failed:?}");
    assert!(begun.elapsed() < Duration::from_secs(10), "told after {:?}", begun.elapsed());
    until("health that says degraded", || !running.health()[0].is_running()).await;
    let degraded_after = begun.elapsed();
    tokio::time::sleep(AWAY.saturating_sub(begun.elapsed())).await;
    let (n_trials, took) = (wire.n_accepted() - before, begun.elapsed());
    println!("{kind}: degraded after {degraded_after:?}, {n_trials} connections were tried in {took:?}");
    let rate = n_trials as f64 / took.as_secs_f64();
    assert!(rate <= MAX_TRIALS, "{n_trials} connections were tried in {took:?}");
    wire.set(Wire::Whole);
    let back = Instant::now();
    publish(&publisher, &topic, 30..60).await;
    until("what was published since", || (0..60).all(|n| seen.lock().contains(&n))).await;
    println!("{kind}: all goes on after {:?}", back.elapsed());
    assert!(back.elapsed() < LATE, "{kind}: all goes on after {:?}", back.elapsed());
    until("being well again", || running.health()[0].is_running()).await;
    // Away for a moment, and nothing is published since.
    wire.set(Wire::Cut);
    until("health that says degraded again", || !running.health()[0].is_running()).await;
    wire.set(Wire::Whole);
    until("being well though nothing comes", || running.health()[0].is_running()).await;
    running.stop().await.unwrap();
    bus.close().await.unwrap();
}

macro_rules! on {
    ($($name:ident $kind:ident)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            comes_back(Kind::$kind).await;
        }
    )*};
}

on! {
    kafka Kafka
    nats Nats
    postgres Postgres
    rabbitmq Rabbitmq
    redis Redis
    valkey Valkey
}
