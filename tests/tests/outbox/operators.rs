//! What operators see and do.

use std::time::Duration;

use eventbus::{ErrorKind, Topic};
use outbox::{Operator as _, RowId, Which};

use crate::home::{Cx, Does, Home};

pub(crate) async fn operators_see_what_waits<Db: Home>(cx: Cx<Db>) {
    let operator = cx.outbox.operator();
    let empty = operator.status().await.unwrap();
    assert_eq!((empty.n_pending, empty.oldest_ms, empty.n_unowned_shards), (0, None, 64));
    for n in 0..5 {
        cx.publish(if n == 0 { "o'brien" } else { "b" }, n).await;
    }
    let mut tx = cx.outbox.begin().await.unwrap();
    tx.publish_envelope(&cx.topic, cx.event("", 9).without_key().without_payload()).unwrap();
    tx.commit().await.unwrap();
    let status = operator.status().await.unwrap();
    assert_eq!((status.n_pending, status.n_parked, status.n_blocked_keys), (6, 0, 0));
    assert!(
        status.n_bytes > 0 && status.oldest_ms.is_some_and(|age| (0..60_000).contains(&age)),
        "{status:?}"
    );
    let entries = operator.entries(Which::Pending, Some(&cx.topic), Duration::ZERO, 100).await.unwrap();
    assert_eq!(entries.len(), 6);
    assert_eq!(entries[0].key.as_deref(), Some("6f27627269656e"));
    assert_eq!((entries[5].key.as_deref(), entries[0].attempts), (None, 0));
    assert!(entries[0].head.contains("test.counted") && entries[0].event_id.len() == 32, "{:?}", entries[0]);
    assert!(operator.entries(Which::Pending, None, Duration::from_secs(60), 100).await.unwrap().is_empty());
    assert_eq!(operator.entries(Which::Pending, None, Duration::ZERO, 2).await.unwrap().len(), 2);
    let (shown, body) = operator.entry(RowId(entries[1].id)).await.unwrap().unwrap();
    assert_eq!((shown.id, body), (entries[1].id, Some(b"1".to_vec())));
    assert_eq!(operator.entry(RowId(entries[5].id)).await.unwrap().unwrap().1, None);
    assert!(operator.entry(RowId(1 << 40)).await.unwrap().is_none());
    let relay = cx.relay().await;
    cx.until_empty().await;
    let relays = operator.relays().await.unwrap();
    assert_eq!((relays.len(), relays[0].n_shards), (1, 64));
    assert!((0..30_000).contains(&relays[0].silent_ms), "{relays:?}");
    assert_eq!(operator.status().await.unwrap().n_unowned_shards, 0);
    relay.stop().await;
    assert!(operator.relays().await.unwrap().is_empty());
}

pub(crate) async fn operators_free_what_is_stuck<Db: Home>(cx: Cx<Db>) {
    let operator = cx.outbox.operator();
    cx.broker.on("bad", Does::Refuses(ErrorKind::TooLarge));
    let relay = cx.relay().await;
    cx.publish("bad", 1).await;
    cx.publish("bad", 2).await;
    cx.until_rows(1, "EVToutbox_blocked").await;
    let stuck = operator.stuck(10).await.unwrap();
    assert_eq!((stuck.len(), stuck[0].n_waiting, stuck[0].may_pass), (1, 2, false));
    assert!(stuck[0].error.contains("refuses") && stuck[0].key == "626164", "{stuck:?}");
    assert_eq!(operator.entries(Which::Blocked, None, Duration::ZERO, 10).await.unwrap().len(), 2);
    // Set aside with a reason, it lets its key go on.
    cx.broker.on("bad", None);
    let head = RowId(stuck[0].head_id);
    assert!(operator.park(head, "too much o' it").await.unwrap());
    assert!(!operator.park(head, "again").await.unwrap());
    cx.until("the next", |seen| seen.iter().any(|seen| seen.n == 2)).await;
    let parked = operator.entries(Which::Parked, None, Duration::ZERO, 10).await.unwrap();
    assert_eq!((parked.len(), parked[0].error.as_deref()), (1, Some("too much o' it")));
    // And back: published under its own number and id.
    assert!(operator.unpark(head).await.unwrap());
    assert!(!operator.unpark(head).await.unwrap());
    cx.until("the first", |seen| seen.iter().any(|seen| seen.n == 1 && seen.seq == head.0)).await;
    cx.until_empty().await;
    // What waits for its next try goes at once.
    cx.broker.on("bad", Does::Refuses(ErrorKind::TooLarge));
    cx.publish("bad", 3).await;
    cx.until_rows(1, "EVToutbox_blocked WHERE attempts >= 3").await;
    cx.broker.on("bad", None);
    assert_eq!(operator.retry(None).await.unwrap(), 1);
    let began = std::time::Instant::now();
    cx.until_empty().await;
    assert!(began.elapsed() < Duration::from_secs(2), "it took {:?}", began.elapsed());
    assert_eq!(operator.retry(None).await.unwrap(), 0);
    relay.stop().await;
}

pub(crate) async fn operators_give_up_what_nobody_wants<Db: Home>(cx: Cx<Db>) {
    let operator = cx.outbox.operator();
    cx.publish("a", 1).await;
    let id = RowId(cx.number("SELECT min(id) FROM EVToutbox").await);
    // What waits is not removed by a slip.
    assert!(!operator.discard(id).await.unwrap());
    assert!(operator.park(id, "test").await.unwrap());
    assert!(operator.discard(id).await.unwrap());
    assert!(operator.entry(id).await.unwrap().is_none());
    // What was set aside a moment ago stays, however old it is; nor is another topic taken for one whose name looks like tables.
    for topic in ["EVTorders", "evt.orders", "evt_orders"] {
        let mut tx = cx.outbox.begin().await.unwrap();
        tx.publish_envelope(&Topic::new(topic).unwrap(), cx.event("a", 3)).unwrap();
        tx.commit().await.unwrap();
        let id = RowId(cx.number("SELECT min(id) FROM EVToutbox").await);
        cx.run(Db::AGED_OUTBOX).await;
        let reason = "EVT HEX(1) NOW() it's";
        assert!(operator.park(id, reason).await.unwrap());
        let parked = operator.entry(id).await.unwrap().unwrap().0;
        assert_eq!((parked.topic.as_str(), parked.error.as_deref()), (topic, Some(reason)));
    }
    let (topic, hour) = (Topic::new("EVTorders").unwrap(), Duration::from_secs(3600));
    assert_eq!(operator.purge(None, hour).await.unwrap(), 0);
    assert_eq!(operator.n_parked(Some(&topic), Duration::ZERO).await.unwrap(), 1);
    assert_eq!(operator.purge(Some(&topic), Duration::ZERO).await.unwrap(), 1);
    assert_eq!(operator.n_parked(None, Duration::ZERO).await.unwrap(), 2);
    // The shards of a relay that is known to be gone.
    let store = cx.store().await;
    store.lease("dead", Duration::from_secs(600)).await.unwrap();
    assert_eq!(operator.release("dead").await.unwrap(), 64);
    cx.publish("a", 2).await;
    let relay = cx.relay().await;
    cx.until_empty().await;
    relay.stop().await;
    store.close().await;
}
