//! D8, D9, D12: power loss, a sync that fails, bytes that change.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::check::{Violation, ensure, ensure_eq};
use super::cx::{Checked, Cx, Member, same};
use crate::capability::Durability;
use crate::error::ErrorKind;
use crate::id::EventId;
use crate::transport::{Content, Delivery, Settle};

/// What is known while the power may go: ids in the order in which they became so.
#[derive(Default)]
struct Known {
    confirmed: HashSet<EventId>,
    /// Given to settle, whatever became of it.
    settling: HashSet<EventId>,
    settled: HashSet<EventId>,
}

pub(super) async fn power_loss_keeps_confirmed(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    if s.capabilities.durability < Durability::Flushed {
        return Ok(());
    }
    let events = cx.events(cx.size(400, 2_000), 16);
    let place: HashMap<EventId, usize> =
        events.iter().enumerate().map(|(at, event)| (event.id().clone(), at)).collect();
    let known = Arc::new(Mutex::new(Known::default()));
    let (publisher, topic, batch, book) =
        (s.publisher.clone(), s.topic.clone(), events.clone(), known.clone());
    let publishing = tokio::spawn(async move {
        for batch in batch.chunks(3) {
            let ids: Vec<_> = batch.iter().map(|event| event.id().clone()).collect();
            publisher.enqueue(&topic, batch.to_vec()).await?.await.all()?;
            book.lock().confirmed.extend(ids);
        }
        Ok::<_, crate::Error>(())
    });
    let n_cuts = cx.size(4, 40);
    let mut n_cut = 0;
    while n_cut < n_cuts {
        let wanted = (n_cut + 1) * events.len() / (n_cuts + 1);
        // Half of what arrives is settled, so that positions are on their way too.
        while known.lock().confirmed.len() < wanted {
            let Some(got) = s.member.poll_within(8, Duration::from_millis(5)).await? else { continue };
            let ids: Vec<_> = got.iter().filter_map(|d| Some(d.content.envelope()?.id().clone())).collect();
            known.lock().settling.extend(ids.iter().cloned());
            s.member.ack(&got).await?;
            known.lock().settled.extend(ids);
        }
        let before = {
            let known = known.lock();
            (known.confirmed.clone(), known.settled.clone())
        };
        let image = cx.subject.power_cut(cx.random.u64(..)).await?;
        let settling = known.lock().settling.clone();
        let mut member = cx.join(&image, &s.topic, &s.group).await?;
        let mut found: Vec<usize> = Vec::new();
        // The member that lost its power still has its seat until its session is over.
        let wanted: HashSet<_> = before.0.difference(&settling).cloned().collect();
        for delivery in drain_until(&mut member, wanted).await? {
            let Content::Envelope(event) = &delivery.content else {
                return Err(Violation::new(format!("a torn event came back: {:?}", delivery.content)));
            };
            let Some(at) = place.get(event.id()) else {
                return Err(Violation::new(format!("an event that was never sent: {event:?}")));
            };
            same(&events[*at], event)?;
            found.push(*at);
        }
        let recovered: HashSet<&EventId> = found.iter().map(|at| events[*at].id()).collect();
        let lost = before.0.iter().filter(|id| !recovered.contains(id) && !settling.contains(*id)).count();
        ensure_eq!(lost, 0, "confirmed events that a power cut took, of {}", before.0.len());
        let again = before.1.iter().filter(|id| recovered.contains(id)).count();
        ensure_eq!(again, 0, "settled events that a power cut brought back, of {}", before.1.len());
        let mut last: HashMap<&[u8], usize> = HashMap::new();
        for at in found {
            let key = events[at].key().map_or(&b""[..], |key| key.as_bytes());
            if let Some(earlier) = last.insert(key, at) {
                ensure!(earlier < at, "event {at} of its key came before event {earlier}");
            }
        }
        image.close().await?;
        n_cut += 1;
    }
    let rest = async {
        while !publishing.is_finished() {
            if let Some(got) = s.member.poll_within(64, Duration::from_millis(5)).await? {
                s.member.ack(&got).await?;
            }
        }
        Ok::<_, Violation>(())
    };
    cx.within("publishing", rest).await??;
    publishing.await.map_err(|panic| Violation::new(panic.to_string()))??;
    Ok(())
}

/// Reads and settles until all that is wanted was there, or nothing comes any more; and then the rest.
async fn drain_until(member: &mut Member, mut wanted: HashSet<EventId>) -> Checked<Vec<Delivery>> {
    let mut all = Vec::new();
    while !wanted.is_empty() {
        let Some(got) = member.poll_within(64, member.idle).await? else { break };
        got.iter().filter_map(|d| d.content.envelope()).for_each(|event| {
            wanted.remove(event.id());
        });
        member.ack(&got).await?;
        all.extend(got);
    }
    all.extend(member.drain().await?);
    Ok(all)
}

