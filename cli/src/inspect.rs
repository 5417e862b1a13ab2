//! `inspect` and `capabilities`: what there is, and how far it is.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand, ValueEnum};
use eventbus::admin::{Admin, GroupInfo, TopicInfo};
use eventbus::{Group, Offset, PartitionId, Topic};

use crate::chain;
use crate::complete;
use crate::exit::{Failure, Outcome};
use crate::listing::Listing;
use crate::out::Out;
use crate::out::row;
use crate::range;
use crate::record;
use crate::session::Session;

/// Looks at topics, groups and records.
///
/// Examples:
///   eventctl -c sqlite://shop.db inspect topics
///   eventctl -c sqlite://shop.db inspect lag --crit 1000
///   eventctl -c sqlite://shop.db inspect message orders/3@88
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Inspect {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// All topics.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db inspect topics -o table
    ///   eventctl -c sqlite://shop.db inspect topics --match 'order-*' --sort kept -w
    #[command(verbatim_doc_comment)]
    Topics {
        /// With the framework's own: parking logs, inboxes, notes of tools.
        #[arg(long)]
        internal: bool,
        /// Only topics in which nothing was stored for so long, such as 1h; one without events is among them.
        #[arg(long, value_name = "TIME", value_parser = range::duration)]
        idle: Option<Duration>,
        #[command(flatten)]
        listing: Listing,
    },
    /// One topic, by partition.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db inspect topic orders
    #[command(verbatim_doc_comment)]
    Topic {
        /// Its name.
        #[arg(add = complete::topics())]
        topic: Topic,
    },
    /// All groups, by topic.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db inspect groups --columns group,topic,lag
    ///   eventctl -c sqlite://shop.db inspect groups --lag-gt 0 --sort lag
    #[command(verbatim_doc_comment)]
    Groups {
        /// With the marks of parking logs.
        #[arg(long)]
        internal: bool,
        #[command(flatten)]
        listing: Listing,
    },
    /// One group, by topic and partition.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db inspect group billing
    ///   eventctl -c sqlite://shop.db inspect group billing --peek 3
    #[command(verbatim_doc_comment)]
    Group {
        /// Its name.
        #[arg(add = complete::groups())]
        group: Group,
        /// Instead so many records before and after each of its positions.
        #[arg(long, value_name = "N")]
        peek: Option<u64>,
    },
    /// How far groups are behind; exit code 7 on a breach.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db inspect lag --crit 1000 --max-age 5m
    ///   eventctl -c sqlite://shop.db inspect lag --format prometheus
    #[command(verbatim_doc_comment)]
    Lag {
        /// Only this group.
        #[arg(add = complete::groups())]
        group: Option<Group>,
        /// A lag above is a warning.
        #[arg(long, value_name = "N")]
        warn: Option<u64>,
        /// A lag above is a breach.
        #[arg(long, value_name = "N")]
        crit: Option<u64>,
        /// An unsettled event older than this is a breach.
        #[arg(long, value_name = "DURATION", value_parser = range::duration)]
        max_age: Option<Duration>,
        /// For whom: people and scripts, or a monitor.
        #[arg(long, value_enum, default_value = "text")]
        format: LagFormat,
    },
    /// One record.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db inspect message orders/3@88
    ///   eventctl -c sqlite://shop.db inspect message orders/3@88 --chain -o table
    #[command(verbatim_doc_comment)]
    Message {
        /// Its place: topic/partition@offset.
        reference: String,
        /// With so many records of its partition before and after it.
        #[arg(long, value_name = "N", conflicts_with_all = ["hex", "chain"])]
        context_window: Option<u64>,
        /// Its body as bytes.
        #[arg(long, conflicts_with = "chain")]
        hex: bool,
        /// The events that caused it and that it caused, over all topics, as a tree.
        #[arg(long)]
        chain: bool,
    },
}

impl Inspect {
    /// Whether it does not end by itself.
    pub(crate) fn follows(&self) -> bool {
        match &self.what {
            What::Topics { listing, .. } | What::Groups { listing, .. } => listing.follows(),
            _ => false,
        }
    }
}

/// Reads `topic/partition@offset`.
///
/// # Errors
/// Usage: it is not of that form.
pub(crate) fn place(reference: &str) -> Outcome<(Topic, PartitionId, Offset)> {
    let bad = || Failure::Usage(format!("expected topic/partition@offset, such as orders/3@88: {reference}"));
    let (topic, rest) = reference.rsplit_once('/').ok_or_else(bad)?;
    let (partition, offset) = rest.split_once('@').ok_or_else(bad)?;
    let partition = partition.parse().map_err(|_| bad())?;
    let offset = offset.parse().map_err(|_| bad())?;
    Ok((Topic::new(topic)?, PartitionId(partition), Offset(offset)))
}

