//! `doctor`: is this bus fit to be trusted?

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use eventbus::admin::{GroupInfo, TopicInfo};
use eventbus::fitness::{Probe, Verdict};
use eventbus::{Envelope, Group, Polled, Settle, Subscription, Topic};
use serde_json::{Map, Value, json};

use crate::exit::{Failure, Outcome};
use crate::out::Out;
use crate::out::{row, say};
use crate::session::Session;
use crate::store::Store;

/// How long the canary may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Checks that the bus works and is set up to keep its promises: settings, counts, a canary round. Exit code 7 if not.
///
/// It looks at an outbox as well: that of --store, else of the context, else in the database of the bus if there is one.
///
/// Examples:
///   eventctl -c sqlite://shop.db doctor -o table
///   eventctl -c sqlite://shop.db doctor --fix-hints
///   eventctl -c sqlite://shop.db doctor --bundle doctor.json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Doctor {
    #[command(flatten)]
    store: Store,
    /// Says what to do about each finding.
    #[arg(long)]
    fix_hints: bool,
    /// Writes into a file what somebody who helps has to know: checks, capabilities, topics, groups. No bodies, no secrets.
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
}

/// Runs the checks; each is a row.
///
/// # Errors
/// Check: one of them is false.
pub(crate) async fn run(session: &Session, doctor: &Doctor, out: &mut Out) -> Outcome {
    let mut probes = Vec::new();
    let admin = session.admin()?;
    let topics = admin.topics().await;
    let mut bundle = Bundle::default();
    probes.push(match &topics {
        Ok(topics) => Probe::good("read", format_args!("{} topics", topics.len())),
        Err(error) => Probe::good("read", error).or_bad(false, "look at the detail, then again with -v"),
    });
    match admin.probes().await {
        Ok(found) => probes.extend(found),
        Err(error) => {
            let probe = Probe::good("settings", error);
            probes.push(probe.or_bad(false, "let this user read the settings of the broker"));
        }
    }
    let topics = topics.unwrap_or_default();
    let letters: u64 = topics
        .iter()
        .filter(|info| info.topic.as_str().ends_with(".dlq"))
        .flat_map(|info| &info.partitions)
        .map(|part| part.n_kept)
        .sum();
    // They wait for an operator: that is not what a broker is unfit by.
    probes.push(waits(Probe::good("dead letters", letters), letters, "eventctl dlq list --group-by reason"));
    let groups = admin.groups(None).await?;
    if doctor.bundle.is_some() {
        bundle = Bundle::of(&topics, &groups);
    }
    let lag: u64 =
        groups.iter().filter(|group| !crate::inspect::is_internal(&group.topic)).map(|group| group.lag).sum();
    probes.push(waits(
        Probe::good("lag of all groups", lag),
        lag,
        "eventctl inspect groups --lag-gt 0 --sort lag",
    ));
    if session.may_write().is_ok() {
        let flown = canary(session).await;
        let is_back = flown.is_ok();
        let detail = flown.map_or_else(|problem| problem, |took| format!("{} ms", took.as_millis()));
        let probe = Probe::good("canary: publish, consume, settle", detail);
        probes.push(probe.or_bad(is_back, "look at the detail, then again with -v"));
    }
    let found = match doctor.store.look(session).await {
        Ok(Some(store)) => store.operator().probes().await.map(Some).map_err(Failure::from),
        Ok(None) => Ok(None),
        Err(failure) => Err(failure),
    };
    match found {
        Ok(Some(mut found)) => {
            found.iter_mut().for_each(|probe| probe.name.insert_str(0, "outbox: "));
            probes.extend(found);
        }
        Ok(None) => {}
        Err(failure) => {
            let probe = Probe::good("outbox: read", failure);
            probes.push(probe.or_bad(false, "look at the detail; eventctl outbox status"));
        }
    }
    let is_bad = |probe: &&Probe| probe.verdict == Verdict::Bad;
    let failed: Vec<String> = probes.iter().filter(is_bad).map(|probe| probe.name.clone()).collect();
    let rows = probes.into_iter().map(|probe| {
        let mut row = row! {
            "check": probe.name, "state": probe.verdict.to_string(), "detail": probe.detail
        };
        if doctor.fix_hints {
            row.insert("hint".into(), Some(probe.hint).filter(|hint| !hint.is_empty()).into());
        }
        row
    });
    let rows: Vec<_> = rows.collect();
    if let Some(path) = &doctor.bundle {
        bundle.write(session, &rows, path)?;
        say!("{} holds what was found: read it before you give it away", path.display());
    }
    out.rows(rows)?;
    if failed.is_empty() { Ok(()) } else { Err(Failure::Check(format!("failed: {}", failed.join(", ")))) }
}

/// What is known of a bus, for somebody else.
#[derive(Default)]
struct Bundle {
    topics: Vec<Value>,
    groups: Vec<Value>,
}

impl Bundle {
    fn of(topics: &[TopicInfo], groups: &[GroupInfo]) -> Self {
        let parts = |info: &TopicInfo| -> Vec<Value> {
            let parts = info.partitions.iter();
            parts
                .map(|part| json!({"first": part.first.0, "next": part.next.0, "kept": part.n_kept}))
                .collect()
        };
        let topic = |info: &TopicInfo| json!({"topic": info.topic.as_str(), "partitions": parts(info)});
        let group = |info: &GroupInfo| {
            json!({"group": info.group.as_str(), "topic": info.topic.as_str(), "partition": info.partition.0,
            "settled": info.settled.0, "end": info.end.0, "lag": info.lag, "is_owned": info.owner.is_some()})
        };
        Self { topics: topics.iter().map(topic).collect(), groups: groups.iter().map(group).collect() }
    }

    fn write(self, session: &Session, checks: &[Map<String, Value>], path: &Path) -> Outcome {
        let claims = session.bus.transport().capabilities().rows().into_iter();
        let claims: Map<String, Value> =
            claims.map(|(axis, claim)| (axis.to_owned(), claim.to_string().into())).collect();
        let whole = json!({
            "schema": "eventctl.doctor-bundle/1",
            "eventctl": env!("CARGO_PKG_VERSION"),
            "system": format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            "at": eventbus::time::to_rfc3339(std::time::SystemTime::now()),
            // Neither who connects, nor with which options.
            "bus": session.place(),
            "protected": session.context.protected,
            "read_only": session.context.read_only,
            "checks": checks,
            "capabilities": claims,
            "topics": self.topics,
            "groups": self.groups,
        });
        let text =
            serde_json::to_string_pretty(&whole).map_err(|error| Failure::Runtime(error.to_string()))?;
        Ok(std::fs::write(path, text + "\n")?)
    }
}

/// Says how to look at what waits, if anything does.
fn waits(probe: Probe, n_waiting: u64, hint: &'static str) -> Probe {
    if n_waiting == 0 { probe } else { probe.with_hint(hint) }
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
