//! Commands: one owner, an answer, a deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use eventbus::{Command, Deadline, Envelope, ErrorKind, Event, Failure, Reply, Service, State, Typed};
use serde::{Deserialize, Serialize};

use super::{on_each, quick, topic};

#[derive(Debug, Command, Serialize, Deserialize)]
#[command(type = "test.reserve", version = 1, key = sku, reply = Reserved)]
struct Reserve {
    sku: String,
    quantity: u32,
}

#[derive(Debug, Event, Serialize, Deserialize)]
#[event(type = "test.reserved", version = 1)]
struct Reserved {
    left: u32,
}

#[derive(Clone, Default)]
struct Stock(Arc<AtomicUsize>);

async fn reserve(
    Typed(wanted): Typed<Reserve>,
    deadline: Deadline,
    State(Stock(runs)): State<Stock>,
) -> Result<Reply<Reserved>, Failure> {
    runs.fetch_add(1, Ordering::SeqCst);
    assert!(deadline.left().is_some_and(|left| !left.is_zero()));
    match wanted.quantity {
        0 => Err(Failure::permanent("stock.nothing", "zero is no quantity")),
        99 => std::future::pending().await,
        quantity => Ok(Reply(Reserved { left: 100 - quantity })),
    }
}

fn command(quantity: u32) -> Reserve {
    Reserve { sku: format!("sku-{quantity}"), quantity }
}

/// A command is answered by its owner; a failure is an answer, and so is the end of the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_is_answered_or_says_why_not() {
    on_each(async |bus| {
        let stock = Stock::default();
        let owner = || Service::new("stock").retry(quick()).on(topic("commands"), reserve);
        let running =
            owner().timeout(Duration::from_secs(1)).with_state(stock.clone()).start(&bus).await.unwrap();
        let requests = bus.requests().await.unwrap();
        let ask = async |quantity: u32, within: u64| {
            requests.request(&topic("commands"), &command(quantity), Duration::from_millis(within)).await
        };
        assert_eq!(ask(7, 10_000).await.unwrap().left, 93);
        let (a, b) = tokio::join!(ask(1, 10_000), ask(2, 10_000));
        assert_eq!((a.unwrap().left, b.unwrap().left), (99, 98));
        let refused = ask(0, 10_000).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Failed);
        assert!(
            refused.to_string().contains("zero is no quantity")
                && refused.to_string().contains("stock.nothing")
        );
        assert_eq!(ask(99, 300).await.unwrap_err().kind(), ErrorKind::Timeout);
        // A second owner is refused, under whatever name.
        let other = Service::new("thief").on(topic("commands"), reserve).with_state(Stock::default());
        assert_eq!(other.start(&bus).await.unwrap_err().kind(), ErrorKind::Conflict);
        // What comes after its time is not run.
        let before = stock.0.load(Ordering::SeqCst);
        let late =
            Envelope::of(&command(5), "/t").unwrap().with_extension("expirytime", "2020-01-01T00:00:00Z");
        bus.publisher().await.unwrap().publish_envelope(&topic("commands"), late).await.unwrap();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while running.counts().expired == 0 {
            assert!(tokio::time::Instant::now() < deadline, "{:?}", running.counts());
            tokio::task::yield_now().await;
        }
        let ran = stock.0.load(Ordering::SeqCst) - before;
        let inbox = requests.inbox().clone();
        requests.close().await;
        assert!(bus.transport().admin().unwrap().topic(&inbox).await.unwrap().is_none(), "the inbox stays");
        drop(running.stop().await);
        // The one that hung may have run once more meanwhile.
        assert!(ran <= 1, "a late command was run");
    })
    .await;
}
