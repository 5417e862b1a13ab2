//! `tail`: reads records without joining any group.

use std::time::SystemTime;

use clap::{Args, ValueEnum};
use eventbus::Topic;
use eventbus::admin::Record;
use eventbus::time::to_rfc3339;

use crate::context::Session;
use crate::exit::Outcome;
use crate::out::Out;
use crate::range::{Bound, Span, resolve};
use crate::reader::{Filter, RangeFlags, Reader, event};
use crate::record;

/// Reads records. Never joins or moves a group.
///
/// Examples:
///   eventctl -c sqlite://shop.db tail orders -n 5
///   eventctl -c sqlite://shop.db tail orders -f --type shop.order.paid
///   eventctl -c sqlite://shop.db tail orders --range @-1h:end -o jsonl --full
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Tail {
    /// The topic.
    pub dest: Topic,
    /// The last records, when no range is given.
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
    /// Only one record of so many, such as 1/100.
    #[arg(long, value_name = "1/N", value_parser = one_of)]
    pub sample: Option<u64>,
    /// Writes each record like this: {ts} {ref} {key} {id} {type} {value}, and \\t \\n.
    #[arg(long, value_name = "TEMPLATE")]
    pub format: Option<String>,
    /// Writes each body into a file of this folder, named by its place.
    #[arg(long, value_name = "DIR")]
    pub save: Option<std::path::PathBuf>,
    /// How times are shown to people.
    #[arg(long, value_enum, default_value = "iso")]
    pub time: Time,
    /// Writes bodies whole.
    #[arg(long)]
    pub full: bool,
    /// Writes no bodies.
    #[arg(long)]
    pub meta_only: bool,
    /// Cuts bodies at so many bytes.
    #[arg(long, default_value_t = 4096, value_name = "BYTES")]
    pub max_bytes: usize,
}

/// Runs the command.
///
/// # Errors
/// The topic does not exist, or the transport fails.
pub(crate) async fn run(session: &Session, tail: &Tail, out: &mut Out) -> Outcome {
    let admin = session.admin()?;
    let ranged = tail.range.from.is_some() || tail.range.range.is_some() || tail.to.is_some();
    let default = match (ranged, tail.follow) {
        (true, _) => Bound::Start,
        (false, true) => Bound::End,
        (false, false) => Bound::Last(tail.n),
    };
    let mut range = tail.range.or_from(default);
    range.to = tail.to.unwrap_or(range.to);
    let spans: Vec<Span> = resolve(admin, &tail.dest, range).await?;
    let mut reader = Reader::new(admin, tail.dest.clone(), spans);
    let mut last: Vec<Record> = Vec::new();
    let (mut n_written, mut n_matched) = (0, 0u64);
    loop {
        while let Some(record) = reader.next().await? {
            if !tail.filter.takes(&record.content) {
                continue;
            }
            n_matched += 1;
            if tail.sample.is_some_and(|n| n_matched % n != 1 && n > 1) {
                continue;
            }
            if !ranged && !tail.follow {
                last.push(record);
                continue;
            }
            write(session, tail, out, &record)?;
            n_written += 1;
            if tail.max.is_some_and(|max| n_written >= max) {
                return Ok(());
            }
        }
        if !tail.follow {
            break;
        }
        reader.follow().await?;
    }
    // The last of all partitions together, not of each.
    let keep = tail.max.map_or(tail.n, |max| max.min(tail.n)) as usize;
    let skip = last.len().saturating_sub(keep);
    last.iter().skip(skip).try_for_each(|record| write(session, tail, out, record))
}

/// How times are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Time {
    /// RFC 3339, in UTC.
    Iso,
    /// How long ago.
    Relative,
    /// Seconds since 1970.
    Unix,
}

impl Time {
    fn show(self, time: SystemTime) -> String {
        match self {
            Self::Iso => to_rfc3339(time),
            Self::Relative => {
                let ago = SystemTime::now().duration_since(time).unwrap_or_default();
                format!("{:.1}s ago", ago.as_secs_f64())
            }
            Self::Unix => {
                let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                format!("{:.3}", since.as_secs_f64())
            }
        }
    }
}

fn one_of(text: &str) -> Result<u64, String> {
    let n = text.strip_prefix("1/").unwrap_or(text).parse::<u64>();
    n.ok().filter(|n| *n > 0).ok_or_else(|| "expected 1/N, such as 1/100".into())
}

/// Fills a template; what it does not know stays as it is.
fn fill(template: &str, tail: &Tail, record: &Record) -> String {
    let event = event(record);
    let body = event.and_then(|event| event.payload()).map(|body| String::from_utf8_lossy(body).into_owned());
    let text = |found: Option<String>| found.unwrap_or_else(|| "-".into());
    [
        ("{ts}", tail.time.show(record.stored_at)),
        ("{ref}", record::reference(&tail.dest, record)),
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

fn save(folder: &std::path::Path, tail: &Tail, record: &Record) -> Outcome {
    std::fs::create_dir_all(folder)?;
    let name = record::reference(&tail.dest, record).replace(['/', '@'], "_");
    let body = match &record.content {
        eventbus::Content::Envelope(event) => event.payload().cloned(),
        eventbus::Content::Undecodable(bad) => bad.raw.clone(),
        _ => None,
    };
    Ok(std::fs::write(folder.join(name), body.unwrap_or_default())?)
}

fn write(session: &Session, tail: &Tail, out: &mut Out, record: &Record) -> Outcome {
    if let Some(folder) = &tail.save {
        save(folder, tail, record)?;
    }
    if let Some(template) = &tail.format {
        return out.line(fill(template, tail, record));
    }
    if out.format() == crate::out::Format::None {
        return Ok(());
    }
    if out.format().is_for_people() {
        return out.line(for_people(tail, record));
    }
    let max_bytes = if tail.full { None } else { Some(tail.max_bytes) };
    let mut json = record::to_json(&session.broker, &tail.dest, record, max_bytes);
    if tail.meta_only
        && let Some(object) = json.as_object_mut()
    {
        object.remove("value");
    }
    out.record(json)
}

fn for_people(tail: &Tail, record: &Record) -> String {
    let place = record::reference(&tail.dest, record);
    let time = tail.time.show(record.stored_at);
    let Some(event) = event(record) else { return format!("{time}  {place}  (undecodable)") };
    let key = event.key().map_or_else(|| "-".into(), |key| key.to_string());
    let body = match event.payload() {
        None => "(absent)".into(),
        Some(_) if tail.meta_only => String::new(),
        Some(body) => {
            let shown = if tail.full { body.len() } else { body.len().min(tail.max_bytes) };
            let text = String::from_utf8_lossy(body.get(..shown).unwrap_or_default()).into_owned();
            if shown < body.len() { format!("{text}… ({} B, --full shows all)", body.len()) } else { text }
        }
    };
    format!("{time}  {place}  {key}  {}  {body}", event.event_type())
}
