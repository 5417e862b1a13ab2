//! A service: a durable group with routes from topics to handlers.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use crate::backoff::Retry;
use crate::batch::{BatchHandler, BoundBatch};
use crate::bus::Bus;
use crate::driver::{self, Running};
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Message;
use crate::extract::{Beginning, Context};
use crate::failure::Failure;
use crate::handler::{Bound, Handler, bind};
use crate::name::{Group, Topic};
use crate::outcome::{IntoOutcome, Outcome};
use crate::parking::Parking;
use crate::subscription::{Start, Subscription};
use crate::versions::{OtherVersions, Unfit};

/// A condition on a header: `Guard::header("priority", "high")`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    name: String,
    value: Vec<u8>,
}

impl Guard {
    /// Holds if the first header of this name has exactly this value.
    pub fn header(name: impl Into<String>, value: impl AsRef<[u8]>) -> Self {
        Self { name: name.into(), value: value.as_ref().to_vec() }
    }

    pub(crate) fn holds(&self, headers: &crate::Headers) -> bool {
        headers.get(&self.name) == Some(&self.value)
    }
}

/// Most events a batch handler gets at once.
const MAX_BATCH: NonZeroUsize = NonZeroUsize::new(64).unwrap();
/// Different keys that fail in a row before intake pauses.
const BREAKER_AT: NonZeroUsize = NonZeroUsize::new(10).unwrap();

/// Bounds and policies of a service's subscriptions.
#[derive(Debug, Clone)]
pub(crate) struct Policy {
    pub(crate) lanes: NonZeroUsize,
    pub(crate) window: NonZeroUsize,
    pub(crate) window_bytes: NonZeroUsize,
    pub(crate) revoke_within: Duration,
    pub(crate) breaker_at: NonZeroUsize,
    pub(crate) lease: Duration,
    pub(crate) silence: Duration,
    pub(crate) retry: Retry,
    pub(crate) parking: Parking,
    pub(crate) other_versions: OtherVersions,
    #[cfg(feature = "rate-limit")]
    pub(crate) per_second: Option<std::num::NonZeroU32>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) drain_within: Duration,
    pub(crate) start: Start,
}

/// A durable consumer group whose handlers are async functions.
///
/// | Bound | Default | Option |
/// |---|---|---|
/// | keys handled in parallel, each topic | 32 | [`lanes`](Self::lanes) |
/// | events in hand, each topic | 1,024 | [`window`](Self::window) |
/// | a delivery without a sign of life | 30 s | [`lease`](Self::lease) |
/// | events wait and nothing is delivered | 60 s | [`rejoin_after`](Self::rejoin_after) |
/// | runs in the lane, deliveries, delays | 3, 8, 1 s to 5 min | [`retry`](Self::retry) |
/// | a known type in another version | again after 1 min | [`other_versions`](Self::other_versions) |
/// | parked events a key, parked keys a partition | 1,024, 10,000 | [`parking`](Self::parking) |
/// | bytes in hand, each topic | 64 MiB | [`window_bytes`](Self::window_bytes) |
/// | handing a partition over | 10 s | [`revoke_within`](Self::revoke_within) |
/// | events in one call of a batch handler | 64 | [`up_to`](Self::up_to) |
/// | different keys that fail in a row before intake pauses | 10 | [`breaker_at`](Self::breaker_at) |
/// | the pause before a probe, while intake is paused | 0.5 s, doubling to 30 s | fixed |
/// | the pause after a failure of the transport | 50 ms, doubling to 5 s | fixed |
/// | runs a second, each topic | unbounded | `rate_limit` (feature `rate-limit`) |
/// | a run of a handler | unbounded | [`timeout`](Self::timeout) |
/// | draining at the end | 25 s | [`drain_within`](Self::drain_within) |
/// | waiting for an answer to a command | none | `within` of [`Requests::request`](crate::Requests::request) |
///
/// What transports bound is in the tables of [`memory`](crate::transport::memory) and
/// [`sqlite`](crate::transport::sqlite).
///
/// Unknown types are acknowledged and counted; a known type in a version that no route takes is retried, as a newer
/// member may know it ([`other_versions`](Self::other_versions)); a body that does not decode, a permanent failure, and a
/// transient one after its last attempt go to `<topic>.dlq`, confirmed before the source is settled.
pub struct Service<S = ()> {
    name: String,
    routes: Vec<Route<S>>,
    policy: Policy,
}

