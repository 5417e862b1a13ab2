//! P1–P20: publishing.

use std::collections::HashSet;
use std::time::Duration;

use super::check::{Violation, ensure, ensure_eq};
use super::cx::{Book, Checked, Cx, fails_as, pass, persist, publish, same};
use crate::admin::Offset;
use crate::capability::{Ordering, Replay};
use crate::envelope::Envelope;
use crate::error::ErrorKind;
use crate::header::{Headers, MAX_HEADER_BYTES, MAX_HEADERS};
use crate::name::Topic;
use crate::transport::Polled;

pub(super) async fn reads_back_every_byte(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let mut events = cx.events(100, 7);
    events.push(Envelope::new("conformance.bare", "/c").with_time(None));
    s.publish(&events).await?;
    let mut book = Book::new(&events);
    let got = s.member.take(events.len()).await?;
    book.record_all(&got)?;
    s.member.ack(&got).await?;
    s.member.stays_quiet("after everything was read").await?;
    book.exactly_once()?;
    let consumer = s.member.consumer.clone();
    s.member.close().await?;
    match consumer.poll(super::cx::some(1)).await {
        Ok(Polled::Closed) => Ok(()),
        Err(error) if error.kind() == ErrorKind::Closed => Ok(()),
        other => Err(Violation::new(format!("a poll right after close returned {other:?}"))),
    }
}

pub(super) async fn keeps_headers_exactly(cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let many =
        (0..MAX_HEADERS).fold(Headers::new(), |headers, at| headers.with(format!("h{at}"), format!("{at}")));
    let tricky = Headers::new()
        .with("same", "1")
        .with("Same", "2")
        .with("same", "")
        .with("same", "1")
        .with("binary", (0..=255u8).collect::<Vec<_>>())
        .with("text", "zażółć 漢字 🦀")
        .with("x", "=:;,\r\n\0");
    let one = Headers::new().with("one", "1");
    let sets = [Headers::new(), one, many.clone(), tricky];
    let events: Vec<_> = sets
        .iter()
        .map(|headers| Envelope::new("h", "/c").with_key("k").with_headers(headers.clone()))
        .collect();
    s.publish(&events).await?;
    let got = s.member.take(events.len()).await?;
    Book::new(&events).record_all(&got)?;
    let too_many = Envelope::new("h", "/c").with_headers(many.with("one-more", ""));
    let too_big = Envelope::new("h", "/c").with_header("n", vec![b'x'; MAX_HEADER_BYTES]);
    for bad in [too_many, too_big] {
        let refused = s.publisher.enqueue(&s.topic, vec![bad]).await?.await.single();
        fails_as("a header block above the bound", refused, &[ErrorKind::TooLarge])?;
    }
    s.member.ack(&got).await?;
    s.member.stays_quiet("after refused headers").await
}

pub(super) async fn carries_payloads_of_every_size(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let mut sizes = vec![0, 1, 63, 64, 65, 65_535, 65_536, 65_537, 1 << 20];
    if let Some(limit) = s.capabilities.max_event_bytes {
        let overhead = Envelope::new("p", "/c").with_key("k").with_payload("").size_bytes();
        sizes.retain(|size| size + overhead <= limit);
        sizes.extend([limit - overhead - 1, limit - overhead]);
    }
    for size in sizes {
        let mut payload = vec![0u8; size];
        cx.random.fill(&mut payload);
        payload.iter_mut().zip(0..=255u8).for_each(|(byte, value)| *byte = value);
        let event = Envelope::new("p", "/c").with_key("k").with_payload(payload);
        s.publish(std::slice::from_ref(&event)).await?;
        let got = s.member.take(1).await?;
        Book::new(&[event]).record_all(&got)?;
        s.member.ack(&got).await?;
    }
    Ok(())
}

