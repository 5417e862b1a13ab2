//! Publishing: one task sends whatever waits in one go, one call for each partition; the confirms resolve with the
//! answers.

use std::collections::{BTreeMap, HashMap};
use std::sync::Weak;

use redis::aio::MultiplexedConnection;
use redis::{Pipeline, RedisError, Value};

use super::entry;
use super::keys;
use super::store::{Store, from_redis, is_unknown, script};
use crate::admin::Offset;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::partition::{self, PartitionId};
use crate::transport::Receipt;
use crate::transport::kit::queue::{Queued, Rounds};

/// What is sent at once at most.
const MAX_ROUND_EVENTS: usize = 4096;
const MAX_ROUND_BYTES: usize = 16 << 20;

/// Stores what is published until the store is closed.
pub(super) async fn write(store: Weak<Store>, mut rounds: Rounds) {
    let mut connection = None;
    while let Some(round) = rounds.next(MAX_ROUND_EVENTS, MAX_ROUND_BYTES).await {
        let Some(store) = store.upgrade() else { return };
        store_round(&store, &mut connection, round.batches).await;
        if round.ending.tell() {
            return;
        }
    }
}

/// Events of a round by topic, partition and number of partitions: the places of batch and event, in order.
type Lanes<'a> = BTreeMap<(&'a Topic, u32, u32), Vec<(usize, usize)>>;

async fn store_round(store: &Store, connection: &mut Option<MultiplexedConnection>, round: Vec<Queued>) {
    let mut outcomes: Vec<Vec<Option<Result<Receipt>>>> =
        round.iter().map(|queued| queued.events.iter().map(|_| None).collect()).collect();
    // A second try is for topics that were deleted, or created, since they were looked up.
    for _ in 0..2 {
        let mut lanes = Lanes::new();
        let mut resolved: HashMap<&Topic, Result<u32>> = HashMap::new();
        for (at, queued) in round.iter().enumerate() {
            if !queued.events.is_empty() && !resolved.contains_key(&queued.topic) {
                resolved.insert(&queued.topic, store.partitions(&queued.topic).await);
            }
            for (event_at, event) in queued.events.iter().enumerate() {
                let Some(outcome) = outcomes.get_mut(at).and_then(|of| of.get_mut(event_at)) else {
                    continue;
                };
                let retries = outcome.as_ref().is_none_or(|outcome| {
                    outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound)
                });
                match resolved.get(&queued.topic) {
                    Some(Ok(n_partitions)) if retries => {
                        let partition = partition::of_envelope(event, *n_partitions).0;
                        lanes
                            .entry((&queued.topic, partition, *n_partitions))
                            .or_default()
                            .push((at, event_at));
                    }
                    Some(Err(error)) if retries => *outcome = Some(Err(error.duplicate())),
                    _ => {}
                }
            }
        }
        if lanes.is_empty() {
            break;
        }
        let answers = send(store, connection, &round, &lanes).await;
        let mut again = false;
        for (((topic, partition, _), events), answer) in lanes.iter().zip(answers) {
            let ids = answer
                .map_err(|error| error.with("topic", topic))
                .and_then(|ids| if ids.len() == events.len() { Ok(ids) } else { Err(unexpected()) });
            if let Err(error) = &ids
                && error.kind() == ErrorKind::NotFound
            {
                store.forget(topic);
                again = true;
            }
            for (nth, (at, event_at)) in events.iter().enumerate() {
                let outcome = match &ids {
                    Ok(ids) => ids
                        .get(nth)
                        .copied()
                        .ok_or_else(unexpected)
                        .map(|offset| Receipt::new(PartitionId(*partition), Offset(offset))),
                    Err(error) => Err(error.duplicate()),
                };
                if let Some(place) = outcomes.get_mut(*at).and_then(|of| of.get_mut(*event_at)) {
                    *place = Some(outcome);
                }
            }
            store.bells.ring(topic);
        }
        if !again {
            break;
        }
    }
    for (queued, outcomes) in round.into_iter().zip(outcomes) {
        queued.answer(outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| Err(unexpected()))));
    }
}

