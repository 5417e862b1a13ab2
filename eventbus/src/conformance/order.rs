//! O1–O7: order.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use super::check::{Violation, ensure, ensure_eq};
use super::cx::{Book, Checked, Cx, Member, fails_as, partitions, publish, run_members};
use crate::capability::{Members, Ordering};
use crate::error::ErrorKind;
use crate::transport::Settle;

/// An order that is not claimed must be refused; true if the case goes on.
async fn claims(cx: &Cx, order: Ordering) -> Checked<bool> {
    let transport = cx.connect().await?;
    if transport.capabilities().ordering >= order {
        return Ok(true);
    }
    let subscription = cx.subscription(&transport, &cx.topic("t")?, &cx.group("g")?).with_ordering(order);
    fails_as(
        "an order that is not claimed",
        transport.subscribe(&subscription).await.map(drop),
        &[ErrorKind::Unsupported],
    )?;
    Ok(false)
}

pub(super) async fn per_key_order(mut cx: Cx) -> Checked {
    if !claims(&cx, Ordering::PerKey).await? {
        return Ok(());
    }
    let s = cx.setup().await?;
    let mut members = vec![s.member];
    let n_members = if s.capabilities.order_members == Members::Many { 10 } else { 1 };
    for _ in 1..n_members {
        members.push(cx.join(&s.transport, &s.topic, &s.group).await?);
    }
    let events = cx.events(cx.size(800, 4_000), 200);
    let mut book = Book::new(&events);
    for part in events.chunks(100) {
        publish(&s.publisher, &s.topic, part).await?;
    }
    let mut used = HashSet::new();
    run_members(&cx, &mut members, &mut book, |_, delivery| {
        used.insert(delivery.partition);
    })
    .await?;
    ensure!(
        used.len() > 1 || s.capabilities.ordering == Ordering::PerTopic,
        "all keys fell into one partition: nothing was proven"
    );
    book.in_order(false)?;
    book.exactly_once()
}

pub(super) async fn per_topic_order(mut cx: Cx) -> Checked {
    if !claims(&cx, Ordering::PerTopic).await? {
        return Ok(());
    }
    let mut s = cx.setup().await?;
    let events = cx.events(cx.size(300, 2_000), 50);
    s.publish(&events).await?;
    let mut book = Book::new(&events);
    while book.n_seen() < events.len() {
        let got = s.member.poll(cx.random.usize(1..20)).await?;
        book.record_all(&got)?;
        s.member.ack(&got).await?;
    }
    book.in_order(true)?;
    book.exactly_once()
}