/// Reads the one record at a place.
///
/// # Errors
/// Not found: there is none, or no longer.
pub(crate) async fn record_at(
    session: &Session,
    reference: &str,
) -> Outcome<(Topic, eventbus::admin::Record)> {
    let (topic, partition, offset) = place(reference)?;
    let gone = || Failure::NotFound(format!("there is no record at {reference}"));
    let read = session.admin()?.read(&topic, partition, offset, 1).await;
    let mut read = match read {
        Err(error) if matches!(error.kind(), eventbus::ErrorKind::DataLoss { .. }) => return Err(gone()),
        read => read?,
    };
    match read.pop() {
        Some(record) if record.offset == offset => Ok((topic, record)),
        _ => Err(gone()),
    }
}

/// Sums a group's partitions of one topic.
fn by_topic(groups: Vec<GroupInfo>) -> BTreeMap<(String, String), (u64, usize, usize)> {
    let mut sums: BTreeMap<(String, String), (u64, usize, usize)> = BTreeMap::new();
    for info in groups {
        let sum = sums.entry((info.group.to_string(), info.topic.to_string())).or_default();
        sum.0 += info.lag;
        sum.1 += 1;
        sum.2 += usize::from(info.owner.is_some());
    }
    sums
}

/// Runs the command.
///
/// # Errors
/// As the transport reports; a breached check.
pub(crate) async fn run(session: &Session, inspect: &Inspect, out: &mut Out) -> Outcome {
    let admin = session.admin()?;
    match &inspect.what {
        What::Topics { internal, idle, listing } => {
            let rows = async || {
                let mut shown = admin.topics().await?;
                shown.retain(|info| *internal || !is_internal(&info.topic));
                if let Some(since) = idle.and_then(|idle| SystemTime::now().checked_sub(idle)) {
                    shown = idle_since(admin, shown, since).await?;
                }
                let rows = shown.into_iter().map(|info| {
                    let kept: u64 = info.partitions.iter().map(|part| part.n_kept).sum();
                    row! {"topic": info.topic.as_str(), "partitions": info.partitions.len(), "kept": kept}
                });
                Ok(rows.collect())
            };
            listing.show(out, "topic", rows).await
        }
        What::Topic { topic } => {
            let info = admin
                .topic(topic)
                .await?
                .ok_or_else(|| Failure::NotFound(format!("there is no topic {topic}")))?;
            let rows = info.partitions.iter().map(|part| {
                row! {"topic": topic.as_str(), "partition": part.partition.0, "first": part.first.0, "next": part.next.0,
                "kept": part.n_kept}
            });
            out.rows(rows.collect())
        }
        What::Groups { internal, listing } => {
            let rows = async || {
                let mut groups = admin.groups(None).await?;
                groups.retain(|info| *internal || !is_internal(&info.topic));
                let rows = by_topic(groups).into_iter().map(|((group, topic), (lag, partitions, owned))| {
                    row! {"group": group, "topic": topic, "partitions": partitions, "owned": owned, "lag": lag}
                });
                Ok(rows.collect())
            };
            listing.show(out, "group", rows).await
        }
        What::Group { group, peek } => {
            let found: Vec<_> =
                admin.groups(None).await?.into_iter().filter(|info| info.group == *group).collect();
            if found.is_empty() {
                return Err(Failure::NotFound(format!("there is no group {group}")));
            }
            if let Some(n) = peek {
                for info in found {
                    around(session, &info.topic, info.partition, info.settled, *n..*n, out).await?;
                }
                return out.end();
            }
            let rows = found.into_iter().map(|info| {
                row! {"group": info.group.as_str(), "topic": info.topic.as_str(), "partition": info.partition.0,
                "settled": info.settled.0, "end": info.end.0, "lag": info.lag, "owner": info.owner}
            });
            out.rows(rows.collect())
        }
        What::Lag { group, warn, crit, max_age, format } => {
            let bounds = Bounds { warn: *warn, crit: *crit, max_age: *max_age };
            lag(session, out, group.as_ref(), &bounds, *format).await
        }
        What::Message { reference, chain: true, .. } => {
            let (_, record) = record_at(session, reference).await?;
            out.rows(chain::chain(session, &record).await?)
        }
        What::Message { reference, hex: true, .. } => {
            let (_, record) = record_at(session, reference).await?;
            record::bytes(&record).chunks(16).enumerate().try_for_each(|(at, bytes)| {
                let hex: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                let shown: String =
                    bytes.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '.' }).collect();
                out.line(format_args!("{:08x}  {:47}  {shown}", at * 16, hex.join(" ")))
            })
        }
        What::Message { reference, context_window: Some(n), .. } => {
            let (topic, record) = record_at(session, reference).await?;
            around(session, &topic, record.partition, record.offset, *n..n + 1, out).await?;
            out.end()
        }
        What::Message { reference, .. } => {
            let (topic, record) = record_at(session, reference).await?;
            let json = record::to_json(&session.broker, &topic, &record);
            out.document(&json)
        }
    }
}

