//! Slow and stalled handlers: leases are kept, intake stops at the window.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use eventbus::{Bus, Consumer, Failure, Followers, Parking, Polled, Service, State, Typed, Waits};
use eventbus_tests::around::{Around, Change, Poll, Polls};
use tokio::sync::Semaphore;

use super::{Log, Step, on_each, quick, topic};

/// A handler that takes three times its lease runs once: the lease is renewed while it works.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_handler_runs_once() {
    async fn handle(Typed(step): Typed<Step>, State((log, runs)): State<(Log, Arc<AtomicUsize>)>) {
        runs.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        log.add(&step);
    }
    on_each(async |bus| {
        let state = (Log::default(), Arc::new(AtomicUsize::new(0)));
        let service = Service::new("slow").lease(Duration::from_millis(500)).on(topic("steps"), handle);
        let running = service.with_state(state.clone()).start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        publisher.publish(&topic("steps"), &Step { key: "a".into(), n: 1 }).await.unwrap();
        state.0.until(1).await;
        let redelivered = running.counts().redelivered;
        running.stop().await.unwrap();
        assert_eq!((state.1.load(Ordering::SeqCst), redelivered), (1, 0));
    })
    .await;
}

/// While handlers stand still, no more than the window is in hand; then everything is handled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_handlers_stop_intake() {
    async fn handle(Typed(step): Typed<Step>, State((log, gate)): State<(Log, Arc<Semaphore>)>) {
        drop(gate.acquire().await);
        log.add(&step);
    }
    on_each(async |bus| {
        let state = (Log::default(), Arc::new(Semaphore::new(0)));
        let window = NonZeroUsize::new(16).unwrap();
        let service = Service::new("stalled").window(window).on(topic("steps"), handle);
        let running = service.with_state(state.clone()).start(&bus).await.unwrap();
        let steps: Vec<_> = (0..500).map(|n| Step { key: format!("k{n}"), n }).collect();
        bus.publisher().await.unwrap().enqueue(&topic("steps"), &steps).await.unwrap().await.all().unwrap();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while running.counts().in_flight < 16 {
            assert!(tokio::time::Instant::now() < deadline, "{:?}", running.counts());
            tokio::task::yield_now().await;
        }
        // A quiet period: passing time is the subject.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(running.counts().in_flight, 16, "more than the window is in hand");
        state.1.add_permits(1_000);
        state.0.until(500).await;
        running.stop().await.unwrap();
    })
    .await;
}

/// Hears the first deliveries and nothing after them, as on a connection that died without a word.
#[derive(Debug)]
struct Deaf {
    n_heard: AtomicUsize,
    hears: usize,
    /// It begins to hear when there is a permit.
    begins: Arc<Semaphore>,
}

#[async_trait]
impl Poll for Deaf {
    async fn poll(&self, inner: &dyn Consumer, max: NonZeroUsize) -> eventbus::Result<Polled> {
        if self.n_heard.load(Ordering::SeqCst) >= self.hears {
            std::future::pending::<()>().await;
        }
        drop(self.begins.acquire().await);
        let polled = inner.poll(max).await?;
        if let Polled::Deliveries(deliveries) = &polled {
            self.n_heard.fetch_add(deliveries.len(), Ordering::SeqCst);
        }
        Ok(polled)
    }
}

/// The first consumer goes deaf; those that follow hear everything, when they may begin.
#[derive(Debug)]
struct FirstIsDeaf {
    n_consumers: AtomicUsize,
    begin: Arc<Semaphore>,
}

impl FirstIsDeaf {
    fn new(begin: &Arc<Semaphore>) -> Self {
        Self { n_consumers: AtomicUsize::new(0), begin: begin.clone() }
    }
}

impl Change for FirstIsDeaf {
    fn consumer(&self, consumer: Arc<dyn Consumer>) -> Arc<dyn Consumer> {
        let (hears, begins) = match self.n_consumers.fetch_add(1, Ordering::SeqCst) {
            0 => (3, Arc::new(Semaphore::new(1))),
            _ => (usize::MAX, self.begin.clone()),
        };
        Arc::new(Polls(consumer, Deaf { n_heard: AtomicUsize::new(0), hears, begins }))
    }
}

