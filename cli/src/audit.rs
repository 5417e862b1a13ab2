//! The audit topic: what was redriven or replayed, when, with which outcome.

use std::collections::HashSet;
use std::time::SystemTime;

use eventbus::time::to_rfc3339;
use eventbus::{Envelope, Topic};
use serde_json::{Value, json};

use crate::exit::Outcome;
use crate::range::{Bound, Range, resolve};
use crate::reader::{Reader, event};
use crate::session::Session;

const TOPIC: &str = "_evt.audit";

/// Names a dead letter: its place can be used again after its topic was deleted, its id with it cannot.
pub(crate) fn name_of(place: &str, id: &eventbus::EventId) -> String {
    format!("{place} {id}")
}

/// Notes what was done. The entry is durable when this returns.
///
/// # Errors
/// The transport fails.
pub(crate) async fn note(session: &Session, action: &str, details: Value) -> Outcome {
    let who = std::env::var("USER").unwrap_or_else(|_| "unknown".into());
    let body = json!({"action": action, "who": who, "at": to_rfc3339(SystemTime::now()), "details": details});
    let entry = Envelope::new("evt.audit", "/eventctl")
        .with_content_type("application/json")
        .with_payload(body.to_string());
    let publisher = session.bus.transport().publisher().await?;
    let (topic, _) = session.own_topic(TOPIC).await?;
    publisher.enqueue(&topic, vec![entry]).await?.await.all()?;
    Ok(())
}

/// Returns the places of dead letters that were redriven or resolved.
///
/// # Errors
/// The transport fails.
pub(crate) async fn settled_letters(session: &Session) -> Outcome<HashSet<String>> {
    let (admin, topic) = (session.admin()?, Topic::new(TOPIC)?);
    let mut found = HashSet::new();
    if admin.topic(&topic).await?.is_none() {
        return Ok(found);
    }
    let spans = resolve(admin, &topic, Range { from: Bound::Start, to: Bound::End }).await?;
    let mut reader = Reader::new(admin, topic, spans);
    while let Some(record) = reader.next().await? {
        let body = event(&record).and_then(|event| serde_json::from_slice::<Value>(event.payload()?).ok());
        let Some(body) = body.filter(|body| body["action"] == "redrive" || body["action"] == "resolve")
        else {
            continue;
        };
        found.extend(
            body["details"]["letters"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|place| Some(place.as_str()?.to_owned())),
        );
    }
    Ok(found)
}
