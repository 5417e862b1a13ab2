//! `doctor`: is this bus fit to be trusted?

use std::time::{Duration, Instant};

use clap::Args;
use eventbus::{Envelope, Group, Polled, Settle, Subscription, Topic};

use crate::context::Session;
use crate::exit::{Failure, Outcome};
use crate::out::Out;
use crate::out::row;

/// How long the canary may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Checks that the bus works: reads, counts, sends a canary round. Exit code 7 if not.
///
/// Examples:
///   eventctl -c sqlite://shop.db doctor -o table
///   eventctl -c sqlite://shop.db doctor --fix-hints
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Doctor {
    /// Says what to do about each finding.
    #[arg(long)]
    fix_hints: bool,
}

/// What to do about a finding; nothing about what is well.
fn hint(check: &str, state: &str, detail: &str) -> Option<&'static str> {
    match (check, state) {
        ("dead letters", _) if detail != "0" => Some("eventctl dlq list --group-by reason"),
        ("lag of all groups", _) if detail != "0" => Some("eventctl inspect groups --lag-gt 0 --sort lag"),
        (_, "ok") => None,
        ("integrity", _) => Some("stop the programs, keep a copy of the file, and restore the last good one"),
        ("journal mode", _) => Some("open it with a program of this framework: it sets the write-ahead log"),
        ("library", _) => Some("build with the bundled SQLite, or a system one of 3.51.3 or later"),
        _ => Some("look at the detail, then again with -v"),
    }
}

/// Runs the checks; each is a row.
///
/// # Errors
/// Check: one of them is false.
pub(crate) async fn run(session: &Session, doctor: &Doctor, out: &mut Out) -> Outcome {
    let mut rows = Vec::new();
    let mut failed = Vec::new();
    let mut check = |name: &str, outcome: Result<String, String>| {
        let (state, detail) = match outcome {
            Ok(detail) => ("ok", detail),
            Err(detail) => {
                failed.push(name.to_owned());
                ("FAILED", detail)
            }
        };
        let mut row = row! {"check": name, "state": state, "detail": detail};
        if doctor.fix_hints {
            row.insert("hint".into(), hint(name, state, &detail).into());
        }
        rows.push(row);
    };
    let admin = session.admin()?;
    let topics = admin.topics().await;
    check(
        "read",
        topics.as_ref().map(|topics| format!("{} topics", topics.len())).map_err(ToString::to_string),
    );
    for (name, outcome) in session.file().map(|file| file_checks(&file)).unwrap_or_default() {
        check(name, outcome);
    }
    let letters: u64 = topics
        .unwrap_or_default()
        .iter()
        .filter(|info| info.topic.as_str().ends_with(".dlq"))
        .flat_map(|info| &info.partitions)
        .map(|part| part.n_kept)
        .sum();
    check("dead letters", Ok(letters.to_string()));
    let groups = admin.groups(None).await?;
    let lag: u64 =
        groups.iter().filter(|group| !crate::inspect::is_internal(&group.topic)).map(|group| group.lag).sum();
    check("lag of all groups", Ok(lag.to_string()));
    if session.may_write().is_ok() {
        check(
            "canary: publish, consume, settle",
            canary(session).await.map(|took| format!("{} ms", took.as_millis())),
        );
    }
    out.rows(rows)?;
    if failed.is_empty() { Ok(()) } else { Err(Failure::Check(format!("failed: {}", failed.join(", ")))) }
}

#[cfg(not(feature = "sqlite"))]
fn file_checks(_: &std::path::Path) -> Vec<(&'static str, Result<String, String>)> {
    Vec::new()
}

/// What can be said of the embedded file without the bus.
#[cfg(feature = "sqlite")]
fn file_checks(path: &std::path::Path) -> Vec<(&'static str, Result<String, String>)> {
    let text = |error: rusqlite::Error| error.to_string();
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let file = match rusqlite::Connection::open_with_flags(path, flags) {
        Ok(file) => file,
        Err(error) => return vec![("file", Err(error.to_string()))],
    };
    let ask = |sql: &str| file.query_row(sql, [], |row| row.get::<_, String>(0)).map_err(text);
    let is = |found: String, wanted: &str| if found == wanted { Ok(found) } else { Err(found) };
    let library = if rusqlite::version_number() >= 3_051_003 {
        Ok(rusqlite::version().to_owned())
    } else {
        Err(format!("{}: its write-ahead log can corrupt the file before 3.51.3", rusqlite::version()))
    };
    vec![
        ("integrity", ask("PRAGMA quick_check(1)").and_then(|found| is(found, "ok"))),
        ("journal mode", ask("PRAGMA journal_mode").and_then(|found| is(found, "wal"))),
        ("library", library),
    ]
}

/// One event all the way round.
async fn canary(session: &Session) -> Result<Duration, String> {
    let text = |error: eventbus::Error| error.to_string();
    let (topic, is_ours) = session.own_topic("_evt.doctor").await.map_err(text)?;
    let group = Group::new(format!("doctor-{}", std::process::id())).map_err(text)?;
    let took = fly(session, &topic, &group).await;
    if is_ours && let Some(admin) = session.bus.transport().admin() {
        admin.delete_topic(&topic).await.map_err(text)?;
    }
    took
}

async fn fly(session: &Session, topic: &Topic, group: &Group) -> Result<Duration, String> {
    let text = |error: eventbus::Error| error.to_string();
    let transport = session.bus.transport();
    let consumer =
        transport.subscribe(&Subscription::group(topic.clone(), group.clone())).await.map_err(text)?;
    let event = Envelope::new("evt.canary", "/eventctl").with_payload("chirp");
    let id = event.id().clone();
    let started = Instant::now();
    let publisher = transport.publisher().await.map_err(text)?;
    publisher.enqueue(topic, vec![event]).await.map_err(text)?.await.all().map_err(text)?;
    let arrives = async {
        loop {
            if let Polled::Deliveries(deliveries) =
                consumer.poll(std::num::NonZeroUsize::MIN).await.map_err(text)?
            {
                let outcomes: Vec<_> =
                    deliveries.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
                consumer.settle(&outcomes).await.map_err(text)?.all().map_err(text)?;
                if deliveries
                    .iter()
                    .any(|delivery| delivery.content.envelope().is_some_and(|event| *event.id() == id))
                {
                    return Ok(started.elapsed());
                }
            }
        }
    };
    let took = tokio::time::timeout(PATIENCE, arrives)
        .await
        .map_err(|_| format!("nothing came within {PATIENCE:?}"))?;
    consumer.close(Instant::now() + PATIENCE).await.map_err(text)?;
    if let Some(admin) = transport.admin() {
        admin.delete_group(group, topic).await.map_err(text)?;
    }
    took
}
