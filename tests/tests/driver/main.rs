//! The driver over each transport: order within keys, failures, dead letters, draining.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test reports by panicking")]

mod batch;
mod bounds;
mod layers;
mod order;
mod request;
mod versions;

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use eventbus::capability::Ack;
use eventbus::transport::sqlite::{Options, Sqlite};
use eventbus::{
    Admin, Bus, Emit, Envelope, Event, Failure, Guard, HealthState, Meta, Offset, OtherVersions, Retry,
    Service, Start, State, Topic, TopicSpec, Typed,
};
use eventbus_tests::apart::Apart;
use parking_lot::Mutex;
use tokio::sync::Notify;
use xtask::brokers::Kind;

#[derive(Debug, Clone, Event, serde::Serialize, serde::Deserialize)]
#[event(type = "test.step", version = 1, key = key)]
struct Step {
    key: String,
    n: u32,
}

#[derive(Debug, Clone, Event, serde::Serialize, serde::Deserialize)]
#[event(type = "test.echo", version = 1, key = key)]
struct Echo {
    key: String,
    n: u32,
}

fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

fn quick() -> Retry {
    Retry::exponential(Duration::from_millis(20), Duration::from_millis(100), NonZeroU32::new(6).unwrap())
        .with_in_lane(NonZeroU32::MIN)
}

/// What handlers did, with a bell.
#[derive(Clone, Default)]
struct Log(Arc<(Mutex<Handled>, Notify)>);

type Handled = Vec<(String, u32)>;

impl Log {
    fn add(&self, step: &Step) {
        self.0.0.lock().push((step.key.clone(), step.n));
        self.0.1.notify_waiters();
    }

    fn all(&self) -> Handled {
        self.0.0.lock().clone()
    }

    async fn until(&self, n: usize) {
        self.until_it_has(n, Vec::len).await;
    }

    /// Waits for so many events, however often each was handled.
    async fn until_distinct(&self, n: usize) {
        self.until_it_has(n, |handled| handled.iter().collect::<HashSet<_>>().len()).await;
    }

    async fn until_it_has(&self, n: usize, count: fn(&Handled) -> usize) {
        let reached = async {
            loop {
                let mut rung = std::pin::pin!(self.0.1.notified());
                rung.as_mut().enable();
                if count(&self.0.0.lock()) >= n {
                    return;
                }
                rung.await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(30), reached).await;
        assert!(waited.is_ok(), "only {} of {n} were handled", count(&self.all()));
    }
}

async fn letters(bus: &Bus, of: &str, n: usize) -> Vec<Envelope> {
    let dead = topic(of).dead_letters().unwrap();
    let admin = bus.transport().admin().unwrap();
    let mut found = Vec::new();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while found.len() < n {
        assert!(tokio::time::Instant::now() < deadline, "{} of {n} dead letters", found.len());
        found.clear();
        let Some(info) = admin.topic(&dead).await.unwrap() else {
            tokio::task::yield_now().await;
            continue;
        };
        for partition in &info.partitions {
            let records = admin.read(&dead, partition.partition, partition.first, 1_000).await.unwrap();
            found.extend(records.iter().filter_map(|record| record.content.envelope().cloned()));
        }
        if found.len() < n {
            let ends: Vec<_> = info.partitions.iter().map(|p| (p.partition, p.next)).collect();
            admin.wait(&dead, &ends, Duration::from_millis(200)).await.unwrap();
        }
    }
    found
}

/// Every test runs on both embedded transports, and on every broker, where its topics have names of their own.
async fn on_each<F: AsyncFn(Bus)>(test: F) {
    test(eventbus::connect("memory://?replay=10000").await.unwrap()).await;
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/bus.db", folder.path().display());
    let bus = eventbus::connect(&url).await.unwrap();
    test(bus.clone()).await;
    bus.close().await.unwrap();
    for kind in Kind::ALL {
        // Seen where the test fails.
        println!("on {kind}");
        let url = format!("{}?declare=create&partitions=4&session=2s", xtask::brokers::url(kind).unwrap());
        let shared = eventbus::connect(&url).await.unwrap();
        let bus = Bus::new(Apart::new(shared, format!("driver-{:x}", fastrand::u64(..))));
        test(bus.clone()).await;
        bus.close().await.unwrap();
    }
}

/// A failing event holds back its key, every key ends in order, nothing is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lanes_keep_key_order_through_failures() {
    #[derive(Clone, Default)]
    struct Shop {
        log: Log,
        failures: Arc<Mutex<HashMap<(String, u32), u32>>>,
        running: Arc<Mutex<HashMap<String, u32>>>,
    }
    async fn handle(Typed(step): Typed<Step>, State(shop): State<Shop>) -> Result<(), Failure> {
        let before = shop.running.lock().insert(step.key.clone(), step.n);
        assert_eq!(before, None, "two events of key {} ran at once", step.key);
        tokio::task::yield_now().await;
        shop.running.lock().remove(&step.key);
        let left = shop.failures.lock().get_mut(&(step.key.clone(), step.n)).map(|left| {
            *left = left.saturating_sub(1);
            *left
        });
        match left {
            Some(left) if left > 0 => Err(Failure::transient("flaky", "not yet")),
            _ => {
                shop.log.add(&step);
                Ok(())
            }
        }
    }
    on_each(async |bus| {
        let shop = Shop::default();
        let (n_keys, each) = (40, 15);
        let mut random = fastrand::Rng::with_seed(7);
        for key in 0..n_keys {
            for n in 0..each {
                if random.u8(..10) == 0 {
                    shop.failures.lock().insert((format!("k{key}"), n), random.u32(2..5));
                }
            }
        }
        assert!(!shop.failures.lock().is_empty());
        let service =
            Service::new("orders").retry(quick()).on(topic("steps"), handle).with_state(shop.clone());
        let running = service.start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        for n in 0..each {
            let batch: Vec<_> = (0..n_keys).map(|key| Step { key: format!("k{key}"), n }).collect();
            publisher.enqueue(&topic("steps"), &batch).await.unwrap().await.all().unwrap();
        }
        shop.log.until((n_keys * each) as usize).await;
        running.stop().await.unwrap();
        let mut next: HashMap<String, u32> = HashMap::new();
        for (key, n) in shop.log.all() {
            let expected = next.entry(key.clone()).or_default();
            assert_eq!(*expected, n, "key {key} out of order");
            *expected += 1;
        }
    })
    .await;
}

