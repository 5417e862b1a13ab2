//! C1–C24: consuming and settling.

use std::collections::HashSet;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::check::{Violation, ensure, ensure_eq};
use super::cx::{Book, Checked, Cx, fails_as, pass, publish, run_members, some};
use crate::capability::{Ack, Attempts, Lease, Ordering};
use crate::error::ErrorKind;
use crate::header::Headers;
use crate::subscription::Subscription;
use crate::transport::{Content, Polled, Settle, Undecodable};

const AGAIN: Settle = Settle::Retry { after: None };

pub(super) async fn poll_never_exceeds_max(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(cx.size(300, 1_000), 20);
    s.publish(&events).await?;
    let mut book = Book::new(&events);
    let mut round = 0;
    while book.n_seen() < events.len() {
        let max = [1, 7, 64][round % 3];
        round += 1;
        let got = s.member.poll(max).await?;
        book.record_all(&got)?;
        s.member.ack(&got).await?;
    }
    book.exactly_once()
}

pub(super) async fn dropped_consumer_loses_nothing(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(30, 10);
    s.publish(&events).await?;
    let got = s.member.take(20).await?;
    drop(s.member);
    let mut next = cx.join(&s.transport, &s.topic, &s.group).await?;
    let mut book = Book::new(&events);
    let all = next.take(30).await?;
    book.record_all(&all)?;
    let before: HashSet<_> = got.iter().map(|delivery| delivery.token).collect();
    ensure!(
        all.iter().all(|delivery| !before.contains(&delivery.token)),
        "a token of the dropped consumer came again"
    );
    next.ack(&all).await?;
    book.exactly_once()
}

pub(super) async fn settled_is_not_redelivered(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let group = cx.group("leased")?;
    let subscription = cx.subscription(&s.transport, &s.topic, &group).with_lease(cx.settings().lease);
    let mut member = cx.subscribe(&s.transport, &subscription).await?;
    let events = cx.events(100, 10);
    s.publish(&events).await?;
    let got = member.take(100).await?;
    member.ack(&got).await?;
    let twice = cx.settings().lease * 2;
    ensure!(member.poll_within(1, twice).await?.is_none(), "a settled event came again within two leases");
    member.close().await?;
    let mut next = cx.subscribe(&s.transport, &subscription).await?;
    ensure!(next.poll_within(1, twice).await?.is_none(), "a settled event came again after reopen");
    Ok(())
}

pub(super) async fn cancelled_poll_strands_nothing(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let events = cx.events(cx.size(300, 1_000), 10);
    let (publisher, topic, batch) = (s.publisher.clone(), s.topic.clone(), events.clone());
    let publishing = tokio::spawn(async move {
        for (at, event) in batch.into_iter().enumerate() {
            publisher.enqueue(&topic, vec![event]).await?.await.single()?;
            // In bursts with pauses, so that polls wait, and can be cancelled, however fast the store is.
            if at % 16 == 15 {
                pass(Duration::from_millis(3)).await;
            }
            tokio::task::yield_now().await;
        }
        Ok::<_, crate::Error>(())
    });
    let mut book = Book::new(&events);
    let (mut n_cancelled, mut last_progress) = (0, Instant::now());
    while book.n_seen() < events.len() {
        ensure!(
            last_progress.elapsed() < cx.settings().idle,
            "{} of {} after cancelled polls",
            book.n_seen(),
            events.len()
        );
        // Polled a few times, then dropped: at every await point in the end. Now and then one has the time
        // that a slow machine needs, so that cancelling is the subject and not a race against the store.
        let polls = cx.random.usize(1..4);
        let patient = cx.random.usize(0..4) == 0;
        let mut polling = s.member.consumer.poll(some(8));
        let mut ready = None;
        for _ in 0..polls {
            let polled =
                std::future::poll_fn(|task| std::task::Poll::Ready(polling.as_mut().poll(task))).await;
            if let std::task::Poll::Ready(polled) = polled {
                ready = Some(polled?);
                break;
            }
            tokio::task::yield_now().await;
        }
        if patient && ready.is_none() {
            ready = tokio::time::timeout(Duration::from_millis(100), polling).await.ok().transpose()?;
        }
        match ready {
            Some(Polled::Deliveries(got)) => {
                last_progress = Instant::now();
                book.record_all(&got)?;
                let outcomes: Vec<_> = got.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
                s.member.consumer.settle(&outcomes).await?.all()?;
            }
            Some(_) => {}
            None => {
                n_cancelled += 1;
                pass(Duration::from_millis(1)).await;
            }
        }
    }
    publishing.await.map_err(|panic| Violation::new(panic.to_string()))??;
    ensure!(n_cancelled > 0, "no poll was cancelled: the case proved nothing");
    book.exactly_once()
}

