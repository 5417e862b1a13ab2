//! S1–S11: groups and subscriptions.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use super::check::{Violation, ensure, ensure_eq};
use super::cx::{Book, Checked, Cx, Member, fails_as, publish, run_members};
use crate::capability::{Members, Ordering, Replay};
use crate::error::ErrorKind;
use crate::subscription::{Start, Subscription};
use crate::transport::{Delivery, Transport};

pub(super) async fn two_groups_each_get_everything(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let mut other = cx.join(&s.transport, &s.topic, &cx.group("other")?).await?;
    let events = cx.events(50, 6);
    s.publish(&events).await?;
    for member in [&mut s.member, &mut other] {
        let mut book = Book::new(&events);
        let got = member.take(events.len()).await?;
        book.record_all(&got)?;
        member.ack(&got).await?;
        member.stays_quiet("after everything").await?;
        book.exactly_once()?;
    }
    Ok(())
}

pub(super) async fn members_share_the_work(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let mut members = vec![s.member];
    for _ in 1..4 {
        members.push(cx.join(&s.transport, &s.topic, &s.group).await?);
    }
    // Let the partitions settle on their owners before there is work.
    cx.share_out(&mut members).await?;
    let events = cx.events(cx.size(400, 1_000), 97);
    publish(&s.publisher, &s.topic, &events).await?;
    let mut book = Book::new(&events);
    let mut busy = HashSet::new();
    run_members(&cx, &mut members, &mut book, |at, _| {
        busy.insert(at);
    })
    .await?;
    for member in &mut members {
        member.stays_quiet("an event at a second member").await?;
    }
    book.exactly_once()?;
    let may_share =
        s.capabilities.ordering == Ordering::None || s.capabilities.order_members == Members::Many;
    ensure!(busy.len() >= 2 || !may_share, "only {} member was busy", busy.len());
    Ok(())
}

pub(super) async fn group_position_survives_reopen(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(40, 8);
    s.publish(&events).await?;
    let mut book = Book::new(&events);
    let half = s.member.take(20).await?;
    book.record_all(&half)?;
    s.member.ack(&half).await?;
    s.member.close().await?;
    s.transport.close().await?;
    let fresh = cx.connect().await?;
    let mut member = cx.join(&fresh, &s.topic, &s.group).await?;
    let rest = member.take(20).await?;
    book.record_all(&rest)?;
    member.ack(&rest).await?;
    member.stays_quiet("a settled event came again").await?;
    book.exactly_once()
}

pub(super) async fn membership_churn_loses_nothing(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let events = cx.events(cx.size(600, 5_000), 50);
    s.publish(&events).await?;
    let mut book = Book::new(&events);
    // Each member with what it took and has not settled; the book counts what was settled.
    let mut members: Vec<(Member, Vec<Delivery>)> = vec![(s.member, Vec::new())];
    let (mut rounds, mut n_handed_over) = (0, 0);
    while book.n_seen() < events.len() {
        rounds += 1;
        ensure!(rounds < 20_000, "no progress under churn: {} of {}", book.n_seen(), events.len());
        if rounds % 4 == 0 && members.len() < 4 {
            members.push((cx.join(&s.transport, &s.topic, &s.group).await?, Vec::new()));
        }
        if rounds % 7 == 0 && members.len() > 1 {
            let holds = members.iter().position(|(_, in_hand)| !in_hand.is_empty());
            let (leaver, in_hand) =
                members.swap_remove(holds.unwrap_or_else(|| cx.random.usize(..members.len())));
            n_handed_over += in_hand.len();
            // Some say goodbye, some just go.
            if rounds % 2 == 0 {
                leaver.close().await?;
            }
        }
        for (member, in_hand) in &mut members {
            in_hand.extend(member.poll_within(16, Duration::from_millis(5)).await?.unwrap_or_default());
            let settled: Vec<_> = in_hand.drain(..in_hand.len().div_ceil(2)).collect();
            member.ack(&settled).await?;
            book.record_all(&settled)?;
        }
    }
    ensure!(n_handed_over > 0, "nobody left with events in hand: the case proved nothing");
    book.exactly_once()
}

pub(super) async fn leaver_hands_over_unsettled(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(20, 20);
    s.publish(&events).await?;
    let got = s.member.take(20).await?;
    let (settled, unsettled) = got.split_at(10);
    s.member.ack(settled).await?;
    let mut peer = cx.join(&s.transport, &s.topic, &s.group).await?;
    s.member.close().await?;
    let expected: Vec<_> =
        unsettled.iter().filter_map(|delivery| delivery.content.envelope().cloned()).collect();
    let mut book = Book::new(&expected);
    let again = peer.take(10).await?;
    book.record_all(&again)?;
    peer.ack(&again).await?;
    peer.stays_quiet("a settled event of the leaver").await?;
    book.exactly_once()
}

