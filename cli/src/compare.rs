//! `audit`: the numbers that an outbox gave, against what is in a topic and what a consumer handled.

use std::collections::{HashMap, HashSet};

use clap::Args;
use eventbus::time::to_rfc3339;
use eventbus::{Envelope, Topic};
use outbox::InboxOperator;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::exit::{Failure, Outcome};
use crate::out::{Out, row, say};
use crate::range::{Range, resolve};
use crate::reader::Reader;
use crate::session::Session;
use crate::store::Store;

/// Compares the numbers that an outbox gave its events with their order in a topic, and with what a consumer handled.
///
/// Each finding is a row. `repeated`: an event is there again, which happens and which inboxes pass over. `reordered`: an event
/// is behind a later one of its key, and is not there before in the range. `unhandled`: the consumer does not know an event; it may have
/// been dead-lettered, be of a type that nobody takes, or be older than the consumer remembers. `undecodable`: it is no event.
/// Exit code 7 for anything but repetitions.
///
/// What is not found: an event that never came into the topic, as numbers have gaps (outbox status shows what waits); and, with
/// a consumer that knows keys by their numbers, an event that was left behind later ones of its key.
///
/// Examples:
///   eventctl -c sqlite://shop.db audit orders
///   eventctl -c kafka://broker audit orders --consumer billing.charge@1 --store postgres://me@db/shop
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Audit {
    /// The topic.
    #[arg(add = crate::complete::topics())]
    topic: Topic,
    #[command(flatten)]
    store: Store,
    /// Compares with what this one handled too, as `inbox list` names it.
    #[arg(long, value_name = "NAME")]
    consumer: Option<String>,
    /// Which events. What came in the last minute may still be on its way to the consumer.
    #[arg(long, default_value = "start:@-1m")]
    range: Range,
    /// Most findings that are shown; all are counted.
    #[arg(short = 'n', long, default_value_t = 100)]
    max: usize,
}

impl Audit {
    /// Whether it looks into an inbox too.
    pub(crate) fn asks_a_consumer(&self) -> bool {
        self.consumer.is_some()
    }
}

/// Events that a consumer is asked about at once.
const HELPING: usize = 500;

/// What is asked of a consumer about an event.
enum Asked {
    Id(Uuid),
    Number { source: String, key: String, seq: i64 },
}

/// What of an outbox's numbers was seen.
#[derive(Default)]
struct Seen {
    n_events: u64,
    n_numbered: u64,
    /// The highest number of each key, and all numbers.
    highest: HashMap<(String, Vec<u8>), i64>,
    numbers: HashSet<(String, i64)>,
    found: Vec<Map<String, Value>>,
    n_repeated: u64,
    n_reordered: u64,
    n_unhandled: u64,
    n_undecodable: u64,
}

impl Seen {
    fn found(&mut self, what: &str, place: &str, event: &Envelope, max: usize) {
        match what {
            "repeated" => self.n_repeated += 1,
            "reordered" => self.n_reordered += 1,
            _ => self.n_unhandled += 1,
        }
        if self.found.len() < max {
            let key = event.key().map(|key| String::from_utf8_lossy(key.as_bytes()).into_owned());
            self.found.push(row! {"finding": what, "place": place, "id": event.id().to_string(), "key": key,
            "seq": event.extension("evt-seq"), "time": event.time().map(to_rfc3339)});
        }
    }

    fn undecodable(&mut self, place: &str, max: usize) {
        self.n_undecodable += 1;
        if self.found.len() < max {
            let nothing = Value::Null;
            self.found.push(
                row! {"finding": "undecodable", "place": place, "id": nothing.clone(), "key": nothing.clone(),
                "seq": nothing.clone(), "time": nothing},
            );
        }
    }

    /// Takes the next event of a partition.
    fn take(&mut self, place: &str, event: &Envelope, max: usize) {
        self.n_events += 1;
        let seq = event.extension("evt-seq").and_then(|seq| seq.parse::<i64>().ok());
        let (Some(seq), Some(source)) = (seq, event.extension("evt-source")) else { return };
        self.n_numbered += 1;
        if !self.numbers.insert((source.to_owned(), seq)) {
            return self.found("repeated", place, event, max);
        }
        let Some(key) = event.key() else { return };
        let highest = self.highest.entry((source.to_owned(), key.as_bytes().to_vec())).or_insert(seq);
        if seq < *highest {
            return self.found("reordered", place, event, max);
        }
        *highest = seq;
    }
}

