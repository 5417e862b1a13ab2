//! Ranges, the same on every transport: `start`, `end`, `N`, `-N`, `+N`, `@TIME`, `@-1h`, and `A:B`.

use std::str::FromStr;
use std::time::{Duration, SystemTime};

use eventbus::admin::{Admin, PartitionInfo};
use eventbus::time::from_rfc3339;
use eventbus::url::parse_duration;
use eventbus::{Offset, PartitionId, Topic};

use crate::exit::{Failure, Outcome};

/// Reads a duration of a flag.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "expected a duration such as 250ms, 30s, 5m, 12h or 7d".to_owned())
}

/// Reads a rate: 200/s, 30/m or 5.
///
/// # Errors
/// What was expected.
pub(crate) fn rate(text: &str) -> Result<f64, String> {
    let (number, seconds) = match text.split_once('/') {
        None => (text, 1.0),
        Some((number, "s")) => (number, 1.0),
        Some((number, "m")) => (number, 60.0),
        Some(_) => return Err("expected a rate such as 200/s or 30/m".into()),
    };
    let found = number.parse::<f64>().ok().filter(|n| n.is_finite() && *n > 0.0);
    found.map(|n| n / seconds).ok_or_else(|| "expected a rate such as 200/s or 30/m".into())
}

/// One end of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bound {
    /// The first kept record.
    Start,
    /// The end as it is now.
    End,
    /// An offset.
    At(u64),
    /// So many before the end, in each partition.
    Last(u64),
    /// So many after the range's begin.
    Plus(u64),
    /// The first record stored at or after a time.
    Time(SystemTime),
    /// The first record stored so long after the range's begin.
    PlusTime(Duration),
}

impl FromStr for Bound {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |digits: &str| digits.parse::<u64>().map_err(|_| format!("not a number: {digits}"));
        match text.split_at_checked(1) {
            _ if text == "start" => Ok(Self::Start),
            _ if text == "end" => Ok(Self::End),
            Some(("@", time)) => parse_time(time).map(Self::Time),
            Some(("-", digits)) => number(digits).map(Self::Last),
            Some(("+", rest)) => match parse_duration(rest) {
                Some(after) => Ok(Self::PlusTime(after)),
                None => number(rest).map(Self::Plus),
            },
            _ => number(text)
                .map(Self::At)
                .map_err(|_| format!("expected start, end, N, -N, +N or @TIME: {text}")),
        }
    }
}

fn parse_time(text: &str) -> Result<SystemTime, String> {
    let bad = || format!("expected a time such as 2026-08-22, 2026-08-22T10:00Z or -1h: {text}");
    if let Some(ago) = text.strip_prefix('-').and_then(parse_duration) {
        return SystemTime::now().checked_sub(ago).ok_or_else(bad);
    }
    let full = match text.len() {
        10 => format!("{text}T00:00:00Z"),
        _ => text.to_owned(),
    };
    // Minutes are enough: 10:00Z is 10:00:00Z.
    let seconds = full.strip_suffix('Z').filter(|front| front.matches(':').count() == 1);
    let full = seconds.map_or(full.clone(), |front| format!("{front}:00Z"));
    from_rfc3339(&full).ok_or_else(bad)
}

/// A range with two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    /// Inclusive.
    pub from: Bound,
    /// Exclusive.
    pub to: Bound,
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Times hold colons: the one that splits is followed by a bound.
        let splits = text.char_indices().filter(|(_, c)| *c == ':').map(|(at, _)| at);
        for at in splits {
            let (from, to) = (text.get(..at).unwrap_or_default(), text.get(at + 1..).unwrap_or_default());
            let from = if from.is_empty() { Ok(Bound::Start) } else { from.parse() };
            let to = if to.is_empty() { Ok(Bound::End) } else { to.parse() };
            if let (Ok(from), Ok(to)) = (from, to) {
                return Ok(Self { from, to });
            }
        }
        Ok(Self { from: text.parse()?, to: Bound::End })
    }
}

/// A range in one partition, resolved and frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// The partition.
    pub partition: PartitionId,
    /// Inclusive.
    pub from: Offset,
    /// Exclusive.
    pub to: Offset,
}

/// Records that are read at once where events must be counted.
const PAGE: usize = 256;

impl Span {
    /// How many offsets it holds.
    pub(crate) fn len(&self) -> u64 {
        self.to.0.saturating_sub(self.from.0)
    }
}

