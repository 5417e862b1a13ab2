//! Costs that may not grow: allocations a message in memory, syncs a batch on a file.
#![allow(clippy::unwrap_used, reason = "a test reports by panicking")]
#![allow(unsafe_code, reason = "an allocator is an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use eventbus::transport::memory::{Memory, Options};
use eventbus::transport::sqlite::{self, Sqlite};
use eventbus::{Admin, Envelope, Group, Polled, Settle, Subscription, Topic, TopicSpec, Transport};
use eventbus_tests::disk::Disk;

/// Counts what is asked of the system's allocator.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn events(n: usize) -> Vec<Envelope> {
    (0..n)
        .map(|at| Envelope::new("t", "/s").with_key(format!("k{}", at % 100)).with_payload(vec![7; 200]))
        .collect()
}

/// The transport adds at most one allocation to each message, from publish to settle, in batches of 64.
/// One test alone in this program's process at a time: the counter is the process's.
#[test]
fn a_message_costs_at_most_one_allocation_and_a_batch_one_sync() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let memory = Memory::new(Options::default());
        let topic = Topic::new("orders").unwrap();
        let consumer =
            memory.subscribe(&Subscription::group(topic.clone(), Group::new("g").unwrap())).await.unwrap();
        let publisher = memory.publisher().await.unwrap();
        let (n, batch) = (64 * 200, 64);
        let run = async |events: Vec<Envelope>| {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for chunk in events.chunks(batch) {
                publisher.enqueue(&topic, chunk.to_vec()).await.unwrap().await.all().unwrap();
                let mut left = chunk.len();
                while left > 0 {
                    let Polled::Deliveries(got) =
                        consumer.poll(NonZeroUsize::new(64).unwrap()).await.unwrap()
                    else {
                        continue;
                    };
                    left -= got.len();
                    let settled: Vec<_> = got.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
                    consumer.settle(&settled).await.unwrap().all().unwrap();
                }
            }
            ALLOCATIONS.load(Ordering::Relaxed) - before
        };
        run(events(n)).await;
        let allocations = run(events(n)).await as f64 / n as f64;
        println!("{allocations:.3} allocations a message");
        assert!(allocations <= 1.0, "{allocations:.3} allocations a message");

        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::below(folder.path());
        let file = Sqlite::open_path(folder.path().join("bus.db"), sqlite::Options::default()).await.unwrap();
        file.declare(&TopicSpec::new(topic.clone())).await.unwrap();
        let publisher = file.publisher().await.unwrap();
        let (before, n_batches) = (disk.n_syncs(), 100);
        for _ in 0..n_batches {
            publisher.enqueue(&topic, events(20)).await.unwrap().await.all().unwrap();
        }
        let syncs = disk.n_syncs() - before;
        println!("{syncs} syncs for {n_batches} batches");
        // The log's first frame is synced with its header once.
        assert!(syncs <= n_batches + 2, "{syncs} syncs for {n_batches} batches");
        file.close().await.unwrap();
    });
}