fn unexpected() -> Error {
    Error::new(ErrorKind::Unexpected, "the server did not answer for every event")
}

/// Sends the lanes in one go; returns for each the offsets of its events, or why there are none.
async fn send(
    store: &Store,
    connection: &mut Option<MultiplexedConnection>,
    round: &[Queued],
    lanes: &Lanes<'_>,
) -> Vec<Result<Vec<u64>>> {
    let all = |error: &Error| lanes.iter().map(|_| Err(error.duplicate())).collect();
    let mut pipeline = Pipeline::with_capacity(lanes.len() + 1);
    for ((topic, partition, n_partitions), events) in lanes {
        let call = pipeline.cmd("EVALSHA").arg(script!("append").get_hash()).arg(2);
        call.arg(keys::stream(topic, *partition)).arg(keys::meta(topic)).arg(keys::channel(topic));
        call.arg(*partition).arg(*n_partitions).arg(events.len());
        for (at, event_at) in events {
            let Some(event) = round.get(*at).and_then(|queued| queued.events.get(*event_at)) else {
                continue;
            };
            let mut n_arguments = 0;
            entry::fields(event, |_, _| n_arguments += 2);
            call.arg(n_arguments);
            entry::fields(event, |name, value| _ = call.arg(name).arg(value));
        }
    }
    if store.options.flushed {
        pipeline.cmd("WAITAOF").arg(1).arg(0).arg(store.options.timeout.as_millis() as u64);
    }
    pipeline.ignore_errors();
    for _ in 0..2 {
        let mut open = match connection.take() {
            Some(open) => open,
            None => match open(store).await {
                Ok(open) => open,
                Err(error) => return all(&error),
            },
        };
        let answers: Result<Vec<Value>, RedisError> = pipeline.query_async(&mut open).await;
        match answers {
            Ok(answers) if answers.iter().take(lanes.len()).all(is_no_script) => {
                // The server forgot its scripts and did nothing: it learns them with the next connection.
            }
            Ok(answers) => {
                *connection = Some(open);
                return read(store, answers, lanes.len());
            }
            Err(error) if is_unknown(&error) => {
                return all(&Error::new(ErrorKind::Unknown, "the server's answer was lost").caused_by(error));
            }
            Err(error) => return all(&from_redis(error)),
        }
    }
    all(&Error::new(ErrorKind::Unavailable, "the server forgets its scripts"))
}

fn is_no_script(answer: &Value) -> bool {
    matches!(answer, Value::ServerError(error) if error.code() == "NOSCRIPT")
}

/// A connection for publishing, whose server knows the script.
async fn open(store: &Store) -> Result<MultiplexedConnection> {
    let mut connection = store.connect().await?;
    script!("append").prepare_invoke().load_async(&mut connection).await.map_err(from_redis)?;
    Ok(connection)
}

fn read(store: &Store, mut answers: Vec<Value>, n_lanes: usize) -> Vec<Result<Vec<u64>>> {
    let mut failed = None;
    if store.options.flushed {
        let flushed = match answers.pop() {
            Some(Value::Array(counts)) => matches!(counts.first(), Some(Value::Int(1..))),
            _ => false,
        };
        if !flushed {
            failed = Some(Error::new(ErrorKind::Unknown, "the server did not say in time that it flushed"));
        }
    }
    let offsets = |answer: Value| match answer {
        Value::Array(ids) => {
            let offset = |id: &Value| match id {
                Value::BulkString(id) => keys::offset(id),
                _ => None,
            };
            match (&failed, ids.iter().map(offset).collect::<Option<Vec<_>>>()) {
                (Some(error), _) => Err(error.duplicate()),
                (None, offsets) => offsets.ok_or_else(unexpected),
            }
        }
        Value::ServerError(error) => Err(from_redis(error.into())),
        _ => Err(unexpected()),
    };
    let mut found: Vec<_> = answers.into_iter().map(offsets).collect();
    found.resize_with(n_lanes, || Err(unexpected()));
    found
}
