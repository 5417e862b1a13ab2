//! Who may publish what.

use std::collections::BTreeSet;

use super::{Cx, LONG, Outcome, SHORT, ensure, shards};
use crate::row::{RowId, Shard};
use crate::store::{Blocked, Leased, Store};

fn owned(leased: &Leased) -> BTreeSet<Shard> {
    leased.shards.iter().map(|(shard, _)| *shard).collect()
}

fn short(leased: &Leased) -> String {
    let epochs: BTreeSet<i64> = leased.shards.iter().map(|(_, epoch)| *epoch).collect();
    format!(
        "{} shards under epochs {epochs:?}, and {} to be released",
        leased.shards.len(),
        leased.surplus.len()
    )
}

/// Renews until a relay owns so many, which others release.
async fn until_owns(cx: &Cx, store: &dyn Store, relay: &str, n: usize) -> Result<Leased, super::Violation> {
    let began = tokio::time::Instant::now();
    loop {
        let leased = store.lease(relay, LONG).await?;
        if leased.shards.len() >= n {
            return Ok(leased);
        }
        ensure!(began.elapsed() < cx.soon(), "{relay} owns {} of {n} shards", leased.shards.len());
        tokio::time::sleep(super::Duration::from_millis(20)).await;
    }
}

pub(super) async fn shares_what_nobody_owns(cx: &Cx) -> Outcome {
    let (here, there) = (cx.store().await?, cx.store().await?);
    let first = here.lease("a", LONG).await?;
    ensure!(owned(&first).len() == 64 && first.surplus.is_empty(), "alone it owns all: {}", short(&first));
    let second = there.lease("b", LONG).await?;
    ensure!(second.shards.is_empty(), "what another owns is given to b: {}", short(&second));
    // The first is told what the other should have, and gives it free when it likes.
    let first = here.lease("a", LONG).await?;
    let (kept, surplus) = (owned(&first), first.surplus.iter().copied().collect::<BTreeSet<_>>());
    ensure!((kept.len(), surplus.len()) == (32, 32), "a half each: {}", short(&first));
    ensure!(kept.is_disjoint(&surplus), "kept and to be released: {}", short(&first));
    here.release("a", &first.surplus).await?;
    let second = until_owns(cx, &*there, "b", 32).await?;
    ensure!(owned(&second) == surplus, "b owns what a released: {}", short(&second));
    let third = here.lease("c", LONG).await?;
    ensure!(third.shards.is_empty(), "what others own is given to c: {}", short(&third));
    Ok(())
}

pub(super) async fn renews_what_is_owned(cx: &Cx) -> Outcome {
    let store = cx.store().await?;
    let before = store.lease("a", SHORT).await?;
    for _ in 0..6 {
        tokio::time::sleep(SHORT / 3).await;
        let mut now = store.lease("a", SHORT).await?;
        now.shards.sort_unstable();
        let mut before = before.shards.clone();
        before.sort_unstable();
        ensure!(now.shards == before, "what is renewed in time keeps its epoch: {}", short(&now));
        let other = store.lease("b", SHORT).await?;
        ensure!(other.shards.is_empty(), "a lease that was renewed is given to b: {}", short(&other));
        store.leave("b").await?;
    }
    Ok(())
}

pub(super) async fn takes_over_when_a_lease_is_over(cx: &Cx) -> Outcome {
    let (here, there) = (cx.store().await?, cx.store().await?);
    let before = here.lease("a", SHORT).await?;
    let early = there.lease("b", LONG).await?;
    ensure!(early.shards.is_empty(), "the lease is not over: {}", short(&early));
    tokio::time::sleep(SHORT).await;
    let after = until_owns(cx, &*there, "b", 32).await?;
    for (shard, epoch) in &after.shards {
        let was = before.shards.iter().find(|(other, _)| other == shard).map(|(_, epoch)| *epoch);
        ensure!(
            was.is_some_and(|was| *epoch > was),
            "the epoch of {shard} does not grow: {epoch} after {was:?}"
        );
    }
    Ok(())
}