/// Resolves a range in every partition of a topic.
///
/// # Errors
/// The topic does not exist, or the transport fails.
pub(crate) async fn resolve(admin: &dyn Admin, topic: &Topic, range: Range) -> Outcome<Vec<Span>> {
    let info =
        admin.topic(topic).await?.ok_or_else(|| Failure::NotFound(format!("there is no topic {topic}")))?;
    let mut spans = Vec::new();
    for partition in info.partitions {
        let from = bound(admin, topic, &partition, range.from, partition.first).await?;
        let to = match (range.from, range.to) {
            (Bound::Time(begin), Bound::PlusTime(after)) => {
                let end = begin.checked_add(after).map_or(Bound::End, Bound::Time);
                bound(admin, topic, &partition, end, from).await?
            }
            (_, to) => bound(admin, topic, &partition, to, from).await?,
        };
        spans.push(Span { partition: partition.partition, from, to: to.max(from) });
    }
    Ok(spans)
}

async fn bound(
    admin: &dyn Admin,
    topic: &Topic,
    of: &PartitionInfo,
    bound: Bound,
    begin: Offset,
) -> Outcome<Offset> {
    let offset = match bound {
        Bound::Start => of.first,
        Bound::End => of.next,
        Bound::At(offset) => Offset(offset),
        Bound::Last(n) => last(admin, topic, of, n).await?,
        Bound::Plus(n) if has_no_gaps(of) => Offset(begin.0.saturating_add(n)),
        Bound::Plus(n) => {
            let found = nth(admin, topic, of, begin.max(of.first), n).await?;
            found.unwrap_or(of.next)
        }
        Bound::PlusTime(_) => {
            return Err(Failure::Usage("a duration such as +30m needs a range that begins at a time".into()));
        }
        Bound::Time(time) => admin.offset_at(topic, of.partition, time).await?,
    };
    Ok(offset.clamp(of.first, of.next))
}

/// Whether as many events are kept as there are offsets.
fn has_no_gaps(of: &PartitionInfo) -> bool {
    of.n_kept >= of.next.0.saturating_sub(of.first.0)
}

/// The offset of the n-th event after the one at (or first behind) an offset; `None` if there are fewer.
async fn nth(
    admin: &dyn Admin,
    topic: &Topic,
    of: &PartitionInfo,
    mut from: Offset,
    mut n: u64,
) -> Outcome<Option<Offset>> {
    loop {
        let page = admin.read(topic, of.partition, from, PAGE).await?;
        let found = usize::try_from(n).ok().and_then(|n| page.get(n));
        match (found, page.last()) {
            (Some(found), _) => return Ok(Some(found.offset)),
            (None, None) => return Ok(None),
            (None, Some(last)) => {
                n -= page.len() as u64;
                from = Offset(last.offset.0 + 1);
            }
        }
    }
}

/// The offset of the n-th last event. Where offsets have gaps they say nothing of how many events lie between them:
/// then ever more is read, from ever further back.
async fn last(admin: &dyn Admin, topic: &Topic, of: &PartitionInfo, n: u64) -> Outcome<Offset> {
    if has_no_gaps(of) || n == 0 {
        return Ok(Offset(of.next.0.saturating_sub(n)));
    }
    if n >= of.n_kept {
        return Ok(of.first);
    }
    let mut back = n;
    loop {
        let from = Offset(of.next.0.saturating_sub(back)).max(of.first);
        let (mut offsets, mut at) = (std::collections::VecDeque::new(), from);
        loop {
            let page = admin.read(topic, of.partition, at, PAGE).await?;
            let Some(end) = page.last().map(|last| last.offset) else { break };
            offsets.extend(page.iter().map(|record| record.offset));
            while offsets.len() as u64 > n {
                offsets.pop_front();
            }
            at = Offset(end.0 + 1);
        }
        if offsets.len() as u64 >= n || from == of.first {
            return Ok(offsets.front().copied().unwrap_or(from));
        }
        back = back.saturating_mul(16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_read_as_written() {
        let time = |text| Bound::Time(from_rfc3339(text).unwrap());
        for (text, from, to) in [
            ("start", Bound::Start, Bound::End),
            ("5:10", Bound::At(5), Bound::At(10)),
            ("-3:", Bound::Last(3), Bound::End),
            (":+7", Bound::Start, Bound::Plus(7)),
            ("@2026-08-22", time("2026-08-22T00:00:00Z"), Bound::End),
            ("@2026-08-22T10:00Z:+30", time("2026-08-22T10:00:00Z"), Bound::Plus(30)),
            (
                "@2026-08-22T10:00Z:+30m",
                time("2026-08-22T10:00:00Z"),
                Bound::PlusTime(Duration::from_secs(1800)),
            ),
            ("@2026-08-22T10:00:05Z:@2026-08-23", time("2026-08-22T10:00:05Z"), time("2026-08-23T00:00:00Z")),
        ] {
            assert_eq!(text.parse::<Range>().unwrap(), Range { from, to }, "{text}");
        }
        assert!(matches!("@-1h:end".parse::<Range>().unwrap().from, Bound::Time(_)));
        for bad in
            ["", "middle", "@yesterday", "5-10", "@2026-08-22T10:00Z:+30x", "@2026-08-22T10:00Znonsense"]
        {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
    }
}
