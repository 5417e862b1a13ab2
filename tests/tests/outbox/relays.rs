//! How what is stored is published.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use eventbus::ErrorKind;
use outbox::{Permanent, Shard, State};

use crate::home::{Cx, Does, Home};

pub(crate) async fn an_event_is_removed_when_it_is_confirmed<Db: Home>(cx: Cx<Db>) {
    cx.broker.answers_after(Duration::from_millis(300));
    let relay = cx.relay().await;
    cx.publish("a", 1).await;
    cx.until("the event", |seen| seen.len() == 1).await;
    assert_eq!(cx.n_stored().await, 1, "it is stored until the broker's answer");
    cx.until_empty().await;
    assert_eq!(relay.counts().published, 1);
    relay.stop().await;
}

pub(crate) async fn a_lost_answer_is_repeated_under_the_same_id<Db: Home>(cx: Cx<Db>) {
    cx.broker.on("a", Does::LosesAnswers);
    let relay = cx.relay().await;
    cx.publish("a", 1).await;
    cx.publish("a", 2).await;
    cx.until("a repetition", |seen| seen.len() >= 2).await;
    assert!(cx.broker.seen().iter().all(|seen| seen.n == 1), "the second waits for the first");
    cx.broker.on("a", None);
    cx.until_empty().await;
    let seen = cx.broker.seen();
    let ids: HashSet<_> = seen.iter().filter(|seen| seen.n == 1).map(|seen| (&seen.id, seen.seq)).collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(cx.broker.firsts()["a"], [1, 2]);
    relay.stop().await;
}

pub(crate) async fn a_blocked_key_holds_back_nobody_else<Db: Home>(cx: Cx<Db>) {
    cx.broker.on("bad", Does::Refuses(ErrorKind::Full));
    let relay = cx.relay().await;
    cx.publish("bad", 1).await;
    cx.publish("bad", 2).await;
    for n in 0..200 {
        cx.publish(&format!("k{}", n % 20), n).await;
    }
    cx.until("the others", |seen| seen.len() == 200).await;
    cx.until_rows(1, "EVToutbox_blocked WHERE may_pass").await;
    assert!(cx.n_stored().await >= 2);
    cx.broker.on("bad", None);
    cx.until("the blocked ones", |seen| seen.len() == 202).await;
    cx.until_empty().await;
    assert_eq!(cx.broker.firsts()["bad"], [1, 2]);
    assert_eq!(cx.number("SELECT count(*) FROM EVToutbox_blocked").await, 0);
    relay.stop().await;
}

pub(crate) async fn what_can_never_be_published_is_parked<Db: Home>(cx: Cx<Db>) {
    cx.broker.on("bad", Does::Refuses(ErrorKind::TooLarge));
    let relay = cx.relay_with(|relay| relay.with_permanent(Permanent::Park)).await;
    cx.publish("bad", 1).await;
    cx.until_rows(1, "EVToutbox_parked").await;
    cx.broker.on("bad", None);
    cx.publish("bad", 2).await;
    cx.until("the next of its key", |seen| seen.iter().any(|seen| seen.n == 2)).await;
    cx.until_empty().await;
    let mut connection = cx.pool.acquire().await.unwrap();
    let parked =
        Db::pairs(&mut connection, cx.sql("SELECT error, CAST(attempts AS bigint) FROM EVToutbox_parked"));
    let parked = parked.await.unwrap();
    assert!(parked[0].0.contains("refuses this key") && parked[0].1 == 1, "{parked:?}");
    assert_eq!(relay.counts().parked, 1);
    relay.stop().await;
}