pub(super) async fn topics_do_not_cross(mut cx: Cx) -> Checked {
    let transport = cx.connect().await?;
    let (n_topics, each) = (cx.size(8, 20), cx.size(25, 100));
    let group = cx.group("same")?;
    let publisher = transport.publisher().await?;
    let mut topics = Vec::new();
    for at in 0..n_topics {
        // Each name is a prefix of the next.
        let topic = cx.topic(&format!("t{}", ".x".repeat(at)))?;
        let member = cx.join(&transport, &topic, &group).await?;
        topics.push((topic, member, cx.events(each, 5)));
    }
    for (topic, _, events) in &topics {
        publish(&publisher, topic, events).await?;
    }
    for (_, member, events) in &mut topics {
        let mut book = Book::new(events);
        let got = member.take(each).await?;
        book.record_all(&got)?;
        member.ack(&got).await?;
        book.exactly_once()?;
    }
    for (_, member, _) in &mut topics {
        member.stays_quiet("an event of another topic").await?;
    }
    Ok(())
}

pub(super) async fn start_position_is_honoured(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let (old, new) = (cx.events(12, 3), cx.events(6, 3));
    s.publish(&old).await?;
    let of = |group, start| cx.subscription(&s.transport, &s.topic, &group).with_start(start);
    let mut latest = cx.subscribe(&s.transport, &of(cx.group("latest")?, Start::Latest)).await?;
    let mut earliest = None;
    if s.capabilities.replay >= Replay::Offset {
        earliest = Some(cx.subscribe(&s.transport, &of(cx.group("earliest")?, Start::Earliest)).await?);
    }
    s.publish(&new).await?;
    let mut book = Book::new(&new);
    let got = latest.take(new.len()).await?;
    book.record_all(&got)?;
    latest.ack(&got[..3]).await?;
    latest.close().await?;
    if let Some(mut earliest) = earliest {
        let all: Vec<_> = old.iter().chain(&new).cloned().collect();
        let mut book = Book::new(&all);
        let got = earliest.take(all.len()).await?;
        book.record_all(&got)?;
        earliest.ack(&got).await?;
        book.exactly_once()?;
        // The group exists now: another start changes nothing.
        let mut again = cx.subscribe(&s.transport, &of(cx.group("latest")?, Start::Earliest)).await?;
        let rest = again.take(3).await?;
        Book::new(&new).record_all(&rest)?;
        again.ack(&rest).await?;
        again.stays_quiet("an existing group started over").await?;
    } else {
        let mut again = cx.subscribe(&s.transport, &of(cx.group("latest")?, Start::Latest)).await?;
        Book::new(&new).record_all(&again.take(3).await?)?;
    }
    Ok(())
}

pub(super) async fn subscribe_returns_ready(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    for round in 0..cx.size(20, 200) {
        let topic = cx.topic(&format!("r{round}"))?;
        let mut member = cx.join(&s.transport, &topic, &cx.group("g")?).await?;
        let events = cx.events(1, 1);
        publish(&s.publisher, &topic, &events).await?;
        let got = member.take(1).await?;
        Book::new(&events).record_all(&got)?;
        member.ack(&got).await?;
        member.close().await?;
    }
    Ok(())
}

pub(super) async fn dropped_subscribe_leaves_no_member(mut cx: Cx) -> Checked {
    let transport = cx.connect().await?;
    let (topic, group) = (cx.topic("dropped")?, cx.group("g")?);
    cx.join(&transport, &topic, &group).await?.close().await?;
    for round in 0..cx.size(12, 60) {
        let subscription = cx.subscription(&transport, &topic, &group);
        let mut joining = transport.subscribe(&subscription);
        // Dropped after more and more of its way.
        for step in 0..=round % 6 {
            if step > 0 {
                tokio::task::yield_now().await;
            }
            let polled =
                std::future::poll_fn(|task| std::task::Poll::Ready(joining.as_mut().poll(task))).await;
            if polled.is_ready() {
                break;
            }
        }
    }
    // A member that nobody has would keep its partitions for a session.
    let mut member = cx.join(&transport, &topic, &group).await?;
    member.idle = cx.settings().quiet * 5;
    let events = cx.events(60, 60);
    publish(&transport.publisher().await?, &topic, &events).await?;
    let mut book = Book::new(&events);
    let got = member.take(events.len()).await?;
    book.record_all(&got)?;
    member.ack(&got).await?;
    book.exactly_once()
}

pub(super) async fn missing_topic_is_typed(mut cx: Cx) -> Checked {
    let transport = cx.connect().await?;
    let topic = cx.topic("missing")?;
    match transport.subscribe(&cx.subscription(&transport, &topic, &cx.group("g")?)).await {
        Err(error) => ensure_eq!(error.kind(), ErrorKind::NotFound, "subscribe to a missing topic"),
        Ok(consumer) => {
            if let Some(admin) = transport.admin() {
                ensure!(admin.topic(&topic).await?.is_some(), "subscribed to a topic that does not exist");
            }
            drop(consumer);
            let mut member = cx.join(&transport, &topic, &cx.group("g")?).await?;
            let events = cx.events(3, 3);
            publish(&transport.publisher().await?, &topic, &events).await?;
            Book::new(&events).record_all(&member.take(3).await?)?;
        }
    }
    Ok(())
}

