//! `replay`: publishes a range of a topic into another, planned first.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use eventbus::{Envelope, EventId, Offset, PartitionId, Topic};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::exit::{Failure, Outcome};
use crate::jq::Jq;
use crate::out::Out;
use crate::out::row;
use crate::out::say;
use crate::pace::Pace;
use crate::progress::{Progress, Style};
use crate::publish::OnError;
use crate::range::{Bound, Range, Span, resolve};
use crate::reader::{Filter, RangeFlags, Reader, event};
use crate::session::{Gate, Session};
use crate::{audit, complete, record};

/// Publishes a range of a topic into another topic. No group moves.
///
/// Examples:
///   eventctl -c sqlite://shop.db replay plan orders --range @-1h:end --to orders.replay
///   eventctl -c sqlite://shop.db replay run orders --range @-1h:end --to orders.replay --execute
///   eventctl -c sqlite://shop.db replay run orders --range @-1h:end --to-handler billing/charge --ids new --execute
///   eventctl -c prod replay run orders --range @-1h:end --to-context sqlite://copy.db --execute
///   eventctl -c sqlite://shop.db replay plan orders --range @-1h:end --to orders.replay -O plan.json
///   eventctl -c sqlite://shop.db replay run plan.json --rate 200/s --verify --execute
///   eventctl -c sqlite://shop.db replay run --resume rp_0190… --execute
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Replay {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Counts what would be published; writes nothing.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db replay plan orders --range @-1h:end --to orders.replay -O plan.json
    #[command(verbatim_doc_comment)]
    Plan {
        #[command(flatten)]
        flags: Flags,
        /// Writes the plan into a file, for `replay run`.
        #[arg(short = 'O', long = "plan-out", value_name = "FILE")]
        plan_out: Option<PathBuf>,
    },
    /// Publishes.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db replay run plan.json --rate 200/s --verify --execute
    ///   eventctl -c sqlite://shop.db replay run orders --to orders.fixed --where '.value.data.amount < 0' --edit '.value.data.amount = 0' --execute
    ///   eventctl -c sqlite://shop.db replay run --resume rp_0190… --execute
    #[command(verbatim_doc_comment)]
    Run {
        #[command(flatten)]
        flags: Flags,
        /// Goes on with a replay that was interrupted, from its last checkpoint.
        #[arg(long, value_name = "ID", conflicts_with_all = ["source", "to"])]
        resume: Option<String>,
        #[command(flatten)]
        how: How,
        /// Does it; without, only plans.
        #[arg(long)]
        execute: bool,
    },
}

/// How events are published.
#[derive(Debug, Args)]
struct How {
    /// Publishes no faster, such as 200/s.
    #[arg(long, value_name = "N/s", value_parser = crate::range::rate)]
    rate: Option<f64>,
    /// Reaches that rate after so long, evenly from none.
    #[arg(long, value_name = "TIME", requires = "rate", value_parser = crate::range::duration)]
    ramp: Option<std::time::Duration>,
    /// What an event does that the target refuses.
    #[arg(long, value_enum, default_value = "stop")]
    on_error: OnError,
    /// Notes how far it came after so many events.
    #[arg(long, default_value_t = 500, value_name = "N")]
    checkpoint_every: u64,
    /// Counts in the target what arrived.
    #[arg(long)]
    verify: bool,
}

/// The one consumer for which events are replayed.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Handler {
    group: String,
    name: Option<String>,
}