/// While one key is handed back with a long delay, the others are not held up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_key_delays_nobody_else() {
    async fn handle(Typed(step): Typed<Step>, State(log): State<Log>) -> Result<(), Failure> {
        if step.key == "bad" && step.n == 0 {
            return Err(Failure::transient("down", "for long").retry_after(Duration::from_secs(3_600)));
        }
        log.add(&step);
        Ok(())
    }
    on_each(async |bus| {
        let log = Log::default();
        let service = Service::new("orders").on(topic("steps"), handle).with_state(log.clone());
        let running = service.start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        let bad = [0, 1, 2].map(|n| Step { key: "bad".into(), n });
        publisher.enqueue(&topic("steps"), &bad).await.unwrap().await.all().unwrap();
        let good: Vec<_> = (0..300).map(|n| Step { key: format!("good{}", n % 10), n }).collect();
        publisher.enqueue(&topic("steps"), &good).await.unwrap().await.all().unwrap();
        publisher.publish(&topic("steps"), &Step { key: "bad".into(), n: 3 }).await.unwrap();
        log.until(300).await;
        assert!(log.all().iter().all(|(key, _)| key != "bad"), "a later event of the failing key ran");
        running.stop().await.unwrap();
    })
    .await;
}

/// A panic is one failed delivery; the service lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_is_one_failed_delivery() {
    async fn handle(Typed(step): Typed<Step>, State((log, runs)): State<(Log, Arc<AtomicUsize>)>) {
        let first = runs.fetch_add(1, Ordering::Relaxed) == 0;
        assert!(!first, "the first run panics");
        log.add(&step);
    }
    on_each(async |bus| {
        let state = (Log::default(), Arc::new(AtomicUsize::new(0)));
        let service =
            Service::new("orders").retry(quick()).on(topic("steps"), handle).with_state(state.clone());
        let running = service.start(&bus).await.unwrap();
        bus.publisher()
            .await
            .unwrap()
            .publish(&topic("steps"), &Step { key: "a".into(), n: 1 })
            .await
            .unwrap();
        state.0.until(1).await;
        let counts = running.counts();
        running.stop().await.unwrap();
        assert_eq!((counts.retried, state.1.load(Ordering::Relaxed)), (1, 2));
    })
    .await;
}