struct Route<S> {
    topic: Topic,
    /// The path of the handler.
    name: &'static str,
    message: Option<(&'static str, u32)>,
    guard: Option<Guard>,
    emit_to: Option<Topic>,
    is_command: bool,
    /// Most events in one call, where it takes batches.
    max_batch: NonZeroUsize,
    bind: Box<dyn FnOnce(S) -> Handling + Send>,
}

/// How a route's handler takes events.
pub(crate) enum Handling {
    One(Box<dyn Bound>),
    Batch { handler: Box<dyn BoundBatch>, max: NonZeroUsize },
}

/// A route whose handler has its state.
pub(crate) struct BoundRoute {
    pub(crate) name: &'static str,
    pub(crate) takes: Takes,
    pub(crate) guard: Option<Guard>,
    pub(crate) emit_to: Option<Topic>,
    pub(crate) handling: Handling,
}

/// The events that a route takes, if its guard holds.
pub(crate) enum Takes {
    All,
    Version(&'static str, u32),
    /// Of a type, those in other versions than these.
    Others(&'static str, Vec<u32>),
}

impl Takes {
    pub(crate) fn fits(&self, envelope: &Envelope) -> bool {
        // What names no version is the first.
        let version = envelope.version().unwrap_or(1);
        match self {
            Self::All => true,
            Self::Version(event_type, known) => envelope.event_type() == *event_type && version == *known,
            Self::Others(event_type, known) => {
                envelope.event_type() == *event_type && !known.contains(&version)
            }
        }
    }
}

impl BoundRoute {
    /// The routes for other versions of the types that these routes take.
    fn for_others(routes: &[Self], policy: OtherVersions) -> Vec<Self> {
        let mut known: BTreeMap<&'static str, Vec<u32>> = BTreeMap::new();
        for route in routes {
            if let Takes::Version(event_type, version) = route.takes {
                known.entry(event_type).or_default().push(version);
            }
        }
        let other = |(event_type, versions)| {
            let handler = Unfit::new(policy)?;
            Some(Self {
                name: Unfit::NAME,
                takes: Takes::Others(event_type, versions),
                guard: None,
                emit_to: None,
                handling: Handling::One(Box::new(handler)),
            })
        };
        known.into_iter().filter_map(other).collect()
    }

    /// Has the handler's arguments look whether runs can work.
    async fn prepare(&self, bus: &Bus, topic: &Topic, group: &Group) -> Result<()> {
        let beginning = Beginning { bus, topic, group, handler: self.name };
        let prepared = match &self.handling {
            Handling::One(handler) => handler.prepare(&beginning),
            Handling::Batch { handler, .. } => handler.prepare(&beginning),
        };
        prepared.await.map_err(|error| error.with("handler", self.name))
    }

    /// Runs the handler on one delivery.
    pub(crate) async fn call(&self, context: &Context) -> Outcome {
        match &self.handling {
            Handling::One(handler) => handler.call(context).await,
            Handling::Batch { handler, .. } => match handler.call(std::slice::from_ref(context)).await {
                Ok(mut outcomes) => outcomes.pop().flatten().unwrap_or_else(|| {
                    Failure::transient("batch", "an event that runs alone was left out of its call")
                        .into_outcome()
                }),
                Err(failure) => failure.into_outcome(),
            },
        }
    }
}

impl<S: Clone + Send + Sync + 'static> Service<S> {
    /// Names a service: the name is its consumer group and, after a `/`, the source of what it emits.
    pub fn new(name: impl Into<String>) -> Self {
        let policy = Policy {
            lanes: NonZeroUsize::MIN.saturating_add(31),
            window: Subscription::WINDOW,
            window_bytes: Subscription::WINDOW_BYTES,
            revoke_within: Subscription::REVOKE_WITHIN,
            breaker_at: BREAKER_AT,
            lease: Subscription::LEASE,
            silence: Duration::from_secs(60),
            retry: Retry::default(),
            parking: Parking::default(),
            other_versions: OtherVersions::default(),
            #[cfg(feature = "rate-limit")]
            per_second: None,
            timeout: None,
            drain_within: Duration::from_secs(25),
            start: Start::Latest,
        };
        Self { name: name.into(), routes: Vec::new(), policy }
    }

    /// Routes events of a topic to a handler: those of the type and version that its [`Typed`](crate::Typed)
    /// argument names, or all if it has none. Of several routes that match, the first wins.
    #[must_use]
    pub fn on<A: 'static, H: Handler<A, S>>(mut self, topic: Topic, handler: H) -> Self {
        self.routes.push(Route {
            topic,
            name: path::<H>(),
            message: H::MESSAGE,
            guard: None,
            emit_to: None,
            is_command: H::IS_COMMAND,
            max_batch: MAX_BATCH,
            bind: Box::new(move |state| Handling::One(bind(handler, state))),
        });
        self
    }