pub(super) async fn refuses_oversize_before_io(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let base = Envelope::new("p", "/c").with_key("k").with_header("counted", "too");
    match s.capabilities.max_event_bytes {
        Some(limit) => {
            let room = limit - base.clone().with_payload("").size_bytes();
            let big = base.with_payload(vec![7; room + 1]);
            let refused = s.publisher.enqueue(&s.topic, vec![big]).await?.await.single();
            let error = fails_as("an event above the limit", refused, &[ErrorKind::TooLarge])?;
            ensure!(!error.is_retryable(), "too large must be permanent");
        }
        None => {
            let big = base.with_payload(vec![7; 16 << 20]);
            let outcome = cx
                .within("16 MiB", async {
                    Ok(s.publisher.enqueue(&s.topic, vec![big]).await?.await.single())
                })
                .await?;
            if outcome.map_err(|error: crate::Error| Violation::from(error))?.is_ok() {
                let got = s.member.take(1).await?;
                s.member.ack(&got).await?;
            }
        }
    }
    let next = cx.events(1, 1);
    s.publish(&next).await?;
    let got = s.member.take(1).await?;
    Book::new(&next).record_all(&got)?;
    s.member.ack(&got).await?;
    s.member.stays_quiet("after the refused event").await
}

pub(super) async fn carries_an_absent_payload(cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let absent = Envelope::new("tombstone", "/c").with_key("k");
    let empty = Envelope::new("empty", "/c").with_key("k").with_payload("");
    if !s.capabilities.absent_payload {
        let refused = s.publisher.enqueue(&s.topic, vec![absent]).await?.await.single();
        fails_as("an absent payload", refused, &[ErrorKind::Unsupported])?;
        return Ok(());
    }
    let events = [absent, empty];
    s.publish(&events).await?;
    let got = s.member.take(2).await?;
    Book::new(&events).record_all(&got)?;
    s.member.ack(&got).await
}

pub(super) async fn ok_means_stored(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let (events, more) = (cx.events(20, 5), cx.events(20, 5));
    s.publish(&events).await?;
    let receipts = s.publisher.enqueue(&s.topic, more.clone()).await?.await.all();
    drop(s.publisher);
    s.member.close().await?;
    let mut expected = events;
    if receipts.is_ok() {
        expected.extend(more);
    }
    let fresh = cx.connect().await?;
    let mut member = cx.join(&fresh, &s.topic, &s.group).await?;
    let mut book = Book::new(&expected);
    book.record_all(&member.take(expected.len()).await?)?;
    book.exactly_once()
}

pub(super) async fn receipts_match_call_order(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(cx.size(300, 1_000), 9);
    let mut confirms = Vec::new();
    for event in &events {
        confirms.push(s.publisher.enqueue(&s.topic, vec![event.clone()]).await?);
    }
    let mut receipts = Vec::new();
    for confirm in confirms {
        receipts.push(confirm.await.single()?);
    }
    let batch = cx.events(50, 9);
    receipts.extend(s.publish(&batch).await?);
    let sent: Vec<_> = events.into_iter().chain(batch).collect();
    let mut last = std::collections::HashMap::<_, Offset>::new();
    let mut places = std::collections::HashMap::new();
    for (at, receipt) in receipts.iter().enumerate() {
        let Some(offset) = receipt.offset else { continue };
        ensure!(places.insert((receipt.partition, offset), at).is_none(), "two receipts name one place");
        if s.capabilities.ordering >= Ordering::PerKey
            && let Some(before) = last.insert(sent[at].key().cloned(), offset)
        {
            ensure!(before < offset, "receipt {at} does not ascend for its key");
        }
    }
    let mut book = Book::new(&sent);
    let mut seen = 0;
    while seen < sent.len() {
        let got = s.member.poll(64).await?;
        for delivery in &got {
            let at = book.record(delivery)?;
            if let (Some(offset), false) = (delivery.offset, places.is_empty()) {
                ensure_eq!(
                    places.get(&(delivery.partition, offset)),
                    Some(&at),
                    "the receipt of event {at} names another place"
                );
            }
        }
        seen += got.len();
        s.member.ack(&got).await?;
    }
    book.exactly_once()?;
    if s.capabilities.ordering >= Ordering::PerKey {
        book.in_order(s.capabilities.ordering >= Ordering::PerTopic)?;
    }
    Ok(())
}