pub(super) async fn settle_is_idempotent(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(10, 10);
    s.publish(&events).await?;
    let got = s.member.take(10).await?;
    let twice = [(got[0].token, Settle::Ack), (got[0].token, Settle::Ack), (got[1].token, Settle::Ack)];
    s.member.settle_each(&twice).await?;
    s.member.settle_each(&twice).await?;
    s.member.close().await?;
    let mut next = cx.join(&s.transport, &s.topic, &s.group).await?;
    let rest = next.take(8).await?;
    let mut book = Book::new(&events);
    book.record_all(&rest)?;
    next.ack(&rest).await?;
    next.stays_quiet("after the eight unsettled events").await?;
    let settled = got[..2].iter().filter_map(|delivery| delivery.content.envelope());
    for event in settled {
        ensure!(
            !rest.iter().any(|delivery| delivery.content.envelope().is_some_and(|e| e.id() == event.id())),
            "a settled event returned"
        );
    }
    Ok(())
}

pub(super) async fn settle_runs_beside_a_pending_poll(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    s.publish(&cx.events(1, 1)).await?;
    let got = s.member.take(1).await?;
    let consumer = s.member.consumer.clone();
    let mut pending = tokio::spawn(async move {
        loop {
            match consumer.poll(some(1)).await {
                Ok(Polled::Deliveries(deliveries)) => return Ok(deliveries.len()),
                Ok(_) => {}
                Err(error) => return Err(error),
            }
        }
    });
    let waits = tokio::time::timeout(cx.settings().quiet, &mut pending).await;
    ensure!(waits.is_err(), "a poll of an empty topic returned {waits:?}");
    let outcome = tokio::time::timeout(
        Duration::from_secs(1),
        s.member.consumer.settle(&[(got[0].token, Settle::Ack)]),
    )
    .await;
    let settled = outcome.map_err(|_| Violation::new("settle waited for the poll"))?;
    settled?.all()?;
    ensure!(!pending.is_finished(), "the settle ended the poll");
    s.publish(&cx.events(1, 1)).await?;
    let n = cx
        .within("the pending poll", pending)
        .await?
        .map_err(|panic| Violation::new(panic.to_string()))??;
    ensure_eq!(n, 1, "deliveries of the pending poll");
    Ok(())
}

pub(super) async fn out_of_order_settles_keep_gaps(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(200, 200);
    s.publish(&events).await?;
    let mut got = s.member.take(200).await?;
    cx.random.shuffle(&mut got);
    let n_settled = cx.random.usize(60..140);
    for part in got[..n_settled].chunks(7) {
        s.member.ack(part).await?;
    }
    s.member.close().await?;
    let mut next = cx.join(&cx.connect().await?, &s.topic, &s.group).await?;
    let expected: Vec<_> =
        got[n_settled..].iter().filter_map(|delivery| delivery.content.envelope().cloned()).collect();
    let mut seen = HashSet::new();
    while let Some(again) = next.poll_within(64, cx.settings().quiet).await? {
        seen.extend(
            again.iter().filter_map(|delivery| delivery.content.envelope().map(|event| event.id().clone())),
        );
        next.ack(&again).await?;
    }
    let lost = expected.iter().filter(|event| !seen.contains(event.id())).count();
    ensure_eq!(lost, 0, "unsettled events that never returned, of {}", expected.len());
    if s.capabilities.ack == Ack::Individual {
        ensure_eq!(seen.len(), expected.len(), "events that returned");
    }
    Ok(())
}

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
    member.settle(&got, Settle::Retry { after: Some(after) }).await?;
    let started = Instant::now();
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

