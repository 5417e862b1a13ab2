//! `inbox`: what consumers remember, and how they forget it.

use clap::{Args, Subcommand};
use eventbus::{Envelope, EventId};

use crate::exit::{Failure, Outcome};
use crate::out::{Out, row, say};
use crate::outbox::readable;
use crate::session::Gate;
use crate::store::Store;

/// Looks into what consumers remember that handle each event once.
///
/// It is in the database of --store, else of the context's outbox, else of the bus.
///
/// Examples:
///   eventctl -c sqlite://shop.db inbox list
///   eventctl inbox --store postgres://me@db/shop forget 0193e4f2-7a1c-7000-8000-000000000001
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct InboxCommand {
    #[command(flatten)]
    store: Store,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Lists consumers, or what one of them handled, the latest first.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db inbox list
    ///   eventctl -c sqlite://shop.db inbox list --consumer billing.charge@1
    #[command(verbatim_doc_comment)]
    List {
        /// Its name: service.handler@generation.
        #[arg(long, value_name = "NAME")]
        consumer: Option<String>,
        /// Most events.
        #[arg(short = 'n', long, default_value_t = 100)]
        max: u32,
    },
    /// Has consumers forget an event: when it comes again, as in a replay, they handle it again.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db inbox forget 0193e4f2-7a1c-7000-8000-000000000001 --consumer billing.charge@1
    #[command(verbatim_doc_comment)]
    Forget {
        /// The id of the event, or what list shows.
        id: String,
        /// Only this one.
        #[arg(long, value_name = "NAME", required_unless_present = "all")]
        consumer: Option<String>,
        /// All consumers, of all services.
        #[arg(long, conflicts_with = "consumer")]
        all: bool,
        /// The source of the event, if its id is no UUID.
        #[arg(long, default_value = "/eventctl")]
        source: String,
    },
}

impl InboxCommand {
    /// Where it is, as far as the command line says.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }
}

/// Runs the command.
///
/// # Errors
/// Connect: the database cannot be reached. Not found: a consumer, an event.
pub(crate) async fn run(command: &InboxCommand, gate: &Gate, out: &mut Out) -> Outcome {
    let store = command.store.open(gate).await?;
    let inbox = store.inbox_operator();
    match &command.what {
        What::List { consumer: None, .. } => {
            let consumers = inbox.consumers().await?;
            let rows = consumers.iter().map(|seen| {
                row! {"consumer": seen.consumer, "memory": seen.memory, "known": seen.n_known,
                "begun": seen.n_begun, "oldest_ms": seen.oldest_ms, "remembers_seconds": seen.remembers_seconds}
            });
            out.rows(rows.collect())
        }
        What::List { consumer: Some(name), max } => {
            let Some(memory) = inbox.memory(name).await? else {
                return Err(Failure::NotFound(format!("there is no consumer {name}")));
            };
            if memory == "events" {
                let handled = inbox.handled(name, *max).await?;
                let rows = handled.iter().map(|one| row! {"event_id": one.event_id, "age_ms": one.age_ms});
                return out.rows(rows.collect());
            }
            let progress = inbox.progress(name, *max).await?;
            let rows = progress.iter().map(|one| {
                row! {"source": one.source, "key": readable(&one.key), "last_seq": one.last_seq, "age_ms": one.age_ms}
            });
            out.rows(rows.collect())
        }
        What::Forget { id, consumer, all, source } => {
            let event = Envelope::new("", source.clone()).with_id(EventId::parse(id));
            match all {
                true => gate.may_destroy("what all consumers remember of", id)?,
                false => gate.may_write()?,
            }
            let mut n = inbox.forget(consumer.as_deref(), outbox::known_by(&event)).await?;
            // As list shows it: what an event is known by, in another form than ids have.
            if n == 0
                && let Ok(known_by) = uuid::Uuid::try_parse(id)
            {
                n = inbox.forget(consumer.as_deref(), known_by).await?;
            }
            match n {
                0 => Err(Failure::NotFound(format!(
                    "nobody remembers {id} by its id (of keys that are known by their numbers, none can be forgotten)"
                ))),
                n => {
                    say!("{n} consumers do not remember {id} any more");
                    Ok(())
                }
            }
        }
    }
}