/// Writes the records around a place: so many below it, and so many from it on.
async fn around(
    session: &Session,
    topic: &Topic,
    partition: PartitionId,
    at: Offset,
    n: std::ops::Range<u64>,
    out: &mut Out,
) -> Outcome {
    let admin = session.admin()?;
    let parts = admin.topic(topic).await?.map(|info| info.partitions).unwrap_or_default();
    let first = parts.iter().find(|known| known.partition == partition).map(|known| known.first);
    let from = Offset(at.0.saturating_sub(n.start)).max(first.unwrap_or_default());
    let end = at.0.saturating_add(n.end);
    let max = usize::try_from(end.saturating_sub(from.0)).unwrap_or(usize::MAX);
    let read = admin.read(topic, partition, from, max).await?;
    // Places may have gaps, and what is read goes beyond them.
    let wanted = read.iter().filter(|record| record.offset.0 < end);
    wanted.into_iter().try_for_each(|record| out.record(record::to_json(&session.broker, topic, record)))
}

/// The topics in which nothing was stored since a time.
async fn idle_since(admin: &dyn Admin, topics: Vec<TopicInfo>, time: SystemTime) -> Outcome<Vec<TopicInfo>> {
    let mut idle = Vec::new();
    for info in topics {
        let mut is_idle = true;
        for part in info.partitions.iter().filter(|part| part.n_kept > 0) {
            is_idle &= admin.offset_at(&info.topic, part.partition, time).await? >= part.next;
        }
        if is_idle {
            idle.push(info);
        }
    }
    Ok(idle)
}

/// Topics that are the framework's own: parking logs, inboxes, what tools note.
pub(crate) fn is_internal(topic: &Topic) -> bool {
    let name = topic.as_str();
    name.ends_with(".parked") || name.starts_with("replies.") || name.starts_with("_evt.")
}

/// For whom the lag is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LagFormat {
    /// Rows in the form of --output.
    Text,
    /// The text exposition format of Prometheus.
    Prometheus,
    /// One line and exit code 0, 1 or 2, as Nagios plugins answer.
    Nagios,
}

struct Bounds {
    warn: Option<u64>,
    crit: Option<u64>,
    max_age: Option<Duration>,
}

async fn lag(
    session: &Session,
    out: &mut Out,
    group: Option<&Group>,
    bounds: &Bounds,
    format: LagFormat,
) -> Outcome {
    let admin = session.admin()?;
    let mut groups = admin.groups(None).await?;
    // The position in a parking log is a mark, and what is above it is not behind.
    groups.retain(|info| !is_internal(&info.topic) && group.is_none_or(|group| info.group == *group));
    if let (Some(group), true) = (group, groups.is_empty()) {
        return Err(Failure::NotFound(format!("there is no group {group}")));
    }
    let mut oldest: BTreeMap<(String, String), Duration> = BTreeMap::new();
    for info in groups.iter().filter(|info| info.lag > 0) {
        let read = admin.read(&info.topic, info.partition, info.settled, 1).await;
        if let Some(record) = read.ok().and_then(|mut read| read.pop()) {
            let age = SystemTime::now().duration_since(record.stored_at).unwrap_or_default();
            let known = oldest.entry((info.group.to_string(), info.topic.to_string())).or_default();
            *known = age.max(*known);
        }
    }
    let (mut breaches, mut warnings, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    for (names, (lag, ..)) in by_topic(groups) {
        let age = oldest.get(&names).copied();
        let (group, topic) = names;
        let late = bounds.max_age.is_some_and(|max| age.is_some_and(|age| age > max));
        let state = if bounds.crit.is_some_and(|crit| lag > crit) || late {
            breaches.push(format!("{group} on {topic}: {lag}"));
            "BREACH"
        } else if bounds.warn.is_some_and(|warn| lag > warn) {
            warnings.push(format!("{group} on {topic}: {lag}"));
            "warning"
        } else {
            "ok"
        };
        if format == LagFormat::Prometheus {
            let labels =
                format!("messaging_consumer_group_name={group:?},messaging_destination_name={topic:?}");
            out.line(format_args!("evt_consumer_lag{{{labels}}} {lag}"))?;
        }
        let age = age.map(|age| format!("{:.1}s", age.as_secs_f64()));
        rows.push(row! {"group": group, "topic": topic, "lag": lag, "oldest": age, "state": state});
    }
    match format {
        LagFormat::Text => out.rows(rows)?,
        LagFormat::Prometheus => {}
        LagFormat::Nagios => {
            let (word, code, which) = match (breaches.is_empty(), warnings.is_empty()) {
                (true, true) => ("OK", 0, Vec::new()),
                (true, false) => ("WARNING", 1, warnings),
                (false, _) => ("CRITICAL", 2, breaches),
            };
            out.line(format_args!(
                "LAG {word} - {} pairs of group and topic; {}",
                rows.len(),
                which.join(", ")
            ))?;
            return if code == 0 { Ok(()) } else { Err(Failure::Plugin(code)) };
        }
    }
    if breaches.is_empty() {
        Ok(())
    } else {
        Err(Failure::Check(format!("lag above the bound: {}", breaches.join(", "))))
    }
}

/// Shows what the transport can do.
///
/// # Errors
/// The reader has gone.
pub(crate) fn capabilities(session: &Session, out: &mut Out) -> Outcome {
    let rows = session.bus.transport().capabilities().rows();
    out.rows(rows.into_iter().map(|(axis, claim)| row! {"capability": axis, "claim": claim}).collect())
}
