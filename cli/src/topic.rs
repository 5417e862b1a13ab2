//! `topic`: create, delete, purge.

use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

use clap::{Args, Subcommand};
use eventbus::{Topic, TopicSpec};
use serde_json::json;

use crate::audit;
use crate::complete;
use crate::exit::{Failure, Outcome};
use crate::out::say;
use crate::range::{self, Bound, Range, resolve};
use crate::session::Session;

/// Creates, empties and deletes topics.
///
/// Examples:
///   eventctl -c sqlite://shop.db topic create orders --partitions 8 --retention 7d
///   eventctl -c sqlite://shop.db topic purge orders --before @-30d --execute --confirm orders
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct TopicCommand {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Creates a topic, or verifies that it is as declared.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db topic create orders --partitions 8 --retention 7d --if-not-exists
    #[command(verbatim_doc_comment)]
    Create {
        /// Its name.
        #[arg(add = complete::topics())]
        topic: Topic,
        /// How many partitions it has.
        #[arg(long, default_value_t = TopicSpec::PARTITIONS)]
        partitions: NonZeroU32,
        /// How long settled events are kept, such as 7d.
        #[arg(long, value_name = "DURATION", value_parser = range::duration)]
        retention: Option<Duration>,
        /// How many settled events of a partition are kept.
        #[arg(long, value_name = "N")]
        keep: Option<NonZeroU64>,
        /// An existing topic of this shape is fine.
        #[arg(long)]
        if_not_exists: bool,
    },
    /// Deletes a topic with its events and its groups' positions.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db topic delete orders.replay --execute --confirm orders.replay
    #[command(verbatim_doc_comment)]
    Delete {
        /// Its name.
        #[arg(add = complete::topics())]
        topic: Topic,
        /// Does it; without, only says what would be done.
        #[arg(long)]
        execute: bool,
    },
    /// Removes events, whoever still wants them.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db topic purge orders --before @-30d --execute --confirm orders
    #[command(verbatim_doc_comment)]
    Purge {
        /// Its name.
        #[arg(add = complete::topics())]
        topic: Topic,
        /// Everything below: N, @TIME, end.
        #[arg(long, value_name = "BOUND", default_value = "end", allow_hyphen_values = true)]
        before: Bound,
        /// Does it; without, only says what would be done.
        #[arg(long)]
        execute: bool,
    },
}

impl TopicCommand {
    /// Whether the command may make a file that does not exist.
    pub(crate) fn creates(&self) -> bool {
        matches!(self.what, What::Create { .. })
    }
}

/// Runs the command.
///
/// # Errors
/// Not found, a conflict, or refused for safety.
pub(crate) async fn run(session: &Session, command: &TopicCommand) -> Outcome {
    let admin = session.admin()?;
    match &command.what {
        What::Create { topic, partitions, retention, keep, if_not_exists } => {
            session.may_write()?;
            let mut spec = TopicSpec::new(topic.clone()).with_partitions(*partitions);
            if let Some(age) = retention {
                spec = spec.with_max_age(*age);
            }
            if let Some(keep) = keep {
                spec = spec.with_max_events(*keep);
            }
            match admin.declare(&spec).await? {
                true => say!("created {topic} with {partitions} partitions"),
                false if *if_not_exists => say!("{topic} exists with {partitions} partitions"),
                false => {
                    return Err(Failure::Runtime(format!(
                        "{topic} exists already (--if-not-exists accepts that)"
                    )));
                }
            }
            Ok(())
        }
        What::Delete { topic, execute } => {
            let info = admin
                .topic(topic)
                .await?
                .ok_or_else(|| Failure::NotFound(format!("there is no topic {topic}")))?;
            let kept: u64 = info.partitions.iter().map(|part| part.n_kept).sum();
            if !execute {
                say!("would delete {topic} with {kept} events; add --execute to do it");
                return Ok(());
            }
            session.may_destroy("topic", topic.as_str())?;
            admin.delete_topic(topic).await?;
            audit::note(session, "delete", json!({"topic": topic.as_str(), "events": kept})).await?;
            say!("deleted {topic} with {kept} events");
            Ok(())
        }
        What::Purge { topic, before, execute } => {
            let spans = resolve(admin, topic, Range { from: Bound::Start, to: *before }).await?;
            let total: u64 = spans.iter().map(crate::range::Span::len).sum();
            if !execute {
                say!("would remove {total} events of {topic}; add --execute to do it");
                return Ok(());
            }
            session.may_destroy("topic", topic.as_str())?;
            let mut removed = 0;
            for span in spans {
                removed += admin.purge(topic, span.partition, span.to).await?;
            }
            audit::note(session, "purge", json!({"topic": topic.as_str(), "events": removed})).await?;
            say!("removed {removed} events of {topic}");
            Ok(())
        }
    }
}