pub(super) async fn expired_lease_redelivers(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let lease = cx.settings().lease;
    let group = cx.group("leased")?;
    let mut member = cx
        .subscribe(&s.transport, &cx.subscription(&s.transport, &s.topic, &group).with_lease(lease))
        .await?;
    s.publish(&cx.events(1, 1)).await?;
    let got = member.take(1).await?;
    if s.capabilities.lease == Lease::None {
        ensure!(got[0].lease_until.is_none(), "a lease without the claim");
        ensure!(member.poll_within(1, lease * 2).await?.is_none(), "it returned while its consumer lives");
        return Ok(());
    }
    ensure!(got[0].lease_until.is_some(), "no lease on a delivery of a transport that claims one");
    let again = member.poll(1).await?;
    ensure_eq!(again[0].content, got[0].content, "the event whose lease ended");
    let late = member.consumer.settle(&[(got[0].token, Settle::Ack)]).await?;
    ensure_eq!(late.lost, [got[0].token], "tokens lost by a settle after the lease");
    let third = member.poll_within(1, lease * 3).await?;
    ensure!(third.is_some(), "the late settle of the old token settled the new delivery");
    member.ack(&third.unwrap_or_default()).await
}

pub(super) async fn renewed_lease_holds(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let lease = cx.settings().lease;
    let group = cx.group("leased")?;
    let mut member = cx
        .subscribe(&s.transport, &cx.subscription(&s.transport, &s.topic, &group).with_lease(lease))
        .await?;
    s.publish(&cx.events(1, 1)).await?;
    let got = member.take(1).await?;
    if s.capabilities.lease < Lease::Extendable {
        let refused = member.consumer.renew(&[got[0].token], lease).await;
        return fails_as("renew", refused, &[ErrorKind::Unsupported]).map(drop);
    }
    let end = Instant::now() + lease * 3;
    while Instant::now() < end {
        member.consumer.renew(&[got[0].token], lease).await?.all()?;
        ensure!(member.poll_within(1, lease / 3).await?.is_none(), "a renewed delivery came again");
    }
    member.ack(&got).await
}

pub(super) async fn old_token_never_hits_a_new_delivery(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(10, 10);
    s.publish(&events).await?;
    let old = s.member.take(10).await?;
    s.member.close().await?;
    let fresh = cx.connect().await?;
    let mut next = cx.join(&fresh, &s.topic, &s.group).await?;
    let new = next.take(10).await?;
    let tokens: Vec<_> = old.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
    let settled = next.consumer.settle(&tokens).await?;
    ensure_eq!(settled.lost.len(), 10, "old tokens that were refused");
    drop(new);
    drop(next);
    let mut last = cx.join(&fresh, &s.topic, &s.group).await?;
    let mut book = Book::new(&events);
    book.record_all(&last.take(10).await?)?;
    book.exactly_once()
}

pub(super) async fn settle_after_close_is_an_error(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(1, 1);
    s.publish(&events).await?;
    let got = s.member.take(1).await?;
    let consumer = s.member.consumer.clone();
    s.member.close().await?;
    fails_as(
        "settle after close",
        consumer.settle(&[(got[0].token, Settle::Ack)]).await,
        &[ErrorKind::Closed],
    )?;
    let mut next = cx.join(&s.transport, &s.topic, &s.group).await?;
    Book::new(&events).record_all(&next.take(1).await?)
}