    /// Routes events of a topic to a batch handler: those of the type and version of its
    /// [`Batch`](crate::Batch), up to 64 at once, at most one of each key. It never waits for a batch to fill.
    #[must_use]
    pub fn on_batch<A: 'static, H: BatchHandler<A, S>>(mut self, topic: Topic, handler: H) -> Self {
        self.routes.push(Route {
            topic,
            name: path::<H>(),
            message: Some((H::Message::TYPE, H::Message::VERSION)),
            guard: None,
            emit_to: None,
            is_command: H::Message::IS_COMMAND,
            max_batch: MAX_BATCH,
            bind: Box::new(move |state| Handling::Batch {
                handler: crate::batch::bind(handler, state),
                max: MAX_BATCH,
            }),
        });
        self
    }

    /// Sets the most events that one call of the batch handler before gets.
    #[must_use]
    pub fn up_to(mut self, events: NonZeroUsize) -> Self {
        if let Some(route) = self.routes.last_mut() {
            route.max_batch = events;
        }
        self
    }

    /// Adds a condition to the route before.
    #[must_use]
    pub fn when(mut self, guard: Guard) -> Self {
        if let Some(route) = self.routes.last_mut() {
            route.guard = Some(guard);
        }
        self
    }

    /// Says where the route before publishes what it emits.
    #[must_use]
    pub fn emit_to(mut self, topic: Topic) -> Self {
        if let Some(route) = self.routes.last_mut() {
            route.emit_to = Some(topic);
        }
        self
    }

    /// Sets how many keys of a topic are handled in parallel; events of one key never are.
    #[must_use]
    pub fn lanes(mut self, lanes: NonZeroUsize) -> Self {
        self.policy.lanes = lanes;
        self
    }

    /// Sets the most events of a topic in hand.
    #[must_use]
    pub fn window(mut self, events: NonZeroUsize) -> Self {
        self.policy.window = events;
        self
    }

    /// Sets the most bytes of a topic in hand; one event is taken however large it is.
    #[must_use]
    pub fn window_bytes(mut self, bytes: NonZeroUsize) -> Self {
        self.policy.window_bytes = bytes;
        self
    }

    /// Sets how long a partition that moves to another member may take: what is running then runs there again.
    #[must_use]
    pub fn revoke_within(mut self, budget: Duration) -> Self {
        self.policy.revoke_within = budget;
        self
    }

    /// Sets how many different keys may fail in a row, each by a dependency, before intake pauses.
    #[must_use]
    pub fn breaker_at(mut self, keys: NonZeroUsize) -> Self {
        self.policy.breaker_at = keys;
        self
    }

