//! `outbox`: what waits, what is stuck, and how to free it.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use eventbus::Topic;
use outbox::{AnyOutbox, Entry, Operator, Permanent, RowId, Which};
use serde_json::{Map, Value, json};

use crate::exit::{Failure, Outcome};
use crate::out::{Out, row, say};
use crate::range;
use crate::session::{Gate, Session};
use crate::store::Store;

/// Looks into an outbox and frees what is stuck, while programs use it.
///
/// It is the one of --store, else of the context's outbox, else in the database of the bus.
///
/// Examples:
///   eventctl -c sqlite://shop.db outbox status
///   eventctl outbox --store postgres://me@db/shop stuck
///   eventctl -c kafka://broker outbox --store postgres://me@db/shop relay
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct OutboxCommand {
    #[command(flatten)]
    store: Store,
    #[command(subcommand)]
    what: What,
}

/// Which events are listed.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum State {
    Pending,
    Blocked,
    Parked,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Shows how much waits, since when, and who publishes it. Exit code 7 if something is stuck or nobody does.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db outbox status
    #[command(verbatim_doc_comment)]
    Status,
    /// Lists events, the oldest first.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db outbox list --older-than 1m
    ///   eventctl -c sqlite://shop.db outbox list --state parked
    #[command(verbatim_doc_comment)]
    List {
        /// Those that wait, those whose key is blocked, or those that were set aside.
        #[arg(long, value_enum, default_value = "pending")]
        state: State,
        /// Only of this topic.
        #[arg(long)]
        topic: Option<Topic>,
        /// Only what is older.
        #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = range::duration)]
        older_than: Duration,
        /// Most events.
        #[arg(short = 'n', long, default_value_t = 100)]
        max: u32,
    },
    /// Shows one event with its body.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db outbox show 4711
    #[command(verbatim_doc_comment)]
    Show {
        /// Its number.
        id: i64,
    },
    /// Lists keys that wait behind an event that cannot be published. Exit code 7 if there are any.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db outbox stuck
    #[command(verbatim_doc_comment)]
    Stuck,
    /// Lists transactions that hold keys, or hold relays back.
    ///
    /// Examples:
    ///   eventctl outbox --store postgres://me@db/shop blockers
    #[command(verbatim_doc_comment)]
    Blockers,
    /// Publishes to the bus of the context, until Ctrl-C.
    ///
    /// Examples:
    ///   eventctl -c kafka://broker outbox --store postgres://me@db/shop relay
    ///   eventctl -c sqlite://shop.db outbox relay --once
    #[command(verbatim_doc_comment)]
    Relay {
        /// Ends when nothing waits but what is stuck.
        #[arg(long)]
        once: bool,
        /// Sets aside what can never be published, instead of blocking its key.
        #[arg(long)]
        park: bool,
    },
    /// Tries blocked keys at once: that of an event, or all.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db outbox retry
    #[command(verbatim_doc_comment)]
    Retry {
        /// The number of the event that failed.
        id: Option<i64>,
    },
    /// Frees what a relay owns that is known to be gone.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db outbox release shop-77-1a2b3c4d
    #[command(verbatim_doc_comment)]
    Release {
        /// Its name, as status shows it.
        relay: String,
    },
    /// Sets an event aside, so that its key goes on without it.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db outbox park 4711 --reason 'the topic is gone'
    #[command(verbatim_doc_comment)]
    Park {
        /// Its number.
        id: i64,
        /// Why.
        #[arg(long, default_value = "by an operator")]
        reason: String,
    },
    /// Puts an event that was set aside back in its place.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db outbox unpark 4711
    #[command(verbatim_doc_comment)]
    Unpark {
        /// Its number.
        id: i64,
    },
    /// Removes an event that was set aside: it is never published.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db outbox skip 4711 --confirm 4711
    #[command(verbatim_doc_comment)]
    Skip {
        /// Its number.
        id: i64,
    },
    /// Removes events that were set aside long ago. Without --execute it shows how many they are.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db outbox purge --older-than 7d
    ///   eventctl -c sqlite://shop.db outbox purge --older-than 7d --topic orders --execute --confirm parked
    #[command(verbatim_doc_comment)]
    Purge {
        /// For how long they have been set aside at least.
        #[arg(long, value_name = "DURATION", value_parser = range::duration)]
        older_than: Duration,
        /// Only of this topic.
        #[arg(long)]
        topic: Option<Topic>,
        /// Does it.
        #[arg(long)]
        execute: bool,
    },
}

