//! C15–C17: deliveries that are ours for a time.

use tokio::time::Instant;

use super::check::{ensure, ensure_eq};
use super::cx::{Book, Checked, Cx, Member, Setup, fails_as};
use crate::capability::Lease;
use crate::error::ErrorKind;
use crate::transport::{Delivery, Settle};

/// A member with short leases, and the one event that it took.
async fn leased_one(cx: &mut Cx, s: &Setup) -> Checked<(Member, Vec<Delivery>)> {
    let subscription = cx.subscription(&s.transport, &s.topic, &cx.group("leased")?);
    let mut member = cx.subscribe(&s.transport, &subscription.with_lease(cx.settings().lease)).await?;
    s.publish(&cx.events(1, 1)).await?;
    let got = member.take(1).await?;
    Ok((member, got))
}

pub(super) async fn expired_lease_redelivers(mut cx: Cx) -> Checked {
    let (s, lease) = (cx.setup().await?, cx.settings().lease);
    let (mut member, got) = leased_one(&mut cx, &s).await?;
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
    let (s, lease) = (cx.setup().await?, cx.settings().lease);
    let (mut member, got) = leased_one(&mut cx, &s).await?;
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
