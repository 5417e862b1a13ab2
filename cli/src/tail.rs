//! `tail`: reads records without joining any group.

use std::collections::{HashMap, VecDeque};
use std::time::SystemTime;

use clap::Args;
use eventbus::admin::{Admin, Record};
use eventbus::{PartitionId, Topic};

use crate::decode::Decode;
use crate::exit::{Failure, Outcome};
use crate::jq::Jq;
use crate::out::{Out, say};
use crate::range::{Bound, Range, Span, resolve};
use crate::reader::{Filter, RangeFlags, Reader, Wanted, event};
use crate::record;
use crate::session::Session;
use crate::time::Time;

/// Reads records. Never joins or moves a group.
///
/// Examples:
///   eventctl -c sqlite://shop.db tail orders -n 5
///   eventctl -c sqlite://shop.db tail orders -f --type shop.order.paid
///   eventctl -c sqlite://shop.db tail orders --range @-1h:end -o jsonl --full
///   eventctl -c sqlite://shop.db tail orders -f --decode-with 'protoc --decode shop.Order order.proto'
///   eventctl -c sqlite://shop.db tail orders payments --where '.value.data.amount > 100' --select .key.data
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Tail {
    /// The topics; records of several are merged by the time they were stored.
    #[arg(required = true, value_name = "DEST", add = crate::complete::topics())]
    pub dest: Vec<Topic>,
    /// The last records that fit, when no range is given.
    #[arg(short, default_value_t = 10, value_name = "N")]
    pub n: u64,
    /// Goes on with what arrives.
    #[arg(short, long)]
    pub follow: bool,
    /// Stops at the end as it is now; the default without -f.
    #[arg(long, conflicts_with = "follow")]
    pub until_end: bool,
    #[command(flatten)]
    pub range: RangeFlags,
    /// Where to stop, exclusive.
    #[arg(long, value_name = "BOUND", conflicts_with_all = ["range", "follow"], allow_hyphen_values = true)]
    pub to: Option<Bound>,
    #[command(flatten)]
    pub filter: Filter,
    /// Stops after so many records.
    #[arg(long, value_name = "N")]
    pub max: Option<u64>,
    /// Writes what this jq filter makes of each record, a JSON value a line.
    #[arg(long, value_name = "JQ", conflicts_with_all = ["format", "meta_only"])]
    pub select: Option<String>,
    /// Only one record of so many, such as 1/100.
    #[arg(long, value_name = "1/N", value_parser = one_of)]
    pub sample: Option<u64>,
    /// Writes each record like this: {ts} {ref} {key} {id} {type} {value}, and \\t \\n.
    #[arg(long, value_name = "TEMPLATE")]
    pub format: Option<String>,
    /// Writes each body into a file of this folder, named by its place.
    #[arg(long, value_name = "DIR")]
    pub save: Option<std::path::PathBuf>,
    /// Writes bodies whole.
    #[arg(long)]
    pub full: bool,
    /// Writes no bodies.
    #[arg(long)]
    pub meta_only: bool,
    #[command(flatten)]
    pub decode: Decode,
    /// Cuts bodies at so many bytes.
    #[arg(long, default_value_t = 4096, value_name = "BYTES")]
    pub max_bytes: usize,
}

impl Tail {
    /// Bytes of a body that are shown.
    fn most(&self) -> usize {
        if self.full { usize::MAX } else { self.max_bytes }
    }
}

/// Runs the command.
///
/// # Errors
/// The topic does not exist, or the transport fails.
pub(crate) async fn run(session: &Session, tail: &Tail, time: Time, out: &mut Out) -> Outcome {
    let admin = session.admin()?;
    let ranged = tail.range.from.is_some() || tail.range.range.is_some() || tail.to.is_some();
    let mut range = tail.range.or_from(if ranged { Bound::Start } else { Bound::End });
    range.to = tail.to.unwrap_or(range.to);
    let wanted = tail.filter.ready(&session.broker)?;
    let select = tail.select.as_deref().map(Jq::compile).transpose()?;
    let mut writer = Writer { session, tail, select, time, out, unfit: Unfit::default() };
    let mut chosen = Chosen { wanted, sample: tail.sample, n_matched: 0 };
    if !ranged && !tail.follow {
        let found = last(admin, tail, &mut chosen, &mut writer.unfit).await?;
        found.iter().try_for_each(|(topic, record)| writer.write(topic, record))?;
        return writer.end();
    }
    let mut reader = Reader::over(admin, spans(admin, &tail.dest, range).await?);
    let mut n_written = 0;
    loop {
        while let Some((topic, record)) = reader.next_of_any().await? {
            if !chosen.takes(&topic, &record, &mut writer.unfit)? {
                continue;
            }
            writer.write(&topic, &record)?;
            n_written += 1;
            if tail.max.is_some_and(|max| n_written >= max) {
                return writer.end();
            }
        }
        if !tail.follow {
            return writer.end();
        }
        reader.follow().await?;
    }
}