    /// Sets for how long a delivery stays ours without a sign of life, where the transport has leases. A handler
    /// may run longer: leases are renewed at a third of this while the process lives.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.policy.lease = lease;
        self
    }

    /// Sets for how long events may wait while nothing is delivered and nothing is in hand: then the consumer is
    /// given up and the group joined again, and health is degraded until a delivery comes. What was handed back
    /// with a delay is waited for first. It needs a transport with an admin, and that assigns partitions.
    #[must_use]
    pub fn rejoin_after(mut self, silence: Duration) -> Self {
        self.policy.silence = silence;
        self
    }

    /// Sets when failures are retried and given up.
    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.policy.retry = retry;
        self
    }

    /// Sets what becomes of events of a known type in a version that no route takes.
    #[must_use]
    pub fn other_versions(mut self, policy: OtherVersions) -> Self {
        self.policy.other_versions = policy;
        self
    }

    /// Sets where failed events wait, what waits behind them, and how much of it.
    #[must_use]
    pub fn parking(mut self, parking: Parking) -> Self {
        self.policy.parking = parking;
        self
    }

    /// Runs handlers of a topic at most so often a second, evenly; a call of a batch handler counts once.
    /// What waits for its turn stays with the transport, or in the window.
    #[cfg(feature = "rate-limit")]
    #[must_use]
    pub fn rate_limit(mut self, per_second: std::num::NonZeroU32) -> Self {
        self.policy.per_second = Some(per_second);
        self
    }

    /// Ends a run of a handler after a time, as a transient failure.
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.policy.timeout = Some(limit);
        self
    }

    /// Sets how long the service may finish what it holds when it is stopped.
    #[must_use]
    pub fn drain_within(mut self, budget: Duration) -> Self {
        self.policy.drain_within = budget;
        self
    }

    /// Sets where the group starts when it is new.
    #[must_use]
    pub fn start_at(mut self, start: Start) -> Self {
        self.policy.start = start;
        self
    }

    /// Gives the handlers their state.
    #[must_use]
    pub fn with_state(self, state: S) -> Service<()> {
        let routes = self.routes.into_iter().map(|route| {
            let Route { topic, name, message, guard, emit_to, is_command, max_batch, bind } = route;
            let state = state.clone();
            let bind = Box::new(move |()| bind(state));
            Route { topic, name, message, guard, emit_to, is_command, max_batch, bind }
        });
        Service { name: self.name, routes: routes.collect(), policy: self.policy }
    }
}

impl Service<()> {
    /// Joins the group on every topic of the routes and handles until it is stopped.
    ///
    /// # Errors
    /// What [`Transport::subscribe`](crate::Transport::subscribe) reports, a name that is not allowed, or what an argument of a
    /// handler [lacks](crate::Extract::prepare).
    ///
    /// # Cancellation
    /// What was joined until then is left, without a drain.
    pub async fn start(self, bus: &Bus) -> Result<Running> {
        let group = Group::new(&self.name)?;
        if self.routes.is_empty() {
            return Err(Error::config("a service needs at least one route: .on(topic, handler)")
                .with("service", &group));
        }
        let mut topics: BTreeMap<Topic, Vec<BoundRoute>> = BTreeMap::new();
        // Nothing is borrowed from the routes over a wait, so that a service can be started from any task.
        let commands = self.routes.iter().filter(|route| route.is_command);
        let commands: Vec<Topic> = commands.map(|route| route.topic.clone()).collect();
        for topic in commands {
            check_owner(bus, &topic, &group).await?;
        }
        let paths: Vec<&'static str> = self.routes.iter().map(|route| route.name).collect();
        for route in self.routes {
            let mut handling = (route.bind)(());
            if let Handling::Batch { max, .. } = &mut handling {
                *max = route.max_batch;
            }
            let bound = BoundRoute {
                name: name_among(&paths, route.name),
                takes: route.message.map_or(Takes::All, |(name, version)| Takes::Version(name, version)),
                guard: route.guard,
                emit_to: route.emit_to,
                handling,
            };
            topics.entry(route.topic).or_default().push(bound);
        }
        // Before anything is joined: a service starts as a whole.
        for (topic, routes) in &topics {
            for route in routes {
                route.prepare(bus, topic, &group).await?;
            }
        }
        let mut running = Running::new(self.policy.drain_within);
        for (topic, mut routes) in topics {
            // Last, so that whatever else fits wins.
            routes.extend(BoundRoute::for_others(&routes, self.policy.other_versions));
            let subscription = driver::Subscribed::open(bus, &group, topic, routes, &self.policy).await?;
            running.add(Arc::new(subscription));
        }
        Ok(running)
    }