pub(super) async fn gives_free_what_is_released(cx: &Cx) -> Outcome {
    let (here, there) = (cx.store().await?, cx.store().await?);
    here.lease("a", LONG).await?;
    // Nobody else's.
    there.release("b", &shards()).await?;
    there.leave("b").await?;
    let other = there.lease("c", LONG).await?;
    ensure!(other.shards.is_empty(), "somebody else gave free what a owns: {}", short(&other));
    there.leave("c").await?;
    here.leave("a").await?;
    let all = there.lease("d", LONG).await?;
    ensure!(
        all.shards.len() == 64,
        "who left is gone at once, and counts for no share: {} of 64",
        all.shards.len()
    );
    Ok(())
}

/// A relay that was replaced changes nothing, whatever it says.
pub(super) async fn heeds_no_one_who_is_replaced(cx: &Cx) -> Outcome {
    let store = cx.store().await?;
    cx.commit(&[("a", 1), ("b", 1), ("c", 1)]).await?;
    let old = store.lease("old", SHORT).await?;
    let found = cx.all(&*store, 3).await?;
    let published: Vec<_> = found.iter().map(|pending| (pending.shard, pending.id)).collect();
    tokio::time::sleep(SHORT * 2).await;
    let mine = until_owns(cx, &*store, "new", 32).await?;
    store.release("old", &old.surplus).await?;
    let still = store.settle("new", &mine.shards, &[]).await?;
    ensure!(
        still.len() == mine.shards.len(),
        "the new owner owns {} of {} shards",
        still.len(),
        mine.shards.len()
    );
    let taken = owned(&mine);
    let said = store.settle("old", &old.shards, &published).await?;
    let n_both = said.iter().filter(|shard| taken.contains(shard)).count();
    ensure!(n_both == 0, "who was replaced is told that it owns {n_both} shards of another");
    let blocked: Vec<_> = found.iter().map(|pending| Blocked::new(pending, 1, LONG, "late")).collect();
    store.block("old", &old.shards, &blocked).await?;
    store.park("old", &old.shards, &blocked).await?;
    // The epoch decides, and not the name; and the name, not only the epoch.
    store.settle("new", &old.shards, &published).await?;
    store.settle("old", &mine.shards, &published).await?;
    let meant = found.iter().filter(|pending| taken.contains(&pending.shard)).count();
    let left = store.claim(&super::everything()).await?;
    let n_left = left.iter().filter(|pending| taken.contains(&pending.shard)).count();
    ensure!(n_left == meant, "who was replaced changed what is there: {n_left} of {meant} are left");
    Ok(())
}

pub(super) async fn removes_what_is_named(cx: &Cx) -> Outcome {
    let store = cx.store().await?;
    let leased = store.lease("a", LONG).await?;
    for n in 1..=4 {
        cx.commit(&[("a", n), ("b", n)]).await?;
    }
    let all = cx.all(&*store, 8).await?;
    // A later event, and the first of another key; one more that never was, and one under another shard.
    let named: Vec<_> = all.iter().filter(|pending| super::number(pending) == 3).collect();
    let mut published: Vec<_> = named.iter().map(|pending| (pending.shard, pending.id)).collect();
    published.push((Shard(0), RowId(i64::MAX)));
    if let Some(first) = all.first() {
        published.push((Shard((first.shard.0 + 1) % Shard::COUNT), first.id));
    }
    for _ in 0..2 {
        let said: BTreeSet<_> = store.settle("a", &leased.shards, &published).await?.into_iter().collect();
        ensure!(said == owned(&leased), "a owns 64 shards, and is told of {}", said.len());
        let left = super::numbers(&store.claim(&super::everything()).await?);
        ensure!(
            left.len() == 2 && left.values().all(|left| *left == [1, 2, 4]),
            "what was not named is gone: {left:?}"
        );
    }
    Ok(())
}