/// The spans of topics, each once.
async fn spans(admin: &dyn Admin, dest: &[Topic], range: Range) -> Outcome<Vec<(Topic, Vec<Span>)>> {
    let mut topics: Vec<(Topic, Vec<Span>)> = Vec::new();
    for topic in dest {
        if !topics.iter().any(|(known, _)| known == topic) {
            topics.push((topic.clone(), resolve(admin, topic, range).await?));
        }
    }
    Ok(topics)
}

/// Which records are taken.
struct Chosen<'a> {
    wanted: Wanted<'a>,
    sample: Option<u64>,
    n_matched: u64,
}

impl Chosen<'_> {
    fn takes(&mut self, topic: &Topic, record: &Record, unfit: &mut Unfit) -> Outcome<bool> {
        let place = || record::reference(topic, record);
        let is_match = unfit.or_default(self.wanted.takes(topic, record), place)?;
        self.n_matched += u64::from(is_match);
        Ok(is_match && self.sample.is_none_or(|n| n == 1 || self.n_matched % n == 1))
    }
}

/// The last records that are taken, of all partitions together: reads further back until there are so many, or no more.
async fn last(
    admin: &dyn Admin,
    tail: &Tail,
    chosen: &mut Chosen<'_>,
    unfit: &mut Unfit,
) -> Outcome<Vec<(Topic, Record)>> {
    let keep = tail.max.map_or(tail.n, |max| max.min(tail.n));
    let mut window = tail.n;
    loop {
        let topics = spans(admin, &tail.dest, Range { from: Bound::Last(window), to: Bound::End }).await?;
        let whole = spans(admin, &tail.dest, Range { from: Bound::Start, to: Bound::End }).await?;
        let mut found = VecDeque::new();
        // When that was stored where reading began, of the partitions that were not read from their beginning.
        let mut begun: HashMap<(Topic, PartitionId), Option<SystemTime>> = HashMap::new();
        for ((topic, spans), (_, whole)) in topics.iter().zip(&whole) {
            let is_cut = |span: &Span| {
                !whole.iter().any(|all| all.partition == span.partition && all.from >= span.from)
            };
            begun.extend(
                spans.iter().filter(|span| is_cut(span)).map(|span| ((topic.clone(), span.partition), None)),
            );
        }
        (chosen.n_matched, unfit.n) = (0, 0);
        let mut reader = Reader::over(admin, topics);
        while let Some((topic, record)) = reader.next_of_any().await? {
            if let Some(first @ None) = begun.get_mut(&(topic.clone(), record.partition)) {
                *first = Some(record.stored_at);
            }
            if chosen.takes(&topic, &record, unfit)? {
                found.push_back((topic, record));
                if found.len() as u64 > keep {
                    found.pop_front();
                }
            }
        }
        let oldest = found.front().filter(|_| found.len() as u64 >= keep).map(|(_, record)| record.stored_at);
        // What was not read is older than all that is kept.
        let is_older = |first: &Option<SystemTime>| {
            oldest.is_some_and(|oldest| first.is_none_or(|first| first <= oldest))
        };
        if keep == 0 || window == u64::MAX || begun.values().all(is_older) {
            return Ok(found.into());
        }
        window = window.saturating_mul(16);
    }
}

/// Records that a jq filter could not be run on: they are told and passed over.
#[derive(Debug, Default)]
struct Unfit {
    n: u64,
    is_told: bool,
}