pub(super) async fn in_flight_is_bounded(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let group = cx.group("bounded")?;
    let (window, bytes) = (50, 64 * 1024);
    let base = cx.subscription(&s.transport, &s.topic, &group);
    let mut member = cx.subscribe(&s.transport, &base.clone().with_window(some(window))).await?;
    let events = cx.events(window * 3, 20);
    s.publish(&events).await?;
    let mut held = Vec::new();
    while let Some(got) = member.poll_within(window * 2, cx.settings().quiet).await? {
        held.extend(got);
        ensure!(held.len() <= window, "{} in hand, the window is {window}", held.len());
    }
    ensure_eq!(held.len(), window, "the window is used");
    member.ack(&held[..10]).await?;
    let more = member.poll(window).await?;
    ensure!(more.len() <= 10, "10 were settled, {} came", more.len());
    if s.capabilities.delay {
        // A full window waits quietly also when a delayed event is due: on a paused clock, a poll that
        // turns round and round never lets the time of the quiet period pass.
        let after = Duration::from_millis(20);
        member.settle(&held[10..11], Settle::Retry { after: Some(after) }).await?;
        let refill = member.poll_within(window, after / 2).await?.unwrap_or_default();
        ensure!(refill.len() <= 10, "the window was exceeded: {}", refill.len());
        let mut n_back = 0;
        while let Some(got) = member.poll_within(window, cx.settings().quiet).await? {
            n_back += got.len();
            ensure!(n_back <= 10, "{n_back} came into a full window");
        }
    }
    member.close().await?;
    // The same by bytes: one event above the bound still goes out, a second does not.
    let topic = cx.topic("bytes")?;
    let by_bytes = Subscription { topic: topic.clone(), ..base }.with_window_bytes(some(bytes));
    let mut member = cx.subscribe(&s.transport, &by_bytes).await?;
    let big: Vec<_> =
        cx.events(40, 20).into_iter().map(|event| event.with_payload(vec![1u8; 8 * 1024])).collect();
    publish(&s.publisher, &topic, &big).await?;
    let mut n_held = 0;
    while let Some(got) = member.poll_within(64, cx.settings().quiet).await? {
        n_held += got.len();
        ensure!(
            n_held <= bytes / (8 * 1024) + 1,
            "{n_held} events of 8 KiB in hand, the bound is {bytes} bytes"
        );
    }
    Ok(())
}

pub(super) async fn close_ends_poll_and_is_idempotent(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(1, 1);
    s.publish(&events).await?;
    let got = s.member.take(1).await?;
    let (consumer, waiting) = (s.member.consumer.clone(), s.member.consumer.clone());
    let pending = tokio::spawn(async move {
        loop {
            match waiting.poll(some(1)).await {
                Ok(Polled::Closed) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Closed => return Ok(()),
                Ok(Polled::Deliveries(_)) => return Err("a delivery"),
                Ok(_) => {}
                Err(_) => return Err("an error"),
            }
        }
    });
    pass(Duration::from_millis(50)).await;
    let deadline = (Instant::now() + cx.settings().idle).into_std();
    let outcome = [(got[0].token, Settle::Ack)];
    let (settled, closed) = tokio::join!(biased; consumer.settle(&outcome), consumer.close(deadline));
    settled?.all()?;
    closed?;
    consumer.close(deadline).await?;
    let ended = cx
        .within("the pending poll after close", pending)
        .await?
        .map_err(|panic| Violation::new(panic.to_string()))?;
    ensure!(ended.is_ok(), "the pending poll returned {ended:?}");
    let mut next = cx.join(&s.transport, &s.topic, &s.group).await?;
    next.stays_quiet("an event whose settle was in progress").await
}

pub(super) async fn concurrent_close_is_clean(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    s.member.close().await?;
    let events = cx.events(50, 10);
    s.publish(&events).await?;
    let mut tasks = Vec::new();
    for _ in 0..10 {
        let (transport, subscription) =
            (s.transport.clone(), cx.subscription(&s.transport, &s.topic, &s.group));
        let idle = cx.settings().idle;
        tasks.push(tokio::spawn(async move {
            let consumer = transport.subscribe(&subscription).await?;
            drop(tokio::time::timeout(Duration::from_millis(5), consumer.poll(some(5))).await);
            consumer.close((Instant::now() + idle).into_std()).await
        }));
    }
    for task in tasks {
        cx.within("a concurrent close", task).await?.map_err(|panic| Violation::new(panic.to_string()))??;
    }
    let mut members = [cx.join(&s.transport, &s.topic, &s.group).await?];
    let mut book = Book::new(&events);
    run_members(&cx, &mut members, &mut book, |_, _| {}).await?;
    book.exactly_once()
}