pub(super) async fn dropped_confirm_still_delivers(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(30, 4);
    for event in &events {
        drop(s.publisher.enqueue(&s.topic, vec![event.clone()]).await?);
    }
    let got = s.member.take(events.len()).await?;
    let mut book = Book::new(&events);
    book.record_all(&got)?;
    s.member.ack(&got).await?;
    book.exactly_once()
}

pub(super) async fn cancelled_enqueue_publishes_nothing(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let bound = cx.subject.bound();
    let (filling, cancelled, after) = (cx.events(bound - 5, 3), cx.events(10, 3), cx.events(5, 3));
    s.publish(&filling).await?;
    let mut waited = 0;
    for _ in 0..20 {
        let waiting = s.publisher.enqueue(&s.topic, cancelled.clone());
        if tokio::time::timeout(Duration::from_millis(2), waiting).await.is_err() {
            waited += 1;
        }
    }
    ensure_eq!(waited, 20, "enqueues that had to wait for room");
    s.publish(&after).await?;
    let expected: Vec<_> = filling.into_iter().chain(after).collect();
    let mut book = Book::new(&expected);
    let mut n = 0;
    while n < expected.len() {
        let got = s.member.poll(64).await?;
        n += got.len();
        book.record_all(&got)?;
        s.member.ack(&got).await?;
    }
    s.member.stays_quiet("events of a cancelled enqueue").await?;
    book.exactly_once()
}

pub(super) async fn batch_failure_is_per_event(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let mut events = cx.events(9, 3);
    let bad_at = 4;
    let bad_key = events[bad_at].key().cloned();
    events[bad_at] = events[bad_at].clone().with_header("huge", vec![0; MAX_HEADER_BYTES + 1]);
    let outcomes: Vec<_> = s.publisher.enqueue(&s.topic, events.clone()).await?.await.into_iter().collect();
    ensure_eq!(outcomes.len(), events.len(), "one outcome for each event");
    let ordered = s.capabilities.ordering >= Ordering::PerKey;
    let mut good = Vec::new();
    for (at, outcome) in outcomes.into_iter().enumerate() {
        let follows = ordered && at > bad_at && events[at].key().cloned() == bad_key;
        if at == bad_at {
            fails_as("the bad event of a batch", outcome, &[ErrorKind::TooLarge, ErrorKind::Invalid])?;
        } else if follows {
            ensure!(outcome.is_err(), "event {at} passed a refused one of its key");
        } else {
            ensure!(outcome.is_ok(), "event {at} failed for its neighbour: {outcome:?}");
            good.push(events[at].clone());
        }
    }
    let got = s.member.take(good.len()).await?;
    let mut book = Book::new(&good);
    book.record_all(&got)?;
    s.member.ack(&got).await?;
    s.member.stays_quiet("after the good events").await?;
    book.exactly_once()
}

pub(super) async fn publish_after_close_is_an_error(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let events = cx.events(3, 1);
    s.publisher.close().await?;
    s.publisher.close().await?;
    match s.publisher.enqueue(&s.topic, events.clone()).await {
        Err(error) => ensure_eq!(error.kind(), ErrorKind::Closed, "enqueue after close"),
        Ok(confirm) => {
            for outcome in confirm.await {
                fails_as("publish after close", outcome, &[ErrorKind::Closed])?;
            }
        }
    }
    s.member.stays_quiet("events published after close").await?;
    let other = s.transport.publisher().await?;
    publish(&other, &s.topic, &events).await?;
    s.member.take(3).await.map(drop)
}

