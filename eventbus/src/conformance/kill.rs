//! D1, D4: processes that die. The child plays a role and says what it has done; the parent kills it
//! and compares.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::sync::Arc;

use parking_lot::Mutex;

use super::check::{Violation, ensure, ensure_eq};
use super::cx::{Checked, Cx};
use crate::capability::Durability;
use crate::envelope::Envelope;
use crate::error::Result;
use crate::id::EventId;
use crate::name::{Group, Topic};
use crate::subscription::Subscription;
use crate::transport::{Consumer, Polled, Settle, Transport};

/// Plays the child's role: `publish TOPIC STEPS` or `consume TOPIC GROUP STEPS`. After so many steps it
/// waits: it ends only by being killed, or by an error. A subject's child program connects and calls this
/// with its arguments.
///
/// # Errors
/// What the transport reports, or a role that does not exist.
pub async fn child(transport: Arc<dyn Transport>, arguments: &[String]) -> Result<()> {
    // What was polled stays in hand, so that the parent's kill is what takes it away.
    let mut held = None;
    match arguments {
        [role, topic, steps] if role == "publish" => {
            publish(&*transport, &Topic::new(topic)?, parse(steps)?).await?;
        }
        [role, topic, group, steps] if role == "consume" => {
            let consumer =
                consume(&*transport, &Topic::new(topic)?, Group::new(group)?, parse(steps)?).await?;
            held = Some(consumer);
        }
        other => return Err(crate::Error::config(format!("not a role: {}", other.join(" ")))),
    }
    let () = std::future::pending().await;
    drop(held);
    Ok(())
}

fn parse(steps: &str) -> Result<usize> {
    steps.parse().map_err(|_| crate::Error::config(format!("not a number of steps: {steps}")))
}

/// Says a word about an event; the parent may kill us right after any of them.
fn say(word: &str, id: &EventId) {
    let mut out = std::io::stdout().lock();
    // A parent that does not listen any more has killed us already.
    drop(writeln!(out, "{word} {id}").and_then(|()| out.flush()));
}

async fn publish(transport: &dyn Transport, topic: &Topic, steps: usize) -> Result<()> {
    let publisher = transport.publisher().await?;
    for n in 0..steps {
        let event = Envelope::new("conformance.event", "/child")
            .with_key((n % 7).to_string())
            .with_payload(vec![7; 100]);
        let id = event.id().clone();
        publisher.enqueue(topic, vec![event]).await?.await.single()?;
        say("ok", &id);
    }
    Ok(())
}

async fn consume(
    transport: &dyn Transport,
    topic: &Topic,
    group: Group,
    steps: usize,
) -> Result<Arc<dyn Consumer>> {
    let consumer = transport.subscribe(&Subscription::group(topic.clone(), group)).await?;
    let mut n_acked = 0;
    loop {
        let Polled::Deliveries(deliveries) = consumer.poll(super::cx::some(64)).await? else { continue };
        let ids: Vec<_> = deliveries
            .iter()
            .filter_map(|delivery| Some((delivery.token, delivery.content.envelope()?.id().clone())))
            .collect();
        ids.iter().for_each(|(_, id)| say("got", id));
        // One by one, so that a kill falls between two of them.
        for (token, id) in ids {
            say("acking", &id);
            consumer.settle(&[(token, Settle::Ack)]).await?.all()?;
            say("acked", &id);
            n_acked += 1;
            if n_acked == steps {
                return Ok(consumer);
            }
        }
    }
}

/// A child that does not outlive the case that started it, however the case ends.
struct Child(Arc<Mutex<std::process::Child>>);

impl Drop for Child {
    fn drop(&mut self) {
        // SIGKILL: nothing of the child runs after this. What it had said stays in the pipe.
        let mut child = self.0.lock();
        drop(child.kill());
        drop(child.wait());
    }
}

/// Steps a child may be ahead of its parent's kill: so that a slow parent does not find all work done.
const AHEAD: usize = 10;

