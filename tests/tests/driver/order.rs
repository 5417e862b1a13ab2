//! The order of a key when settles take their time: what is handed back is the transport's only when it says so.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus::{Bus, Consumer, Failure, Retry, Service, Settle, Settled, State, Token, Typed};
use eventbus_tests::around::{Around, Change, Poll, Polls};
use parking_lot::Mutex;

use super::{Log, Step, on_each, topic};

const N_EVENTS: u32 = 200;

/// Settles late, as over a network: polls go on meanwhile, and bring what follows.
#[derive(Debug)]
struct Late;

#[async_trait]
impl Poll for Late {
    async fn settle(&self, inner: &dyn Consumer, outcomes: &[(Token, Settle)]) -> eventbus::Result<Settled> {
        tokio::time::sleep(Duration::from_millis(5)).await;
        inner.settle(outcomes).await
    }
}

impl Change for Late {
    fn consumer(&self, consumer: Arc<dyn Consumer>) -> Arc<dyn Consumer> {
        Arc::new(Polls(consumer, Self))
    }
}

/// Events that failed once.
type Failed = Arc<Mutex<HashSet<(String, u32)>>>;

/// Events that came while an earlier one of their key was on its way back go back too, and the lane waits for all of
/// them: those that follow are there before the transport has them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_handed_back_too_late_keeps_its_place() {
    async fn handle(
        Typed(step): Typed<Step>,
        State((log, failed)): State<(Log, Failed)>,
    ) -> Result<(), Failure> {
        // Of each event its own: every seventh run would be the same event's again and again, if six others run
        // between its runs, and that event would become a dead letter.
        if step.n % 5 == 0 && failed.lock().insert((step.key.clone(), step.n)) {
            return Err(Failure::transient("flaky", "not yet"));
        }
        log.add(&step);
        Ok(())
    }
    on_each(async |bus| {
        let bus = Bus::new(Around { inner: bus.transport().clone(), change: Late });
        let state = (Log::default(), Failed::default());
        let pause = Duration::from_millis(1);
        let retry =
            Retry::exponential(pause, pause, Retry::default().attempts).with_in_lane(1.try_into().unwrap());
        let service = Service::new("late").retry(retry).on(topic("late"), handle).with_state(state.clone());
        let running = service.start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        for n in 0..N_EVENTS {
            let steps: Vec<_> = ["a", "b"].map(|key| Step { key: key.to_owned(), n }).into();
            drop(publisher.enqueue(&topic("late"), &steps).await.unwrap());
            tokio::time::sleep(pause).await;
        }
        state.0.until(2 * N_EVENTS as usize).await;
        running.stop().await.unwrap();
        let mut next: HashMap<String, u32> = HashMap::new();
        for (key, n) in state.0.all() {
            let expected = next.entry(key.clone()).or_default();
            assert_eq!(*expected, n, "key {key} out of order");
            *expected += 1;
        }
    })
    .await;
}
