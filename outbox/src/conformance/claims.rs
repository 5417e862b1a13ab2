//! What a store gives.

use std::collections::BTreeMap;
use std::time::Duration;

use eventbus::{Envelope, EventId, Topic};

use super::{Cx, Outcome, ensure, everything, numbers, shards, told};
use crate::row::{Pending, RowId};
use crate::store::Claim;

pub(super) async fn gives_every_byte_back(cx: &Cx) -> Outcome {
    let every_byte: Vec<u8> = (0..=255).collect();
    let large: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let plain = || Envelope::new("test.bytes", "/test");
    let events = vec![
        plain(),
        plain().with_payload(every_byte.clone()).with_key(eventbus::Key::new(every_byte.clone())),
        plain().with_payload(Vec::new()).with_key("ключ \u{1f511} \" ' \\ % _"),
        plain().with_key("large").with_payload(large),
        plain().with_id(EventId::parse("an id of somebody else")).with_version(7).with_time(None),
        plain()
            .with_subject("subject \u{2028} \"'")
            .with_content_type("application/x; a=\"b\"")
            .with_schema("urn:schema:1")
            .with_extension("partitionkey", "what others call it")
            .with_header("X-Empty", "")
            .with_header("X-Twice", "1")
            .with_header("X-Twice", "2")
            .with_header("X-Bytes", every_byte),
    ];
    let topics = [Cx::topic()?, Topic::new("a.topic-with_all.of-it")?];
    let mut transaction = cx.subject.begin().await?;
    for topic in &topics {
        for event in &events {
            transaction.append(topic, event.clone()).await?;
        }
    }
    transaction.commit().await?;
    let store = cx.store().await?;
    let found =
        cx.claimed(&*store, &Claim::new(shards(), 1000, 64 << 20), topics.len() * events.len()).await?;
    for (topic, event) in topics.iter().flat_map(|topic| events.iter().map(move |event| (topic, event))) {
        let of_it = |pending: &&Pending| {
            pending.event.as_ref().is_ok_and(|(to, found)| to == topic && found.id() == event.id())
        };
        let Some(pending) = found.iter().find(of_it) else {
            return Err(super::Violation::new(format!("{topic} {} is not given", event.id())));
        };
        ensure!(
            pending.event.as_ref().is_ok_and(|(_, found)| found == event),
            "an event came back as another: {:?} instead of {event:?}",
            pending.event
        );
        let fresh = Pending::new(pending.id, pending.shard, topic.clone(), event.clone());
        ensure!(
            (&pending.topic, &pending.key, pending.event_id, pending.attempts)
                == (&fresh.topic, &fresh.key, fresh.event_id, 0),
            "what is said of an event is not so: {pending:?}"
        );
        ensure!(
            pending.size_bytes >= event.payload().map_or(0, bytes::Bytes::len),
            "its size is none: {pending:?}"
        );
    }
    Ok(())
}

pub(super) async fn gives_what_is_committed_and_nothing_else(cx: &Cx) -> Outcome {
    let store = cx.store().await?;
    let (mut open, topic) = (cx.subject.begin().await?, Cx::topic()?);
    open.append(&topic, Cx::event("a", 1)).await?;
    let found = store.claim(&everything()).await?;
    ensure!(found.is_empty(), "an event of an open transaction is given: {}", told(&found));
    open.rollback().await?;
    cx.commit(&[("b", 1)]).await?;
    let mut dropped = cx.subject.begin().await?;
    dropped.append(&topic, Cx::event("c", 1)).await?;
    drop(dropped);
    cx.commit(&[("d", 1)]).await?;
    let found = cx.all(&*store, 2).await?;
    let expected = BTreeMap::from([("b".to_owned(), vec![1]), ("d".to_owned(), vec![1])]);
    ensure!(numbers(&found) == expected, "{} instead of {expected:?}", told(&found));
    Ok(())
}