async fn refused(
    cx: &Cx,
    transport: &std::sync::Arc<dyn Transport>,
    what: &str,
    subscription: &Subscription,
) -> Checked {
    let result = cx.within("a refusal", transport.subscribe(subscription)).await?;
    fails_as(what, result.map(drop), &[ErrorKind::Unsupported]).map(drop)
}

pub(super) async fn unsupported_is_refused_at_subscribe(cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let claims = s.capabilities;
    let plain = || Subscription::group(s.topic.clone(), s.group.clone()).with_ordering(Ordering::None);
    for order in [Ordering::PerKey, Ordering::PerTopic] {
        if order > claims.ordering {
            refused(&cx, &s.transport, "a stronger order", &plain().with_ordering(order)).await?;
        }
    }
    if claims.replay < Replay::Offset {
        refused(&cx, &s.transport, "start at earliest", &plain().with_start(Start::Earliest)).await?;
        refused(&cx, &s.transport, "start at offsets", &plain().with_start(Start::Offsets([].into())))
            .await?;
    }
    if claims.replay < Replay::OffsetAndTime {
        refused(&cx, &s.transport, "start at a time", &plain().with_start(Start::Time(SystemTime::now())))
            .await?;
    }
    if !claims.delay {
        refused(&cx, &s.transport, "delayed retry", &plain().with_delayed_retry()).await?;
    }
    // What is claimed is accepted.
    let strongest = plain().with_ordering(claims.ordering);
    let strongest = if claims.delay { strongest.with_delayed_retry() } else { strongest };
    s.transport.subscribe(&strongest).await?;
    Ok(())
}

pub(super) async fn history_then_tail_once(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    if s.capabilities.replay < Replay::Offset {
        let late = cx.subscription(&s.transport, &s.topic, &cx.group("late")?).with_start(Start::Earliest);
        return refused(&cx, &s.transport, "start at earliest", &late).await;
    }
    let events = cx.events(cx.size(200, 2_000), 10);
    let (first, rest) = events.split_at(events.len() / 4);
    s.publish(first).await?;
    let (publisher, topic, tail) = (s.publisher.clone(), s.topic.clone(), rest.to_vec());
    let publishing = tokio::spawn(async move {
        for event in tail {
            publisher.enqueue(&topic, vec![event]).await?.await.single()?;
            tokio::task::yield_now().await;
        }
        Ok::<_, crate::Error>(())
    });
    let late = cx.subscription(&s.transport, &s.topic, &cx.group("late")?).with_start(Start::Earliest);
    let mut member = cx.subscribe(&s.transport, &late).await?;
    let mut book = Book::new(&events);
    while book.n_seen() < events.len() {
        let got = member.poll(64).await?;
        book.record_all(&got)?;
        member.ack(&got).await?;
    }
    publishing.await.map_err(|panic| Violation::new(panic.to_string()))??;
    member.stays_quiet("after the tail").await?;
    book.exactly_once()?;
    if s.capabilities.ordering >= Ordering::PerKey {
        book.in_order(false)?;
    }
    Ok(())
}

pub(super) async fn broadcast_reaches_every_instance(mut cx: Cx) -> Checked {
    let transport = cx.connect().await?;
    let (topic, group) = (cx.topic("news")?, cx.group("beside")?);
    let mut beside = cx.join(&transport, &topic, &group).await?;
    let broadcast = Subscription::broadcast(topic.clone()).with_ordering(transport.capabilities().ordering);
    let mut instances = Vec::new();
    for _ in 0..3 {
        instances.push(cx.subscribe(&cx.connect().await?, &broadcast).await?);
    }
    let publisher = transport.publisher().await?;
    let (first, second) = (cx.events(30, 5), cx.events(10, 5));
    publish(&publisher, &topic, &first).await?;
    for member in instances.iter_mut().chain([&mut beside]) {
        let mut book = Book::new(&first);
        while book.n_seen() < first.len() {
            let got = member.poll(16).await?;
            book.record_all(&got)?;
            member.ack(&got).await?;
        }
        book.exactly_once()?;
        book.in_order(false)?;
    }
    // One that leaves takes its place with it; a new one begins with what comes.
    let left = instances.remove(0);
    left.close().await?;
    drop(left);
    instances.push(cx.subscribe(&transport, &broadcast).await?);
    publish(&publisher, &topic, &second).await?;
    for member in &mut instances {
        let mut book = Book::new(&second);
        let got = member.take(second.len()).await?;
        book.record_all(&got)?;
        member.ack(&got).await?;
        book.exactly_once()?;
        member.stays_quiet("a broadcast brought more than was published since").await?;
    }
    if let Some(admin) = transport.admin() {
        let groups = admin.groups(Some(&topic)).await?;
        ensure!(
            groups.iter().all(|info| info.group == group),
            "a broadcast is listed as a group: {groups:?}"
        );
    }
    Ok(())
}
