//! C1–C7, C18–C24: consuming and settling.

use std::collections::HashSet;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::check::{Violation, ensure, ensure_eq};
use super::cx::{Book, Checked, Cx, fails_as, pass, publish, run_members, some};
use crate::capability::Ack;
use crate::error::ErrorKind;
use crate::header::Headers;
use crate::subscription::Subscription;
use crate::transport::{Content, Polled, Settle, Undecodable};

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