pub(super) async fn unroutable_is_an_error(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let missing = cx.topic("never-declared")?;
    let rounds = cx.size(100, 2_000);
    let (mut confirms, mut n_unroutable) = (Vec::new(), 0);
    for at in 0..rounds {
        let unroutable = at % 5 == 2;
        let topic = if unroutable { &missing } else { &s.topic };
        n_unroutable += usize::from(unroutable);
        confirms.push((unroutable, s.publisher.enqueue(topic, cx.events(1, 1)).await?));
    }
    let (mut failed, mut stored) = (0, 0);
    for (unroutable, confirm) in confirms {
        match (unroutable, confirm.await.single()) {
            (false, Ok(_)) => {}
            (false, Err(error)) => return Err(Violation::new(format!("a routable event failed: {error}"))),
            (true, Ok(_)) => stored += 1,
            (true, Err(error)) => {
                ensure_eq!(error.kind(), ErrorKind::NotFound, "unroutable");
                failed += 1;
            }
        }
    }
    ensure!(
        failed == n_unroutable || stored == n_unroutable,
        "{failed} of {n_unroutable} unroutable events failed"
    );
    if stored > 0 {
        // Topics are created on use: then the topic exists and stored what it confirmed.
        let Some(admin) = s.transport.admin() else {
            return Err(Violation::new("a confirmed topic cannot be looked at"));
        };
        let info = admin.topic(&missing).await?;
        let info = info.ok_or_else(|| {
            Violation::new("events to a missing topic were confirmed and it does not exist")
        })?;
        let mut n_found = 0;
        for known in &info.partitions {
            n_found += if s.capabilities.replay >= Replay::Offset {
                admin.read(&missing, known.partition, known.first, rounds).await?.len()
            } else {
                // Without replay nothing is kept to be counted, and offsets begin at 0.
                known.next.0 as usize
            };
        }
        ensure_eq!(n_found, stored, "events stored in the created topic");
    }
    Ok(())
}

pub(super) async fn concurrent_publishers_lose_nothing(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let (n_publishers, each) = (cx.size(10, 50), cx.size(40, 100));
    let mut tasks = Vec::new();
    let mut all = Vec::new();
    for number in 0..n_publishers {
        let events: Vec<_> =
            cx.events(each, 1).into_iter().map(|event| event.with_key(format!("p{number}"))).collect();
        let publisher = s.transport.publisher().await?;
        let topic = s.topic.clone();
        let stop_at = (number % 4 == 3).then_some(each / 2);
        all.extend(events.iter().take(stop_at.unwrap_or(each)).cloned());
        tasks.push(tokio::spawn(async move {
            for (at, event) in events.into_iter().enumerate() {
                if Some(at) == stop_at {
                    return publisher.close().await;
                }
                publisher.enqueue(&topic, vec![event]).await?.await.single()?;
            }
            Ok(())
        }));
    }
    for task in tasks {
        task.await.map_err(|panic| Violation::new(panic.to_string()))??;
    }
    let mut book = Book::new(&all);
    while book.n_seen() < all.len() {
        let got = s.member.poll(64).await?;
        book.record_all(&got)?;
        s.member.ack(&got).await?;
    }
    book.exactly_once()?;
    if s.capabilities.ordering >= Ordering::PerKey {
        book.in_order(false)?;
    }
    Ok(())
}

