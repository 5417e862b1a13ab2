//! Reading records outside any group: spans of partitions, merged by time, filtered.

use std::collections::VecDeque;

use clap::Args;
use eventbus::admin::{Admin, Record};
use eventbus::{Content, Envelope, Offset, Topic};

use crate::exit::{Failure, Outcome};
use crate::range::{Bound, Range, Span};

/// Which records are wanted.
#[derive(Debug, Clone, Default, Args, serde::Serialize, serde::Deserialize)]
pub(crate) struct Filter {
    /// Only events with this key.
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
    /// Only events of this type.
    #[arg(long = "type", value_name = "TYPE")]
    pub event_type: Option<String>,
    /// Only the event with this id.
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,
    /// Only events of this conversation.
    #[arg(long, value_name = "ID")]
    pub correlation: Option<String>,
    /// Only events with this header.
    #[arg(long = "header", value_name = "NAME=VALUE")]
    pub headers: Vec<String>,
    /// Only events whose body holds this text.
    #[arg(long, value_name = "TEXT")]
    pub grep: Option<String>,
}

impl Filter {
    /// Whether a record is wanted.
    pub(crate) fn takes(&self, content: &Content) -> bool {
        let Some(event) = content.envelope() else { return self.is_empty() };
        let same = |wanted: &Option<String>, found: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| found == Some(wanted))
        };
        let key = event.key().map(|key| String::from_utf8_lossy(key.as_bytes()));
        let header = |pair: &String| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            event.headers().all(name).any(|found| found == value.as_bytes())
        };
        let holds = |text: &String| {
            let body = event.payload().map(|payload| String::from_utf8_lossy(payload));
            body.is_some_and(|body| body.contains(text.as_str()))
        };
        same(&self.key, key.as_deref())
            && same(&self.event_type, Some(event.event_type()))
            && same(&self.id, Some(&event.id().to_string()))
            && same(&self.correlation, event.extension("correlationid"))
            && self.headers.iter().all(header)
            && self.grep.as_ref().is_none_or(holds)
    }

    fn is_empty(&self) -> bool {
        self.key.is_none()
            && self.event_type.is_none()
            && self.id.is_none()
            && self.correlation.is_none()
            && self.headers.is_empty()
            && self.grep.is_none()
    }
}

/// Flags that name a range.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct RangeFlags {
    /// Where to begin: start, end, N, -N, @TIME, @-1h.
    #[arg(long, value_name = "BOUND", allow_hyphen_values = true)]
    pub from: Option<Bound>,
    /// Both at once: FROM:TO.
    #[arg(long, value_name = "FROM:TO", conflicts_with = "from", allow_hyphen_values = true)]
    pub range: Option<Range>,
}

impl RangeFlags {
    /// The range, with a default begin.
    pub(crate) fn or_from(&self, from: Bound) -> Range {
        self.range.unwrap_or(Range { from: self.from.unwrap_or(from), to: Bound::End })
    }
}

/// Records read in one call.
const CHUNK: usize = 256;

/// Reads several partitions in the order in which records were stored.
pub(crate) struct Reader<'a> {
    admin: &'a dyn Admin,
    topic: Topic,
    parts: Vec<(Span, VecDeque<Record>)>,
}

impl<'a> Reader<'a> {
    /// Begins to read.
    pub(crate) fn new(admin: &'a dyn Admin, topic: Topic, spans: Vec<Span>) -> Self {
        Self { admin, topic, parts: spans.into_iter().map(|span| (span, VecDeque::new())).collect() }
    }

    /// Returns the next record; `None` at the end of every span.
    ///
    /// # Errors
    /// What the transport reports.
    pub(crate) async fn next(&mut self) -> Outcome<Option<Record>> {
        for (span, ahead) in &mut self.parts {
            if ahead.is_empty() && span.len() > 0 {
                let max = CHUNK.min(usize::try_from(span.len()).unwrap_or(CHUNK));
                let read = self.admin.read(&self.topic, span.partition, span.from, max).await?;
                match read.last() {
                    Some(last) => span.from = Offset(last.offset.0 + 1),
                    None => span.from = span.to,
                }
                ahead.extend(read);
            }
        }
        let first = self.parts.iter_mut().filter(|(_, ahead)| !ahead.is_empty());
        let first =
            first.min_by_key(|(_, ahead)| ahead.front().map(|record| (record.stored_at, record.partition)));
        Ok(first.and_then(|(_, ahead)| ahead.pop_front()))
    }

    /// Waits for records behind the spans, which are extended to what is there then.
    ///
    /// # Errors
    /// What the transport reports.
    pub(crate) async fn follow(&mut self) -> Outcome {
        let ends: Vec<_> = self.parts.iter().map(|(span, _)| (span.partition, span.to)).collect();
        self.admin.wait(&self.topic, &ends, std::time::Duration::from_secs(3_600)).await?;
        let gone = || Failure::NotFound(format!("topic {} was deleted", self.topic));
        let info = self.admin.topic(&self.topic).await?.ok_or_else(gone)?;
        for (span, _) in &mut self.parts {
            if let Some(known) = info.partitions.iter().find(|known| known.partition == span.partition) {
                span.to = known.next;
                span.from = span.from.max(known.first);
            }
        }
        Ok(())
    }
}

/// The event of a record, if it is one.
pub(crate) fn event(record: &Record) -> Option<&Envelope> {
    record.content.envelope()
}
