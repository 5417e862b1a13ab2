//! D2–D11: what survives.

use std::num::NonZeroU32;
use std::time::Duration;

use tokio::time::Instant;

use super::check::{Violation, ensure};
use super::cx::{Book, Checked, Cx, publish, run_members, some};
use crate::admin::TopicSpec;
use crate::capability::{Durability, Instances, Lease, Ordering, Replay};
use crate::error::ErrorKind;
use crate::transport::Settle;

pub(super) async fn confirmed_survives_restart(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let events = cx.events(cx.size(200, 2_000), 20);
    s.publish(&events).await?;
    drop((s.member, s.publisher, s.transport));
    cx.subject.restart().await?;
    let fresh = cx.connect().await?;
    let mut member = cx.join(&fresh, &s.topic, &s.group).await?;
    if s.capabilities.durability < Durability::Broker {
        return member
            .stays_quiet("a volatile transport kept events over a restart: it claims too little")
            .await;
    }
    let mut book = Book::new(&events);
    while book.n_seen() < events.len() {
        let got = member.poll(64).await?;
        book.record_all(&got)?;
        member.ack(&got).await?;
    }
    book.exactly_once()
}

pub(super) async fn consumer_resumes_after_restart(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let (before, after) = (cx.events(30, 10), cx.events(30, 10));
    s.publish(&before).await?;
    let got = s.member.take(15).await?;
    s.member.ack(&got).await?;
    let mut book = Book::new(&before);
    book.record_all(&got)?;
    drop((s.member, s.publisher, s.transport));
    cx.subject.restart().await?;
    let fresh = cx.connect().await?;
    let window = 8;
    let subscription = cx.subscription(&fresh, &s.topic, &s.group).with_window(some(window));
    let mut member = cx.subscribe(&fresh, &subscription).await?;
    publish(&fresh.publisher().await?, &s.topic, &after).await?;
    let volatile = s.capabilities.durability < Durability::Broker;
    let mut late = Book::new(&after);
    let wanted = if volatile { after.len() } else { after.len() + 15 };
    let mut n_seen = 0;
    while n_seen < wanted {
        let got = member.poll(64).await?;
        ensure!(got.len() <= window, "{} in hand after the restart, the window is {window}", got.len());
        for delivery in &got {
            late.record(delivery).or_else(|_| book.record(delivery)).map(drop)?;
        }
        n_seen += got.len();
        member.ack(&got).await?;
    }
    late.exactly_once()?;
    if volatile { Ok(()) } else { book.exactly_once() }
}

pub(super) async fn full_store_refuses_before_ack(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let (before, refused, after) = (cx.events(20, 5), cx.events(200, 5), cx.events(20, 5));
    s.publish(&before).await?;
    cx.subject.fill(true).await?;
    let mut stored = before.clone();
    let mut n_refused = 0;
    for event in &refused {
        let outcome = match s.publisher.enqueue(&s.topic, vec![event.clone()]).await {
            Ok(confirm) => cx.within("a confirm while the store is full", confirm).await?.single(),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(_) => stored.push(event.clone()),
            Err(error) => {
                ensure!(error.kind() == ErrorKind::Full && error.is_retryable(), "a full store: {error}");
                n_refused += 1;
            }
        }
        if n_refused == 5 {
            break;
        }
    }
    ensure!(n_refused > 0, "the store never became full");
    cx.subject.fill(false).await?;
    s.publish(&after).await?;
    stored.extend(after);
    let mut book = Book::new(&stored);
    while book.n_seen() < stored.len() {
        let got = s.member.poll(64).await?;
        book.record_all(&got)?;
        s.member.ack(&got).await?;
    }
    s.member.stays_quiet("a refused event").await?;
    book.exactly_once()
}

