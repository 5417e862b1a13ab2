//! C8–C14, C26: what is handed back, and what is given up.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

use super::check::{ensure, ensure_eq};
use super::cx::{Book, Checked, Cx, fails_as, pass, publish};
use crate::capability::{Ack, Attempts, Lease, Ordering};
use crate::error::ErrorKind;
use crate::transport::Settle;

const AGAIN: Settle = Settle::Retry { after: None };

pub(super) async fn retry_repeats_id_and_counts(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(3, 1);
    s.publish(&events).await?;
    for attempt in 1..=3u32 {
        let got = s.member.take(3).await?;
        Book::new(&events).record_all(&got)?;
        for delivery in &got {
            match s.capabilities.attempts {
                Attempts::Exact => ensure_eq!(delivery.attempt.map(u32::from), Some(attempt), "attempt"),
                Attempts::None => ensure!(
                    delivery.attempt.is_none(),
                    "an attempt without the claim: {:?}",
                    delivery.attempt
                ),
            }
        }
        s.member.settle(&got, if attempt < 3 { AGAIN } else { Settle::Ack }).await?;
    }
    s.member.stays_quiet("after the ack").await
}

pub(super) async fn retry_after_waits(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    if !s.capabilities.delay {
        let subscription = cx.subscription(&s.transport, &s.topic, &s.group).with_delayed_retry();
        return fails_as(
            "delayed retry",
            s.transport.subscribe(&subscription).await,
            &[ErrorKind::Unsupported],
        )
        .map(drop);
    }
    let group = cx.group("delayed")?;
    let subscription = cx
        .subscription(&s.transport, &s.topic, &group)
        .with_delayed_retry()
        .with_ordering(s.capabilities.ordering.min(Ordering::PerKey));
    let mut member = cx.subscribe(&s.transport, &subscription).await?;
    let events = cx.events(2, 2);
    let (after, slack) = (Duration::from_millis(600), cx.settings().idle / 2);
    s.publish(&events[..1]).await?;
    let got = member.take(1).await?;
    // From the call on: storing it may take a while.
    let started = Instant::now();
    member.settle(&got, Settle::Retry { after: Some(after) }).await?;
    s.publish(&events[1..]).await?;
    let other = member.take(1).await?;
    ensure!(started.elapsed() < after, "another event waited for the delayed one");
    Book::new(&events[1..]).record_all(&other)?;
    member.ack(&other).await?;
    member.close().await?;
    // The delay survives its owner.
    let mut next = cx.subscribe(&cx.connect().await?, &subscription).await?;
    let again = next.take(1).await?;
    let waited = started.elapsed();
    Book::new(&events[..1]).record_all(&again)?;
    next.ack(&again).await?;
    ensure!(
        waited >= after - Duration::from_millis(20),
        "came after {waited:?}, not before {after:?} was asked"
    );
    ensure!(waited <= after + slack, "came after {waited:?}, {after:?} was asked");
    Ok(())
}

pub(super) async fn reject_ends_it_for_this_group(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let mut other = cx.join(&s.transport, &s.topic, &cx.group("other")?).await?;
    let events = cx.events(5, 5);
    s.publish(&events).await?;
    let got = s.member.take(5).await?;
    s.member.settle(&got[1..2], Settle::Reject).await?;
    s.member.settle(&got[2..], Settle::Ack).await?;
    s.member.settle(&got[..1], AGAIN).await?;
    let again = s.member.take(1).await?;
    ensure_eq!(again[0].content, got[0].content, "the sibling of a rejected event");
    s.member.ack(&again).await?;
    s.member.close().await?;
    let mut next = cx.join(&s.transport, &s.topic, &s.group).await?;
    next.stays_quiet("a rejected event").await?;
    let mut book = Book::new(&events);
    book.record_all(&other.take(5).await?)?;
    book.exactly_once()
}