/// A consumer that hears nothing while events wait is degraded, given up and replaced; nothing is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_consumer_is_degraded_and_replaced() {
    async fn handle(Typed(step): Typed<Step>, State(log): State<Log>) {
        log.add(&step);
    }
    on_each(async |bus| {
        if !bus.transport().capabilities().delay {
            // Without delays there is always a log of parked events, which has a consumer of its own.
            return;
        }
        let begin = Arc::new(Semaphore::new(0));
        let bus = Bus::new(Around { inner: bus.transport().clone(), change: FirstIsDeaf::new(&begin) });
        let log = Log::default();
        let service = Service::new("deaf")
            .retry(quick())
            // No log of parked events: the only consumer is that of the topic.
            .parking(Parking::default().with_waits(Waits::Transport).with_followers(Followers::Skip))
            .rejoin_after(Duration::from_millis(600))
            .on(topic("steps"), handle);
        let running = service.with_state(log.clone()).start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        let publish =
            async |n| publisher.publish(&topic("steps"), &Step { key: "a".into(), n }).await.unwrap();
        for n in 0..3 {
            publish(n).await;
            log.until(n as usize + 1).await;
        }
        assert!(running.health()[0].is_running(), "{:?}", running.health());
        publish(3).await;
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while running.health()[0].is_running() {
            assert!(tokio::time::Instant::now() < deadline, "nobody noticed the silence");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let health = running.health().remove(0);
        assert_eq!(health.reason(), Some("events wait and nothing is delivered: joined again"));
        begin.add_permits(1);
        log.until(4).await;
        publish(4).await;
        log.until(5).await;
        assert!(running.health()[0].is_running(), "{:?}", running.health());
        running.stop().await.unwrap();
        assert_eq!(log.all().iter().map(|(_, n)| *n).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    })
    .await;
}

/// A service that has nothing to do, or waits for what it handed back, is left in peace.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_waits_rightly_is_left_in_peace() {
    async fn handle(Typed(step): Typed<Step>, State(log): State<Log>) -> Result<(), Failure> {
        log.add(&step);
        match log.all().len() {
            1 => Err(Failure::transient("not.yet", "come again").retry_after(Duration::from_millis(1_500))),
            _ => Ok(()),
        }
    }
    on_each(async |bus| {
        if !bus.transport().capabilities().delay {
            // Without delays there is always a log of parked events, which has a consumer of its own.
            return;
        }
        let log = Log::default();
        let service = Service::new("patient")
            .retry(quick())
            .parking(Parking::default().with_waits(Waits::Transport).with_followers(Followers::Skip))
            .rejoin_after(Duration::from_millis(200))
            .on(topic("steps"), handle);
        let running = service.with_state(log.clone()).start(&bus).await.unwrap();
        bus.publisher()
            .await
            .unwrap()
            .publish(&topic("steps"), &Step { key: "a".into(), n: 0 })
            .await
            .unwrap();
        log.until(1).await;
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while log.all().len() < 2 {
            assert!(tokio::time::Instant::now() < deadline, "it never came again");
            assert!(running.health()[0].is_running(), "{:?}", running.health());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        running.stop().await.unwrap();
    })
    .await;
}

/// A second Ctrl-C does not wait for what a handler will never finish.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_the_drain() {
    async fn handle(Typed(step): Typed<Step>, State(log): State<Log>) {
        log.add(&step);
        std::future::pending::<()>().await;
    }
    let bus = eventbus::connect("memory://").await.unwrap();
    let log = Log::default();
    let service = Service::new("stuck").on(topic("steps"), handle).with_state(log.clone());
    let (running, started) = (bus.clone(), tokio::time::Instant::now());
    let mut running = tokio::spawn(async move { service.run(&running).await });
    while bus.transport().admin().unwrap().groups(None).await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    bus.publisher().await.unwrap().publish(&topic("steps"), &Step { key: "a".into(), n: 0 }).await.unwrap();
    log.until(1).await;
    let interrupt = || {
        let me = std::process::id().to_string();
        assert!(std::process::Command::new("kill").args(["-INT", &me]).status().unwrap().success());
    };
    interrupt();
    // A quiet period: it drains, and passing time is the subject.
    let waits = tokio::time::timeout(Duration::from_millis(500), &mut running).await;
    assert!(waits.is_err(), "the first signal did not wait for the handler");
    interrupt();
    let ended = tokio::time::timeout(Duration::from_secs(10), running).await.unwrap().unwrap();
    assert!(ended.unwrap_err().to_string().contains("second signal"));
    assert!(started.elapsed() < Duration::from_secs(20), "it waited for the whole budget");
}