/// Poison goes to the dead letters once, with its bytes and the reason; transient failures after
/// bounded attempts; what decodes is untouched.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poison_reaches_the_dead_letters_once() {
    async fn handle(Typed(step): Typed<Step>, State(log): State<Log>) -> Result<(), Failure> {
        match step.n {
            1 => Err(Failure::permanent("never", "will not work")),
            2 => Err(Failure::transient("always.down", "no answer")),
            _ => {
                log.add(&step);
                Ok(())
            }
        }
    }
    on_each(async |bus| {
        let log = Log::default();
        let service =
            Service::new("orders").retry(quick()).on(topic("steps"), handle).with_state(log.clone());
        let running = service.start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        let garbage =
            Envelope::new("test.step", "/t").with_version(1).with_key("g").with_payload("{\"key\": 7");
        publisher.publish_envelope(&topic("steps"), garbage.clone()).await.unwrap();
        publisher
            .publish_envelope(&topic("steps"), Envelope::new("test.other", "/t").with_payload("?"))
            .await
            .unwrap();
        let steps = [0, 1, 2, 3].map(|n| Step { key: format!("k{n}"), n });
        publisher.enqueue(&topic("steps"), &steps).await.unwrap().await.all().unwrap();
        let letters = letters(&bus, "steps", 3).await;
        log.until(2).await;
        // A letter can be read a moment before it is counted.
        let monitor = running.monitor();
        running.stop().await.unwrap();
        let counts = monitor.counts();
        assert_eq!((letters.len(), counts.dead_lettered, counts.unknown), (3, 3, 1));
        let by_reason = |reason: &str| {
            letters
                .iter()
                .find(|letter| letter.extension("evt-dlq-reason") == Some(reason))
                .unwrap_or_else(|| panic!("no {reason} in {letters:?}"))
        };
        let poison = by_reason("decode");
        assert_eq!((poison.payload(), poison.id()), (garbage.payload(), garbage.id()));
        assert_eq!(poison.extension("evt-dlq-origin"), Some("steps"));
        assert_eq!(poison.extension("evt-dlq-group"), Some("orders"));
        assert_eq!(by_reason("never").extension("evt-dlq-attempts"), Some("1"));
        assert_eq!(by_reason("always.down").extension("evt-dlq-attempts"), Some("6"));
        assert_eq!(by_reason("never").extension("evt-dlq-handler"), Some("handle"));
    })
    .await;
}

/// While the dead letter cannot be stored, the event is not settled; when there is room again, it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_dead_letter_keeps_the_event() {
    async fn handle(Typed(_): Typed<Step>) -> Result<(), Failure> {
        Err(Failure::permanent("never", "will not work"))
    }
    let folder = tempfile::tempdir().unwrap();
    let sqlite = Sqlite::open_path(folder.path().join("bus.db"), Options::default()).await.unwrap();
    let bus = Bus::new(sqlite.clone());
    let service = Service::new("orders").retry(quick()).start_at(Start::Earliest).on(topic("steps"), handle);
    bus.publisher().await.unwrap().publish(&topic("steps"), &Step { key: "a".into(), n: 1 }).await.unwrap();
    sqlite.set_max_file_bytes(Some(1)).unwrap();
    let running = service.with_state(()).start(&bus).await.unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while running.counts().redelivered < 2 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the event did not come again: {:?}",
            running.counts()
        );
        tokio::task::yield_now().await;
    }
    let lag: u64 = sqlite.groups(Some(&topic("steps"))).await.unwrap().iter().map(|group| group.lag).sum();
    assert_eq!((lag, running.counts().dead_lettered), (1, 0), "the event must stay");
    sqlite.set_max_file_bytes(None).unwrap();
    assert_eq!(letters(&bus, "steps", 1).await.len(), 1);
    running.stop().await.unwrap();
    bus.close().await.unwrap();
}

/// An event whose letter would be above the limit is dead-lettered without its body, which stays where
/// the letter says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_would_be_too_large_goes_without_its_body() {
    async fn handle(Typed(_): Typed<Step>) -> Result<(), Failure> {
        Err(Failure::permanent("never", "will not work"))
    }
    on_each(async |bus| {
        let limit = bus.transport().capabilities().max_event_bytes.unwrap();
        let base = Envelope::new("test.step", "/t").with_version(1).with_key("big");
        let body = format!("{{\"key\":\"big\",\"n\":1}}{}", " ".repeat(limit - base.size_bytes() - 28));
        let service = Service::new("orders").retry(quick()).on(topic("steps"), handle).with_state(());
        let running = service.start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        let whole = base.clone().with_payload(body);
        let stored = publisher.publish_envelope(&topic("steps"), whole).await.unwrap();
        let letters = letters(&bus, "steps", 1).await;
        assert_eq!((letters[0].id(), letters[0].payload()), (base.id(), None));
        assert_eq!(letters[0].extension("evt-dlq-body"), Some("omitted"));
        // The body is where the letter says.
        let offset = Offset(letters[0].extension("evt-dlq-offset").unwrap().parse().unwrap());
        let admin = bus.transport().admin().unwrap();
        let found = admin.read(&topic("steps"), stored.partition, offset, 1).await.unwrap();
        assert_eq!(found[0].content.envelope().map(Envelope::id), Some(base.id()));
        running.stop().await.unwrap();
    })
    .await;
}

