//! What the processes do: producers count up each of their keys, consumers note what they handle.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use eventbus::{
    Bus, Envelope, ErrorKind, Event, EventId, Failure, Retry, Service, Start, State, Topic, Typed,
};
use eventbus_tests::around::Around;
use parking_lot::Mutex;

use crate::account::now_ms;
use crate::bugs::{Bug, Planted};

/// Producers, and keys of each.
pub(crate) const N_PRODUCERS: usize = 4;
pub(crate) const KEYS_EACH: usize = 50;
/// One in so many runs of a handler fails.
pub(crate) const FAILS_ONE_IN: u32 = 20;
/// Between two rounds of a producer.
const PACE: Duration = Duration::from_millis(25);
pub(crate) const AGAIN: Duration = Duration::from_millis(100);

pub(crate) struct Place {
    pub(crate) url: String,
    pub(crate) topic: String,
    pub(crate) folder: PathBuf,
    pub(crate) id: usize,
    pub(crate) bug: Bug,
    /// The database of a run over an outbox.
    pub(crate) db: String,
}

#[derive(Debug, Clone, Event, serde::Serialize, serde::Deserialize)]
#[event(type = "torture.step", version = 1, key = key)]
pub(crate) struct Step {
    pub(crate) key: String,
    pub(crate) n: u64,
    /// Tells attempts for one number apart, of which only one is committed.
    #[serde(default)]
    pub(crate) token: String,
}

impl Step {
    pub(crate) fn new(key: String, n: i64) -> Self {
        let token = format!("{:016x}", fastrand::u64(..));
        Self { key, n: n.unsigned_abs(), token }
    }
}

impl Place {
    pub(crate) fn topic(&self) -> eventbus::Result<Topic> {
        Topic::new(self.topic.clone())
    }

    /// A file that is only ever appended to, a whole line at a time.
    fn log(&self, name: &str) -> eventbus::Result<File> {
        let path = self.folder.join(name);
        OpenOptions::new().create(true).append(true).open(&path).map_err(|error| {
            eventbus::Error::new(ErrorKind::Unavailable, "a log cannot be opened").caused_by(error)
        })
    }

    /// Whether everybody should come to an end.
    pub(crate) fn is_over(&self) -> bool {
        self.folder.join("over").exists()
    }

    pub(crate) async fn connect(&self) -> eventbus::Result<Bus> {
        loop {
            match eventbus::connect(&self.url).await {
                Err(error) if error.is_retryable() => tokio::time::sleep(AGAIN).await,
                connected => return connected,
            }
        }
    }
}

fn written(error: std::io::Error) -> eventbus::Error {
    eventbus::Error::new(ErrorKind::Unavailable, "a log cannot be written").caused_by(error)
}

/// Publishes the next event of each key until the run is over: again, under its id, until it is confirmed.
pub(crate) async fn produce(place: &Place) -> eventbus::Result<()> {
    let name = format!("confirmed.{}", place.id);
    let mut next: HashMap<String, u64> = HashMap::new();
    for line in std::fs::read_to_string(place.folder.join(&name)).unwrap_or_default().lines() {
        if let Some((key, n)) = line.split_once(' ') {
            next.insert(key.to_owned(), n.parse().unwrap_or(0) + 1);
        }
    }
    let (mut log, topic) = (place.log(&name)?, place.topic()?);
    let bus = place.connect().await?;
    let publisher = bus.transport().publisher().await?;
    while !place.is_over() {
        let mut batch = Vec::new();
        let mut steps = Vec::new();
        for at in 0..KEYS_EACH {
            let key = format!("p{}k{at}", place.id);
            let step = Step { n: *next.entry(key.clone()).or_default(), key, token: String::new() };
            let id = EventId::parse(&format!("{}-{}", step.key, step.n));
            batch.push(Envelope::of(&step, "/torture")?.with_id(id));
            steps.push(step);
        }
        let outcomes: Vec<eventbus::Result<()>> = match publisher.enqueue(&topic, batch).await {
            Ok(confirm) => confirm.await.into_iter().map(|outcome| outcome.map(drop)).collect(),
            Err(error) => steps.iter().map(|_| Err(error.duplicate())).collect(),
        };
        let mut lines = String::new();
        for (step, outcome) in steps.iter().zip(outcomes) {
            let is_done = match outcome {
                Ok(()) => true,
                // An earlier event of its key was not stored: there is none in a batch of ours.
                Err(error) if error.is_retryable() || error.kind() == ErrorKind::Failed => {
                    place.bug == Bug::LostConfirm
                }
                Err(error) => return Err(error),
            };
            if is_done {
                lines.push_str(&format!("{} {}\n", step.key, step.n));
                *next.entry(step.key.clone()).or_default() += 1;
            }
        }
        log.write_all(lines.as_bytes()).map_err(written)?;
        tokio::time::sleep(PACE).await;
    }
    if place.bug == Bug::NeverEnds {
        std::future::pending::<()>().await;
    }
    bus.close().await
}