/// Of two transactions the one that has its number first commits last.
pub(super) async fn gives_what_commits_late(cx: &Cx) -> Outcome {
    if cx.subject.writes_in_turn() {
        return Ok(());
    }
    let (store, topic) = (cx.store().await?, Cx::topic()?);
    for round in 0..8 {
        // Some of these pairs are in one shard, some are not.
        let (late, soon) = (format!("late-{round}"), format!("soon-{round}"));
        let mut first = cx.subject.begin().await?;
        first.append(&topic, Cx::event(&late, 1)).await?;
        cx.commit(&[(&soon, 1)]).await?;
        let known = cx.all(&*store, 2 * round + 1).await?;
        ensure!(!numbers(&known).contains_key(&late), "an event of an open transaction is given");
        first.commit().await?;
        let found = cx.all(&*store, 2 * round + 2).await?;
        ensure!(
            numbers(&found).contains_key(&late),
            "{late} was committed and is not given: {}",
            told(&found)
        );
    }
    Ok(())
}

/// Whatever is asked for, of each key come its first events.
pub(super) async fn gives_the_events_of_a_key_in_their_order(cx: &Cx) -> Outcome {
    let (store, keys) = (cx.store().await?, ["a", "b", "c", "d", "e"]);
    for n in 1..=12 {
        cx.commit(&keys.map(|key| (key, n))).await?;
    }
    let all = cx.all(&*store, 60).await?;
    let in_order: Vec<i64> = (1..=12).collect();
    ensure!(numbers(&all).values().all(|numbers| *numbers == in_order), "not in their order: {}", told(&all));
    let size = all.first().map_or(1, |pending| pending.size_bytes);
    for (max_events, max_of_shard, max_bytes) in
        [(7, 7, 1 << 20), (20, 2, 1 << 20), (60, 60, size * 9), (60, 60, 1), (13, 4, size * 6)]
    {
        let mut claim = Claim::new(shards(), max_events, max_bytes);
        claim.max_of_shard = max_of_shard;
        // What was given before is held, so that round by round all of it comes.
        let mut held: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for _ in 0..80 {
            let found = store.claim(&claim).await?;
            ensure!(found.len() <= max_events, "{} events instead of at most {max_events}", found.len());
            let before_last: usize = found.iter().rev().skip(1).map(|pending| pending.size_bytes).sum();
            ensure!(before_last < max_bytes, "{before_last} bytes and an event more instead of {max_bytes}");
            claim.held.extend(found.iter().map(|pending| pending.id));
            for (key, numbers) in numbers(&found) {
                held.entry(key).or_default().extend(numbers);
            }
            let is_prefix = |numbers: &Vec<i64>| in_order.starts_with(numbers);
            ensure!(held.values().all(is_prefix), "events of a key were left out: {held:?}");
            if found.is_empty() {
                break;
            }
        }
        let n_held: usize = held.values().map(Vec::len).sum();
        ensure!(n_held == 60, "{n_held} of 60 events came, of claims for {max_events} and {max_bytes} bytes");
    }
    Ok(())
}

pub(super) async fn gives_no_more_than_is_asked_for(cx: &Cx) -> Outcome {
    let store = cx.store().await?;
    cx.commit(&[("a", 1), ("b", 1), ("a", 2), ("b", 2)]).await?;
    let all = cx.all(&*store, 4).await?;
    let of = |key: &'static str| move |pending: &&Pending| pending.key.as_ref() == key.as_bytes();
    let Some(shard) = all.iter().find(of("a")).map(|pending| pending.shard) else {
        return Err(super::Violation::new("the key of an event is not its key"));
    };
    ensure!(all.iter().filter(of("a")).all(|pending| pending.shard == shard), "a key is in two shards");
    let others: Vec<_> = shards().into_iter().filter(|other| *other != shard).collect();
    let found = store.claim(&Claim::new(others, 1000, 1 << 20)).await?;
    ensure!(found.iter().all(|pending| pending.shard != shard), "a shard came that was not asked for");
    let found = store.claim(&Claim::new(Vec::new(), 1000, 1 << 20)).await?;
    ensure!(found.is_empty(), "nothing was asked for: {}", told(&found));
    let mut claim = everything();
    claim.held = all.iter().filter(of("a")).map(|pending| pending.id).collect();
    let found = store.claim(&claim).await?;
    ensure!(
        found.len() == 2 && !found.iter().any(|pending| of("a")(&pending)),
        "held, and given: {}",
        told(&found)
    );
    let mut claim = everything();
    claim.full = vec![(Cx::topic()?.to_string(), bytes::Bytes::from_static(b"b"))];
    let found = store.claim(&claim).await?;
    ensure!(
        found.len() == 2 && !found.iter().any(|pending| of("b")(&pending)),
        "full, and given: {}",
        told(&found)
    );
    // A key is one of its topic.
    claim.full = vec![("another".to_owned(), bytes::Bytes::from_static(b"b"))];
    let found = store.claim(&claim).await?;
    ensure!(found.len() == 4, "the key of another topic is full: {}", told(&found));
    let found = store.claim(&Claim::new(shards(), 1, 1)).await?;
    ensure!(found.len() == 1, "one event is given however large it is: {}", told(&found));
    Ok(())
}