pub(super) async fn second_owner_is_refused_or_shares(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(60, 20);
    let second = match cx.subject.connect().await {
        Err(error) if s.capabilities.instances == Instances::One => {
            ensure!(
                matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Unavailable),
                "a second owner: {error}"
            );
            s.publish(&events).await?;
            return Book::new(&events).record_all(&s.member.take(60).await?);
        }
        Err(error) => return Err(Violation::new(format!("several instances are claimed: {error}"))),
        Ok(second) => second,
    };
    let peer = cx.join(&second, &s.topic, &s.group).await?;
    publish(&second.publisher().await?, &s.topic, &events[..30]).await?;
    s.publish(&events[30..]).await?;
    let mut book = Book::new(&events);
    let mut members = [s.member, peer];
    run_members(&cx, &mut members, &mut book, |_, _| {}).await?;
    book.exactly_once()?;
    // What comes in through one owner is read through the other.
    let [mut first, peer] = members;
    peer.close().await?;
    let more = cx.events(10, 5);
    publish(&second.publisher().await?, &s.topic, &more).await?;
    let mut book = Book::new(&more);
    book.record_all(&first.take(10).await?)?;
    book.exactly_once()
}

pub(super) async fn clock_jumps_are_harmless(mut cx: Cx) -> Checked {
    const HOUR: Duration = Duration::from_secs(3_600);
    let transport = cx.connect().await?;
    let (topic, group) = (cx.topic("events")?, cx.group("main")?);
    let capabilities = transport.capabilities();
    if let Some(admin) = transport.admin() {
        let one = NonZeroU32::MIN;
        admin.declare(&TopicSpec::new(topic.clone()).with_partitions(one).with_max_age(HOUR / 2)).await?;
    }
    let mut wanted = cx
        .subscription(&transport, &topic, &group)
        .with_ordering(capabilities.ordering.min(Ordering::PerKey))
        .with_lease(cx.settings().idle * 2);
    if capabilities.delay {
        wanted = wanted.with_delayed_retry();
    }
    let mut member = cx.subscribe(&transport, &wanted).await?;
    let publisher = transport.publisher().await?;
    let (after, slack) = (cx.settings().quiet * 3, cx.settings().idle / 2);
    let events = cx.events(9, 9);
    // An hour ahead, an hour behind, and right again.
    for (events, (forward, by)) in events.chunks(3).zip([(true, HOUR), (false, HOUR * 2), (true, HOUR)]) {
        let mut book = Book::new(events);
        publish(&publisher, &topic, &events[..2]).await?;
        let got = member.take(2).await?;
        book.record_all(&got)?;
        let retried = Instant::now();
        if capabilities.delay {
            member.settle(&got[1..], Settle::Retry { after: Some(after) }).await?;
        }
        cx.subject.step_clock(forward, by).await?;
        // The other is in hand for as long as it was to be, though it looks older now.
        member.stays_quiet("a step of the clock ended a lease or a delay").await?;
        publish(&publisher, &topic, &events[2..]).await?;
        let last = member.take(1).await?;
        book.record_all(&last)?;
        member.ack(&last).await?;
        if capabilities.delay {
            let again = member.take(1).await?;
            let waited = retried.elapsed();
            ensure!(again[0].offset == got[1].offset, "not the delayed event: {again:?}");
            book.record_all(&again)?;
            ensure!(
                waited + Duration::from_millis(20) >= after && waited <= after + slack,
                "came after {waited:?}, {after:?} was asked"
            );
            member.ack(&again).await?;
        }
        if capabilities.lease > Lease::None {
            let renewed = member.consumer.renew(&[got[0].token], cx.settings().idle * 2).await;
            ensure!(
                capabilities.lease < Lease::Extendable
                    || renewed.is_ok_and(|settled| settled.lost.is_empty()),
                "a step of the clock took a lease"
            );
        }
        member.ack(&got[..1]).await?;
        book.complete()?;
    }
    if let (Some(admin), true) = (transport.admin(), capabilities.replay > Replay::None) {
        let mut n_kept = 0;
        for known in admin.topic(&topic).await?.map(|info| info.partitions).unwrap_or_default() {
            n_kept += admin.read(&topic, known.partition, known.first, 100).await?.len();
        }
        ensure!(
            n_kept == events.len(),
            "{n_kept} of {} events are left after an hour that was none",
            events.len()
        );
    }
    Ok(())
}
