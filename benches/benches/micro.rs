//! Micro level: what one envelope costs to make, check and read.
#![allow(missing_docs, reason = "criterion's macros define public functions")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use eventbus::{Envelope, EventId, Headers, partition};

fn envelope(c: &mut Criterion) {
    let body = bytes(256);
    let mut group = c.benchmark_group("envelope");
    group.throughput(Throughput::Elements(1));
    group.bench_function("id", |b| b.iter(EventId::generate));
    group.bench_function("new, key and body", |b| {
        b.iter(|| Envelope::new("shop.order.placed", "/bench").with_key("key-7").with_payload(body.clone()));
    });
    let event = Envelope::new("shop.order.placed", "/bench").with_key("key-7").with_payload(body.clone());
    group.bench_function("clone", |b| b.iter(|| event.clone()));
    group.bench_function("admit", |b| b.iter(|| event.clone().admit(1 << 20)));
    group.bench_function("partition", |b| b.iter(|| partition::of_envelope(&event, 16)));
    let headers = (0..6).fold(Headers::new(), |headers, at| headers.with(format!("header-{at}"), "value"));
    group.bench_function("look up one of 6 headers", |b| b.iter(|| headers.get("header-5").map(<[u8]>::len)));
    group.finish();
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31) as u8).collect()
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).warm_up_time(std::time::Duration::from_secs(1)).noise_threshold(0.05);
    targets = envelope
}
criterion_main!(benches);
