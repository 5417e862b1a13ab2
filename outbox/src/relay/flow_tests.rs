use std::collections::BTreeMap;
use std::time::Duration;

use eventbus::{Error, ErrorKind};

use super::*;

const POLICY: Policy = Policy {
    batch_events: 4,
    batch_bytes: 1000,
    patience: 1,
    parks: false,
    backoff_from: Duration::from_secs(1),
    backoff_to: Duration::from_secs(300),
};

fn row(id: i64, key: &'static str) -> Pending {
    let topic = Topic::new("orders").unwrap();
    let envelope = Envelope::new("a", "/x").with_key(key);
    Pending {
        id: RowId(id),
        shard: Shard((key.len() % 2) as u8),
        event_id: envelope.id().as_uuid().unwrap(),
        topic: "orders".to_owned(),
        key: key.into(),
        event: Ok((topic, envelope)),
        size_bytes: 10,
        attempts: 0,
    }
}

fn owning(shards: &[u8]) -> Flow {
    let mut flow = Flow::new(POLICY);
    flow.own(&shards.iter().map(|shard| (Shard(*shard), 1)).collect::<Vec<_>>());
    flow
}

fn ids(round: &[Sent]) -> Vec<i64> {
    round.iter().map(|sent| sent.id.0).collect()
}

fn ok(ids: &[i64]) -> Vec<(RowId, Result<(), Error>)> {
    ids.iter().map(|id| (RowId(*id), Ok(()))).collect()
}

fn failed(ids: &[i64], kind: ErrorKind) -> Vec<(RowId, Result<(), Error>)> {
    ids.iter().map(|id| (RowId(*id), Err(Error::new(kind, "x")))).collect()
}

#[test]
fn one_event_of_a_key_is_on_its_way() {
    let mut flow = owning(&[0, 1]);
    flow.claimed(vec![row(1, "a"), row(2, "bb"), row(3, "a"), row(4, "a")]);
    assert_eq!(ids(&flow.next_round()), [1, 2]);
    assert!(flow.next_round().is_empty());
    assert_eq!(flow.confirmed(ok(&[1]), || 0.0), Round::Went);
    assert_eq!(ids(&flow.next_round()), [3]);
    assert_eq!(flow.take_writes().published, [(Shard(1), RowId(1))]);
}

#[test]
fn few_of_each_shard_are_taken_while_there_is_enough_of_all() {
    let mut flow = owning(&[0, 1, 2, 3, 4, 5, 6, 7]);
    let mut take = |n: i64| {
        let claim = flow.claim().unwrap();
        flow.claimed((0..n).map(|id| row(id, "a")).collect());
        (0..n).for_each(|id| flow.drop_row(RowId(id)));
        claim.max_of_shard
    };
    // Of a batch of four, a quarter of what two for each of eight shards would be.
    assert_eq!([take(1), take(1), take(1), take(0), take(4), take(4), take(2)], [1, 2, 4, 4, 4, 2, 1]);
}

/// A claim that was not cut short leaves nothing behind that was committed by then.
#[test]
fn only_an_answer_at_its_bound_is_asked_for_again_at_once() {
    let answer = |shards: &[u8], n: i64, bytes: usize| {
        let mut flow = owning(shards);
        flow.claim().unwrap();
        let large = |id| Pending { size_bytes: bytes, ..row(id, if id % 2 == 0 { "a" } else { "bb" }) };
        flow.claimed((0..n).map(large).collect())
    };
    assert_eq!([0, 1, 3].map(|n| answer(&[0, 1], n, 10)), [false; 3]);
    assert!(answer(&[0, 1], 4, 10), "as many as a batch");
    assert!(answer(&[0, 1], 2, 500), "as many bytes");
    assert!(answer(&[0, 1, 2, 3, 4, 5, 6, 7], 1, 10), "as many as were wanted of a shard");
}

#[test]
fn a_key_stops_at_its_first_failure_and_others_go_on() {
    let mut flow = owning(&[0, 1]);
    flow.claimed(vec![row(1, "a"), row(2, "bb"), row(3, "a"), row(4, "bb")]);
    flow.next_round();
    let mut outcomes = ok(&[2]);
    outcomes.extend(failed(&[1], ErrorKind::Unknown));
    assert_eq!(flow.confirmed(outcomes, || 0.0), Round::Went);
    assert_eq!(ids(&flow.next_round()), [4]);
    let writes = flow.take_writes();
    assert_eq!(
        (writes.blocked.len(), writes.blocked[0].head, writes.blocked[0].may_pass),
        (1, RowId(1), true)
    );
    // Until that is stored, the store would give the event again.
    assert!(flow.claim().unwrap().held.contains(&RowId(1)));
    flow.written(&writes);
    assert!(!flow.claim().unwrap().held.contains(&RowId(1)));
}

#[test]
fn an_outage_blocks_no_key_at_first() {
    let mut flow = owning(&[0, 1]);
    flow.claimed(vec![row(1, "a"), row(2, "bb")]);
    assert_eq!(ids(&flow.next_round()), [1, 2]);
    assert_eq!(flow.confirmed(failed(&[1, 2], ErrorKind::Unavailable), || 0.0), Round::Stuck);
    assert!(flow.take_writes().is_empty());
    assert_eq!(flow.next_round().len(), 2);
    assert_eq!(flow.confirmed(failed(&[1, 2], ErrorKind::Unavailable), || 0.0), Round::Stuck);
    assert_eq!(flow.take_writes().blocked.len(), 2);
}