    /// Runs until SIGTERM or Ctrl-C, then drains. A second signal ends it at once: what is in hand is redelivered.
    ///
    /// # Errors
    /// As [`start`](Self::start), what ended a subscription, or [`Timeout`](ErrorKind::Timeout) where it was not
    /// drained.
    ///
    /// # Cancellation
    /// Stops without draining; what was in hand is redelivered.
    pub async fn run(self, bus: &Bus) -> Result<()> {
        let shutdown = driver::shutdown_signal();
        let mut running = self.start(bus).await?;
        tokio::select! {
            () = shutdown => {
                let again = driver::shutdown_signal();
                tokio::select! {
                    stopped = running.stop() => stopped,
                    () = again => Err(Error::new(ErrorKind::Timeout, "a second signal came before it was drained")),
                }
            }
            error = running.failed() => {
                // The others finish what they hold; the first failure is the one to tell.
                if let Err(later) = running.stop().await {
                    tracing::error!(error = %later, "a subscription did not end well either");
                }
                Err(error)
            }
        }
    }
}

/// A command has one owner: a topic with commands has one group.
async fn check_owner(bus: &Bus, topic: &Topic, group: &Group) -> Result<()> {
    let Some(admin) = bus.transport().admin() else { return Ok(()) };
    if admin.topic(topic).await?.is_none() {
        return Ok(());
    }
    match admin.groups(Some(topic)).await?.into_iter().find(|other| other.group != *group) {
        None => Ok(()),
        Some(other) => {
            Err(Error::new(ErrorKind::Conflict, "commands have one owner, and the topic has another group")
                .with("topic", topic)
                .with("owner", other.group)
                .with("service", group))
        }
    }
}

/// The path of a handler's function, without the types that it was made for.
fn path<H>() -> &'static str {
    let name = std::any::type_name::<H>();
    let mut open = 0;
    let begins = name.bytes().rposition(|byte| {
        match byte {
            b'>' => open += 1,
            b'<' => open -= 1,
            _ => {}
        }
        open == 0
    });
    match begins.and_then(|at| name.get(..at)) {
        Some(path) if name.ends_with('>') && !path.is_empty() => path,
        _ => name,
    }
}

fn last(path: &'static str) -> &'static str {
    path.rsplit("::").next().unwrap_or(path)
}

/// A handler's name: that of its function, or its whole path where another handler of the service has that name.
fn name_among(paths: &[&'static str], path: &'static str) -> &'static str {
    let is_shared = paths.iter().any(|other| *other != path && last(other) == last(path));
    if is_shared { path } else { last(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bill<T>() {}

    mod other {
        pub(super) fn bill() {}
    }

    struct Shop<T>(T);

    impl<T> Shop<T> {
        fn ship(&self) -> &T {
            &self.0
        }
    }

    trait Sells {
        fn sell() {}
    }

    impl Sells for Shop<u8> {}

    fn path_of<H>(_: H) -> &'static str {
        path::<H>()
    }

    #[test]
    fn handlers_are_named_after_their_functions() {
        let (generic, plain) = (path_of(bill::<Vec<u8>>), path_of(other::bill));
        assert_eq!(name_among(&[generic], generic), "bill");
        assert_eq!(name_among(&[generic, generic], generic), "bill");
        let (method, of_trait) = (path_of(Shop::<Vec<u8>>::ship), path_of(<Shop<u8> as Sells>::sell));
        assert_eq!((name_among(&[method], method), name_among(&[of_trait], of_trait)), ("ship", "sell"));
        assert_eq!(name_among(&[generic, plain], plain), "eventbus::service::tests::other::bill");
    }
}
