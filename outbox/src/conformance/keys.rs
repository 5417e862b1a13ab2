//! Keys that wait.

use super::{Cx, LONG, Outcome, SHORT, Violation, ensure, everything, number, numbers, told};
use crate::row::Pending;
use crate::store::{Blocked, Leased, Store};

/// The first event of a key.
fn head<'a>(found: &'a [Pending], key: &str) -> Result<&'a Pending, Violation> {
    let first = found.iter().find(|pending| pending.key.as_ref() == key.as_bytes());
    first.ok_or_else(|| Violation::new(format!("nothing of {key} is given: {}", told(found))))
}

async fn keys_given(store: &dyn Store) -> Result<Vec<String>, Violation> {
    Ok(numbers(&store.claim(&everything()).await?).into_keys().collect())
}

async fn place(cx: &Cx) -> Result<(std::sync::Arc<dyn Store>, Leased, Vec<Pending>), Violation> {
    let store = cx.store().await?;
    let leased = store.lease("a", LONG).await?;
    cx.commit(&[("bad", 1), ("good", 1), ("bad", 2)]).await?;
    let found = cx.all(&*store, 3).await?;
    Ok((store, leased, found))
}

/// All of a key waits with its first event, for as long as was said; others do not.
pub(super) async fn keeps_a_blocked_key_back(cx: &Cx) -> Outcome {
    let (store, leased, found) = place(cx).await?;
    let bad = head(&found, "bad")?;
    store.block("a", &leased.shards, &[Blocked::new(bad, 3, LONG, "not \0 now \u{1f480}")]).await?;
    cx.commit(&[("bad", 3)]).await?;
    let given = keys_given(&*cx.store().await?).await?;
    ensure!(given == ["good"], "a key that is blocked is kept back, and no other: {given:?}");
    // What is said later counts.
    store.block("a", &leased.shards, &[Blocked::new(bad, 4, SHORT, "soon")]).await?;
    let given = keys_given(&*store).await?;
    ensure!(given == ["good"], "it is not due yet: {given:?}");
    let found = cx.all(&*store, 4).await?;
    let attempts: Vec<u32> = found.iter().filter(|p| p.key.as_ref() == b"bad").map(|p| p.attempts).collect();
    ensure!(attempts == [4, 0, 0], "attempts are those of the event that failed: {attempts:?}");
    Ok(())
}

pub(super) async fn frees_a_key_with_its_event(cx: &Cx) -> Outcome {
    let (store, leased, found) = place(cx).await?;
    let bad = head(&found, "bad")?;
    store.block("a", &leased.shards, &[Blocked::new(bad, 1, LONG, "no")]).await?;
    store.settle("a", &leased.shards, &[(bad.shard, bad.id)]).await?;
    let found = cx.all(&*store, 2).await?;
    let next = head(&found, "bad")?;
    ensure!((number(next), next.attempts) == (2, 0), "the next one is free, and was never tried: {next:?}");
    Ok(())
}

/// A note that comes late, of an event that somebody published since.
pub(super) async fn blocks_nothing_for_what_is_gone(cx: &Cx) -> Outcome {
    let (store, leased, found) = place(cx).await?;
    let bad = head(&found, "bad")?;
    store.settle("a", &leased.shards, &[(bad.shard, bad.id)]).await?;
    store.block("a", &leased.shards, &[Blocked::new(bad, 1, LONG, "late")]).await?;
    let given = keys_given(&*store).await?;
    ensure!(given == ["bad", "good"], "a key is blocked by an event that is gone: {given:?}");
    store.park("a", &leased.shards, &[Blocked::new(bad, 1, LONG, "late")]).await?;
    let given = keys_given(&*store).await?;
    ensure!(given == ["bad", "good"], "a key waits for an event that is gone: {given:?}");
    Ok(())
}

pub(super) async fn makes_due_what_may_pass(cx: &Cx) -> Outcome {
    let (store, leased, found) = place(cx).await?;
    let mut for_good = Blocked::new(head(&found, "good")?, 1, LONG, "never");
    for_good.may_pass = false;
    let may_pass = Blocked::new(head(&found, "bad")?, 2, LONG, "the broker is away");
    let shard = may_pass.shard;
    store.block("a", &leased.shards, &[may_pass, for_good]).await?;
    let others: Vec<_> = super::shards().into_iter().filter(|other| *other != shard).collect();
    store.unblock(&others).await?;
    let given = keys_given(&*store).await?;
    ensure!(given.is_empty(), "what is blocked for good, or of another shard, is due: {given:?}");
    store.unblock(&[shard]).await?;
    let found = cx.all(&*store, 2).await?;
    let bad = head(&found, "bad")?;
    ensure!(bad.attempts == 2, "its attempts are forgotten: {bad:?}");
    ensure!(numbers(&found).len() == 1, "what is blocked for good is due: {}", told(&found));
    Ok(())
}

/// An event that is set aside is not given any more, and the others of its key go on.
pub(super) async fn sets_aside_what_is_parked(cx: &Cx) -> Outcome {
    let (store, leased, found) = place(cx).await?;
    let bad = head(&found, "bad")?;
    store.block("a", &leased.shards, &[Blocked::new(bad, 1, LONG, "no")]).await?;
    store.park("a", &leased.shards, &[Blocked::new(bad, 2, LONG, "never \0")]).await?;
    // Its answer was lost.
    store.park("a", &leased.shards, &[Blocked::new(bad, 2, LONG, "never")]).await?;
    let found = cx.all(&*store, 2).await?;
    let next = head(&found, "bad")?;
    ensure!(found.len() == 2, "what is set aside is given: {}", told(&found));
    ensure!((number(next), next.attempts) == (2, 0), "the next of its key goes on: {next:?}");
    Ok(())
}
