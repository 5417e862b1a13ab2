//! Metrics through the `metrics` facade, under the names of the semantic conventions for messaging where they
//! have one. Labels are built once a route: never a key, an id or an error's text.
//!
//! | Metric | Kind | Labels beside topic and group |
//! |---|---|---|
//! | `messaging.process.duration` | histogram, s | handler |
//! | `messaging.client.consumed.messages` | counter | |
//! | `messaging.client.sent.messages` | counter | handler |
//! | `evt.handler.attempts` | counter | handler, outcome: `done`, `transient`, `permanent`, `poison` |
//! | `evt.dlq.messages` | counter | |
//! | `evt.dlq.parked_keys`, `evt.consumer.in_flight`, `evt.breaker.state` | gauge | |

#[cfg(feature = "metrics")]
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::error::Class;
use crate::name::{Group, Topic};

/// The meters of one subscription.
#[derive(Default)]
pub(in crate::driver) struct Meters {
    #[cfg(feature = "metrics")]
    inner: Option<Inner>,
}

#[cfg(feature = "metrics")]
struct Inner {
    consumed: Counter,
    dead_lettered: Counter,
    in_flight: Gauge,
    held: Gauge,
    breaker: Gauge,
    routes: std::collections::HashMap<&'static str, Route>,
}

#[cfg(feature = "metrics")]
struct Route {
    duration: Histogram,
    sent: Counter,
    done: Counter,
    transient: Counter,
    permanent: Counter,
    poison: Counter,
}

#[cfg_attr(
    not(feature = "metrics"),
    allow(clippy::unused_self, unused_variables, reason = "a switched-off feature")
)]
impl Meters {
    /// Whether somebody may read them.
    pub(in crate::driver) const ARE_ON: bool = cfg!(feature = "metrics");

    /// The time that a run begins, where somebody may want to know.
    pub(in crate::driver) fn clock() -> Option<tokio::time::Instant> {
        Self::ARE_ON.then(tokio::time::Instant::now)
    }

    /// Registers the meters: with the recorder that is installed at this moment.
    pub(in crate::driver) fn new(
        topic: &Topic,
        group: &Group,
        handlers: impl Iterator<Item = &'static str>,
    ) -> Self {
        #[cfg(feature = "metrics")]
        {
            let at = [
                ("messaging.destination.name", topic.to_string()),
                ("messaging.consumer.group.name", group.to_string()),
            ];
            let route = |handler: &'static str| {
                let of = |outcome: &'static str| {
                    let [topic, group] = at.clone();
                    counter!(
                        "evt.handler.attempts",
                        &[topic, group, ("handler", handler.to_owned()), ("outcome", outcome.to_owned())]
                    )
                };
                let [topic, group] = at.clone();
                let labels = [topic, group, ("handler", handler.to_owned())];
                Route {
                    duration: histogram!("messaging.process.duration", &labels),
                    sent: counter!("messaging.client.sent.messages", &labels),
                    done: of("done"),
                    transient: of("transient"),
                    permanent: of("permanent"),
                    poison: of("poison"),
                }
            };
            let inner = Inner {
                consumed: counter!("messaging.client.consumed.messages", &at),
                dead_lettered: counter!("evt.dlq.messages", &at),
                in_flight: gauge!("evt.consumer.in_flight", &at),
                held: gauge!("evt.dlq.parked_keys", &at),
                breaker: gauge!("evt.breaker.state", &at),
                routes: handlers.map(|handler| (handler, route(handler))).collect(),
            };
            Self { inner: Some(inner) }
        }
        #[cfg(not(feature = "metrics"))]
        Self {}
    }

    /// Notes a run: how long it took, how it ended, and how many events it emitted.
    pub(in crate::driver) fn ran(
        &self,
        handler: &'static str,
        took: std::time::Duration,
        failed: Option<Class>,
        n_sent: usize,
    ) {
        #[cfg(feature = "metrics")]
        if let Some(route) = self.inner.as_ref().and_then(|inner| inner.routes.get(handler)) {
            route.duration.record(took.as_secs_f64());
            route.sent.increment(n_sent as u64);
            match failed {
                None => &route.done,
                Some(Class::Transient) => &route.transient,
                Some(Class::Permanent) => &route.permanent,
                Some(Class::Poison) => &route.poison,
            }
            .increment(1);
        }
    }

    /// Notes deliveries.
    pub(in crate::driver) fn consumed(&self, n: usize) {
        #[cfg(feature = "metrics")]
        if let Some(inner) = &self.inner {
            inner.consumed.increment(n as u64);
            inner.in_flight.increment(n as f64);
        }
    }

    /// Notes deliveries that left the books.
    pub(in crate::driver) fn settled(&self, n: usize) {
        #[cfg(feature = "metrics")]
        if let Some(inner) = &self.inner {
            inner.in_flight.decrement(n as f64);
        }
    }

    /// Notes a dead letter, and what is held since.
    pub(in crate::driver) fn dead_lettered(&self) {
        #[cfg(feature = "metrics")]
        if let Some(inner) = &self.inner {
            inner.dead_lettered.increment(1);
        }
    }

    /// Notes how many keys wait for an operator, and whether the breaker is open.
    pub(in crate::driver) fn state(&self, n_held: u64, is_open: bool) {
        #[cfg(feature = "metrics")]
        if let Some(inner) = &self.inner {
            inner.held.set(n_held as f64);
            inner.breaker.set(if is_open { 1.0 } else { 0.0 });
        }
    }
}
