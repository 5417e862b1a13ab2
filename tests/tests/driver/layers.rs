//! Layers: the rate limit, trace context in and out, metrics under their names.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use eventbus::testing::TestBus;
use eventbus::{Emit, Envelope, Failure, Service, Typed};
use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder,
    SharedString, Unit,
};
use parking_lot::Mutex;

use super::{Echo, Step, topic};

fn step(n: u32) -> Step {
    Step { key: format!("k{n}"), n }
}

#[tokio::test(start_paused = true)]
async fn runs_are_spread_over_the_second() {
    async fn handle(Typed(_): Typed<Step>) {}
    let test = TestBus::new();
    let service = Service::new("orders").rate_limit(NonZeroU32::new(10).unwrap()).on(topic("steps"), handle);
    let running = service.with_state(()).start(test.bus()).await.unwrap();
    let started = tokio::time::Instant::now();
    for n in 0..21 {
        test.publish(&topic("steps"), &step(n)).await.unwrap();
    }
    test.settle().await.unwrap();
    let took = started.elapsed();
    assert!(
        took >= Duration::from_millis(1_990) && took < Duration::from_millis(2_500),
        "21 runs in {took:?}"
    );
    running.stop().await.unwrap();
}

#[tokio::test]
async fn outputs_carry_the_trace_on_and_leave_its_origin() {
    async fn handle(Typed(step): Typed<Step>) -> Emit<Echo> {
        Emit(Echo { key: step.key, n: step.n })
    }
    let test = TestBus::new();
    let service = Service::new("echo").on(topic("steps"), handle).emit_to(topic("echoes"));
    let running = service.with_state(()).start(test.bus()).await.unwrap();
    let origin = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let hop = "00-4bf92f3577b34da6a3ce929d0e0e4736-1111111111111111-01";
    let input = Envelope::of(&step(1), "/t").unwrap();
    let input = input.with_extension("traceparent", origin).with_header("traceparent", hop);
    test.bus().publisher().await.unwrap().publish_envelope(&topic("steps"), input).await.unwrap();
    test.settle().await.unwrap();
    let echo = test.events(&topic("echoes")).await.unwrap().pop().unwrap();
    assert_eq!(echo.extension("traceparent"), Some(origin));
    let next = String::from_utf8(echo.headers().get("traceparent").unwrap().to_vec()).unwrap();
    assert!(next.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && next.ends_with("-01"), "{next}");
    assert!(next != hop && next != origin, "each hop is a span of its own");
    running.stop().await.unwrap();
}

/// Everything that was recorded, by name and labels.
#[derive(Default)]
struct Recorded(Mutex<BTreeMap<String, f64>>);

static RECORDED: LazyLock<Arc<Recorded>> = LazyLock::new(Arc::default);

struct Meter(String);

impl Meter {
    fn add(&self, value: f64) {
        *RECORDED.0.lock().entry(self.0.clone()).or_default() += value;
    }
}

impl CounterFn for Meter {
    fn increment(&self, value: u64) {
        self.add(value as f64);
    }
    fn absolute(&self, value: u64) {
        RECORDED.0.lock().insert(self.0.clone(), value as f64);
    }
}

impl GaugeFn for Meter {
    fn increment(&self, value: f64) {
        self.add(value);
    }
    fn decrement(&self, value: f64) {
        self.add(-value);
    }
    fn set(&self, value: f64) {
        RECORDED.0.lock().insert(self.0.clone(), value);
    }
}

impl HistogramFn for Meter {
    fn record(&self, _: f64) {
        self.add(1.0);
    }
}

struct Keeper;

fn name(key: &Key) -> String {
    let labels: Vec<_> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
    format!("{}{{{}}}", key.name(), labels.join(","))
}

impl Recorder for Keeper {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(Arc::new(Meter(name(key))))
    }
    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(Arc::new(Meter(name(key))))
    }
    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Arc::new(Meter(name(key))))
    }
}

#[tokio::test]
async fn metrics_have_the_names_of_the_conventions() {
    async fn meter(Typed(step): Typed<Step>) -> Result<Emit<Echo>, Failure> {
        if step.n == 3 {
            return Err(Failure::permanent("never", "three"));
        }
        Ok(Emit(Echo { key: step.key, n: step.n }))
    }
    metrics::set_global_recorder(Keeper).unwrap();
    let test = TestBus::new();
    let service = Service::new("metered").on(topic("metered.steps"), meter).emit_to(topic("metered.echoes"));
    let running = service.with_state(()).start(test.bus()).await.unwrap();
    for n in 0..5 {
        test.publish(&topic("metered.steps"), &step(n)).await.unwrap();
    }
    test.settle().await.unwrap();
    running.stop().await.unwrap();
    let at = "messaging.destination.name=metered.steps,messaging.consumer.group.name=metered";
    let read = |name: &str| {
        let recorded = RECORDED.0.lock();
        recorded.get(name).copied().unwrap_or_else(|| panic!("no {name} in {recorded:#?}"))
    };
    assert_eq!(read(&format!("messaging.client.consumed.messages{{{at}}}")), 5.0);
    assert_eq!(read(&format!("messaging.client.sent.messages{{{at},handler=meter}}")), 4.0);
    assert_eq!(read(&format!("messaging.process.duration{{{at},handler=meter}}")), 5.0);
    assert_eq!(read(&format!("evt.handler.attempts{{{at},handler=meter,outcome=done}}")), 4.0);
    assert_eq!(read(&format!("evt.handler.attempts{{{at},handler=meter,outcome=permanent}}")), 1.0);
    assert_eq!(read(&format!("evt.dlq.messages{{{at}}}")), 1.0);
    assert_eq!(read(&format!("evt.consumer.in_flight{{{at}}}")), 0.0);
}