pub(super) async fn publish_waits_when_full(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let bound = cx.subject.bound();
    let events = cx.events(bound + 50, 5);
    let (publisher, topic, batch) = (s.publisher.clone(), s.topic.clone(), events.clone());
    let accepted = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = accepted.clone();
    let publishing = tokio::spawn(async move {
        for event in batch {
            publisher.enqueue(&topic, vec![event]).await?.await.single()?;
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        Ok::<_, crate::Error>(())
    });
    let n_accepted = || accepted.load(std::sync::atomic::Ordering::Relaxed);
    let mut before = usize::MAX;
    while n_accepted() != before {
        before = n_accepted();
        pass(cx.settings().quiet).await;
    }
    ensure!(before <= bound, "{before} events were accepted, the bound is {bound}");
    ensure!(!publishing.is_finished(), "publishing did not wait at the bound of {bound}");
    let mut book = Book::new(&events);
    while book.n_seen() < events.len() {
        let got = s.member.poll(64).await?;
        book.record_all(&got)?;
        s.member.ack(&got).await?;
    }
    cx.within("publishing after room was made", publishing)
        .await?
        .map_err(|panic| Violation::new(panic.to_string()))??;
    book.exactly_once()
}

pub(super) async fn close_wakes_a_waiting_publish(mut cx: Cx) -> Checked {
    for close_transport in [false, true] {
        let transport = cx.connect().await?;
        let (topic, group) = (cx.topic(if close_transport { "all" } else { "one" })?, cx.group("main")?);
        // A group that settles nothing: what is published stays.
        let _member = cx.join(&transport, &topic, &group).await?;
        let publisher = transport.publisher().await?;
        let events = cx.events(cx.subject.bound() + 1, 5);
        let (last, rest) = events.split_last().ok_or_else(|| Violation::new("no events"))?;
        for batch in rest.chunks(500) {
            let filling = async { publisher.enqueue(&topic, batch.to_vec()).await?.await.all() };
            cx.within("filling the topic", filling).await??;
        }
        let (waiter, last) = (publisher.clone(), last.clone());
        let waiting = tokio::spawn(async move { waiter.enqueue(&topic, vec![last]).await.map(drop) });
        pass(cx.settings().quiet).await;
        ensure!(!waiting.is_finished(), "publishing did not wait at the bound of {}", rest.len());
        if close_transport {
            transport.close().await?
        } else {
            publisher.close().await?
        }
        let ended = cx.within("a publish that waited when it was closed", waiting).await?;
        match ended.map_err(|panic| Violation::new(panic.to_string()))? {
            Err(error) => ensure_eq!(error.kind(), ErrorKind::Closed, "how the waiting publish ended"),
            Ok(()) => return Err(Violation::new("a publish into a full topic was accepted by closing")),
        }
    }
    Ok(())
}

pub(super) async fn flush_waits_for_everything(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let mut confirms = Vec::new();
    for event in cx.events(100, 5) {
        confirms.push(Box::pin(s.publisher.enqueue(&s.topic, vec![event]).await?));
    }
    cx.within("flush", s.publisher.flush()).await??;
    for mut confirm in confirms {
        let look =
            std::future::poll_fn(|task| std::task::Poll::Ready(confirm.as_mut().poll(task).is_ready()));
        // The runtime makes a task that was busy for long wait, however ready it is: that is not what is asked.
        let resolved = tokio::task::unconstrained(look).await;
        ensure!(resolved, "a confirm was not resolved after flush");
    }
    Ok(())
}

pub(super) async fn stores_one_id_once(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let event = cx.events(1, 1).remove(0);
    let mut duplicates = 0;
    for _ in 0..3 {
        duplicates += usize::from(s.publish(std::slice::from_ref(&event)).await?[0].duplicate);
    }
    let Some(window) = s.capabilities.dedup else {
        ensure_eq!(duplicates, 0, "duplicates reported without a window");
        let got = s.member.take(3).await?;
        for delivery in &got {
            same(&event, delivery.content.envelope().ok_or_else(|| Violation::new("undecodable"))?)?;
        }
        return s.member.ack(&got).await;
    };
    ensure_eq!(duplicates, 2, "receipts that say duplicate inside the window");
    let got = s.member.take(1).await?;
    s.member.ack(&got).await?;
    s.member.stays_quiet("copies inside the window").await?;
    let other_source = event.clone().with_source("/another");
    s.publish(&[other_source]).await?;
    let got = s.member.take(1).await?;
    s.member.ack(&got).await?;
    if window < cx.settings().idle {
        pass(window + Duration::from_millis(50)).await;
        s.publish(&[event]).await?;
        s.member.take(1).await?;
    }
    Ok(())
}

pub(super) async fn equal_payloads_are_two_events(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let one = cx.events(1, 1).remove(0);
    let two = one.clone().with_id(crate::EventId::generate());
    let events = [one, two];
    s.publish(&events).await?;
    let mut book = Book::new(&events);
    book.record_all(&s.member.take(2).await?)?;
    book.exactly_once()
}

pub(super) async fn lost_ack_is_unknown(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let (before, events) = (cx.events(1, 1), cx.events(5, 2));
    // What never reached a connection would not be unknown.
    s.publish(&before).await?;
    let got = s.member.take(1).await?;
    s.member.ack(&got).await?;
    cx.subject.cut(true).await?;
    let outcomes = match s.publisher.enqueue(&s.topic, events.clone()).await {
        Ok(confirm) => cx.within("a confirm whose answer is lost", confirm).await?,
        Err(error) => events.iter().map(|_| Err(error.duplicate())).collect(),
    };
    let mut keys = HashSet::new();
    for (event, outcome) in events.iter().zip(outcomes) {
        // What is behind one of its key that is unknown may not have been sent at all.
        let is_first = event.key().is_none_or(|key| keys.insert(key.clone()));
        let kinds = [ErrorKind::Unknown, ErrorKind::Unavailable];
        let allowed = kinds.get(..if is_first { 1 } else { 2 }).unwrap_or_default();
        fails_as("a publish whose answer was lost", outcome, allowed)?;
    }
    cx.subject.cut(false).await?;
    s.member.is_patient = true;
    persist(&cx, async || s.publisher.enqueue(&s.topic, events.clone()).await?.await.all()).await?;
    let mut book = Book::new(&events);
    while book.n_seen() < events.len() {
        let got = s.member.poll(64).await?;
        book.record_all(&got)?;
        s.member.ack(&got).await?;
    }
    // What had arrived before its answer was lost comes as a copy.
    book.record_all(&s.member.drain().await?)
}

pub(super) async fn hostile_names_stay_apart(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let base = cx.topic("n")?;
    // What validation lets through must stay apart on the broker: prefixes, dots, cases, look-alikes.
    let names: Vec<Topic> = ["", ".a", ".a.b", ".A", "-a", "_a", ".a-b", ".a_b", "a"]
        .iter()
        .map(|suffix| Topic::new(format!("{base}{suffix}")))
        .collect::<crate::Result<_>>()?;
    let mut members = Vec::new();
    let mut kept = Vec::new();
    for name in names {
        // A broker that cannot keep two names apart refuses the second.
        match s.transport.subscribe(&cx.subscription(&s.transport, &name, &s.group)).await {
            Err(error) => ensure_eq!(error.kind(), ErrorKind::Conflict, "a name that was refused: {error}"),
            Ok(consumer) => {
                members.push(cx.member(consumer));
                kept.push(name);
            }
        }
    }
    ensure!(kept.len() >= 6, "only {} names were taken", kept.len());
    let hostile_keys = ["", "*", ">", "a.b", "../..", "' OR 1=1 --", "\0", "key\r\nx: y", "🦀"];
    let mut books = Vec::new();
    for name in &kept {
        let events: Vec<_> = cx
            .events(hostile_keys.len(), 1)
            .into_iter()
            .zip(hostile_keys)
            .map(|(event, key)| event.with_key(key).with_header("v", key))
            .collect();
        publish(&s.publisher, name, &events).await?;
        books.push(Book::new(&events));
    }
    for (member, book) in members.iter_mut().zip(&mut books) {
        let got = member.take(hostile_keys.len()).await?;
        book.record_all(&got)?;
        member.ack(&got).await?;
        book.exactly_once()?;
    }
    for member in &mut members {
        member.stays_quiet("an event of another topic").await?;
    }
    Ok(())
}

pub(super) async fn reserved_headers_cannot_be_spoofed(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let plain = cx.events(1, 1).remove(0);
    let spoofed = plain
        .clone()
        .with_header("Nats-Msg-Id", plain.id().to_string())
        .with_header("x-death", "9")
        .with_header("evt-attempt", "9")
        .with_header("EVT-dlq-reason", "spoof");
    let spoofed =
        [spoofed.clone().with_id(crate::EventId::generate()), spoofed.with_id(crate::EventId::generate())];
    s.publish(&spoofed).await?;
    let got = s.member.take(2).await?;
    for delivery in &got {
        let found = delivery.content.envelope().ok_or_else(|| Violation::new("undecodable"))?;
        ensure_eq!(found.headers(), plain.headers(), "reserved headers of a user");
        ensure!(delivery.attempt.is_none_or(|attempt| attempt.get() == 1), "a header changed the attempt");
    }
    s.member.ack(&got).await
}
