//! Keys that wait for an operator: parked sequences whose first event was dead-lettered.

use clap::Args;
use eventbus::{Bus, Group, HeldKey, ParkedKeys, Topic};

use crate::exit::{Failure, Outcome};
use crate::session::Session;

/// Chooses one parked sequence.
#[derive(Debug, Args)]
pub(crate) struct Sequence {
    /// The parked sequence of this key: the event that failed, and then what waits behind it, oldest first.
    #[arg(long, value_name = "KEY")]
    pub(crate) sequence: Option<String>,
    /// With --sequence: only of this consumer group.
    #[arg(long, value_name = "GROUP", requires = "sequence")]
    pub(crate) consumer: Option<Group>,
}

/// A held key with where it is parked.
pub(crate) struct Held {
    pub(crate) topic: Topic,
    pub(crate) group: Group,
    pub(crate) key: HeldKey,
}

impl Held {
    pub(crate) fn keys<'a>(&self, bus: &'a Bus) -> eventbus::Result<ParkedKeys<'a>> {
        ParkedKeys::new(bus, &self.topic, &self.group)
    }
}

/// Lists the held keys of all groups, or of one topic.
pub(crate) async fn all(session: &Session, dest: Option<&Topic>) -> Outcome<Vec<Held>> {
    let admin = session.admin()?;
    let mut found = Vec::new();
    for info in admin.topics().await?.iter().filter(|info| info.topic.as_str().ends_with(".parked")) {
        let mut groups: Vec<Group> =
            admin.groups(Some(&info.topic)).await?.into_iter().map(|info| info.group).collect();
        groups.dedup();
        for group in groups {
            // Both names may have dots: the group that keeps the mark tells where one ends.
            let Some(topic) = info.topic.as_str().strip_suffix(&format!(".{group}.parked")) else { continue };
            let topic = Topic::new(topic)?;
            if dest.is_some_and(|dest| *dest != topic) {
                continue;
            }
            let keys = ParkedKeys::new(&session.bus, &topic, &group)?.held().await?;
            found.extend(keys.into_iter().map(|key| Held {
                topic: topic.clone(),
                group: group.clone(),
                key,
            }));
        }
    }
    Ok(found)
}

/// Finds the one that is meant.
///
/// # Errors
/// Not found, or refused if several are meant.
pub(crate) async fn one(
    session: &Session,
    dest: Option<&Topic>,
    key: &str,
    consumer: Option<&Group>,
) -> Outcome<Held> {
    let mut found = all(session, dest).await?;
    found.retain(|held| {
        held.key.key.to_string() == key && consumer.is_none_or(|consumer| held.group == *consumer)
    });
    let Some(held) = found.pop() else {
        return Err(Failure::NotFound(format!(
            "no parked sequence of key {key} waits: see dlq list --parked-keys"
        )));
    };
    if let Some(other) = found.first() {
        return Err(Failure::Refused(format!(
            "key {key} waits in {} of {} and in {} of {}: name one with --dest and --consumer",
            held.topic, held.group, other.topic, other.group
        )));
    }
    Ok(held)
}