fn handler(text: &str) -> Result<Handler, String> {
    let (group, name) = text.split_once('/').map_or((text, None), |(group, name)| (group, Some(name)));
    if group.is_empty() || name.is_some_and(str::is_empty) {
        return Err("expected GROUP or GROUP/HANDLER, as dlq list shows them".into());
    }
    Ok(Handler { group: group.to_owned(), name: name.map(str::to_owned) })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Ids {
    /// The events keep their ids: who has handled them skips them.
    Keep,
    /// New events.
    New,
}

/// Names of headers that are left out.
#[derive(Debug, Clone, Default)]
struct Strip(Vec<String>);

fn strip(text: &str) -> Result<Strip, String> {
    match text.strip_prefix("strip=") {
        Some(names) => Ok(Strip(names.split(',').map(str::to_owned).collect())),
        None if text == "keep" => Ok(Strip::default()),
        None => Err("expected keep, or strip=NAME,NAME".into()),
    }
}

#[derive(Debug, Args)]
struct Flags {
    /// The topic to read, or the file of a plan.
    #[arg(add = complete::topics())]
    source: Option<String>,
    /// The topic to publish to: that which is read, where --to-handler or --to-context is given and this is not.
    #[arg(long, value_name = "TOPIC", add = complete::topics())]
    to: Option<Topic>,
    /// Publishes on another bus. What is noted of the replay is noted there.
    #[arg(long, value_name = "NAME|URL", add = complete::contexts())]
    to_context: Option<String>,
    /// Only for this group, or one handler of it. Where it remembers what it handled, --ids new has it handle them again.
    #[arg(long, value_name = "GROUP[/HANDLER]", value_parser = handler)]
    to_handler: Option<Handler>,
    #[command(flatten)]
    range: RangeFlags,
    #[command(flatten)]
    filter: Filter,
    /// What becomes of the ids.
    #[arg(long, value_enum, default_value = "keep")]
    ids: Ids,
    /// Leaves events with an absent body out.
    #[arg(long)]
    skip_tombstones: bool,
    /// What becomes of the headers: keep, or strip=NAME,NAME. Those of the last hop's trace always go.
    #[arg(id = "headers_policy", long = "headers", value_name = "keep|strip=NAMES", default_value = "keep", value_parser = strip)]
    headers: Strip,
    /// Publishes what this jq filter makes of each record, such as '.value.data.note = null'.
    #[arg(long, value_name = "JQ")]
    edit: Option<String>,
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
/// How long what was published may be without a note: that much is published again after an interruption.
const NOTE_EVERY: std::time::Duration = std::time::Duration::from_secs(1);
/// Records that are passed over before that is noted.
const MAX_PASSED: usize = 10_000;
/// Places that a plan names.
const SAMPLE: usize = 3;
/// Where replays note how far they came.
const REPLAYS: &str = "_evt.replays";

/// What a replay does, with its range resolved: it can be written down, and taken up again.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Job {
    id: String,
    source: String,
    to: String,
    /// Partition, first offset, end.
    spans: Vec<(u32, u64, u64)>,
    filter: Filter,
    ids: Ids,
    #[serde(default)]
    edit: Option<String>,
    #[serde(default)]
    skip_tombstones: bool,
    #[serde(default)]
    strip: Vec<String>,
    /// The place of the bus to publish on, if it is another.
    #[serde(default)]
    to_place: Option<String>,
    #[serde(default)]
    to_handler: Option<Handler>,
    max: Option<u64>,
    max_replays: u32,
    /// Published before this.
    #[serde(default)]
    published: u64,
}

impl Job {
    fn topics(&self) -> Outcome<(Topic, Topic)> {
        Ok((Topic::new(&self.source)?, Topic::new(&self.to)?))
    }

    fn spans(&self) -> Vec<Span> {
        let span = |(partition, from, to): &(u32, u64, u64)| Span {
            partition: PartitionId(*partition),
            from: Offset(*from),
            to: Offset(*to),
        };
        self.spans.iter().map(span).collect()
    }

    async fn of(session: &Session, to_place: Option<String>, flags: &Flags) -> Outcome<Self> {
        let Some(source) = flags.source.as_deref() else {
            return Err(Failure::Usage("what? name a topic, or the file of a plan".into()));
        };
        if std::path::Path::new(source).extension().is_some_and(|extension| extension == "json") {
            let text = std::fs::read_to_string(source)
                .map_err(|error| Failure::NotFound(format!("the plan {source}: {error}")))?;
            return serde_json::from_str(&text)
                .map_err(|error| Failure::Usage(format!("{source} is not a plan: {error}")));
        }
        let topic = Topic::new(source)?;
        let same = (flags.to_handler.is_some() || flags.to_context.is_some()).then_some(&topic);
        let Some(to) = flags.to.as_ref().or(same) else {
            return Err(Failure::Usage("where to? give --to TOPIC".into()));
        };
        let spans = resolve(session.admin()?, &topic, flags.range.or_from(Bound::Start)).await?;
        Ok(Self {
            id: format!("rp_{}", EventId::generate()),
            source: topic.to_string(),
            to: to.to_string(),
            spans: spans.iter().map(|span| (span.partition.0, span.from.0, span.to.0)).collect(),
            filter: flags.filter.clone(),
            ids: flags.ids,
            edit: flags.edit.clone(),
            skip_tombstones: flags.skip_tombstones,
            strip: flags.headers.0.clone(),
            to_place,
            to_handler: flags.to_handler.clone(),
            max: (!flags.all).then_some(flags.max),
            max_replays: flags.max_replays,
            published: 0,
        })
    }

    /// The last that was noted of a replay.
    async fn resumed(session: &Session, id: &str) -> Outcome<Self> {
        let (admin, topic) = (session.admin()?, Topic::new(REPLAYS)?);
        let unknown = || Failure::NotFound(format!("no checkpoint of a replay {id}"));
        if admin.topic(&topic).await?.is_none() {
            return Err(unknown());
        }
        let spans = resolve(admin, &topic, Range { from: Bound::Start, to: Bound::End }).await?;
        let mut reader = Reader::new(admin, topic, spans);
        let mut found = None;
        while let Some(record) = reader.next().await? {
            let body = event(&record).filter(|event| event.subject() == Some(id)).and_then(Envelope::payload);
            found = body.and_then(|body| serde_json::from_slice(body).ok()).or(found);
        }
        found.ok_or_else(unknown)
    }

    /// Notes how far it came: durable when this returns.
    async fn checkpoint(&self, session: &Session) -> Outcome {
        let body = serde_json::to_vec(self).map_err(|error| Failure::Runtime(error.to_string()))?;
        let note = Envelope::new("evt.replay", "/eventctl")
            .with_subject(self.id.clone())
            .with_key(self.id.clone())
            .with_content_type("application/json")
            .with_payload(body);
        let publisher = session.bus.transport().publisher().await?;
        let (topic, _) = session.own_topic(REPLAYS).await?;
        publisher.enqueue(&topic, vec![note]).await?.await.all()?;
        Ok(())
    }

    /// Whether an event is of a kind that is replayed.
    fn carries(&self, event: &Envelope) -> bool {
        !(self.skip_tombstones && event.payload().is_none())
    }

    /// What is left begins behind this record.
    fn pass(&mut self, partition: u32, offset: u64) {
        if let Some(span) = self.spans.iter_mut().find(|span| span.0 == partition) {
            span.1 = offset + 1;
        }
    }
}

impl Replay {
    /// Whether it publishes.
    pub(crate) fn executes(&self) -> bool {
        matches!(&self.what, What::Run { execute: true, .. })
    }

    /// The other bus, where one is named.
    pub(crate) fn to_context(&self) -> Option<&str> {
        match &self.what {
            What::Plan { flags, .. } | What::Run { flags, .. } => flags.to_context.as_deref(),
        }
    }
}

/// Runs the command. `other` is the bus of `--to-context`, which is opened where it is needed.
///
/// # Errors
/// Not found, refused for safety, above the bound, or not all of it arrived.
pub(crate) async fn run(
    session: &Session,
    other: Option<Gate>,
    replay: &Replay,
    progress: Style,
    out: &mut Out,
) -> Outcome {
    let to_place = other.as_ref().map(Gate::place).filter(|place| *place != session.place());
    let fits = |job: &Job| match job.to_place == to_place {
        true => Ok(()),
        false => {
            let place = job.to_place.as_deref().unwrap_or("the bus that it reads");
            Err(Failure::Usage(format!("the plan publishes on {place}: give --to-context as it did")))
        }
    };
    match &replay.what {
        What::Plan { flags, plan_out } => {
            let job = Job::of(session, to_place.clone(), flags).await?;
            fits(&job)?;
            show(session, &job, out).await?;
            if let Some(path) = plan_out {
                let text = serde_json::to_string_pretty(&job)
                    .map_err(|error| Failure::Runtime(error.to_string()))?;
                std::fs::write(path, text + "\n")?;
                let elsewhere = if to_place.is_some() { " --to-context …" } else { "" };
                say!("next: eventctl replay run {}{elsewhere} --execute", path.display());
            }
            Ok(())
        }
        What::Run { flags, resume, how, execute } => {
            let (mut opened, noted) = (None, resume.as_deref());
            let job = match (noted, &other) {
                (None, _) => Job::of(session, to_place.clone(), flags).await?,
                (Some(id), None) => Job::resumed(session, id).await?,
                (Some(id), Some(gate)) => {
                    Job::resumed(opened.insert(Session::through(false, gate.clone()).await?), id).await?
                }
            };
            fits(&job)?;
            let plan =
                if *execute { count(session, &job).await? } else { return show(session, &job, out).await };
            if job.max.is_some_and(|max| plan.n_matched > max) {
                return Err(Failure::Refused(format!(
                    "{} events match, --max is {}: raise it or give --all",
                    plan.n_matched,
                    job.max.unwrap_or_default()
                )));
            }
            other.as_ref().unwrap_or(session).may_write()?;
            if let (Some(gate), None) = (other, &opened) {
                opened = Some(Session::through(true, gate).await?);
            }
            let target = opened.as_ref().unwrap_or(session);
            let progress = Progress::begin(progress, "replay", plan.n_matched);
            let outcome = execute_job(session, target, job, progress, how).await;
            if let Some(opened) = opened {
                opened.bus.close().await?;
            }
            outcome
        }
    }
}

async fn count(session: &Session, job: &Job) -> Outcome<Plan> {
    let (source, to) = job.topics()?;
    // For one handler the range is what it is now: its end does not move.
    if to == source && job.to_place.is_none() && job.to_handler.is_none() {
        return Err(Failure::Refused("source and target are the same topic: it would grow for ever".into()));
    }
    let mut plan = Plan::default();
    let wanted = job.filter.ready(&session.broker)?;
    let edit = job.edit.as_deref().map(Jq::compile).transpose()?;
    let mut reader = Reader::new(session.admin()?, source.clone(), job.spans());
    while let Some(record) = reader.next().await? {
        plan.n_scanned += 1;
        let Some(found) = event(&record).filter(|found| job.carries(found)) else { continue };
        if !wanted.takes(&source, &record)? {
            continue;
        }
        plan.count(found, job.max_replays);
        if plan.sample.len() < SAMPLE {
            // What cannot be edited is found before anything is written.
            if let Some(edit) = &edit {
                record::edited(&session.broker, &source, &record, edit)?;
            }
            plan.sample.push(record::reference(&source, &record));
        }
    }
    Ok(plan)
}

async fn show(session: &Session, job: &Job, out: &mut Out) -> Outcome {
    let plan = count(session, job).await?;
    out.rows(plan.by_type.iter().map(|(name, n)| row! {"type": name, "events": n}).collect())?;
    say!(
        "plan: {} scanned, {} match, {} keys, {} B to {}; over --max-replays: {}; first: {}; nothing was written; replay run … --execute does it",
        plan.n_scanned,
        plan.n_matched,
        plan.keys.len(),
        plan.n_bytes,
        job.to,
        plan.n_tired,
        if plan.sample.is_empty() { "-".to_owned() } else { plan.sample.join(" ") }
    );
    Ok(())
}

/// Publishes, noting how far it came only after its events are confirmed: what was interrupted is repeated
/// from there, under the same ids.
async fn execute_job(
    session: &Session,
    target: &Session,
    mut job: Job,
    mut progress: Progress,
    how: &How,
) -> Outcome {
    let (source, to) = job.topics()?;
    let publisher = target.bus.transport().publisher().await?;
    let wanted_filter = job.filter.clone();
    let wanted = wanted_filter.ready(&session.broker)?;
    let edit = job.edit.as_deref().map(Jq::compile).transpose()?;
    let mut reader = Reader::new(session.admin()?, source.clone(), job.spans());
    let (mut batch, mut passed) = (Vec::new(), Vec::new());
    let mut noted_at = tokio::time::Instant::now();
    let (mut n_published, mut noted, mut n_passed, mut n_refused) = (0u64, 0u64, 0u64, 0u64);
    let pace = Pace::begin(how.rate).with_ramp(how.ramp.unwrap_or_default());
    let window = pace.window(WINDOW);
    job.checkpoint(target).await?;
    let elsewhere = if job.to_place.is_some() { " --to-context …" } else { "" };
    say!(
        "replay {}: interrupted, it goes on with replay run --resume {}{elsewhere} --execute",
        job.id,
        job.id
    );
    loop {
        let record = reader.next().await?;
        let done = record.is_none();
        if let Some(record) = record {
            passed.push((record.partition.0, record.offset.0));
            if let Some(found) = event(&record).filter(|found| job.carries(found))
                && record::n_replays(found) < job.max_replays
                && wanted.takes(&source, &record)?
            {
                let changed =
                    edit.as_ref().map(|edit| record::edited(&session.broker, &source, &record, edit));
                let changed = changed.transpose()?;
                let of = record::reference(&source, &record);
                batch.push(copy(changed.as_ref().unwrap_or(found), &job, &of));
            }
        }
        if batch.len() >= window || passed.len() >= MAX_PASSED || done {
            if !batch.is_empty() {
                let of: Vec<String> = batch
                    .iter()
                    .map(|event: &Envelope| event.extension("evt-replay-of").unwrap_or_default().to_owned())
                    .collect();
                let outcomes = publisher.enqueue(&to, std::mem::take(&mut batch)).await?.await;
                for (of, outcome) in of.into_iter().zip(outcomes) {
                    match outcome {
                        Ok(_) => n_published += 1,
                        Err(error) if how.on_error == OnError::Skip && !error.is_retryable() => {
                            n_refused += 1;
                            say!("eventctl: {of}: {error}; skipped");
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            progress.at(n_published);
            n_passed += passed.len() as u64;
            passed.drain(..).for_each(|(partition, offset)| job.pass(partition, offset));
            if n_published - noted >= how.checkpoint_every.max(1)
                || n_passed >= MAX_PASSED as u64
                || noted_at.elapsed() >= NOTE_EVERY
                || done
            {
                (n_passed, noted_at) = (0, tokio::time::Instant::now());
                noted = n_published;
                let so_far = job.published + n_published;
                Job { published: so_far, ..job.clone() }.checkpoint(target).await?;
            }
            pace.keep(n_published).await;
        }
        if done {
            break;
        }
    }
    progress.end(n_published);
    let total = job.published + n_published;
    let details = json!({"replay": job.id, "source": job.source, "to": job.to, "events": total});
    audit::note(target, "replay", details).await?;
    if how.verify {
        let arrived = arrived(target, &to, &job.id).await?;
        // What was interrupted between a confirm and its note was published again: never less than it says.
        if arrived < total {
            return Err(Failure::Partial(format!("{arrived} of {total} events are in {to}")));
        }
        say!("verified: {arrived} events of {} are in {to}", job.id);
    }
    say!("replayed {n_published} events from {source} to {to}");
    match n_refused {
        0 => Ok(()),
        n => Err(Failure::Partial(format!("{n_published} events were published, {n} were refused"))),
    }
}

/// Counts the events of a replay in its target.
async fn arrived(session: &Session, to: &Topic, id: &str) -> Outcome<u64> {
    let admin = session.admin()?;
    let spans = resolve(admin, to, Range { from: Bound::Start, to: Bound::End }).await?;
    let mut reader = Reader::new(admin, to.clone(), spans);
    let mut n = 0;
    while let Some(record) = reader.next().await? {
        n += u64::from(event(&record).is_some_and(|event| event.extension("evt-replay-id") == Some(id)));
    }
    Ok(n)
}

/// The event as it goes out again: this hop's trace context goes, the journey's stays.
fn copy(event: &Envelope, job: &Job, of: &str) -> Envelope {
    let (ids, replay) = (job.ids, job.id.as_str());
    let goes = ["traceparent", "tracestate"].into_iter().chain(job.strip.iter().map(String::as_str));
    let goes: Vec<&str> = goes.collect();
    let hop = |name: &str| goes.iter().any(|gone| name.eq_ignore_ascii_case(gone));
    let copy = event
        .clone()
        .with_headers(event.headers().without(hop))
        .with_extension("evt-replay-id", replay)
        .with_extension("evt-replay-of", of)
        .with_extension("evt-replay-count", (record::n_replays(event) + 1).to_string());
    let copy = match &job.to_handler {
        Some(Handler { group, name }) => record::only_for(copy, group, name.as_deref()),
        None => copy,
    };
    match ids {
        Ids::Keep => copy,
        // The same for the same replay, so that what is repeated after an interruption is one event.
        Ids::New => copy.with_id(EventId::derive(event.id(), &format!("{replay}/{of}"))),
    }
}

#[derive(Default)]
struct Plan {
    n_scanned: u64,
    n_matched: u64,
    n_bytes: usize,
    n_tired: u64,
    by_type: BTreeMap<String, u64>,
    /// The places of the first that match.
    sample: Vec<String>,
    keys: std::collections::HashSet<Vec<u8>>,
}

impl Plan {
    fn count(&mut self, event: &Envelope, max_replays: u32) {
        if record::n_replays(event) >= max_replays {
            self.n_tired += 1;
            return;
        }
        self.n_matched += 1;
        self.n_bytes += event.size_bytes();
        *self.by_type.entry(event.event_type().to_owned()).or_default() += 1;
        self.keys.extend(event.key().map(|key| key.as_bytes().to_vec()));
    }
}