#[test]
fn what_is_refused_for_good_is_blocked_or_parked() {
    for parks in [false, true] {
        let mut flow = Flow::new(Policy { parks, ..POLICY });
        flow.own(&[(Shard(0), 1), (Shard(1), 1)]);
        let bad = Pending { event: Err("no head".to_owned()), ..row(2, "bb") };
        flow.claimed(vec![row(1, "a"), bad, row(3, "bb")]);
        assert_eq!(ids(&flow.next_round()), [1]);
        assert_eq!(flow.confirmed(failed(&[1], ErrorKind::TooLarge), || 0.0), Round::Refused);
        let writes = flow.take_writes();
        let (noted, none) =
            if parks { (writes.parked, writes.blocked) } else { (writes.blocked, writes.parked) };
        assert_eq!((noted.len(), none.len()), (2, 0));
        assert!(noted.iter().all(|noted| !noted.may_pass));
    }
}

#[test]
fn a_shard_that_is_lost_is_brought_to_its_end() {
    let mut flow = owning(&[0, 1]);
    flow.claimed(vec![row(1, "a"), row(2, "a"), row(3, "bb")]);
    flow.next_round();
    flow.own(&[(Shard(0), 1)]);
    assert_eq!(flow.left(&[Shard(1)]), []);
    // What is on its way is settled under the old epoch; what waits behind it is of the next owner.
    flow.confirmed(ok(&[1, 3]), || 0.0);
    assert!(flow.next_round().is_empty());
    let writes = flow.take_writes();
    assert!(flow.epochs().contains(&(Shard(1), 1)));
    flow.written(&writes);
    assert_eq!(flow.left(&[Shard(1)]), [Shard(1)]);
    assert_eq!(flow.epochs(), [(Shard(0), 1)]);
}

/// Any run of claims, outcomes and changes of ownership publishes the events of a key in their order for the first time.
#[test]
fn first_publications_are_in_order_whatever_happens() {
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let keys = ["a", "bb", "ccc", "dddd"];
        let all: Vec<Pending> = (1..=60).map(|id| row(id, keys[random.usize(..4)])).collect();
        let mut stored: BTreeMap<i64, Pending> = all.iter().map(|row| (row.id.0, row.clone())).collect();
        let mut blocked: HashMap<String, u32> = HashMap::new();
        let mut flow = owning(&[0, 1]);
        let (mut way, mut first): (Vec<Vec<Sent>>, Vec<i64>) = (Vec::new(), Vec::new());
        let (mut steps, mut answer) = (0, None);
        while !stored.is_empty() {
            steps += 1;
            assert!(steps < 20_000, "seed {seed}: no end");
            match random.u8(..10) {
                // The store answers as it was when it was asked, and the answer comes later.
                0..2 if answer.is_none() => {
                    if let Some(claim) = flow.claim() {
                        let due = |row: &&Pending| {
                            !blocked.contains_key(row.ordering_key().unwrap().to_string().as_str())
                        };
                        let found = stored.values().filter(|row| !claim.held.contains(&row.id)).filter(due);
                        let found = found.filter(|row| claim.shards.contains(&row.shard));
                        answer = Some(found.take(claim.max_events).cloned().collect::<Vec<_>>());
                    }
                }
                2 => {
                    if let Some(rows) = answer.take() {
                        flow.claimed(rows);
                    }
                }
                3..5 => {
                    let round = flow.next_round();
                    if !round.is_empty() {
                        way.push(round);
                    }
                }
                5..8 if !way.is_empty() => {
                    let round = way.swap_remove(random.usize(..way.len()));
                    let outcomes = round.iter().map(|sent| {
                        let kinds = [ErrorKind::Unavailable, ErrorKind::Unknown, ErrorKind::TooLarge];
                        let outcome = match random.u8(..4) {
                            0 => Err(Error::new(kinds[random.usize(..3)], "x")),
                            _ => Ok(()),
                        };
                        // What is unknown may be there.
                        let unknown = outcome.as_ref().err().is_some_and(|error| error.is_unknown());
                        if (outcome.is_ok() || unknown && random.bool()) && !first.contains(&sent.id.0) {
                            first.push(sent.id.0);
                        }
                        (sent.id, outcome)
                    });
                    flow.confirmed(outcomes.collect(), || 0.5);
                }
                8 => {
                    let writes = flow.take_writes();
                    if random.u8(..4) == 0 {
                        flow.return_writes(writes);
                    } else if random.u8(..4) == 0 {
                        // Another relay has the shards: nothing was written, and what was published comes again.
                        flow.written(&writes);
                        flow.lost(&writes.published, &[]);
                    } else {
                        writes.published.iter().for_each(|(_, id)| _ = stored.remove(&id.0));
                        for one in &writes.blocked {
                            blocked.insert(String::from_utf8(one.key.to_vec()).unwrap(), one.attempts);
                        }
                        flow.written(&writes);
                    }
                }
                _ => {
                    blocked.retain(|_, _| random.bool());
                    let shards = [(Shard(0), 1), (Shard(1), 1)];
                    flow.own(&shards[..random.usize(1..=2)]);
                }
            }
        }
        for key in keys {
            let of_key: Vec<_> = all.iter().filter(|row| row.key == key).map(|row| row.id.0).collect();
            let published: Vec<_> = first.iter().copied().filter(|id| of_key.contains(id)).collect();
            assert_eq!(published, of_key, "seed {seed}, key {key}");
        }
    }
}
