//! Two versions of a service side by side.

use std::time::Duration;

use eventbus::{Envelope, Event, OtherVersions, Running, Service, State, Typed};

use super::{Log, Step, letters, on_each, quick, topic};

/// The next version of the step, which only the new service knows.
#[derive(Debug, Clone, Event, serde::Serialize, serde::Deserialize)]
#[event(type = "test.step", version = 2, key = key)]
struct Step2 {
    key: String,
    number: u32,
}

async fn old(Typed(step): Typed<Step>, State(log): State<Log>) {
    log.add(&step);
}

async fn new(Typed(step): Typed<Step2>, State(log): State<Log>) {
    log.add(&Step { key: step.key, n: step.number });
}

fn of_version(version: u32, key: u32, n: u32) -> Envelope {
    let key = format!("k{key}");
    let made = match version {
        1 => Envelope::of(&Step { key, n }, "/test"),
        _ => Envelope::of(&Step2 { key, number: n }, "/test"),
    };
    made.unwrap()
}

/// The old member meets what only the new one knows: it keeps that for whoever has the partition next, in the order of
/// the keys, and does not lose it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_update_loses_nothing() {
    const N_KEYS: u32 = 6;
    const N_EACH: u32 = 6;
    on_each(async |bus| {
        let log = Log::default();
        let service = || {
            let again = OtherVersions::Retry { after: Duration::from_millis(500) };
            Service::new("rolling").on(topic("steps"), old).other_versions(again)
        };
        let before: Running = service().with_state(log.clone()).start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        for n in 0..N_EACH {
            for key in 0..N_KEYS {
                // Each key changes versions back and forth: an old event waits behind a new one.
                let event = of_version(1 + (n + key) % 2, key, n);
                publisher.publish_envelope(&topic("steps"), event).await.unwrap();
            }
        }
        // Of each second key the first event is old.
        log.until_distinct(N_KEYS as usize / 2).await;
        assert_eq!(before.counts().dead_lettered, 0);
        let after = service().on(topic("steps"), new).with_state(log.clone()).start(&bus).await.unwrap();
        before.stop().await.unwrap();
        log.until_distinct((N_KEYS * N_EACH) as usize).await;
        let mut next = std::collections::HashMap::<String, u32>::new();
        for (key, n) in log.all() {
            let due = next.entry(key.clone()).or_default();
            assert!(n <= *due, "{key}: {n} came before {due}");
            *due = (*due).max(n + 1);
        }
        assert_eq!((after.counts().dead_lettered, after.counts().unknown), (0, 0));
        after.stop().await.unwrap();
    })
    .await;
}

/// Where they are not waited for they are dead letters.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_nobody_knows_ends_in_the_dead_letters() {
    on_each(async |bus| {
        let log = Log::default();
        let service = Service::new("alone").on(topic("steps"), old).retry(quick());
        let service = service.other_versions(OtherVersions::DeadLetter).with_state(log.clone());
        let running = service.start(&bus).await.unwrap();
        let publisher = bus.publisher().await.unwrap();
        for (version, n) in [(1, 0), (2, 1), (1, 2)] {
            publisher.publish_envelope(&topic("steps"), of_version(version, n, n)).await.unwrap();
        }
        log.until(2).await;
        let dead = letters(&bus, "steps", 1).await;
        assert_eq!(dead[0].version(), Some(2));
        assert_eq!(dead[0].payload(), of_version(2, 1, 1).payload());
        // A letter can be read a moment before it is counted.
        let monitor = running.monitor();
        running.stop().await.unwrap();
        assert_eq!((monitor.counts().dead_lettered, monitor.counts().unknown), (1, 0));
    })
    .await;
}