#[derive(Clone)]
struct Hand {
    effects: Arc<Mutex<File>>,
    bus: Bus,
    topic: Topic,
    bug: Bug,
    /// Where the bug of that name parks: nowhere else, so that whoever takes over knows nothing of it.
    forgettable: Arc<Mutex<HashMap<String, Vec<Step>>>>,
}

impl Hand {
    fn note(&self, step: &Step) -> eventbus::Result<()> {
        let line = format!("{} {} {}\n", now_ms(), step.key, step.n);
        self.effects.lock().write_all(line.as_bytes()).map_err(written)
    }

    /// Parks an event behind the others of its key, in memory alone.
    fn park(&self, step: Step) {
        let key = step.key.clone();
        let is_first = {
            let mut parked = self.forgettable.lock();
            let of = parked.entry(key.clone()).or_default();
            of.push(step);
            of.len() == 1
        };
        if is_first {
            let hand = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let mut parked = hand.forgettable.lock();
                for step in parked.remove(&key).unwrap_or_default() {
                    drop(hand.note(&step));
                }
            });
        }
    }
}

#[allow(clippy::panic, reason = "a bug that is planted")]
fn broken() {
    panic!("planted");
}

async fn handle(Typed(step): Typed<Step>, State(hand): State<Hand>) -> Result<(), Failure> {
    let is_parked = hand.forgettable.lock().contains_key(&step.key);
    let fails = fastrand::u32(..FAILS_ONE_IN) == 0;
    if hand.bug == Bug::Panics && fails {
        // Nobody waits for it.
        drop(tokio::spawn(async { broken() }));
    }
    match hand.bug {
        Bug::ParkedForgotten if is_parked || fails => hand.park(step),
        Bug::RetryToTail if fails => drop(hand.bus.publisher().await?.publish(&hand.topic, &step).await?),
        _ if fails => return Err(Failure::transient("torture", "one in twenty")),
        _ => hand.note(&step)?,
    }
    Ok(())
}

/// Handles events until it is asked to end. The log of effects is one for all consumers: its order is theirs.
pub(crate) async fn consume(place: &Place) -> eventbus::Result<()> {
    let bus = place.connect().await?;
    let bus = Bus::new(Around { inner: bus.transport().clone(), change: Planted(place.bug) });
    let hand = Hand {
        effects: Arc::new(Mutex::new(place.log("effects")?)),
        bus: bus.clone(),
        topic: place.topic()?,
        bug: place.bug,
        forgettable: Arc::default(),
    };
    let (base, most) = (Duration::from_millis(20), Duration::from_millis(300));
    let retry =
        Retry::exponential(base, most, std::num::NonZeroU32::new(200).unwrap_or(std::num::NonZeroU32::MIN))
            .with_in_lane(std::num::NonZeroU32::MIN);
    let shutdown = eventbus::shutdown_signal();
    let running = loop {
        let service = Service::new("torture").retry(retry).start_at(Start::Earliest);
        let service = service.on(place.topic()?, handle).with_state(hand.clone());
        match service.start(&bus).await {
            Err(error) if error.is_retryable() => tokio::time::sleep(AGAIN).await,
            started => break started?,
        }
    };
    shutdown.await;
    running.stop().await?;
    bus.close().await
}
