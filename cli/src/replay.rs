//! `replay`: publishes a range of a topic into another, planned first.

use std::collections::BTreeMap;

use clap::{Args, Subcommand, ValueEnum};
use eventbus::{Envelope, EventId, Topic};
use serde_json::json;

use crate::context::Session;
use crate::exit::{Failure, Outcome};
use crate::out::Out;
use crate::out::row;
use crate::out::say;
use crate::range::{Bound, resolve};
use crate::reader::{Filter, RangeFlags, Reader, event};
use crate::{audit, record};

/// Publishes a range of a topic into another topic. No group moves.
///
/// Examples:
///   eventctl -c sqlite://shop.db replay plan orders --range @-1h:end --to orders.replay
///   eventctl -c sqlite://shop.db replay run orders --range @-1h:end --to orders.replay --execute
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Replay {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Counts what would be published; writes nothing.
    Plan(Flags),
    /// Publishes.
    Run {
        #[command(flatten)]
        flags: Flags,
        /// Does it; without, only plans.
        #[arg(long)]
        execute: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Ids {
    /// The events keep their ids: who has handled them skips them.
    Keep,
    /// New events.
    New,
}

#[derive(Debug, Args)]
struct Flags {
    /// The topic to read.
    source: Topic,
    /// The topic to publish to.
    #[arg(long, value_name = "TOPIC")]
    to: Topic,
    #[command(flatten)]
    range: RangeFlags,
    #[command(flatten)]
    filter: Filter,
    /// What becomes of the ids.
    #[arg(long, value_enum, default_value = "keep")]
    ids: Ids,
    /// At most so many events.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    max: u64,
    /// However many there are.
    #[arg(long, conflicts_with = "max")]
    all: bool,
    /// Events that were replayed so often are left alone.
    #[arg(long, default_value_t = 2, value_name = "N")]
    max_replays: u32,
}

/// Events published before their confirms are awaited.
const WINDOW: usize = 256;

/// Runs the command.
///
/// # Errors
/// Not found, refused for safety, or above the bound.
pub(crate) async fn run(session: &Session, replay: &Replay, out: &mut Out) -> Outcome {
    let (flags, execute) = match &replay.what {
        What::Plan(flags) => (flags, false),
        What::Run { flags, execute } => (flags, *execute),
    };
    if flags.to == flags.source {
        return Err(Failure::Refused("source and target are the same topic: it would grow for ever".into()));
    }
    let admin = session.admin()?;
    let spans = resolve(admin, &flags.source, flags.range.or_from(Bound::Start)).await?;
    let mut plan = Plan::default();
    let mut reader = Reader::new(admin, flags.source.clone(), spans.clone());
    while let Some(record) = reader.next().await? {
        plan.n_scanned += 1;
        let Some(found) = event(&record).filter(|_| flags.filter.takes(&record.content)) else { continue };
        plan.count(found, flags.max_replays);
    }
    if !execute {
        out.rows(plan.by_type.iter().map(|(name, n)| row! {"type": name, "events": n}).collect())?;
        say!(
            "plan: {} scanned, {} match, {} keys, {} B to {}; over --max-replays: {}; nothing was written; replay run … --execute does it",
            plan.n_scanned,
            plan.n_matched,
            plan.keys.len(),
            plan.n_bytes,
            flags.to,
            plan.n_tired
        );
        return Ok(());
    }
    if !flags.all && plan.n_matched > flags.max {
        return Err(Failure::Refused(format!(
            "{} events match, --max is {}: raise it or give --all",
            plan.n_matched, flags.max
        )));
    }
    session.may_write()?;
    let publisher = session.bus.transport().publisher().await?;
    let mut reader = Reader::new(admin, flags.source.clone(), spans);
    let (mut batch, mut n_published) = (Vec::new(), 0);
    let id = EventId::generate().to_string();
    loop {
        let record = reader.next().await?;
        let done = record.is_none();
        if let Some(record) = record
            && let Some(found) = event(&record).filter(|_| flags.filter.takes(&record.content))
            && n_replays(found) < flags.max_replays
        {
            batch.push(copy(found, flags.ids, &id, &record::reference(&flags.source, &record)));
        }
        if batch.len() == WINDOW || (done && !batch.is_empty()) {
            n_published += batch.len();
            publisher.enqueue(&flags.to, std::mem::take(&mut batch)).await?.await.all()?;
        }
        if done {
            break;
        }
    }
    let details = json!({"replay": id, "source": flags.source.as_str(), "to": flags.to.as_str(), "events": n_published});
    audit::note(session, "replay", details).await?;
    say!("replayed {n_published} events from {} to {}", flags.source, flags.to);
    Ok(())
}

fn n_replays(event: &Envelope) -> u32 {
    event.extension("evt-replay-count").and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// The event as it goes out again: this hop's trace context goes, the journey's stays.
fn copy(event: &Envelope, ids: Ids, replay: &str, of: &str) -> Envelope {
    let hop =
        |name: &str| name.eq_ignore_ascii_case("traceparent") || name.eq_ignore_ascii_case("tracestate");
    let copy = event
        .clone()
        .with_headers(event.headers().without(hop))
        .with_extension("evt-replay-id", replay)
        .with_extension("evt-replay-of", of)
        .with_extension("evt-replay-count", (n_replays(event) + 1).to_string());
    match ids {
        Ids::Keep => copy,
        Ids::New => copy.with_id(EventId::generate()),
    }
}

#[derive(Default)]
struct Plan {
    n_scanned: u64,
    n_matched: u64,
    n_bytes: usize,
    n_tired: u64,
    by_type: BTreeMap<String, u64>,
    keys: std::collections::HashSet<Vec<u8>>,
}

impl Plan {
    fn count(&mut self, event: &Envelope, max_replays: u32) {
        if n_replays(event) >= max_replays {
            self.n_tired += 1;
            return;
        }
        self.n_matched += 1;
        self.n_bytes += event.size_bytes();
        *self.by_type.entry(event.event_type().to_owned()).or_default() += 1;
        self.keys.extend(event.key().map(|key| key.as_bytes().to_vec()));
    }
}
