//! D2–D10: what survives.

use super::check::{Violation, ensure};
use super::cx::{Book, Checked, Cx, publish, run_members, some};
use crate::capability::{Durability, Instances};
use crate::error::ErrorKind;

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
