//! A1–A6: what can be seen of a transport.

use std::fmt::Debug;
use std::num::NonZeroU32;
use std::time::Duration;

use super::check::{Violation, ensure, ensure_eq};
use super::cx::{Checked, Cx, pass, some};
use crate::admin::TopicSpec;
use crate::error::ErrorKind;
use crate::transport::{Consumer, Publisher, Settle, Token, Transport};

pub(super) async fn lag_counts_down(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let Some(admin) = s.transport.admin() else {
        ensure!(!s.capabilities.admin, "admin is claimed and absent");
        return Ok(());
    };
    ensure!(s.capabilities.admin, "admin is present and not claimed");
    let lag = async || -> Checked<u64> {
        let mut groups = admin.groups(Some(&s.topic)).await?;
        groups.retain(|info| info.group == s.group);
        ensure_eq!(admin.group(&s.group, &s.topic).await?, groups, "the positions of one group");
        Ok(groups.iter().map(|group| group.lag).sum())
    };
    ensure_eq!(lag().await?, 0, "lag of a new group");
    s.publish(&cx.events(40, 7)).await?;
    ensure_eq!(lag().await?, 40, "lag after 40 events");
    let got = s.member.take(40).await?;
    ensure_eq!(lag().await?, 40, "lag while nothing is settled");
    for (at, part) in got.chunks(10).enumerate() {
        s.member.ack(part).await?;
        ensure_eq!(lag().await?, 30 - 10 * at as u64, "lag after {} settled", 10 * (at + 1));
    }
    Ok(())
}

pub(super) async fn what_is_kept_is_told(cx: Cx) -> Checked {
    const AGE: Duration = Duration::from_secs(36 * 3600);
    let (transport, topic) = (cx.connect().await?, cx.topic("t")?);
    let Some(admin) = transport.admin() else { return Ok(()) };
    let spec = TopicSpec::new(topic.clone()).with_partitions(NonZeroU32::MIN).with_max_age(AGE);
    match admin.declare(&spec).await {
        Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),
        declared => drop(declared?),
    }
    let told = admin.topic(&topic).await?.map(|info| info.retention.max_age);
    ensure_eq!(told, Some(Some(AGE)), "what is told of a topic that keeps events for 36 h");
    let all = admin.topics().await?;
    let told = all.into_iter().find(|info| info.topic == topic).map(|info| info.retention.max_age);
    ensure_eq!(told, Some(Some(AGE)), "what is told of it among all topics");
    Ok(())
}

pub(super) async fn capabilities_are_constant(mut cx: Cx) -> Checked {
    let transport = cx.connect().await?;
    let first = transport.capabilities();
    let s = cx.setup().await?;
    s.publish(&cx.events(50, 5)).await?;
    ensure_eq!(transport.capabilities(), first, "capabilities under load");
    ensure_eq!(s.transport.capabilities(), first, "capabilities of a second value");
    ensure_eq!(transport.admin().is_some(), first.admin, "admin as claimed");
    transport.close().await?;
    ensure_eq!(transport.capabilities(), first, "capabilities after close");
    ensure_eq!(cx.connect().await?.capabilities(), first, "capabilities after reconnect");
    Ok(())
}

pub(super) async fn secrets_never_print(mut cx: Cx) -> Checked {
    let mut s = cx.setup().await?;
    let canary = "canary-5f1d";
    let event = cx.events(1, 1).remove(0).with_payload(canary).with_header("authorization", canary);
    s.publish(std::slice::from_ref(&event)).await?;
    let got = s.member.take(1).await?;
    let text = format!("{:?} {:?} {:?} {got:?}", s.transport, s.publisher, s.member.consumer);
    ensure!(!text.contains(canary), "a payload or header value shows in Debug");
    let huge = event.with_header("x", vec![b'x'; 20_000]);
    let error = s.publisher.enqueue(&s.topic, vec![huge]).await?.await.single().err();
    let error = error.ok_or_else(|| Violation::new("an oversize header was accepted"))?;
    ensure!(!format!("{error} {error:?}").contains(canary), "a payload or header value shows in an error");
    Ok(())
}

pub(super) async fn close_leaves_nothing_behind(mut cx: Cx) -> Checked {
    let (topic, group) = (cx.topic("t")?, cx.group("g")?);
    let batches: Vec<_> = (0..cx.size(12, 50)).map(|_| cx.events(3, 3)).collect();
    let round = async |events: Vec<crate::Envelope>| -> Checked {
        let transport = cx.connect().await?;
        let mut member = cx.join(&transport, &topic, &group).await?;
        super::cx::publish(&transport.publisher().await?, &topic, &events).await?;
        let got = member.take(events.len()).await?;
        member.ack(&got).await?;
        drop(member);
        transport.close().await?;
        let closed = transport.publisher().await;
        ensure!(closed.is_err(), "a closed transport opened a publisher");
        Ok(())
    };
    let mut batches = batches.into_iter();
    for events in batches.by_ref().take(3) {
        round(events).await?;
    }
    let n_tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = n_tasks();
    for events in batches {
        round(events).await?;
    }
    let end = tokio::time::Instant::now() + cx.settings().idle;
    while n_tasks() > before + 1 {
        ensure!(tokio::time::Instant::now() < end, "tasks grew from {before} to {}", n_tasks());
        pass(cx.settings().quiet).await;
    }
    Ok(())
}

pub(super) async fn types_hold_the_seam(cx: Cx) -> Checked {
    fn shared<T: Send + Sync + Debug + ?Sized>() {}
    fn plain<T: Copy + Send + Sync + 'static>() {}
    fn sendable<T: Send>(value: T) -> T {
        value
    }
    shared::<dyn Transport>();
    shared::<dyn Publisher>();
    shared::<dyn Consumer>();
    plain::<Token>();
    plain::<Settle>();
    let transport = cx.connect().await?;
    let publisher = sendable(transport.publisher()).await?;
    let subscription = cx.subscription(&transport, &cx.topic("t")?, &cx.group("g")?);
    let consumer = sendable(transport.subscribe(&subscription)).await?;
    drop(sendable(consumer.poll(some(1))));
    drop(sendable(publisher.enqueue(&subscription.topic, Vec::new())));
    Ok(())
}
