//! A redriven dead letter goes only to the handler that failed, while the program runs.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test reports by panicking")]

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
    world.down.store(false, Ordering::SeqCst);
    ctl(&["dlq", "redrive", "--reason", "billing.down"]);
    assert_eq!(ctl(&["dlq", "list"]).lines().count(), 3, "a preview must change nothing");
    ctl(&["dlq", "redrive", "--reason", "billing.down", "--execute"]);
    until("three bills", async || world.billed.load(Ordering::SeqCst) == 3).await;
    let admin = bus.transport().admin().unwrap();
    until("no lag", async || admin.groups(Some(&topic)).await.unwrap().iter().all(|group| group.lag == 0))
        .await;
    assert_eq!((world.billed.load(Ordering::SeqCst), world.mailed.load(Ordering::SeqCst)), (3, 3));
    assert_eq!(ctl(&["dlq", "list"]), "", "redriven letters are settled");
    billing.stop().await.unwrap();
    mailing.stop().await.unwrap();
}