pub(super) async fn numbers_ascend_and_are_given_out_once(cx: &Cx) -> Outcome {
    let store = cx.store().await?;
    let leased = store.lease("relay", super::LONG).await?;
    let mut last = RowId(i64::MIN);
    for n in 1..=5 {
        // With others of a key that is not this one in between, and after the highest is gone.
        cx.commit(&[("a", n), ("other", n), ("a", -n)]).await?;
        let found = cx.all(&*store, 3).await?;
        for pending in found.iter().filter(|pending| pending.key.as_ref() == b"a") {
            ensure!(pending.id > last, "{:?} comes after {last:?}", pending.id);
            last = pending.id;
        }
        let published: Vec<_> = found.iter().map(|pending| (pending.shard, pending.id)).collect();
        store.settle("relay", &leased.shards, &published).await?;
    }
    Ok(())
}

/// Whoever appends to a key waits for whoever did before, so that its events are in the order of the commits.
pub(super) async fn holds_a_key_until_the_commit(cx: &Cx) -> Outcome {
    let (store, topic) = (cx.store().await?, Cx::topic()?);
    for round in 0..5_usize {
        let key = format!("k{round}");
        let mut first = cx.subject.begin().await?;
        first.append(&topic, Cx::event(&key, 1)).await?;
        let (subject, second_topic, second_key) = (cx.subject.clone(), topic.clone(), key.clone());
        let second = tokio::spawn(async move {
            let mut second = subject.begin().await?;
            second.append(&second_topic, Cx::event(&second_key, 2)).await?;
            second.commit().await
        });
        tokio::time::sleep(Duration::from_millis(60)).await;
        let found = store.claim(&everything()).await?;
        ensure!(
            !numbers(&found).contains_key(&key),
            "the second was committed before the first: {}",
            told(&found)
        );
        first.commit().await?;
        let ended = tokio::time::timeout(cx.soon(), second).await;
        ensure!(matches!(ended, Ok(Ok(Ok(())))), "the second did not commit after the first: {ended:?}");
        let found = cx.all(&*store, 2 * round + 2).await?;
        ensure!(
            numbers(&found).get(&key) == Some(&vec![1, 2]),
            "not in the order of commits: {}",
            told(&found)
        );
    }
    Ok(())
}

pub(super) async fn keeps_its_name(cx: &Cx) -> Outcome {
    let (one, other) = (cx.store().await?, cx.store().await?);
    let (of_one, of_other) = tokio::join!(one.identity(), other.identity());
    let (name, other) = (of_one?, of_other?);
    ensure!(name == other, "two names of one outbox: {name} and {other}");
    ensure!(name == one.identity().await?, "the name changes");
    let fits = !name.is_empty() && name.len() <= 64 && name.bytes().all(|byte| byte.is_ascii_graphic());
    ensure!(fits, "the name is one of 1 to 64 visible characters of ASCII, not {name:?}");
    Ok(())
}