pub(super) async fn failed_sync_poisons(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    if s.capabilities.durability < Durability::Flushed {
        return Ok(());
    }
    let events = cx.events(4, 4);
    s.publish(&events[..1]).await?;
    cx.subject.fail_syncs(true).await?;
    let publish = async |event: &crate::Envelope| {
        let enqueued = s.publisher.enqueue(&s.topic, vec![event.clone()]);
        match cx.within("a publish on a failing disk", enqueued).await? {
            Ok(confirm) => {
                Ok::<_, Violation>(cx.within("a confirm on a failing disk", confirm).await?.single())
            }
            Err(error) => Ok(Err(error)),
        }
    };
    let Err(unknown) = publish(&events[1]).await? else {
        return Err(Violation::new("a publish whose sync failed was confirmed"));
    };
    ensure_eq!(unknown.kind(), ErrorKind::Unknown, "the outcome of a publish whose sync failed");
    let refused = publish(&events[2]).await?;
    ensure!(refused.is_err(), "a publish after a failed sync was confirmed");
    // The disk works again, but what it dropped meanwhile nobody knows: nothing is trusted before a reopen.
    cx.subject.fail_syncs(false).await?;
    let refused = publish(&events[2]).await?;
    ensure!(refused.is_err(), "a publish was confirmed by a second sync, after the first had failed");
    drop((s.member, s.publisher, s.transport));
    cx.subject.restart().await?;
    let fresh = cx.connect().await?;
    super::cx::publish(&fresh.publisher().await?, &s.topic, &events[3..]).await?;
    let mut member = cx.join(&fresh, &s.topic, &s.group).await?;
    let wanted = [events[0].id().clone(), events[3].id().clone()].into();
    let found: Vec<EventId> = drain_until(&mut member, wanted)
        .await?
        .iter()
        .filter_map(|d| Some(d.content.envelope()?.id().clone()))
        .collect();
    for (at, event) in events.iter().enumerate() {
        let n = found.iter().filter(|id| *id == event.id()).count();
        // The one of unknown outcome may be there or not; what was refused must not.
        let allowed = match at {
            0 | 3 => n == 1,
            1 => n <= 1,
            _ => n == 0,
        };
        ensure!(allowed, "event {at} is there {n} times");
    }
    Ok(())
}

pub(super) async fn corruption_is_loud(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    let events = cx.events(cx.size(200, 1_000), 20);
    s.publish(&events).await?;
    drop((s.member, s.publisher, s.transport));
    cx.subject.restart().await?;
    cx.subject.damage(cx.random.u64(..)).await?;
    // Whatever says so is loud enough: opening, joining, polling, or the event itself.
    let is_loud =
        |error: &crate::Error| matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::DataLoss { .. });
    let loud = |error: crate::Error| if is_loud(&error) { Ok(()) } else { Err(Violation::from(error)) };
    let fresh = match cx.connect().await {
        Ok(fresh) => fresh,
        Err(violation) if violation.to_string().contains("damaged") => return Ok(()),
        Err(violation) => return Err(violation),
    };
    let consumer = match fresh.subscribe(&cx.subscription(&fresh, &s.topic, &s.group)).await {
        Ok(consumer) => consumer,
        Err(error) => return loud(error),
    };
    let sent: HashMap<&EventId, &crate::Envelope> = events.iter().map(|event| (event.id(), event)).collect();
    let (mut n_whole, mut n_told) = (0, 0);
    let end = Instant::now() + cx.settings().idle;
    while n_whole + n_told < events.len() {
        let polled = match tokio::time::timeout_at(end, consumer.poll(super::cx::some(64))).await {
            Ok(polled) => polled,
            Err(_) => break,
        };
        let deliveries = match polled {
            Ok(crate::transport::Polled::Deliveries(deliveries)) => deliveries,
            Ok(_) => continue,
            Err(error) => return loud(error),
        };
        for delivery in &deliveries {
            match &delivery.content {
                Content::Envelope(event) => {
                    let Some(sent) = sent.get(event.id()) else {
                        return Err(Violation::new(format!("a damaged event looks whole: {event:?}")));
                    };
                    same(sent, event)?;
                    n_whole += 1;
                }
                Content::Undecodable(_) => n_told += 1,
            }
        }
        let acked: Vec<_> = deliveries.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
        match consumer.settle(&acked).await {
            Ok(settled) => settled.all()?,
            Err(error) => return loud(error),
        }
    }
    ensure_eq!(
        n_whole + n_told,
        events.len(),
        "events that came back, whole or as damaged; nothing said why"
    );
    Ok(())
}
