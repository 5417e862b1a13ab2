//! R1–R4: reading again.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime};

use super::check::{Violation, ensure, ensure_eq};
use super::cx::{Book, Checked, Cx, Setup, fails_as, pass};
use crate::admin::{Admin, Offset};
use crate::capability::Replay;
use crate::envelope::Envelope;
use crate::error::ErrorKind;
use crate::name::Topic;
use crate::subscription::Start;
use crate::transport::{Polled, Receipt};

/// More events than a transport may be inclined to bring at once.
const N_PAGED: usize = 700;

/// A start that is not claimed must be refused; the administration if the case goes on.
async fn claims<'a>(cx: &Cx, s: &'a Setup, replay: Replay) -> Checked<Option<&'a dyn Admin>> {
    if s.capabilities.replay >= replay {
        return match s.transport.admin() {
            Some(admin) => Ok(Some(admin)),
            None => Err(Violation::new("replay is claimed without an administration to read through")),
        };
    }
    let start = if replay == Replay::Offset { Start::Earliest } else { Start::Time(SystemTime::now()) };
    let subscription = cx.subscription(&s.transport, &s.topic, &cx.group("late")?).with_start(start);
    fails_as(
        "a start that is not claimed",
        s.transport.subscribe(&subscription).await.map(drop),
        &[ErrorKind::Unsupported],
    )?;
    Ok(None)
}

/// Where events of one partition are: as their receipts say, or where that is not known to publishers, as a reader finds
/// them by their ids.
async fn places(
    admin: &dyn Admin,
    topic: &Topic,
    events: &[Envelope],
    receipts: &[Receipt],
) -> Checked<Vec<Offset>> {
    let told: Option<Vec<_>> = receipts.iter().map(|receipt| receipt.offset).collect();
    if let Some(told) = told {
        return Ok(told);
    }
    let info = admin.topic(topic).await?.ok_or_else(|| Violation::new("the topic vanished"))?;
    let mut found = HashMap::new();
    for known in info.partitions.iter().filter(|known| known.partition == receipts[0].partition) {
        let mut from = known.first;
        loop {
            let page = admin.read(topic, known.partition, from, 256).await?;
            let Some(last) = page.last() else { break };
            from = Offset(last.offset.0 + 1);
            let ids = page
                .iter()
                .filter_map(|record| Some((record.content.envelope()?.id().clone(), record.offset)));
            found.extend(ids);
        }
    }
    let place = |event: &Envelope| found.get(event.id()).copied();
    events
        .iter()
        .map(|event| {
            place(event).ok_or_else(|| Violation::new("a confirmed event is not where a reader looks"))
        })
        .collect()
}

pub(super) async fn replay_start_is_exact(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let Some(admin) = claims(&cx, &s, Replay::Offset).await? else { return Ok(()) };
    let events: Vec<_> = cx.events(20, 1);
    let before_first = SystemTime::now() - Duration::from_secs(3600);
    let mut receipts = s.publish(&events[..10]).await?;
    pass(Duration::from_millis(30)).await;
    receipts.extend(s.publish(&events[10..]).await?);
    let partition = receipts[0].partition;
    let places = places(admin, &s.topic, &events, &receipts).await?;
    for from in [0, 1, 9, 19] {
        let read = admin.read(&s.topic, partition, places[from], 100).await?;
        ensure_eq!(read.len(), 20 - from, "records from offset {}", places[from]);
        for (record, sent) in read.iter().zip(&events[from..]) {
            ensure_eq!(record.content.envelope(), Some(sent), "record at {}", record.offset);
        }
        let mut starts = BTreeMap::new();
        starts.insert(partition, places[from]);
        let subscription = cx
            .subscription(&s.transport, &s.topic, &cx.group(&format!("from{from}"))?)
            .with_start(Start::Offsets(starts));
        let mut member = cx.subscribe(&s.transport, &subscription).await?;
        let mut book = Book::new(&events[from..]);
        book.record_all(&member.take(20 - from).await?)?;
        book.exactly_once()?;
        book.in_order(true)?;
    }
    let end = Offset(places[19].0 + 1);
    ensure!(admin.read(&s.topic, partition, end, 10).await?.is_empty(), "records behind the end");
    if s.capabilities.replay < Replay::OffsetAndTime {
        return Ok(());
    }
    let stored: Vec<_> = admin.read(&s.topic, partition, places[0], 100).await?;
    ensure!(stored.is_sorted_by_key(|record| record.stored_at), "stored times descend");
    let middle = stored[10].stored_at;
    ensure!(stored[9].stored_at < middle, "the clock did not move: the case proved nothing");
    let after_last = stored[19].stored_at + Duration::from_secs(3600);
    let first_of =
        |time| stored.iter().find(|record| record.stored_at >= time).map_or(end, |record| record.offset);
    for time in [
        before_first,
        stored[0].stored_at,
        middle,
        middle + Duration::from_nanos(1),
        stored[9].stored_at + Duration::from_micros(1),
        after_last,
    ] {
        ensure_eq!(
            admin.offset_at(&s.topic, partition, time).await?,
            first_of(time),
            "first offset at or after a time"
        );
    }
    let subscription =
        cx.subscription(&s.transport, &s.topic, &cx.group("since")?).with_start(Start::Time(middle));
    let mut member = cx.subscribe(&s.transport, &subscription).await?;
    let got = member.take(10).await?;
    Book::new(&events[10..]).record_all(&got)?;
    member.ack(&got).await?;
    member.stays_quiet("events before the start time").await
}