pub(super) async fn retry_comes_before_later_events_of_its_key(mut cx: Cx) -> Checked {
    if !claims(&cx, Ordering::PerKey).await? {
        return Ok(());
    }
    let s = cx.setup().await?;
    let (topic, group) = (cx.topic("retry")?, cx.group("retry")?);
    let subscription = cx.subscription(&s.transport, &topic, &group).with_ordering(Ordering::PerKey);
    let mut member = cx.subscribe(&s.transport, &subscription).await?;
    let events: Vec<_> = cx
        .events(12, 1)
        .into_iter()
        .enumerate()
        .map(|(at, event)| event.with_key(if at % 4 == 3 { "other" } else { "key" }))
        .collect();
    publish(&s.publisher, &topic, &events).await?;
    // One event of the failing key at a time, so that its followers are not handed out yet.
    let mut order = Vec::new();
    let mut failed_once = false;
    let mut book = Book::new(&events);
    let mut failed = None;
    while book.n_seen() < events.len() || order.len() < events.len() {
        let got = member.poll(1).await?;
        let at = book.record(&got[0])?;
        let fails = !failed_once && at % 4 != 3 && at > 0;
        if fails {
            failed_once = true;
            failed = Some(at);
            member.settle(&got, Settle::Retry { after: None }).await?;
        } else {
            order.push(at);
            member.ack(&got).await?;
        }
    }
    ensure!(failed.is_some(), "nothing failed: the case proved nothing");
    for key in [true, false] {
        let of_key: Vec<_> = order.iter().filter(|at| (*at % 4 == 3) == key).collect();
        ensure!(
            of_key.is_sorted(),
            "event {failed:?} was retried and handled after later events of its key: {order:?}"
        );
    }
    // With a delay, other keys go on in the meantime.
    if s.capabilities.delay {
        let topic = cx.topic("delayed")?;
        let subscription = crate::Subscription { topic: topic.clone(), ..subscription }.with_delayed_retry();
        let mut member = cx.subscribe(&s.transport, &subscription).await?;
        publish(&s.publisher, &topic, &events).await?;
        let mut order = Vec::new();
        let mut book = Book::new(&events);
        let delay = Duration::from_millis(500);
        let mut failed_at = None;
        while order.len() < events.len() {
            let got = member.poll(1).await?;
            let at = book.record(&got[0])?;
            if at == 0 && failed_at.is_none() {
                failed_at = Some(Instant::now());
                member.settle(&got, Settle::Retry { after: Some(delay) }).await?;
                continue;
            }
            if at % 4 == 3 && s.capabilities.ordering == Ordering::PerKey {
                ensure!(
                    failed_at.is_none_or(|failed| failed.elapsed() < delay),
                    "another key waited for the delayed one"
                );
            }
            order.push(at);
            member.ack(&got).await?;
        }
        let of_key: Vec<_> = order.iter().filter(|at| **at % 4 != 3).collect();
        ensure!(of_key.is_sorted(), "later events of a delayed key overtook it: {order:?}");
    }
    Ok(())
}

pub(super) async fn order_survives_churn(mut cx: Cx) -> Checked {
    if !claims(&cx, Ordering::PerKey).await? {
        return Ok(());
    }
    let s = cx.setup().await?;
    s.member.close().await?;
    let events = cx.events(cx.size(500, 3_000), 25);
    s.publish(&events).await?;
    let mut book = Book::new(&events);
    let subscription = cx.subscription(&s.transport, &s.topic, &s.group).with_lease(cx.settings().lease * 4);
    let mut members: Vec<Member> = vec![cx.subscribe(&s.transport, &subscription).await?];
    let (mut rounds, mut n_leaves) = (0, 0);
    while book.n_seen() < events.len() {
        rounds += 1;
        ensure!(rounds < 20_000, "no progress under churn: {} of {}", book.n_seen(), events.len());
        if cx.random.u8(..3) == 0 && members.len() < 4 {
            members.push(cx.subscribe(&s.transport, &subscription).await?);
        }
        if cx.random.u8(..5) == 0 && members.len() > 1 {
            n_leaves += 1;
            let leaver = members.swap_remove(cx.random.usize(..members.len()));
            if cx.random.bool() {
                leaver.close().await?;
            }
        }
        for member in &mut members {
            let Some(got) = member.poll_within(4, Duration::from_millis(5)).await? else { continue };
            book.record_all(&got)?;
            // Handled in order: a prefix is settled, the rest waits for the next round or a leave.
            let done = cx.random.usize(..=got.len());
            member.ack(&got[..done]).await?;
            if cx.random.u8(..4) == 0 {
                member.ack(&got[done..]).await?;
            }
        }
    }
    ensure!(n_leaves > 0, "nobody left: the case proved nothing");
    book.in_order(false)
}

