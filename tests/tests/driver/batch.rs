//! Batch handlers: one outcome for each event, order within keys, failures that concern one event only.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use eventbus::{Batch, Emits, Envelope, Failure, Outcomes, Service, State};
use parking_lot::Mutex;

use super::{Echo, Log, Step, letters, on_each, quick, topic};

#[derive(Clone, Default)]
struct Shop {
    log: Log,
    largest: Arc<AtomicUsize>,
    failing: Arc<Mutex<HashMap<(String, u32), u32>>>,
}

async fn store(steps: Batch<Step>, State(shop): State<Shop>) -> Outcomes {
    shop.largest.fetch_max(steps.len(), Ordering::Relaxed);
    let keys: std::collections::HashSet<_> = steps.iter().map(|step| step.message.key.clone()).collect();
    assert_eq!(keys.len(), steps.len(), "two events of one key in one batch");
    tokio::task::yield_now().await;
    steps.each(|step| {
        let step = step.message;
        if let Some(left) = shop.failing.lock().get_mut(&(step.key.clone(), step.n)).filter(|left| **left > 0)
        {
            *left -= 1;
            return Err(Failure::transient("flaky", "not yet"));
        }
        shop.log.add(&step);
        Ok(Emits::new())
    })
}

/// Every event of a batch has its own outcome, and a failing one holds back its key alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_has_one_outcome_for_each_event() {
    on_each(async |bus| {
        let shop = Shop::default();
        let (n_keys, each) = (50u32, 10u32);
        let mut random = fastrand::Rng::with_seed(3);
        for (key, n) in (0..n_keys).flat_map(|key| (0..each).map(move |n| (key, n))) {
            if random.u8(..8) == 0 {
                shop.failing.lock().insert((format!("k{key}"), n), random.u32(1..4));
            }
        }
        let service =
            Service::new("index").retry(quick()).on_batch(topic("steps"), store).with_state(shop.clone());
        let running = service.start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        for n in 0..each {
            let batch: Vec<_> = (0..n_keys).map(|key| Step { key: format!("k{key}"), n }).collect();
            publisher.enqueue(&topic("steps"), &batch).await.unwrap().await.all().unwrap();
        }
        shop.log.until((n_keys * each) as usize).await;
        // The handler says that it stored before the driver counts that it did.
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while running.counts().handled < u64::from(n_keys * each) {
            assert!(tokio::time::Instant::now() < deadline, "{:?}", running.counts());
            tokio::task::yield_now().await;
        }
        let counts = running.counts();
        running.stop().await.unwrap();
        assert_eq!((counts.handled, counts.dead_lettered), (u64::from(n_keys * each), 0));
        assert!(shop.largest.load(Ordering::Relaxed) > 4, "batches of {:?}", shop.largest);
        let mut next: HashMap<String, u32> = HashMap::new();
        for (key, n) in shop.log.all() {
            let expected = next.entry(key.clone()).or_default();
            assert_eq!(*expected, n, "key {key} out of order or twice");
            *expected += 1;
        }
    })
    .await;
}

/// What cannot be decoded, or makes the handler panic, takes no neighbour with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_event_takes_no_neighbour_with_it() {
    async fn store(steps: Batch<Step>, State(log): State<Log>) -> Result<Outcomes, Failure> {
        assert!(steps.iter().all(|step| step.message.n != 13), "thirteen");
        if steps.iter().any(|step| step.message.n == 14) {
            return Err(Failure::permanent("fourteen", "all of it"));
        }
        Ok(steps.each(|step| log.add(&step.message)))
    }
    on_each(async |bus| {
        let log = Log::default();
        let publisher = bus.publisher().await.unwrap();
        let service =
            Service::new("index").retry(quick()).on_batch(topic("steps"), store).with_state(log.clone());
        let running = service.start(&bus).await.unwrap();
        let mut events: Vec<_> =
            (0..30).map(|n| Envelope::of(&Step { key: format!("k{n}"), n }, "/t").unwrap()).collect();
        events[5] = events[5].clone().with_payload("{");
        publisher.inner().enqueue(&topic("steps"), events).await.unwrap().await.all().unwrap();
        let letters = letters(&bus, "steps", 3).await;
        let mut reasons: Vec<_> =
            letters.iter().filter_map(|letter| letter.extension("evt-dlq-reason")).collect();
        reasons.sort_unstable();
        assert_eq!(reasons, ["decode", "fourteen", "panic"]);
        log.until(27).await;
        running.stop().await.unwrap();
    })
    .await;
}

/// What a batch emits is stored before its inputs are settled, under ids that repeat.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_emits_for_each_event() {
    async fn relay(steps: Batch<Step>) -> Outcomes {
        steps.each(|step| {
            let echo = Echo { key: step.message.key, n: step.message.n };
            Ok::<_, Failure>(Emits::new().to(&topic("echoes"), &echo)?)
        })
    }
    async fn hear(echoes: Batch<Echo>, State(log): State<Log>) -> Outcomes {
        echoes.each(|echo| log.add(&Step { key: echo.message.key, n: echo.message.n }))
    }
    on_each(async |bus| {
        let log = Log::default();
        let relay =
            Service::new("relay").on_batch(topic("steps"), relay).with_state(()).start(&bus).await.unwrap();
        let ear = Service::new("ear")
            .on_batch(topic("echoes"), hear)
            .with_state(log.clone())
            .start(&bus)
            .await
            .unwrap();
        let steps: Vec<_> = (0..100).map(|n| Step { key: format!("k{}", n % 20), n }).collect();
        bus.publisher().await.unwrap().enqueue(&topic("steps"), &steps).await.unwrap().await.all().unwrap();
        log.until(100).await;
        relay.stop().await.unwrap();
        ear.stop().await.unwrap();
    })
    .await;
}

/// No call gets more events than the route allows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_is_as_large_as_it_may_be() {
    async fn hear(steps: Batch<Step>, State((log, sizes)): State<(Log, Arc<Mutex<Vec<usize>>>)>) -> Outcomes {
        let n = std::cell::Cell::new(0);
        let outcomes = steps.each(|step| {
            n.set(n.get() + 1);
            log.add(&step.message);
        });
        sizes.lock().push(n.get());
        outcomes
    }
    on_each(async |bus| {
        let state = (Log::default(), Arc::<Mutex<Vec<usize>>>::default());
        let five = std::num::NonZeroUsize::new(5).unwrap();
        let one = std::num::NonZeroUsize::MIN;
        let service = Service::new("ear").lanes(one).start_at(eventbus::Start::Earliest);
        let service = service.on_batch(topic("steps"), hear).up_to(five).with_state(state.clone());
        let steps: Vec<_> = (0..200).map(|n| Step { key: format!("k{n}"), n }).collect();
        bus.publisher().await.unwrap().enqueue(&topic("steps"), &steps).await.unwrap().await.all().unwrap();
        let running = service.start(&bus).await.unwrap();
        state.0.until(200).await;
        running.stop().await.unwrap();
        assert_eq!(state.1.lock().iter().max(), Some(&5), "{:?}", state.1.lock());
    })
    .await;
}