impl OutboxCommand {
    /// Whether it needs the bus, runs until it is told to end, and ends in good order by itself.
    pub(crate) fn relays(&self) -> bool {
        matches!(self.what, What::Relay { .. })
    }

    /// Where it is, as far as the command line says.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }
}

/// An event as a row.
fn shown(entry: &Entry) -> Map<String, Value> {
    row! {"id": entry.id, "topic": entry.topic, "key": entry.key.as_deref().map(readable), "event_id": entry.event_id,
    "age_ms": entry.age_ms, "bytes": entry.size, "attempts": entry.attempts, "error": entry.error}
}

/// A key as text where it is text.
pub(crate) fn readable(hex: &str) -> String {
    let bytes: Vec<u8> = (0..hex.len())
        .step_by(2)
        .filter_map(|at| hex.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok()))
        .collect();
    match String::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => text,
        _ => format!("0x{hex}"),
    }
}

async fn status(operator: &dyn Operator, out: &mut Out) -> Outcome {
    let (status, relays) = (operator.status().await?, operator.relays().await?);
    let names: Vec<Value> = relays
        .iter()
        .map(|relay| json!({"relay": relay.relay, "shards": relay.n_shards, "silent_ms": relay.silent_ms}))
        .collect();
    out.rows(vec![row! {"pending": status.n_pending, "bytes": status.n_bytes, "oldest_ms": status.oldest_ms,
        "blocked_keys": status.n_blocked_keys, "parked": status.n_parked, "unowned_shards": status.n_unowned_shards,
        "relays": names}])?;
    if status.n_blocked_keys > 0 {
        return Err(Failure::Check("keys are blocked: eventctl outbox stuck says why".into()));
    }
    if status.n_pending > 0 && status.n_unowned_shards > 0 {
        return Err(Failure::Check("events wait, and no relay publishes them: is one running?".into()));
    }
    Ok(())
}

/// Runs a relay until it is told to end, or nothing waits that can be published.
async fn relay(outbox: &AnyOutbox, session: &Session, once: bool, park: bool) -> Outcome {
    let shutdown = eventbus::shutdown_signal();
    let permanent = if park { Permanent::Park } else { Permanent::Block };
    let relay = outbox.relay().with_permanent(permanent).start(&session.bus).await?;
    say!("publishing to {}", session.broker);
    let done = async {
        let operator = outbox.operator();
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let status = operator.status().await?;
            let stuck: u64 = operator.stuck(u32::MAX).await?.iter().map(|key| key.n_waiting).sum();
            if once && status.n_unowned_shards == 0 && status.n_pending <= stuck {
                return Ok::<u64, Failure>(stuck);
            }
        }
    };
    let ended = tokio::select! {
        () = shutdown => Ok(0),
        done = done => done,
    };
    let counts = relay.counts();
    relay.stop().await;
    say!("published {}, failed attempts {}, set aside {}", counts.published, counts.failed, counts.parked);
    match ended? {
        0 => Ok(()),
        stuck => Err(Failure::Partial(format!("{stuck} events wait behind keys that are stuck"))),
    }
}

