//! Reading records outside any group: spans of partitions, merged by time, filtered.

use std::collections::{BTreeMap, VecDeque};
use std::task::Poll;

use clap::Args;
use eventbus::admin::{Admin, Record};
use eventbus::{Content, Envelope, Offset, Topic};
use regex_lite::Regex;

use crate::exit::{Failure, Outcome};
use crate::jq::Jq;
use crate::listing::regex;
use crate::range::{Bound, Range, Span};
use crate::record;

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
    /// Only events whose body holds this regular expression.
    #[arg(long, value_name = "RE")]
    pub grep: Option<String>,
    /// Only records for which this jq filter is true, such as '.value.data.amount > 100'.
    #[arg(long = "where", value_name = "JQ")]
    #[serde(default, rename = "where")]
    pub jq: Option<String>,
}

impl Filter {
    /// Makes the filter ready.
    ///
    /// # Errors
    /// Usage: `--where` is not a filter.
    pub(crate) fn ready<'a>(&'a self, broker: &'a str) -> Outcome<Wanted<'a>> {
        let jq = self.jq.as_deref().map(Jq::compile).transpose()?;
        let grep = self.grep.as_deref().map(regex).transpose()?;
        Ok(Wanted { filter: self, grep, jq, broker })
    }

    /// What can be said without the body's structure.
    fn takes(&self, content: &Content) -> bool {
        let Some(event) = content.envelope() else { return self.is_empty() };
        let same = |wanted: &Option<String>, found: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| found == Some(wanted))
        };
        let key = event.key().map(|key| String::from_utf8_lossy(key.as_bytes()));
        let header = |pair: &String| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            event.headers().all(name).any(|found| found == value.as_bytes())
        };
        same(&self.key, key.as_deref())
            && same(&self.event_type, Some(event.event_type()))
            && same(&self.id, Some(&event.id().to_string()))
            && same(&self.correlation, event.extension("correlationid"))
            && self.headers.iter().all(header)
    }

    /// Whether records that are no events are wanted too: a jq filter sees them as they are.
    fn is_empty(&self) -> bool {
        self.key.is_none()
            && self.event_type.is_none()
            && self.id.is_none()
            && self.correlation.is_none()
            && self.headers.is_empty()
            && self.grep.is_none()
    }
}

/// A filter that is ready to run.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    filter: &'a Filter,
    grep: Option<Regex>,
    jq: Option<Jq>,
    broker: &'a str,
}

impl Wanted<'_> {
    /// Whether a record is wanted. The cheap questions come first.
    ///
    /// # Errors
    /// Usage: the jq filter fails on this record.
    pub(crate) fn takes(&self, topic: &Topic, record: &Record) -> Outcome<bool> {
        let body = event(record).and_then(Envelope::payload).map(|body| String::from_utf8_lossy(body));
        let holds = |grep: &Regex| body.as_ref().is_some_and(|body| grep.is_match(body));
        if !self.filter.takes(&record.content) || !self.grep.as_ref().is_none_or(holds) {
            return Ok(false);
        }
        let Some(jq) = &self.jq else { return Ok(true) };
        jq.holds(&record::for_jq(record::to_json(self.broker, topic, record)))
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

/// Reads partitions, of one topic or several, in the order in which records were stored.
pub(crate) struct Reader<'a> {
    admin: &'a dyn Admin,
    parts: Vec<Part>,
}

struct Part {
    topic: Topic,
    span: Span,
    ahead: VecDeque<Record>,
}

impl<'a> Reader<'a> {
    /// Begins to read a topic.
    pub(crate) fn new(admin: &'a dyn Admin, topic: Topic, spans: Vec<Span>) -> Self {
        Self::over(admin, vec![(topic, spans)])
    }

    /// Begins to read several topics.
    pub(crate) fn over(admin: &'a dyn Admin, topics: Vec<(Topic, Vec<Span>)>) -> Self {
        let part = |topic: &Topic, span| Part { topic: topic.clone(), span, ahead: VecDeque::new() };
        let parts = topics.iter().flat_map(|(topic, spans)| spans.iter().map(move |span| part(topic, *span)));
        Self { admin, parts: parts.collect() }
    }

    /// Returns the next record; `None` at the end of every span.
    ///
    /// # Errors
    /// What the transport reports.
    pub(crate) async fn next(&mut self) -> Outcome<Option<Record>> {
        Ok(self.next_of_any().await?.map(|(_, record)| record))
    }

    /// Returns the next record with its topic.
    ///
    /// # Errors
    /// What the transport reports.
    pub(crate) async fn next_of_any(&mut self) -> Outcome<Option<(Topic, Record)>> {
        for Part { topic, span, ahead } in &mut self.parts {
            if ahead.is_empty() && span.len() > 0 {
                let max = CHUNK.min(usize::try_from(span.len()).unwrap_or(CHUNK));
                let read = self.admin.read(topic, span.partition, span.from, max).await?;
                match read.last() {
                    Some(last) => span.from = Offset(last.offset.0 + 1),
                    None => span.from = span.to,
                }
                ahead.extend(read);
            }
        }
        let first = self.parts.iter_mut().filter(|part| !part.ahead.is_empty());
        let first =
            first.min_by_key(|part| part.ahead.front().map(|record| (record.stored_at, record.partition)));
        Ok(first.and_then(|part| Some((part.topic.clone(), part.ahead.pop_front()?))))
    }

    /// Waits for records behind the spans, which are extended to what is there then.
    ///
    /// # Errors
    /// What the transport reports.
    pub(crate) async fn follow(&mut self) -> Outcome {
        let mut ends: BTreeMap<Topic, Vec<_>> = BTreeMap::new();
        for Part { topic, span, .. } in &self.parts {
            ends.entry(topic.clone()).or_default().push((span.partition, span.to));
        }
        let within = std::time::Duration::from_secs(3_600);
        let mut waits: Vec<_> =
            ends.iter().map(|(topic, ends)| self.admin.wait(topic, ends, within)).collect();
        std::future::poll_fn(|task| {
            let ready = waits.iter_mut().find_map(|wait| match wait.as_mut().poll(task) {
                Poll::Ready(waited) => Some(waited),
                Poll::Pending => None,
            });
            ready.map_or(Poll::Pending, Poll::Ready)
        })
        .await?;
        for topic in ends.keys() {
            let gone = || Failure::NotFound(format!("topic {topic} was deleted"));
            let info = self.admin.topic(topic).await?.ok_or_else(gone)?;
            for Part { span, .. } in self.parts.iter_mut().filter(|part| part.topic == *topic) {
                if let Some(known) = info.partitions.iter().find(|known| known.partition == span.partition) {
                    span.to = known.next;
                    span.from = span.from.max(known.first);
                }
            }
        }
        Ok(())
    }
}

/// The event of a record, if it is one.
pub(crate) fn event(record: &Record) -> Option<&Envelope> {
    record.content.envelope()
}
