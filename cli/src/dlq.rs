//! `dlq`: dead letters: list, show, redrive.

use std::collections::BTreeMap;
use std::time::SystemTime;

use clap::{Args, Subcommand, ValueEnum};
use eventbus::admin::Record;
use eventbus::{Envelope, Topic};
use serde_json::json;

use crate::complete;
use crate::exit::{Failure, Outcome};
use crate::held::{self, Held, Sequence};
use crate::inspect::record_at;
use crate::jq::Jq;
use crate::out::Out;
use crate::out::row;
use crate::out::say;
use crate::pace::Pace;
use crate::range::{Bound, Range, resolve};
use crate::reader::{Filter, Reader, event};
use crate::session::Session;
use crate::{audit, record};

/// Looks at dead letters and sends them back.
///
/// Examples:
///   eventctl -c sqlite://shop.db dlq list --group-by reason
///   eventctl -c sqlite://shop.db dlq redrive --reason payment.timeout --execute
///   eventctl -c sqlite://shop.db dlq list --parked-keys
///   eventctl -c sqlite://shop.db dlq redrive --sequence order-17 --execute
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Dlq {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum By {
    Reason,
    Type,
    Handler,
    Exception,
    Key,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Lists the letters that are not redriven or resolved.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db dlq list --group-by reason
    ///   eventctl -c sqlite://shop.db dlq list --parked-keys
    #[command(verbatim_doc_comment)]
    List {
        /// Lists the keys that wait for an operator instead.
        #[arg(long, conflicts_with = "group_by")]
        parked_keys: bool,
        /// Counts instead.
        #[arg(long, value_enum)]
        group_by: Option<By>,
        /// Only letters of this topic.
        #[arg(long, value_name = "TOPIC", add = complete::topics())]
        dest: Option<Topic>,
        /// Only letters that are younger, such as 1h.
        #[arg(long, value_name = "TIME", value_parser = crate::range::duration)]
        since: Option<std::time::Duration>,
        #[command(flatten)]
        filter: Filter,
    },
    /// Shows one letter whole.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db dlq show orders.dlq/3@0
    #[command(verbatim_doc_comment)]
    Show {
        /// Its place: topic.dlq/partition@offset.
        reference: String,
    },
    /// Publishes letters again: by default only for the handler that failed.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db dlq redrive orders.dlq/3@0 --execute
    ///   eventctl -c sqlite://shop.db dlq redrive --reason payment.timeout --execute
    ///   eventctl -c sqlite://shop.db dlq redrive --sequence order-17 --execute
    #[command(verbatim_doc_comment)]
    Redrive {
        /// Places of letters; without, the filters choose.
        #[arg(conflicts_with = "sequence")]
        references: Vec<String>,
        #[command(flatten)]
        sequence: Sequence,
        /// Only letters with this reason.
        #[arg(long = "reason", alias = "group", value_name = "REASON")]
        reason: Option<String>,
        /// Only letters of this topic.
        #[arg(long, value_name = "TOPIC", add = complete::topics())]
        dest: Option<Topic>,
        #[command(flatten)]
        filter: Filter,
        /// Where to: handler (only who failed), origin (everybody), or a topic.
        #[arg(long, default_value = "handler", value_name = "handler|origin|TOPIC")]
        to: String,
        /// At most so many.
        #[arg(long, default_value_t = 1000, value_name = "N")]
        max: usize,
        /// However many there are.
        #[arg(long, conflicts_with = "max")]
        all: bool,
        /// Letters that were redriven so often are left alone.
        #[arg(long, default_value_t = 2, value_name = "N")]
        max_replays: u32,
        /// No faster than this, such as 50/s.
        #[arg(long, value_name = "N/s", value_parser = crate::range::rate)]
        rate: Option<f64>,
        /// The letters stay open: they can be redriven again.
        #[arg(long)]
        keep: bool,
        /// Publishes what this jq filter makes of each record, such as '.value.data.card = null'.
        #[arg(long, value_name = "JQ")]
        edit: Option<String>,
        /// Does it; without, only says what would be done.
        #[arg(long)]
        execute: bool,
    },
    /// Closes letters without running them again.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db dlq resolve orders.dlq/3@0 --reason 'paid by hand' --execute
    #[command(verbatim_doc_comment)]
    Resolve {
        /// Places of letters.
        #[arg(required_unless_present = "sequence", conflicts_with = "sequence")]
        references: Vec<String>,
        #[command(flatten)]
        sequence: Sequence,
        /// Only letters of this topic.
        #[arg(long, value_name = "TOPIC", add = complete::topics())]
        dest: Option<Topic>,
        /// Why, for the audit.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Does it; without, only says what would be done.
        #[arg(long)]
        execute: bool,
    },
}

impl Dlq {
    /// Whether it publishes.
    pub(crate) fn executes(&self) -> bool {
        matches!(&self.what, What::Redrive { execute: true, .. })
    }
}

struct Letter {
    topic: Topic,
    place: String,
    record: Record,
    event: Envelope,
}

impl Letter {
    fn mark(&self, name: &str) -> &str {
        self.event.extension(name).unwrap_or("-")
    }

    /// Replaces the body and what else a jq filter changes; the marks of the letter stay.
    fn edit(&mut self, session: &Session, edit: &Jq) -> Outcome {
        self.event = record::edited(&session.broker, &self.topic, &self.record, edit)?;
        Ok(())
    }
}

async fn letters(session: &Session, dest: Option<&Topic>, filter: &Filter) -> Outcome<Vec<Letter>> {
    let admin = session.admin()?;
    let settled = audit::settled_letters(session).await?;
    let wanted = dest.map(Topic::dead_letters).transpose()?;
    let (mut found, filter) = (Vec::new(), filter.ready(&session.broker)?);
    for info in admin.topics().await? {
        let of_dest = wanted.as_ref().is_none_or(|wanted| *wanted == info.topic);
        if !info.topic.as_str().ends_with(".dlq") || !of_dest {
            continue;
        }
        let spans = resolve(admin, &info.topic, Range { from: Bound::Start, to: Bound::End }).await?;
        let mut reader = Reader::new(admin, info.topic.clone(), spans);
        while let Some(record) = reader.next().await? {
            let place = record::reference(&info.topic, &record);
            let Some(event) = event(&record).cloned() else { continue };
            if filter.takes(&info.topic, &record)? && !settled.contains(&audit::name_of(&place, event.id())) {
                found.push(Letter { topic: info.topic.clone(), place, record, event });
            }
        }
    }
    Ok(found)
}

/// The letters that were stored since.
fn young(letters: Vec<Letter>, since: Option<std::time::Duration>) -> impl Iterator<Item = Letter> {
    let begin = since.and_then(|since| SystemTime::now().checked_sub(since));
    letters.into_iter().filter(move |letter| begin.is_none_or(|begin| letter.record.stored_at >= begin))
}

fn age(letter: &Letter) -> String {
    let age = SystemTime::now().duration_since(letter.record.stored_at).unwrap_or_default();
    format!("{:.0}s", age.as_secs_f64())
}

/// Runs the command.
///
/// # Errors
/// Not found, refused for safety, or partial.
pub(crate) async fn run(session: &Session, dlq: &Dlq, out: &mut Out) -> Outcome {
    match &dlq.what {
        What::List { parked_keys: true, dest, .. } => {
            let rows = held::all(session, dest.as_ref()).await?.into_iter().map(|held| {
                row! {"topic": held.topic.to_string(), "group": held.group.to_string(), "key": held.key.key.to_string(),
                "event": held.key.event.to_string(), "at": format!("{}/{}@{}", held.topic, held.key.partition, held.key.offset),
                "attempts": held.key.attempts, "waiting": held.key.n_waiting}
            });
            out.rows(rows.collect())
        }
        What::List { group_by: None, dest, filter, since, .. } => {
            let rows = young(letters(session, dest.as_ref(), filter).await?, *since).map(|letter| {
                row! {"ref": letter.place, "reason": letter.mark("evt-dlq-reason"), "group": letter.mark("evt-dlq-group"),
                "handler": letter.mark("evt-dlq-handler"), "type": letter.event.event_type(),
                "key": letter.event.key().map(|key| key.to_string()), "attempts": letter.mark("evt-dlq-attempts"),
                "age": age(&letter), "error": letter.mark("evt-dlq-error-message")}
            });
            out.rows(rows.collect())
        }
        What::List { group_by: Some(by), dest, filter, since, .. } => {
            let mut groups: BTreeMap<(String, String), Vec<Letter>> = BTreeMap::new();
            for letter in young(letters(session, dest.as_ref(), filter).await?, *since) {
                let name = match by {
                    By::Reason => letter.mark("evt-dlq-reason").to_owned(),
                    By::Type => letter.event.event_type().to_owned(),
                    By::Handler => letter.mark("evt-dlq-handler").to_owned(),
                    By::Exception => letter.mark("evt-dlq-error-message").to_owned(),
                    By::Key => letter.event.key().map_or_else(|| "-".into(), |key| key.to_string()),
                };
                let handler = format!("{}.{}", letter.mark("evt-dlq-group"), letter.mark("evt-dlq-handler"));
                groups.entry((name, handler)).or_default().push(letter);
            }
            let rows = groups.into_iter().map(|((name, handler), letters)| {
                let (oldest, newest) = (letters.iter().min_by_key(|l| l.record.stored_at), letters.iter().max_by_key(|l| l.record.stored_at));
                row! {"reason": name, "handler": handler, "count": letters.len(), "oldest": oldest.map(age), "newest": newest.map(age),
                "sample": newest.map(|letter| letter.place.clone())}
            });
            out.rows(rows.collect())
        }
        What::Show { reference } => {
            let (topic, record) = record_at(session, reference).await?;
            let json = record::to_json(&session.broker, &topic, &record);
            out.document(&json)?;
            say!("next: eventctl dlq redrive {reference} --execute");
            Ok(())
        }
        What::Redrive { sequence: Sequence { sequence: Some(key), consumer }, dest, execute, .. } => {
            let held = held::one(session, dest.as_ref(), key, consumer.as_ref()).await?;
            let what = format!("key {key} of {} with {} events behind it", held.group, held.key.n_waiting);
            if !execute {
                say!("would redrive {what}; add --execute to do it");
                return Ok(());
            }
            session.may_write()?;
            held.keys(&session.bus)?.redrive(&held.key).await?;
            close(session, &held, "redrive", json!({"to": "sequence"})).await?;
            say!("redrove {what}");
            Ok(())
        }
        What::Resolve {
            sequence: Sequence { sequence: Some(key), consumer }, dest, reason, execute, ..
        } => {
            let held = held::one(session, dest.as_ref(), key, consumer.as_ref()).await?;
            let what = format!("key {key} of {}: {} events go on", held.group, held.key.n_waiting);
            if !execute {
                say!("would resolve {what}; add --execute to do it");
                return Ok(());
            }
            session.may_write()?;
            held.keys(&session.bus)?.resolve(&held.key, reason).await?;
            close(session, &held, "resolve", json!({"reason": reason})).await?;
            say!("resolved {what}");
            Ok(())
        }
        What::Redrive {
            references,
            reason,
            dest,
            filter,
            to,
            max,
            all,
            max_replays,
            rate,
            keep,
            edit,
            execute,
            ..
        } => {
            let mut chosen = letters(session, dest.as_ref(), filter).await?;
            chosen.retain(|letter| {
                let named = references.is_empty() || references.contains(&letter.place);
                named && reason.as_deref().is_none_or(|reason| letter.mark("evt-dlq-reason") == reason)
            });
            if let Some(missing) =
                references.iter().find(|reference| !chosen.iter().any(|letter| letter.place == **reference))
            {
                return Err(Failure::NotFound(format!("there is no open dead letter at {missing}")));
            }
            let no_event = |letter: &Letter| {
                letter.event.event_type() == "evt.undecodable"
                    || letter.event.extension("evt-dlq-origin").is_none()
            };
            if matches!(to.as_str(), "handler" | "origin")
                && let Some(letter) = chosen.iter().find(|letter| no_event(letter))
            {
                let why = "is no event that a handler could take: choose others, or give --to TOPIC";
                return Err(Failure::Refused(format!("{} {why}", letter.place)));
            }
            let n_tired =
                chosen.iter().filter(|letter| record::n_replays(&letter.event) >= *max_replays).count();
            chosen.retain(|letter| record::n_replays(&letter.event) < *max_replays);
            let n_more = if *all { 0 } else { chosen.len().saturating_sub(*max) };
            chosen.truncate(chosen.len() - n_more);
            let mut tired = String::new();
            if n_tired > 0 {
                tired += &format!("; {n_tired} left alone after {max_replays} replays");
            }
            if n_more > 0 {
                tired += &format!("; {n_more} more above --max {max}");
            }
            if !execute {
                say!("would redrive {} dead letters to {to}{tired}; add --execute to do it", chosen.len());
                return Ok(());
            }
            let edit = edit.as_deref().map(Jq::compile).transpose()?;
            if let Some(edit) = &edit {
                // What cannot be edited is found before anything is written.
                chosen.iter_mut().try_for_each(|letter| letter.edit(session, edit))?;
            }
            session.may_write()?;
            redrive(session, &chosen, to, *rate, *keep).await?;
            say!("redrove {} dead letters to {to}{tired}", chosen.len());
            Ok(())
        }
        What::Resolve { references, dest, reason, execute, .. } => {
            let open = letters(session, dest.as_ref(), &Filter::default()).await?;
            if let Some(missing) =
                references.iter().find(|reference| !open.iter().any(|letter| letter.place == **reference))
            {
                return Err(Failure::NotFound(format!("there is no open dead letter at {missing}")));
            }
            if !execute {
                say!("would resolve {} dead letters; add --execute to do it", references.len());
                return Ok(());
            }
            session.may_write()?;
            let closed = open.iter().filter(|letter| references.contains(&letter.place));
            let names: Vec<_> =
                closed.map(|letter| audit::name_of(&letter.place, letter.event.id())).collect();
            audit::note(session, "resolve", json!({"letters": names, "reason": reason})).await?;
            say!("resolved {} dead letters", references.len());
            Ok(())
        }
    }
}

/// Notes that the letters of a parked event are settled.
async fn close(session: &Session, held: &Held, verb: &str, mut how: serde_json::Value) -> Outcome {
    let open = letters(session, Some(&held.topic), &Filter::default()).await?;
    let of_it = open.iter().filter(|letter| {
        *letter.event.id() == held.key.event && letter.mark("evt-dlq-group") == held.group.as_str()
    });
    let names: Vec<_> = of_it.map(|letter| audit::name_of(&letter.place, letter.event.id())).collect();
    how["letters"] = json!(names);
    audit::note(session, verb, how).await
}

/// Publishes letters again, confirmed, oldest first, and only then notes that they are settled.
async fn redrive(session: &Session, letters: &[Letter], to: &str, rate: Option<f64>, keep: bool) -> Outcome {
    let publisher = session.bus.transport().publisher().await?;
    let pace = Pace::begin(rate);
    for (at, letter) in letters.iter().enumerate() {
        pace.keep(at as u64).await;
        let topic = match to {
            "handler" | "origin" => Topic::new(letter.mark("evt-dlq-origin"))?,
            other => Topic::new(other)?,
        };
        let count = record::n_replays(&letter.event) + 1;
        let mut event = letter
            .event
            .clone()
            .without_extensions(|name| {
                name.starts_with("evt-dlq-") || matches!(name, "evt-replay-group" | "evt-replay-handler")
            })
            .with_extension("evt-replay-of", &letter.place)
            .with_extension("evt-replay-count", count.to_string());
        if to == "handler" {
            event =
                record::only_for(event, letter.mark("evt-dlq-group"), Some(letter.mark("evt-dlq-handler")));
        }
        publisher.enqueue(&topic, vec![event]).await?.await.all()?;
        audit::note(
            session,
            // A letter that stays open is noted under another word.
            if keep { "copy" } else { "redrive" },
            json!({"letters": [audit::name_of(&letter.place, letter.event.id())], "to": to}),
        )
        .await?;
    }
    Ok(())
}
