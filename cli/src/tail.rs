//! `tail`: reads records without joining any group.

use clap::Args;
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
    let mut n_written = 0;
    loop {
        while let Some(record) = reader.next().await? {
            if !tail.filter.takes(&record.content) {
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

fn write(session: &Session, tail: &Tail, out: &mut Out, record: &Record) -> Outcome {
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
    out.line(json)
}

fn for_people(tail: &Tail, record: &Record) -> String {
    let place = record::reference(&tail.dest, record);
    let time = to_rfc3339(record.stored_at);
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