/// What a handler emits is stored before its input is settled, under an id that a repetition repeats.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_have_ids_that_repeat() {
    async fn handle(Typed(step): Typed<Step>, State(log): State<Log>) -> Result<Emit<Echo>, Failure> {
        log.add(&step);
        Ok(Emit(Echo { key: step.key, n: step.n }))
    }
    async fn heard(Meta(envelope): Meta, State(ids): State<Arc<Mutex<Vec<Envelope>>>>) {
        ids.lock().push(envelope);
    }
    on_each(async |bus| {
        let (log, ids) = (Log::default(), Arc::<Mutex<Vec<Envelope>>>::default());
        let echo =
            Service::new("echo").on(topic("steps"), handle).emit_to(topic("echoes")).with_state(log.clone());
        let ear = Service::new("ear").on(topic("echoes"), heard).with_state(ids.clone());
        let (echo, ear) = (echo.start(&bus).await.unwrap(), ear.start(&bus).await.unwrap());
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let input = Envelope::of(&Step { key: "a".into(), n: 1 }, "/t")
            .unwrap()
            .with_extension("traceparent", parent);
        let publisher = bus.publisher().await.unwrap();
        // The same input twice, as a redelivery would be.
        publisher.publish_envelope(&topic("steps"), input.clone()).await.unwrap();
        publisher.publish_envelope(&topic("steps"), input.clone()).await.unwrap();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while ids.lock().len() < 2 {
            assert!(tokio::time::Instant::now() < deadline, "{} echoes", ids.lock().len());
            tokio::task::yield_now().await;
        }
        echo.stop().await.unwrap();
        ear.stop().await.unwrap();
        let ids = ids.lock();
        assert_eq!(ids[0].id(), ids[1].id());
        assert_eq!(ids[0].extension("causationid").unwrap(), input.id().to_string());
        assert_eq!((ids[0].source(), ids[0].extension("traceparent")), ("/echo", Some(parent)));
    })
    .await;
}

/// A stop finishes what runs and hands back what has not begun: nothing lost, and nothing twice where an event is
/// settled alone. Where acks are cumulative, what ran above the first that did not comes again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_finishes_in_flight() {
    async fn handle(Typed(step): Typed<Step>, State(log): State<Log>) {
        tokio::time::sleep(Duration::from_millis(2)).await;
        log.add(&step);
    }
    on_each(async |bus| {
        let log = Log::default();
        let service = || Service::new("orders").on(topic("steps"), handle).with_state(log.clone());
        bus.transport().admin().unwrap().declare(&TopicSpec::new(topic("steps"))).await.unwrap();
        let running = service().start(&bus).await.unwrap();
        let steps: Vec<_> = (0..400).map(|n| Step { key: format!("k{}", n % 50), n }).collect();
        bus.publisher().await.unwrap().enqueue(&topic("steps"), &steps).await.unwrap().await.all().unwrap();
        log.until(60).await;
        running.stop().await.unwrap();
        let before = log.all().len();
        assert!(before < 400, "nothing was left to hand over: the test proved nothing");
        let running = service().start(&bus).await.unwrap();
        log.until_distinct(400).await;
        running.stop().await.unwrap();
        let mut seen = log.all();
        let twice = seen.len() - 400;
        match bus.transport().capabilities().ack {
            Ack::Cumulative => assert!(twice < before, "{twice} of {before} ran twice"),
            _ => assert_eq!(twice, 0, "events ran twice over a clean stop"),
        }
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 400);
    })
    .await;
}

