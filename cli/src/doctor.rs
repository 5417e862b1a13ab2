//! `doctor`: is this bus fit to be trusted?

use std::time::{Duration, Instant};

use clap::Args;
use eventbus::fitness::{Probe, Verdict};
use eventbus::{Envelope, Group, Polled, Settle, Subscription, Topic};

use crate::context::Session;
use crate::exit::{Failure, Outcome};
use crate::out::Out;
use crate::out::row;
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
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Doctor {
    #[command(flatten)]
    store: Store,
    /// Says what to do about each finding.
    #[arg(long)]
    fix_hints: bool,
}

/// Runs the checks; each is a row.
///
/// # Errors
/// Check: one of them is false.
pub(crate) async fn run(session: &Session, doctor: &Doctor, out: &mut Out) -> Outcome {
    let mut probes = Vec::new();
    let admin = session.admin()?;
    let topics = admin.topics().await;
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
    let letters: u64 = topics
        .unwrap_or_default()
        .iter()
        .filter(|info| info.topic.as_str().ends_with(".dlq"))
        .flat_map(|info| &info.partitions)
        .map(|part| part.n_kept)
        .sum();
    // They wait for an operator: that is not what a broker is unfit by.
    probes.push(waits(Probe::good("dead letters", letters), letters, "eventctl dlq list --group-by reason"));
    let groups = admin.groups(None).await?;
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
    let rows = rows.collect();
    out.rows(rows)?;
    if failed.is_empty() { Ok(()) } else { Err(Failure::Check(format!("failed: {}", failed.join(", ")))) }
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