pub(super) async fn a_key_has_one_owner(mut cx: Cx) -> Checked {
    if !claims(&cx, Ordering::PerKey).await? {
        return Ok(());
    }
    let mut s = cx.setup().await?;
    let events = cx.events(40, 8);
    let (first, later) = events.split_at(16);
    s.publish(first).await?;
    let held = s.member.take(16).await?;
    let mut peer = cx.join(&s.transport, &s.topic, &s.group).await?;
    // The old member learns that partitions are to move; it holds events of all of them.
    ensure!(s.member.poll_within(16, Duration::from_millis(50)).await?.is_none(), "an event from nowhere");
    s.publish(later).await?;
    // Everything of the old member is unsettled: the peer may get only keys of other partitions.
    let busy = partitions(&held);
    let held_keys: HashSet<_> = held.iter().filter_map(|d| d.content.envelope()?.key().cloned()).collect();
    if let Some(got) = peer.poll_within(64, cx.settings().quiet).await? {
        for delivery in &got {
            let key = delivery.content.envelope().and_then(|event| event.key().cloned());
            ensure!(
                key.is_none_or(|key| !held_keys.contains(&key)),
                "the peer got a later event of a key that is unsettled elsewhere (partition {}, busy {busy:?})",
                delivery.partition
            );
        }
        peer.ack(&got).await?;
    }
    s.member.ack(&held).await?;
    let started = Instant::now();
    let mut book = Book::new(later);
    let mut members = [s.member, peer];
    run_members(&cx, &mut members, &mut book, |_, _| {}).await?;
    ensure!(
        started.elapsed() < cx.settings().idle,
        "the next events of the keys came only after {:?}",
        started.elapsed()
    );
    book.in_order(false)
}

pub(super) async fn order_member_limit_is_true(mut cx: Cx) -> Checked {
    if !claims(&cx, Ordering::PerKey).await? {
        return Ok(());
    }
    let s = cx.setup().await?;
    let claims_many = s.capabilities.order_members == Members::Many;
    let mut members = vec![s.member, cx.join(&s.transport, &s.topic, &s.group).await?];
    cx.share_out(if claims_many { &mut members } else { &mut members[..1] }).await?;
    let events = cx.events(cx.size(200, 1_000), 50);
    publish(&s.publisher, &s.topic, &events[..100]).await?;
    let mut book = Book::new(&events[..100]);
    let mut busy = HashSet::new();
    run_members(&cx, &mut members, &mut book, |at, _| {
        busy.insert(at);
    })
    .await?;
    if claims_many {
        ensure_eq!(busy.len(), 2, "members that were busy");
    } else {
        ensure_eq!(busy.len(), 1, "active members of an ordered group");
    }
    book.in_order(false)?;
    // The one that stays takes over.
    let worker = *busy.iter().next().unwrap_or(&0);
    members.swap_remove(worker).close().await?;
    publish(&s.publisher, &s.topic, &events[100..]).await?;
    let mut book = Book::new(&events[100..]);
    run_members(&cx, &mut members, &mut book, |_, _| {}).await?;
    book.exactly_once()?;
    book.in_order(false)
}

pub(super) async fn same_key_same_partition(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let n_keys = 30;
    let mut place = HashMap::new();
    for round in 0..3 {
        let transport = if round == 2 { cx.connect().await? } else { s.transport.clone() };
        let publisher = transport.publisher().await?;
        let events = cx.events(n_keys, n_keys);
        let receipts = publish(&publisher, &s.topic, &events).await?;
        for (event, receipt) in events.iter().zip(receipts) {
            let key = event.key().cloned().ok_or_else(|| Violation::new("the suite lost a key"))?;
            let before = place.insert(key.clone(), receipt.partition);
            ensure!(
                before.is_none_or(|before| before == receipt.partition),
                "key {key} moved from {before:?} to {}",
                receipt.partition
            );
        }
    }
    if let Some(admin) = s.transport.admin() {
        for (key, partition) in &place {
            ensure_eq!(admin.partition_of(&s.topic, key).await?, *partition, "partition of key {key}");
        }
        let n = admin.topic(&s.topic).await?.map_or(1, |info| info.partitions.len() as u32);
        for (key, partition) in &place {
            ensure_eq!(
                crate::partition::of_key(key, n),
                *partition,
                "murmur2 partition of key {key} among {n}"
            );
        }
    }
    Ok(())
}