/// Runs the command; `session` is there for those that need the bus.
///
/// # Errors
/// Connect: the database cannot be reached. Not found: an event, a relay. Check: something is stuck.
pub(crate) async fn run(
    command: &OutboxCommand,
    gate: &Gate,
    session: Option<&Session>,
    out: &mut Out,
) -> Outcome {
    let outbox = command.store.open(gate).await?;
    let operator = outbox.operator();
    let missing = |what: &str, id: i64| Failure::NotFound(format!("there is no event {id} that {what}"));
    match &command.what {
        What::Status => status(&*operator, out).await,
        What::List { state, topic, older_than, max } => {
            let which = match state {
                State::Pending => Which::Pending,
                State::Blocked => Which::Blocked,
                State::Parked => Which::Parked,
            };
            let entries = operator.entries(which, topic.as_ref(), *older_than, *max).await?;
            out.rows(entries.iter().map(shown).collect())
        }
        What::Show { id } => {
            let (entry, body) = operator.entry(RowId(*id)).await?.ok_or_else(|| missing("is here", *id))?;
            let mut row = shown(&entry);
            row.insert("head".into(), serde_json::from_str(&entry.head).unwrap_or(Value::String(entry.head)));
            let text = |body: Vec<u8>| match String::from_utf8(body) {
                Ok(text) => Value::String(text),
                Err(error) => {
                    json!({"hex": error.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect::<String>()})
                }
            };
            row.insert("body".into(), body.map_or(Value::Null, text));
            out.document(&Value::Object(row))
        }
        What::Stuck => {
            let stuck = operator.stuck(1000).await?;
            let rows = stuck.iter().map(|key| {
                row! {"topic": key.topic, "key": readable(&key.key), "head": key.head_id, "waiting": key.n_waiting,
                "attempts": key.attempts, "may_pass": key.may_pass, "retry_in_ms": key.retry_in_ms, "error": key.error}
            });
            out.rows(rows.collect())?;
            match stuck.len() {
                0 => Ok(()),
                n => Err(Failure::Check(format!("{n} keys are stuck"))),
            }
        }
        What::Blockers => {
            let rows = operator.blockers().await?.into_iter().map(|blocker| row! {"transaction": blocker});
            out.rows(rows.collect())
        }
        What::Relay { once, park } => {
            gate.may_write()?;
            let session = session.ok_or_else(|| Failure::Usage("no bus: give -c with a context".into()))?;
            relay(&outbox, session, *once, *park).await
        }
        What::Retry { id } => {
            gate.may_write()?;
            let n = operator.retry(id.map(RowId)).await?;
            say!("{n} keys are due now");
            Ok(())
        }
        What::Release { relay } => {
            gate.may_write()?;
            match operator.release(relay).await? {
                0 => Err(Failure::NotFound(format!("there is no relay {relay} that owns something"))),
                n => {
                    say!("{n} shards of {relay} are free");
                    Ok(())
                }
            }
        }
        What::Park { id, reason } => {
            gate.may_write()?;
            match operator.park(RowId(*id), reason).await? {
                true => say!("{id} is set aside; outbox unpark {id} puts it back"),
                false => return Err(missing("waits", *id)),
            }
            Ok(())
        }
        What::Unpark { id } => {
            gate.may_write()?;
            match operator.unpark(RowId(*id)).await? {
                true => say!("{id} is back in its place"),
                false => return Err(missing("was set aside", *id)),
            }
            Ok(())
        }
        What::Purge { older_than, topic, execute } => {
            let (topic, older_than) = (topic.as_ref(), *older_than);
            if !execute || gate.care.dry_run {
                let n = operator.n_parked(topic, older_than).await?;
                say!("{n} events that were set aside would be removed; --execute does it");
                return Ok(());
            }
            gate.may_destroy("what was set aside:", "parked")?;
            say!("{} events that were set aside are gone", operator.purge(topic, older_than).await?);
            Ok(())
        }
        What::Skip { id } => {
            gate.may_destroy("event", &id.to_string())?;
            match operator.discard(RowId(*id)).await? {
                true => say!("{id} is gone, and will not be published"),
                false => return Err(missing("was set aside: outbox park does that", *id)),
            }
            Ok(())
        }
    }
}