/// While what every handler needs is down, nothing is dead-lettered and the service says so; then
/// everything is handled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_opens_the_breaker_and_spares_the_dead_letters() {
    #[derive(Clone, Default)]
    struct Shop(Log, Arc<AtomicBool>, Arc<AtomicUsize>);
    async fn handle(
        Typed(step): Typed<Step>,
        State(Shop(log, down, runs)): State<Shop>,
    ) -> Result<(), Failure> {
        runs.fetch_add(1, Ordering::Relaxed);
        if down.load(Ordering::SeqCst) {
            return Err(Failure::transient("db.down", "connection refused"));
        }
        log.add(&step);
        Ok(())
    }
    on_each(async |bus| {
        let shop = Shop::default();
        shop.1.store(true, Ordering::SeqCst);
        let service =
            Service::new("orders").retry(quick()).on(topic("steps"), handle).with_state(shop.clone());
        let running = service.start(&bus).await.unwrap();
        let steps: Vec<_> = (0..300).map(|n| Step { key: format!("k{}", n % 60), n }).collect();
        bus.publisher().await.unwrap().enqueue(&topic("steps"), &steps).await.unwrap().await.all().unwrap();
        let outage = tokio::time::Instant::now() + Duration::from_secs(2);
        while tokio::time::Instant::now() < outage {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(matches!(running.health()[0].state, HealthState::Paused { .. }), "{:?}", running.health());
        let runs = shop.2.load(Ordering::Relaxed);
        assert!(runs < 100, "{runs} runs in two seconds of an outage");
        shop.1.store(false, Ordering::SeqCst);
        shop.0.until(300).await;
        let (counts, health) = (running.counts(), running.health());
        running.stop().await.unwrap();
        assert_eq!((counts.dead_lettered, health[0].reason()), (0, None));
    })
    .await;
}

/// Instances join and leave under load: no key runs at two of them at once, every event runs once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revocation_awaits_lanes() {
    #[derive(Clone, Default)]
    struct Shop(Log, Arc<Mutex<HashMap<String, u32>>>);
    async fn handle(Typed(step): Typed<Step>, State(Shop(log, running)): State<Shop>) {
        let before = running.lock().insert(step.key.clone(), step.n);
        assert_eq!(before, None, "key {} runs twice at once", step.key);
        tokio::time::sleep(Duration::from_millis(1)).await;
        running.lock().remove(&step.key);
        log.add(&step);
    }
    on_each(async |bus| {
        let shop = Shop::default();
        let start = async || {
            let service = Service::new("orders")
                .retry(Retry::never())
                .on(topic("steps"), handle)
                .with_state(shop.clone());
            service.start(&bus).await.unwrap()
        };
        let first = start().await;
        let publisher = bus.publisher().await.unwrap();
        let (n_keys, each) = (60, 40);
        for n in 0..each {
            let batch: Vec<_> = (0..n_keys).map(|key| Step { key: format!("k{key}"), n }).collect();
            publisher.enqueue(&topic("steps"), &batch).await.unwrap().await.all().unwrap();
        }
        let mut instances = vec![first];
        for round in 1..8 {
            shop.0.until(round * 250).await;
            if round % 2 == 1 {
                instances.push(start().await);
            } else {
                instances.remove(0).stop().await.unwrap();
            }
        }
        shop.0.until((n_keys * each) as usize).await;
        let mut dead = 0;
        for instance in instances {
            dead += instance.counts().dead_lettered;
            instance.stop().await.unwrap();
        }
        assert_eq!(dead, 0, "a handler met another run of its key");
        let mut next: HashMap<String, u32> = HashMap::new();
        for (key, n) in shop.0.all() {
            let expected = next.entry(key.clone()).or_default();
            assert_eq!(*expected, n, "key {key} out of order or twice");
            *expected += 1;
        }
    })
    .await;
}

/// The first route whose type, version and guard fit takes an event; what fits none is counted and passed over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guards_and_versions_choose_the_route() {
    async fn gold(Typed(step): Typed<Step>, State((gold, _)): State<(Log, Log)>) {
        gold.add(&step);
    }
    async fn other(Typed(step): Typed<Step>, State((_, other)): State<(Log, Log)>) {
        other.add(&step);
    }
    on_each(async |bus| {
        let logs = (Log::default(), Log::default());
        let service = Service::new("tiers")
            .on(topic("steps"), gold)
            .when(Guard::header("tier", "gold"))
            .on(topic("steps"), other)
            .other_versions(OtherVersions::Skip);
        let running = service.with_state(logs.clone()).start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        let event = |n| Envelope::of(&Step { key: "a".into(), n }, "/test").unwrap();
        for envelope in [
            event(0).with_header("tier", "gold"),
            event(1).with_header("tier", "silver"),
            event(2),
            event(3).with_version(2),
            Envelope::new("test.unknown", "/test").with_key("a"),
            event(4).with_header("tier", "gold"),
        ] {
            publisher.publish_envelope(&topic("steps"), envelope).await.unwrap();
        }
        logs.0.until(2).await;
        logs.1.until(2).await;
        let numbers = |log: &Log| log.all().iter().map(|(_, n)| *n).collect::<Vec<_>>();
        assert_eq!((numbers(&logs.0), numbers(&logs.1)), (vec![0, 4], vec![1, 2]));
        assert_eq!((running.counts().unknown, running.counts().dead_lettered), (2, 0));
        running.stop().await.unwrap();
    })
    .await;
}
