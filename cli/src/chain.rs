//! The events that an event caused, and those that caused it, over all topics.

use std::collections::{BTreeMap, HashMap, HashSet};

use eventbus::Topic;
use eventbus::admin::Record;
use serde_json::{Map, Value};

use crate::exit::Outcome;
use crate::inspect::is_internal;
use crate::out::row;
use crate::range::{Bound, Range, resolve};
use crate::reader::{Reader, event};
use crate::record;
use crate::session::Session;

struct Link {
    id: String,
    cause: Option<String>,
    correlation: Option<String>,
    event_type: String,
    place: String,
}

/// Returns the chain of a record as rows, causes before what they caused, with the depth of each.
///
/// # Errors
/// What reading reports.
pub(crate) async fn chain(session: &Session, of: &Record) -> Outcome<Vec<Map<String, Value>>> {
    let Some(start) = event(of) else { return Ok(Vec::new()) };
    let links = links(session).await?;
    let (start, correlation) = (start.id().to_string(), start.extension("correlationid").map(str::to_owned));
    let by_id: HashMap<&str, &Link> = links.iter().map(|link| (link.id.as_str(), link)).collect();
    let mut children: BTreeMap<&str, Vec<&Link>> = BTreeMap::new();
    for link in &links {
        if let Some(cause) = &link.cause {
            children.entry(cause).or_default().push(link);
        }
    }
    // Up to the first cause that is still there, and whatever belongs to the same conversation.
    let mut roots: Vec<&str> = Vec::new();
    let mut seen = HashSet::new();
    let belongs = |link: &&Link| link.id == start || correlation.is_some() && link.correlation == correlation;
    for link in links.iter().filter(belongs) {
        let (mut root, mut passed) = (link.id.as_str(), HashSet::new());
        while let Some(cause) = by_id.get(root).and_then(|link| link.cause.as_deref())
            && by_id.contains_key(cause)
            && passed.insert(root)
        {
            root = cause;
        }
        if seen.insert(root) {
            roots.push(root);
        }
    }
    let mut rows = Vec::new();
    let mut written = HashSet::new();
    let mut open: Vec<(&str, usize)> = roots.into_iter().rev().map(|root| (root, 0)).collect();
    while let Some((id, depth)) = open.pop() {
        let Some(link) = by_id.get(id).filter(|_| written.insert(id)) else { continue };
        let mark = if id == start { "*" } else { "" };
        rows.push(
            row! {"event": format!("{}{}{mark}", "  ".repeat(depth), link.event_type), "ref": link.place,
            "id": link.id, "depth": depth},
        );
        let caused = children.get(id).into_iter().flatten();
        open.extend(caused.rev().map(|child| (child.id.as_str(), depth + 1)));
    }
    Ok(rows)
}

/// Every event of the users' topics, by the time it was stored.
async fn links(session: &Session) -> Outcome<Vec<Link>> {
    let admin = session.admin()?;
    let mut topics = Vec::new();
    for info in admin.topics().await?.into_iter().filter(|info| !is_internal(&info.topic)) {
        let spans = resolve(admin, &info.topic, Range { from: Bound::Start, to: Bound::End }).await?;
        topics.push((info.topic, spans));
    }
    let mut reader = Reader::over(admin, topics);
    let mut links = Vec::new();
    while let Some((topic, record)) = reader.next_of_any().await? {
        links.extend(link(&topic, &record));
    }
    Ok(links)
}

fn link(topic: &Topic, record: &Record) -> Option<Link> {
    let event = event(record)?;
    let text = |name: &str| event.extension(name).map(str::to_owned);
    Some(Link {
        id: event.id().to_string(),
        cause: text("causationid"),
        correlation: text("correlationid"),
        event_type: event.event_type().to_owned(),
        place: record::reference(topic, record),
    })
}