pub(super) async fn replay_leaves_live_groups_alone(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(30, 5);
    s.publish(&events).await?;
    let got = s.member.take(10).await?;
    s.member.ack(&got).await?;
    let mut book = Book::new(&events);
    book.record_all(&got)?;
    if let Some(admin) = claims(&cx, &s, Replay::Offset).await? {
        let before = admin.groups(Some(&s.topic)).await?;
        let info = admin.topic(&s.topic).await?.ok_or_else(|| Violation::new("the topic vanished"))?;
        let mut n_read = 0;
        for partition in &info.partitions {
            n_read += admin.read(&s.topic, partition.partition, partition.first, 1_000).await?.len();
        }
        ensure_eq!(n_read, events.len(), "records read outside any group");
        ensure_eq!(admin.groups(Some(&s.topic)).await?, before, "positions of live groups");
    }
    let rest = s.member.take(20).await?;
    book.record_all(&rest)?;
    s.member.ack(&rest).await?;
    s.member.stays_quiet("after the rest").await?;
    book.exactly_once()
}

/// Whoever reads page by page takes one that is not full for the last.
pub(super) async fn a_short_read_is_the_end(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let Some(admin) = claims(&cx, &s, Replay::Offset).await? else { return Ok(()) };
    let events = cx.events(N_PAGED, 1);
    let receipts = s.publish(&events).await?;
    let places = places(admin, &s.topic, &events, &receipts).await?;
    for (at, max) in [(0, 1), (0, 257), (0, N_PAGED - 1), (0, N_PAGED), (100, 550), (100, 10 * N_PAGED)] {
        let from = places[at];
        let read = admin.read(&s.topic, receipts[at].partition, from, max).await?;
        ensure_eq!(read.len(), max.min(N_PAGED - at), "records of {max} that were asked for from {from}");
    }
    Ok(())
}

pub(super) async fn removed_history_is_data_loss(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let Some(admin) = claims(&cx, &s, Replay::Offset).await? else { return Ok(()) };
    // A group that is away: one with a member may have read ahead what is removed.
    s.member.close().await?;
    let events = cx.events(20, 1);
    let receipts = s.publish(&events).await?;
    let places = places(admin, &s.topic, &events, &receipts).await?;
    let (partition, first) = (receipts[0].partition, places[5]);
    let removed = admin.purge(&s.topic, partition, first).await?;
    ensure_eq!(removed, 5, "events removed below {first}");
    let below = places[2];
    let read = admin.read(&s.topic, partition, below, 10).await;
    let loss = ErrorKind::DataLoss { expected: below, first };
    fails_as("reading removed history", read.map(|r| r.len()), &[loss])?;
    let mut member = cx.join(&s.transport, &s.topic, &s.group).await?;
    let end = tokio::time::Instant::now() + cx.settings().idle;
    let error = loop {
        match tokio::time::timeout_at(end, member.consumer.poll(super::cx::some(100))).await {
            Err(_) => return Err(Violation::new("removed history was skipped in silence: nothing came")),
            Ok(Err(error)) => break error,
            Ok(Ok(Polled::Deliveries(got))) => {
                return Err(Violation::new(format!(
                    "removed history was skipped in silence: {} deliveries",
                    got.len()
                )));
            }
            Ok(Ok(_)) => {}
        }
    };
    // Offsets may have gaps: what was due is at most where the first event was.
    let at_most = places[0];
    ensure!(
        matches!(error.kind(), ErrorKind::DataLoss { expected, first: found } if expected <= at_most && found == first),
        "the hole is not named: {error}"
    );
    let mut book = Book::new(&events[5..]);
    let rest = member.take(15).await?;
    book.record_all(&rest)?;
    member.ack(&rest).await?;
    book.exactly_once()
}