pub(super) async fn retry_of_one_leaves_the_batch(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(10, 10);
    s.publish(&events).await?;
    let got = s.member.take(10).await?;
    let outcomes: Vec<_> =
        got.iter().enumerate().map(|(at, d)| (d.token, if at == 2 { AGAIN } else { Settle::Ack })).collect();
    s.member.settle_each(&outcomes).await?;
    let again = s.member.drain().await?;
    let third = got[2].content.envelope().map(|event| event.id().clone());
    let ids: Vec<_> =
        again.iter().map(|delivery| delivery.content.envelope().map(|event| event.id().clone())).collect();
    ensure!(ids.contains(&third), "the retried event never returned");
    if s.capabilities.ack == Ack::Individual {
        ensure_eq!(ids.len(), 1, "events that returned");
    }
    Ok(())
}

pub(super) async fn ack_of_one_is_not_ack_of_the_batch(mut cx: Cx) -> Checked {
    for way in ["close", "drop", "lease"] {
        let s = cx.setup().await?;
        if way == "lease" && s.capabilities.lease == Lease::None {
            continue;
        }
        let (topic, group) = (cx.topic(way)?, cx.group(way)?);
        let mut subscription = cx.subscription(&s.transport, &topic, &group);
        if way == "lease" {
            subscription = subscription.with_lease(cx.settings().lease);
        }
        let mut member = cx.subscribe(&s.transport, &subscription).await?;
        let events = cx.events(20, 20);
        publish(&s.publisher, &topic, &events).await?;
        let got = member.take(20).await?;
        member.ack(&got[..1]).await?;
        let kept;
        match way {
            "close" => member.close().await?,
            "drop" => drop(member),
            _ => {
                kept = member;
                pass(cx.settings().lease + Duration::from_millis(50)).await;
                drop(kept);
            }
        }
        let mut next = cx.join(&s.transport, &topic, &group).await?;
        let again = next.take(19).await?;
        next.ack(&again).await?;
        next.stays_quiet("the settled event").await?;
        let settled = got[0].content.envelope().map(|event| event.id().clone());
        ensure!(
            again
                .iter()
                .all(|delivery| delivery.content.envelope().map(|event| event.id().clone()) != settled),
            "after {way} the settled event returned and another did not"
        );
    }
    Ok(())
}

pub(super) async fn first_failures_are_not_lost(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(100, 10);
    s.publish(&events).await?;
    let mut book = Book::new(&events);
    let mut settled = HashSet::new();
    let mut failures = 0;
    while settled.len() < events.len() {
        for delivery in s.member.poll(8).await? {
            let at = book.record(&delivery)?;
            let fail = failures < 2;
            failures += usize::from(fail);
            s.member.settle(&[delivery], if fail { AGAIN } else { Settle::Ack }).await?;
            if !fail {
                settled.insert(at);
            }
        }
    }
    book.complete()
}

pub(super) async fn survives_many_failures(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let events = cx.events(20, 20);
    s.publish(&events).await?;
    s.member.close().await?;
    for _ in 0..3 {
        let mut failing = cx.join(&s.transport, &s.topic, &s.group).await?;
        let mut failures = 0;
        while failures < cx.size(200, 2_000) {
            let got = failing.poll(20).await?;
            failures += got.len();
            failing.settle(&got, AGAIN).await?;
        }
        failing.close().await?;
    }
    let mut clean = cx.join(&s.transport, &s.topic, &s.group).await?;
    let mut book = Book::new(&events);
    let got = clean.take(20).await?;
    book.record_all(&got)?;
    clean.ack(&got).await?;
    book.exactly_once()
}

pub(super) async fn returned_is_not_an_attempt(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(6, 1);
    s.publish(&events).await?;
    for _ in 0..3 {
        let got = s.member.take(6).await?;
        let mut book = Book::new(&events);
        book.record_all(&got)?;
        if s.capabilities.ordering >= Ordering::PerKey {
            book.in_order(false)?;
        }
        if s.capabilities.attempts == Attempts::Exact {
            let counts: Vec<_> = got.iter().map(|delivery| delivery.attempt.map(u32::from)).collect();
            ensure!(
                counts.iter().all(|count| *count == Some(1)),
                "attempts of events that were returned: {counts:?}"
            );
        }
        // From the last to the first: each returns to its place all the same.
        for delivery in got.iter().rev() {
            s.member.settle(std::slice::from_ref(delivery), Settle::Return).await?;
        }
    }
    let got = s.member.take(6).await?;
    s.member.ack(&got).await
}