impl Unfit {
    fn or_default<T: Default>(&mut self, outcome: Outcome<T>, place: impl Fn() -> String) -> Outcome<T> {
        match outcome {
            Err(Failure::Usage(why)) => {
                if !self.is_told {
                    self.is_told = true;
                    say!("eventctl: {}: {why}", place());
                }
                self.n += 1;
                Ok(T::default())
            }
            other => other,
        }
    }

    fn tell(&self) {
        if self.n > 1 {
            say!("eventctl: the filter failed on {} records", self.n);
        }
    }
}

fn one_of(text: &str) -> Result<u64, String> {
    let n = text.strip_prefix("1/").unwrap_or(text).parse::<u64>();
    n.ok().filter(|n| *n > 0).ok_or_else(|| "expected 1/N, such as 1/100".into())
}

/// Fills a template; what it does not know stays as it is.
fn fill(template: &str, tail: &Tail, time: Time, topic: &Topic, record: &Record) -> String {
    let event = event(record);
    let body = event.and_then(|event| event.payload()).map(|body| tail.decode.show(body, usize::MAX).text());
    let text = |found: Option<String>| found.unwrap_or_else(|| "-".into());
    [
        ("{ts}", time.show(record.stored_at)),
        ("{ref}", record::reference(topic, record)),
        ("{key}", text(event.and_then(|event| Some(event.key()?.to_string())))),
        ("{id}", text(event.map(|event| event.id().to_string()))),
        ("{type}", text(event.map(|event| event.event_type().to_owned()))),
        ("\\t", "\t".into()),
        ("\\n", "\n".into()),
        // Last, so that nothing inside a body is filled.
        ("{value}", text(body)),
    ]
    .iter()
    .fold(template.to_owned(), |text, (name, value)| text.replace(name, value))
}

fn save(folder: &std::path::Path, topic: &Topic, record: &Record) -> Outcome {
    std::fs::create_dir_all(folder)?;
    let name = record::reference(topic, record).replace(['/', '@'], "_");
    Ok(std::fs::write(folder.join(name), record::bytes(record))?)
}

/// Writes records in the form asked for.
struct Writer<'a> {
    session: &'a Session,
    tail: &'a Tail,
    select: Option<Jq>,
    time: Time,
    out: &'a mut Out,
    unfit: Unfit,
}

impl Writer<'_> {
    fn end(&mut self) -> Outcome {
        self.unfit.tell();
        // Lines in a form of one's own are no list.
        if self.select.is_some() || self.tail.format.is_some() { Ok(()) } else { self.out.end() }
    }

    fn write(&mut self, topic: &Topic, record: &Record) -> Outcome {
        let tail = self.tail;
        if let Some(folder) = &tail.save {
            save(folder, topic, record)?;
        }
        if let Some(template) = &tail.format {
            return self.out.line(fill(template, tail, self.time, topic, record));
        }
        if self.out.format() == crate::out::Format::None {
            return Ok(());
        }
        if let Some(select) = &self.select {
            let whole = record::shown(&self.session.broker, topic, record, &tail.decode, usize::MAX);
            let whole = if tail.decode.is_as_it_is() { whole } else { record::for_jq(whole) };
            let place = || record::reference(topic, record);
            let made = self.unfit.or_default(select.all(&whole), place)?;
            return made.into_iter().try_for_each(|value| self.out.line(value));
        }
        if self.out.format().is_for_people() {
            return self.out.line(for_people(tail, self.time, topic, record));
        }
        let mut json = record::shown(&self.session.broker, topic, record, &tail.decode, tail.most());
        if tail.meta_only
            && let Some(object) = json.as_object_mut()
        {
            object.remove("value");
        }
        self.out.record(json)
    }
}

fn for_people(tail: &Tail, time: Time, topic: &Topic, record: &Record) -> String {
    let place = record::reference(topic, record);
    let time = time.show(record.stored_at);
    let Some(event) = event(record) else { return format!("{time}  {place}  (undecodable)") };
    let key = event.key().map_or_else(|| "-".into(), |key| key.to_string());
    let body = match event.payload() {
        None => "(absent)".into(),
        Some(_) if tail.meta_only => String::new(),
        Some(body) => {
            let shown = tail.decode.show(body, tail.most());
            let text = shown.text();
            if shown.is_cut { format!("{text}… ({} B, --full shows all)", body.len()) } else { text }
        }
    };
    format!("{time}  {place}  {key}  {}  {body}", event.event_type())
}