/// Runs a child until it has said a word so often, kills it, and returns all it said.
async fn run_and_kill(
    cx: &Cx,
    arguments: &[&str],
    word: &'static str,
    times: usize,
) -> Checked<Vec<(String, EventId)>> {
    let steps = (times + AHEAD).to_string();
    let arguments: Vec<&str> = arguments.iter().copied().chain([steps.as_str()]).collect();
    let mut command = cx.subject.child(&arguments).ok_or_else(|| Violation::new("no child program"))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| Violation::new(format!("the child did not start: {error}")))?;
    let stdout = child.stdout.take().ok_or_else(|| Violation::new("the child has no output"))?;
    let child = Arc::new(Mutex::new(child));
    let (guard, killed) = (Child(child.clone()), child);
    // The reader ends with the child's output: at the latest when the guard is dropped.
    let reading = tokio::task::spawn_blocking(move || {
        let mut said = Vec::new();
        let mut left = times;
        for line in BufReader::new(stdout).lines().map_while(std::io::Result::ok) {
            if let Some((first, id)) = line.split_once(' ') {
                said.push((first.to_owned(), EventId::parse(id)));
                if first == word {
                    left = left.saturating_sub(1);
                }
            }
            if left == 0 {
                drop(killed.lock().kill());
                left = usize::MAX;
            }
        }
        said
    });
    let said = cx.within("the child", reading).await?.map_err(|panic| Violation::new(panic.to_string()));
    drop(guard);
    said
}

pub(super) async fn confirmed_survives_kill(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    ensure!(
        s.capabilities.durability >= Durability::Process,
        "a child cannot publish to a volatile transport"
    );
    let mut confirmed = Vec::new();
    for _ in 0..cx.size(3, 20) {
        let times = cx.random.usize(5..60);
        let said = run_and_kill(&cx, &["publish", s.topic.as_str()], "ok", times).await?;
        ensure!(said.len() >= times, "the child ended by itself after {} of {times}", said.len());
        confirmed.extend(said.into_iter().map(|(_, id)| id));
    }
    let mut member = s.member;
    let found: Vec<_> =
        member.drain().await?.into_iter().filter_map(|d| Some(d.content.envelope()?.id().clone())).collect();
    let lost = confirmed.iter().filter(|id| !found.contains(id)).count();
    ensure_eq!(lost, 0, "confirmed events that are gone, of {}", confirmed.len());
    Ok(())
}

pub(super) async fn killed_consumer_loses_nothing(mut cx: Cx) -> Checked {
    let s = cx.setup().await?;
    // The group exists; its member here leaves, so that the children get everything.
    s.member.close().await?;
    let events = cx.events(cx.size(200, 1_000), 25);
    s.publish(&events).await?;
    let (mut got, mut acking, mut acked) = (HashSet::new(), HashSet::new(), HashSet::new());
    for _ in 0..cx.size(2, 10) {
        let times = cx.random.usize(5..30);
        for (word, id) in
            run_and_kill(&cx, &["consume", s.topic.as_str(), s.group.as_str()], "acked", times).await?
        {
            let known = match word.as_str() {
                "acked" => &mut acked,
                "acking" => &mut acking,
                _ => &mut got,
            };
            known.insert(id);
        }
    }
    ensure!(got.len() > acked.len(), "nothing was in hand at a kill: the case proved nothing");
    // A child that was killed between a settle and saying so settled it, or did not.
    acking.retain(|id| !acked.contains(id));
    let mut last = cx.join(&s.transport, &s.topic, &s.group).await?;
    let ids = |deliveries: Vec<crate::transport::Delivery>| -> Vec<EventId> {
        deliveries.into_iter().filter_map(|d| Some(d.content.envelope()?.id().clone())).collect()
    };
    let mut wanted: HashSet<_> = events.iter().map(|event| event.id().clone()).collect();
    wanted.retain(|id| !acked.contains(id) && !acking.contains(id));
    let mut returned = Vec::new();
    while !wanted.is_empty() {
        let deliveries =
            last.poll(64).await.map_err(|v| Violation::new(format!("{v}; {} are missing", wanted.len())))?;
        last.ack(&deliveries).await?;
        returned.extend(ids(deliveries));
        returned.iter().for_each(|id| _ = wanted.remove(id));
    }
    returned.extend(ids(last.drain().await?));
    let again = returned.iter().filter(|id| acked.contains(id)).count();
    ensure_eq!(again, 0, "events that a child had settled, and that came again");
    Ok(())
}
