//! A redriven dead letter goes only to the handler that failed, while the program runs.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use eventbus::{Event, Failure, Service, State, Topic, Typed};
use serde::{Deserialize, Serialize};

#[derive(Debug, Event, Serialize, Deserialize)]
#[event(type = "shop.paid", version = 1, key = order)]
struct Paid {
    order: u64,
}

#[derive(Clone, Default)]
struct World {
    down: Arc<AtomicBool>,
    billed: Arc<AtomicUsize>,
    mailed: Arc<AtomicUsize>,
}

async fn bill(Typed(_): Typed<Paid>, State(world): State<World>) -> Result<(), Failure> {
    if world.down.load(Ordering::SeqCst) {
        return Err(Failure::permanent("billing.down", "no answer"));
    }
    world.billed.fetch_add(1, Ordering::SeqCst);
    Ok(())
}

async fn mail(Typed(_): Typed<Paid>, State(world): State<World>) {
    world.mailed.fetch_add(1, Ordering::SeqCst);
}

async fn until(what: &str, reached: impl AsyncFn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !reached().await {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redriven_letter_goes_only_to_the_handler_that_failed() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/bus.db", folder.path().display());
    let bus = eventbus::connect(&url).await.unwrap();
    let (topic, world) = (Topic::new("paid").unwrap(), World::default());
    world.down.store(true, Ordering::SeqCst);
    let billing =
        Service::new("billing").on(topic.clone(), bill).with_state(world.clone()).start(&bus).await.unwrap();
    let mailing =
        Service::new("mailing").on(topic.clone(), mail).with_state(world.clone()).start(&bus).await.unwrap();
    let publisher = bus.publisher().await.unwrap();
    for order in 0..3 {
        publisher.publish(&topic, &Paid { order }).await.unwrap();
    }
    until("three dead letters", async || {
        billing.counts().dead_lettered == 3 && world.mailed.load(Ordering::SeqCst) == 3
    })
    .await;
    let ctl = |arguments: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_eventctl")).args(["-c", &url]).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let listed = ctl(&["dlq", "list"]);
    assert_eq!(listed.lines().count(), 3, "{listed}");
    assert!(
        listed.lines().all(|line| line.contains("billing.down") && line.contains("\"handler\":\"bill\"")),
        "{listed}"
    );
    let grouped = ctl(&["dlq", "list", "--group-by", "reason"]);
    assert!(grouped.contains("\"count\":3"), "{grouped}");
    assert!(ctl(&["dlq", "list", "--group-by", "exception"]).contains("no answer"));
    assert_eq!(ctl(&["dlq", "list", "--since", "1h"]).lines().count(), 3);
    // Copies elsewhere, mended, leave the letters open.
    let edit = [".value.data.order += 100", "--to", "copies", "--keep", "--rate", "200/s", "--execute"];
    ctl(&[&["dlq", "redrive", "--reason", "billing.down", "--edit"], &edit[..]].concat());
    let copies = ctl(&["tail", "copies", "--select", ".value.data.order"]);
    assert_eq!(copies.lines().filter(|order| order.starts_with("10")).count(), 3, "{copies}");
    assert_eq!(ctl(&["dlq", "list"]).lines().count(), 3, "they were to stay open");
    world.down.store(false, Ordering::SeqCst);
    ctl(&["dlq", "redrive", "--reason", "billing.down"]);
    let some = ["-c", &url, "dlq", "redrive", "--reason", "billing.down", "--max", "1"];
    let some = Command::new(env!("CARGO_BIN_EXE_eventctl")).args(some).output().unwrap();
    assert!(String::from_utf8_lossy(&some.stderr).contains("2 more above --max 1"), "{some:?}");
    assert_eq!(ctl(&["dlq", "list"]).lines().count(), 3, "a preview must change nothing");
    ctl(&["dlq", "redrive", "--reason", "billing.down", "--execute"]);
    until("three bills", async || world.billed.load(Ordering::SeqCst) == 3).await;
    let admin = bus.transport().admin().unwrap();
    until("no lag", async || admin.groups(Some(&topic)).await.unwrap().iter().all(|group| group.lag == 0))
        .await;
    assert_eq!((world.billed.load(Ordering::SeqCst), world.mailed.load(Ordering::SeqCst)), (3, 3));
    assert_eq!(ctl(&["dlq", "list"]), "", "redriven letters are settled");
    // A range of the topic for one handler: the copies are in the topic, and nobody else takes them.
    ctl(&[
        "replay",
        "run",
        "paid",
        "--range",
        "0:end",
        "--max",
        "10",
        "--to-handler",
        "billing/bill",
        "--execute",
    ]);
    until("the events again", async || world.billed.load(Ordering::SeqCst) == 9).await;
    until("no lag", async || admin.groups(Some(&topic)).await.unwrap().iter().all(|group| group.lag == 0))
        .await;
    assert_eq!(world.mailed.load(Ordering::SeqCst), 3);
    billing.stop().await.unwrap();
    mailing.stop().await.unwrap();
}

/// What follows a failed event of its key waits for the operator, and comes after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_sequence_goes_on_when_the_operator_says_so() {
    #[derive(Debug, Event, Serialize, Deserialize)]
    #[event(type = "shop.step", version = 1, key = order)]
    struct Step {
        order: u64,
        n: u32,
    }
    type Seen = Arc<parking_lot::Mutex<Vec<(u64, u32)>>>;
    #[derive(Clone, Default)]
    struct Shop(Arc<AtomicBool>, Seen);
    async fn step(Typed(step): Typed<Step>, State(Shop(down, seen)): State<Shop>) -> Result<(), Failure> {
        if down.load(Ordering::SeqCst) && step.n == 0 {
            return Err(Failure::permanent("never", "not now"));
        }
        seen.lock().push((step.order, step.n));
        Ok(())
    }
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/bus.db", folder.path().display());
    let bus = eventbus::connect(&url).await.unwrap();
    let (topic, shop) = (Topic::new("steps.of.orders").unwrap(), Shop::default());
    shop.0.store(true, Ordering::SeqCst);
    let service =
        Service::new("ship.ping").on(topic.clone(), step).with_state(shop.clone()).start(&bus).await.unwrap();
    let publisher = bus.publisher().await.unwrap();
    for (order, n) in [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (1, 2)] {
        publisher.publish(&topic, &Step { order, n }).await.unwrap();
    }
    until("three keys are held", async || service.counts().held == 3 && service.counts().parked == 7).await;
    let ctl = |arguments: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_eventctl")).args(["-c", &url]).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (_, listed) = ctl(&["dlq", "list", "--parked-keys"]);
    assert!(listed.lines().count() == 3 && listed.contains("\"group\":\"ship.ping\""), "{listed}");
    assert_eq!(ctl(&["dlq", "redrive", "--sequence", "4", "--execute"]).0, Some(4), "no such sequence");
    shop.0.store(false, Ordering::SeqCst);
    assert_eq!(ctl(&["dlq", "redrive", "--sequence", "1"]).0, Some(0));
    assert_eq!(service.counts().held, 3, "a preview changes nothing");
    assert_eq!(ctl(&["dlq", "redrive", "--sequence", "1", "--execute"]).0, Some(0));
    until("key 1 went on", async || shop.1.lock().len() == 3).await;
    assert_eq!(ctl(&["dlq", "resolve", "--sequence", "2", "--reason", "by phone", "--execute"]).0, Some(0));
    until("key 2 went on", async || shop.1.lock().len() == 4).await;
    // The letter itself, redriven by its reason, frees its key as well.
    assert_eq!(ctl(&["dlq", "redrive", "--reason", "never", "--execute"]).0, Some(0));
    until("key 3 went on", async || service.counts().parked == 0).await;
    assert_eq!(*shop.1.lock(), [(1, 0), (1, 1), (1, 2), (2, 1), (3, 0), (3, 1)]);
    assert_eq!(ctl(&["dlq", "list"]).1, "", "letters of redriven and resolved keys are settled");
    service.stop().await.unwrap();
}