pub(crate) async fn a_row_that_is_no_event_is_told<Db: Home>(cx: Cx<Db>) {
    cx.publish("bad", 1).await;
    cx.publish("good", 2).await;
    cx.run(r#"UPDATE EVToutbox SET head = '{"type": 7}' WHERE id = (SELECT min(id) FROM EVToutbox)"#).await;
    let relay = cx.relay().await;
    cx.until("the other", |seen| seen.len() == 1).await;
    cx.until_rows(1, "EVToutbox_blocked WHERE NOT may_pass").await;
    let mut connection = cx.pool.acquire().await.unwrap();
    let blocked =
        Db::pairs(&mut connection, cx.sql("SELECT error, head_id FROM EVToutbox_blocked")).await.unwrap();
    let (error, _) = &blocked[0];
    assert!(error.contains("head"), "{error}");
    cx.until_rows(1, "EVToutbox").await;
    relay.stop().await;
}

pub(crate) async fn an_outage_ends_with_everything_published<Db: Home>(cx: Cx<Db>) {
    cx.broker.is_away(true);
    let relay = cx.relay().await;
    for n in 0..100 {
        cx.publish(&format!("k{}", n % 10), n).await;
    }
    let told = async {
        while relay.state() == State::Running {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(crate::home::SOON, told).await.unwrap();
    // Long enough that keys are blocked, and not only the relay waits.
    cx.until_rows(10, "EVToutbox_blocked").await;
    cx.broker.is_away(false);
    let began = Instant::now();
    cx.until_empty().await;
    assert!(began.elapsed() < Duration::from_secs(8), "it took {:?}", began.elapsed());
    assert!(cx.broker.firsts().values().all(|of_key| of_key.len() == 10 && of_key.is_sorted()));
    assert_eq!(relay.state(), State::Running);
    relay.stop().await;
}

pub(crate) async fn a_key_that_fails_is_tried_less_and_less<Db: Home>(cx: Cx<Db>) {
    cx.broker.on("bad", Does::Refuses(ErrorKind::Full));
    let relay = cx.relay().await;
    cx.publish("bad", 1).await;
    cx.until_rows(1, "EVToutbox_blocked").await;
    // Others that go through do not make it due.
    let until = Instant::now() + Duration::from_secs(3);
    let mut n = 0;
    while Instant::now() < until {
        cx.publish("good", n).await;
        n += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let failed = relay.counts().failed;
    assert!((2..10).contains(&failed), "{failed} tries in three seconds");
    relay.stop().await;
}

pub(crate) async fn a_long_key_does_not_starve_the_others<Db: Home>(cx: Cx<Db>) {
    cx.broker.answers_after(Duration::from_millis(5));
    for part in 0..4 {
        let mut tx = cx.outbox.begin().await.unwrap();
        (0..500).for_each(|n| tx.publish_envelope(&cx.topic, cx.event("long", part * 500 + n)).unwrap());
        tx.commit().await.unwrap();
    }
    cx.publish("short", 1).await;
    let relay = cx.relay().await;
    cx.until("the other key", |seen| seen.iter().any(|seen| seen.key == "short")).await;
    let n_before = cx.broker.seen().len();
    assert!(n_before < 400, "{n_before} of the long key went before");
    cx.until_empty().await;
    assert_eq!(cx.broker.firsts()["long"], (0..2000).collect::<Vec<_>>());
    relay.stop().await;
}

pub(crate) async fn a_transport_that_panics_stops_no_key<Db: Home>(cx: Cx<Db>) {
    cx.broker.on("a", Does::Panics);
    let relay = cx.relay().await;
    cx.publish("a", 1).await;
    let failed = async {
        while relay.counts().failed == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(crate::home::SOON, failed).await.unwrap();
    cx.broker.on("a", None);
    cx.until_empty().await;
    relay.stop().await;
}

/// The tables are gone when the broker answers: what is to be noted cannot be, and nobody waits for it for ever.
pub(crate) async fn a_relay_stops_though_its_database_is_gone<Db: Home>(cx: Cx<Db>) {
    cx.broker.answers_after(Duration::from_millis(300));
    let relay = cx.relay().await;
    cx.publish("a", 1).await;
    cx.until("the event", |seen| seen.len() == 1).await;
    cx.run("DROP TABLE EVToutbox_blocked").await;
    let published = async {
        while relay.counts().published == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(crate::home::SOON, published).await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), relay.stop()).await.unwrap();
}

pub(crate) async fn relays_share_the_work<Db: Home>(cx: Cx<Db>) {
    let store = cx.store().await;
    let lease = Duration::from_secs(5);
    let first = store.lease("a", lease).await.unwrap();
    assert_eq!((first.shards.len(), first.surplus.len()), (64, 0));
    let none = store.lease("b", lease).await.unwrap();
    assert_eq!(none.shards.len(), 0);
    let less = store.lease("a", lease).await.unwrap();
    assert_eq!((less.shards.len(), less.surplus.len()), (32, 32));
    assert!(less.shards.iter().all(|owned| first.shards.contains(owned)), "epochs stay with their owner");
    store.release("a", &less.surplus).await.unwrap();
    let second = store.lease("b", lease).await.unwrap();
    assert_eq!(second.shards.len(), 32);
    let of =
        |leased: &outbox::Leased| leased.shards.iter().map(|(shard, _)| *shard).collect::<HashSet<Shard>>();
    assert!(of(&second).is_disjoint(&of(&less)));
    store.leave("a").await.unwrap();
    assert_eq!(store.lease("b", lease).await.unwrap().shards.len(), 64);
    store.close().await;
}

pub(crate) async fn patience_begins_anew_with_each_event<Db: Home>(cx: Cx<Db>) {
    cx.publish("a", 1).await;
    cx.publish("a", 2).await;
    let store = cx.store().await;
    let owned = store.lease("one", Duration::from_secs(60)).await.unwrap().shards;
    let claim = outbox::Claim::new(owned.iter().map(|(shard, _)| *shard).collect(), 10, 1 << 20);
    let rows = store.claim(&claim).await.unwrap();
    let blocked = outbox::Blocked::new(&rows[0], 5, Duration::ZERO, "five times");
    store.block("one", &owned, &[blocked]).await.unwrap();
    // What comes behind an event that failed often did not fail.
    let rows = store.claim(&claim).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.attempts).collect::<Vec<_>>(), [5, 0]);
    store.close().await;
}

pub(crate) async fn a_relay_that_dies_is_replaced<Db: Home>(cx: Cx<Db>) {
    let store = cx.store().await;
    assert_eq!(store.lease("dead", Duration::from_millis(1500)).await.unwrap().shards.len(), 64);
    let relay = cx.relay().await;
    cx.publish("a", 1).await;
    let began = Instant::now();
    cx.until_empty().await;
    assert!(began.elapsed() < Duration::from_secs(6), "it took {:?}", began.elapsed());
    relay.stop().await;
    store.close().await;
}

pub(crate) async fn a_relay_that_lost_its_lease_changes_nothing<Db: Home>(cx: Cx<Db>) {
    cx.publish("a", 1).await;
    let store = cx.store().await;
    let lease = Duration::from_millis(300);
    let old = store.lease("old", lease).await.unwrap().shards;
    let all: Vec<Shard> = old.iter().map(|(shard, _)| *shard).collect();
    let pending = store.claim(&outbox::Claim::new(all, 10, 1 << 20)).await.unwrap().remove(0);
    let published = [(pending.shard, pending.id)];
    // It is replaced while it is paused.
    let replaced = async {
        while store.lease("new", Duration::from_secs(60)).await.unwrap().shards.len() < 32 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        store.leave("old").await.unwrap();
        store.lease("new", Duration::from_secs(60)).await.unwrap().shards
    };
    let new = tokio::time::timeout(crate::home::SOON, replaced).await.unwrap();
    assert_eq!(new.len(), 64);
    assert_eq!(store.settle("old", &old, &published).await.unwrap(), []);
    let blocked = outbox::Blocked::new(&pending, 1, Duration::from_secs(60), "late");
    store.block("old", &old, std::slice::from_ref(&blocked)).await.unwrap();
    store.park("old", &old, &[blocked]).await.unwrap();
    assert_eq!(cx.n_stored().await, 1);
    assert_eq!(cx.number("SELECT count(*) FROM EVToutbox_blocked").await, 0);
    // An epoch of long ago does not do for who owns it now.
    let stale: Vec<_> = new.iter().map(|(shard, epoch)| (*shard, epoch - 1)).collect();
    assert_eq!(store.settle("new", &stale, &published).await.unwrap(), []);
    let mut owned = store.settle("new", &new, &published).await.unwrap();
    owned.sort_unstable();
    assert_eq!((owned.len(), cx.n_stored().await), (64, 0));
    store.close().await;
}

pub(crate) async fn a_note_that_comes_late_blocks_nothing<Db: Home>(cx: Cx<Db>) {
    cx.publish("a", 1).await;
    let (store, lease) = (cx.store().await, Duration::from_secs(60));
    let owned = store.lease("relay", lease).await.unwrap().shards;
    let claim = outbox::Claim::new(owned.iter().map(|(shard, _)| *shard).collect(), 10, 1 << 20);
    let pending = store.claim(&claim).await.unwrap().remove(0);
    let blocked = outbox::Blocked::new(&pending, 1, lease, "its answer was late");
    let note = std::slice::from_ref(&blocked);
    store.block("relay", &owned, note).await.unwrap();
    assert_eq!(cx.number("SELECT count(*) FROM EVToutbox_blocked").await, 1);
    // It was published at another try. Then the statement that was given up runs in the server.
    store.settle("relay", &owned, &[(pending.shard, pending.id)]).await.unwrap();
    store.block("relay", &owned, note).await.unwrap();
    assert_eq!(cx.number("SELECT count(*) FROM EVToutbox_blocked").await, 0);
    cx.publish("a", 2).await;
    assert_eq!(store.claim(&claim).await.unwrap().len(), 1, "the key waits for nothing");
    store.close().await;
}

pub(crate) async fn a_relay_that_stops_leaves_nothing_behind<Db: Home>(cx: Cx<Db>) {
    cx.broker.answers_after(Duration::from_millis(50));
    let relay = cx.relay().await;
    for n in 0..100 {
        cx.publish(&n.to_string(), n).await;
    }
    cx.until("some", |seen| !seen.is_empty()).await;
    relay.stop().await;
    // What the broker confirmed is noted, and the next relay begins at once.
    let n_seen = cx.broker.seen().len() as i64;
    assert_eq!(cx.n_stored().await, 100 - n_seen);
    cx.broker.answers_after(Duration::ZERO);
    let began = Instant::now();
    let relay = cx.relay_with(|relay| relay.with_lease(Duration::from_secs(60))).await;
    cx.until_empty().await;
    assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
    assert_eq!(cx.broker.seen().len(), 100, "nothing is published twice");
    relay.stop().await;
}

pub(crate) async fn numbers_ascend_along_each_key<Db: Home>(cx: Cx<Db>) {
    let relay = cx.relay().await;
    for n in 0..60 {
        let mut tx = cx.outbox.begin().await.unwrap();
        tx.publish_envelope(&cx.topic, cx.event(if n % 2 == 0 { "a" } else { "b" }, n)).unwrap();
        // A third of the numbers is never used.
        if n % 3 == 0 {
            tx.flush().await.map(drop).and(tx.rollback().await).unwrap()
        } else {
            tx.commit().await.unwrap()
        }
    }
    cx.until_empty().await;
    let seen = cx.broker.seen();
    for key in ["a", "b"] {
        let of_key: Vec<_> =
            seen.iter().filter(|seen| seen.key == key).map(|seen| (seen.seq, seen.n)).collect();
        assert_eq!(of_key.len(), 20);
        assert!(of_key.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 < pair[1].1), "{of_key:?}");
    }
    relay.stop().await;
}

pub(crate) async fn the_identity_stays<Db: Home>(cx: Cx<Db>) {
    let (first, second) = (cx.store().await, cx.store().await);
    let (a, b) = tokio::join!(first.identity(), second.identity());
    assert_eq!(a.unwrap(), b.unwrap());
    assert_eq!(first.identity().await.unwrap().len(), 32);
    first.close().await;
    second.close().await;
}