/// How a consumer knows events, and how far it is with each key where it knows them by their numbers.
struct Consumer<'a> {
    inbox: &'a dyn InboxOperator,
    name: &'a str,
    by_numbers: Option<HashMap<(String, String), i64>>,
}

impl<'a> Consumer<'a> {
    async fn find(inbox: &'a dyn InboxOperator, name: &'a str) -> Outcome<Self> {
        if inbox.memory(name).await?.is_none() {
            return Err(Failure::NotFound(format!(
                "there is no consumer {name}: eventctl inbox list shows them"
            )));
        }
        let progress = inbox.progress(name, u32::MAX).await?;
        let of = |one: outbox::Progress| ((one.source, one.key), one.last_seq);
        let by_numbers = (!progress.is_empty()).then(|| progress.into_iter().map(of).collect());
        Ok(Self { inbox, name, by_numbers })
    }

    fn asked(&self, topic: &Topic, event: &Envelope) -> Asked {
        let seq = event.extension("evt-seq").and_then(|seq| seq.parse().ok());
        match (&self.by_numbers, seq, event.extension("evt-source"), event.key()) {
            (Some(_), Some(seq), Some(source), Some(key)) => {
                let key = key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
                Asked::Number { source: format!("{source}/{topic}"), key, seq }
            }
            _ => Asked::Id(outbox::known_by(event)),
        }
    }

    /// Of these events those that it does not know.
    async fn unhandled(&self, asked: Vec<(String, Envelope, Asked)>) -> Outcome<Vec<(String, Envelope)>> {
        let ids: Vec<Uuid> = asked
            .iter()
            .filter_map(|(.., asked)| match asked {
                Asked::Id(id) => Some(*id),
                Asked::Number { .. } => None,
            })
            .collect();
        let known: HashSet<Uuid> = self.inbox.knows(self.name, &ids).await?.into_iter().collect();
        let is_known = |asked: &Asked| match asked {
            Asked::Id(id) => known.contains(id),
            Asked::Number { source, key, seq } => {
                let last = self.by_numbers.as_ref().and_then(|keys| keys.get(&(source.clone(), key.clone())));
                last.is_some_and(|last| last >= seq)
            }
        };
        Ok(asked
            .into_iter()
            .filter(|(.., asked)| !is_known(asked))
            .map(|(place, event, _)| (place, event))
            .collect())
    }
}

/// Runs the command.
///
/// # Errors
/// Not found: the topic, the consumer. Check: something is out of order, unreadable, or not handled.
pub(crate) async fn run(session: &Session, audit: &Audit, out: &mut Out) -> Outcome {
    let store = match &audit.consumer {
        Some(_) => Some(audit.store.open(session).await?.inbox_operator()),
        None => None,
    };
    let consumer = match (&store, &audit.consumer) {
        (Some(inbox), Some(name)) => Some(Consumer::find(&**inbox, name).await?),
        _ => None,
    };
    let admin = session.admin()?;
    let spans = resolve(admin, &audit.topic, audit.range).await?;
    let mut reader = Reader::new(admin, audit.topic.clone(), spans);
    let (mut seen, mut asked) = (Seen::default(), Vec::new());
    loop {
        let record = reader.next().await?;
        let is_over = record.is_none();
        if let Some(record) = record {
            let place = format!("{}/{}@{}", audit.topic, record.partition.0, record.offset.0);
            match record.content.envelope() {
                Some(event) => {
                    seen.take(&place, event, audit.max);
                    if let Some(consumer) = &consumer {
                        asked.push((place, event.clone(), consumer.asked(&audit.topic, event)));
                    }
                }
                None => seen.undecodable(&place, audit.max),
            }
        }
        if let Some(consumer) = &consumer
            && (is_over || asked.len() == HELPING)
        {
            for (place, event) in consumer.unhandled(std::mem::take(&mut asked)).await? {
                seen.found("unhandled", &place, &event, audit.max);
            }
        }
        if is_over {
            break;
        }
    }
    let Seen { n_events, n_numbered, n_repeated, n_reordered, n_unhandled, n_undecodable, found, .. } = seen;
    out.rows(found)?;
    say!(
        "{n_events} events, {n_numbered} of them numbered by an outbox: {n_repeated} repeated, {n_reordered} reordered, \
         {n_unhandled} unhandled, {n_undecodable} undecodable"
    );
    match n_reordered + n_unhandled + n_undecodable {
        0 => Ok(()),
        n => Err(Failure::Check(format!("{n} events of {} are not as they should be", audit.topic))),
    }
}
