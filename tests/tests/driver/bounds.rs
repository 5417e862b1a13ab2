//! Slow and stalled handlers: leases are kept, intake stops at the window.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use eventbus::{Service, State, Typed};
use tokio::sync::Semaphore;

use super::{Log, Step, on_each, topic};

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