pub(super) async fn reopen_rounds_lose_nothing(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    s.member.close().await?;
    let events = cx.events(cx.size(200, 5_000), 40);
    s.publish(&events).await?;
    let mut book = Book::new(&events);
    for round in 0..cx.size(10, 20) {
        let transport = if round % 3 == 0 { cx.connect().await? } else { s.transport.clone() };
        let mut member = cx.join(&transport, &s.topic, &s.group).await?;
        if let Some(got) = member.poll_within(events.len() / 10, cx.settings().quiet).await? {
            let mut settled: Vec<_> = got.into_iter().filter(|_| cx.random.bool()).collect();
            cx.random.shuffle(&mut settled);
            member.ack(&settled).await?;
            book.record_all(&settled)?;
        }
        member.close().await?;
    }
    let mut last = [cx.join(&s.transport, &s.topic, &s.group).await?];
    run_members(&cx, &mut last, &mut book, |_, _| {}).await?;
    book.complete()
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

pub(super) async fn garbage_is_a_delivery(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let (before, after) = (cx.events(3, 3), cx.events(3, 3));
    s.publish(&before).await?;
    let mut noise = vec![0u8; 300];
    cx.random.fill(&mut noise);
    let garbage = [
        (Some(Bytes::from_static(b"no envelope at all")), Headers::new()),
        (Some(Bytes::new()), Headers::new().with("ce_id", "").with("ce_id", "again")),
        (Some(Bytes::from(noise)), Headers::new().with("ce_type", [0xff, 0xfe])),
        (None, Headers::new().with("ce_specversion", "9.9")),
    ];
    for (raw, headers) in &garbage {
        let bad = Undecodable::new(raw.clone(), headers.clone(), "the suite put it there");
        cx.subject.raw(&s.topic, bad).await?;
    }
    s.publish(&after).await?;
    let sent: Vec<_> = before.into_iter().chain(after).collect();
    let (mut book, mut found) = (Book::new(&sent), Vec::new());
    while book.n_seen() < sent.len() || found.len() < garbage.len() {
        for delivery in s.member.poll(16).await? {
            match &delivery.content {
                Content::Undecodable(bad) => {
                    ensure!(!bad.reason.is_empty(), "undecodable without a reason");
                    found.push(bad.raw.clone());
                }
                Content::Envelope(_) => drop(book.record(&delivery)?),
            }
            s.member.ack(&[delivery]).await?;
        }
    }
    book.exactly_once()?;
    for (raw, _) in &garbage {
        ensure!(found.contains(raw), "raw bytes were lost: {raw:?} is not in {found:?}");
    }
    s.member.stays_quiet("garbage in a loop").await
}

pub(super) async fn deleted_topic_is_an_error(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let Some(admin) = s.transport.admin() else {
        ensure!(!s.capabilities.admin, "admin is claimed and absent");
        return Ok(());
    };
    let events = cx.events(2, 1);
    s.publish(&events).await?;
    let got = s.member.take(2).await?;
    s.member.ack(&got).await?;
    admin.delete_topic(&s.topic).await?;
    let end = Instant::now() + cx.settings().idle;
    loop {
        match tokio::time::timeout_at(end, s.member.consumer.poll(some(4))).await {
            Err(_) => return Err(Violation::new("a consumer of a deleted topic waits for ever")),
            Ok(Err(error)) => {
                ensure!(
                    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Closed),
                    "deleted topic: {error}"
                );
                break;
            }
            Ok(Ok(Polled::Closed)) => break,
            Ok(Ok(Polled::Deliveries(ghosts))) => {
                return Err(Violation::new(format!("{} ghost events", ghosts.len())));
            }
            Ok(Ok(_)) => {}
        }
    }
    ensure!(admin.topic(&s.topic).await?.is_none(), "the topic is still listed");
    Ok(())
}
