//! What the messages of a map's stream make of the map: all who read them find the same.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::error::{Error, ErrorKind, Result};
use crate::transport::kit::leased::registers::Held;

/// What is appended between two whole maps, or as much as the map's own size.
const BETWEEN: usize = 1 << 20;
/// Offsets that may be missing though nothing was removed: the broker's own notes take some.
const GAP: u64 = 16;

#[derive(Default)]
pub(super) struct Map {
    entries: BTreeMap<String, (u64, Bytes)>,
    n_bytes: usize,
    /// The offset that is due next; `None` = nothing was read.
    next: Option<u64>,
    /// What was read, until the map is known.
    unknown: Option<Unknown>,
    /// Whether reading must begin at the first message: there was no whole map near the end.
    from_first: bool,
    since_whole: usize,
    heard: HashMap<String, Vec<mpsc::UnboundedSender<Bytes>>>,
}

struct Unknown {
    /// Where reading began.
    from: u64,
    before: Vec<(u64, Change)>,
    /// Whether that is not where the stream begins: if there is no whole map up to this offset, it is read from there.
    until: Option<u64>,
}

/// What a message says.
pub(super) enum Change {
    Set {
        key: String,
        revision: u64,
        value: Bytes,
    },
    Remove {
        key: String,
        revision: u64,
    },
    /// The map as it was after an offset.
    Whole(Whole),
    Look,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Whole {
    after: u64,
    entries: BTreeMap<String, (u64, String)>,
}

/// What came of a message.
pub(super) enum Read {
    /// It was read before.
    Known,
    /// Reading must begin at the first message that is left: the map cannot be known from here.
    Restart,
    /// The new revision, `None` if the change was made from another than there is. Nothing while the map is not known
    /// and may still be.
    Taken(Option<Result<Option<u64>>>),
}

impl Map {
    /// The value of a key, as far as it was read.
    pub(super) fn get(&self, key: &str) -> Option<Held<Bytes>> {
        let (revision, value) = self.entries.get(key)?;
        Some(Held { value: value.clone(), revision: *revision })
    }

    /// The keys that begin like this, as far as they were read.
    pub(super) fn keys(&self, prefix: &str) -> Vec<String> {
        let from = self.entries.range(prefix.to_owned()..);
        from.map(|(key, _)| key).take_while(|key| key.starts_with(prefix)).cloned().collect()
    }

    /// What its keys and values are in bytes.
    pub(super) fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    pub(super) fn is_known(&self) -> bool {
        self.next.is_some() && self.unknown.is_none()
    }

    /// The offset that is due next; `None` = nothing was read.
    pub(super) fn next(&self) -> Option<u64> {
        self.next
    }

    /// Whether reading must begin at the first message there is.
    pub(super) fn is_from_first(&self) -> bool {
        self.from_first
    }

    /// Reading begins in the middle, where most likely a whole map is found up to an offset.
    pub(super) fn begin_at(&mut self, from: u64, until: u64) {
        self.next = Some(from);
        self.unknown = Some(Unknown { from, before: Vec::new(), until: Some(until) });
    }

    /// Forgets what was read: reading begins at the first message there is.
    fn begin_anew(&mut self) {
        (self.next, self.unknown, self.from_first) = (None, None, true);
        (self.entries, self.n_bytes, self.since_whole) = (BTreeMap::new(), 0, 0);
    }

    /// What is written to a key from now on, also what does not hold.
    pub(super) fn hear(&mut self, key: &str) -> mpsc::UnboundedReceiver<Bytes> {
        let (sender, heard) = mpsc::unbounded_channel();
        for known in self.heard.values_mut() {
            known.retain(|heard| !heard.is_closed());
        }
        self.heard.retain(|_, heard| !heard.is_empty());
        self.heard.entry(key.to_owned()).or_default().push(sender);
        heard
    }

    /// The stream is gone: who hears is told a value that is none.
    pub(super) fn end(&mut self) {
        self.entries.clear();
        for heard in std::mem::take(&mut self.heard).into_values().flatten() {
            drop(heard.send(Bytes::new()));
        }
    }

    /// Takes in a message, in the order of the stream; `None` = one that is not ours.
    pub(super) fn take_in(&mut self, offset: u64, n_bytes: usize, change: Option<Change>) -> Read {
        match self.next {
            None => {
                self.unknown =
                    (offset > 0).then(|| Unknown { from: offset, before: Vec::new(), until: None });
            }
            Some(next) if offset < next => return Read::Known,
            // More was removed than we had read. What is left holds a whole map.
            Some(next) if offset > next + GAP => {
                self.begin_anew();
                return Read::Restart;
            }
            Some(_) => {}
        }
        self.next = Some(offset + 1);
        self.since_whole += n_bytes;
        let outcome = match change {
            Some(change) => self.take(offset, change),
            None => Some(Ok(None)),
        };
        if self.unknown.as_ref().is_some_and(|unknown| unknown.until.is_some_and(|until| until <= offset)) {
            self.begin_anew();
            return Read::Restart;
        }
        Read::Taken(outcome)
    }

    /// The whole map, as it is after an offset, if it is time that somebody writes it.
    pub(super) fn due(&mut self, after: u64) -> Option<Vec<u8>> {
        let is_due = self.since_whole > BETWEEN.max(self.n_bytes) && self.unknown.is_none();
        is_due.then(|| {
            self.since_whole = 0;
            self.whole(after)
        })
    }

    /// What a change makes of the map: the new revision, `None` if it was made from another than there is. Nothing while
    /// the map is not known and may still be.
    fn take(&mut self, offset: u64, change: Change) -> Option<Result<Option<u64>>> {
        let Some(Unknown { from, before, until }) = &mut self.unknown else {
            return Some(Ok(self.apply(offset, change)));
        };
        match change {
            // All that came after it was read.
            Change::Whole(whole) if whole.after + 1 >= *from => {
                let before = std::mem::take(before);
                self.unknown = None;
                let known = whole.entries.into_iter();
                self.entries =
                    known.map(|(key, (revision, value))| (key, (revision, value.into()))).collect();
                self.n_bytes = self.entries.iter().map(|(key, (_, value))| key.len() + value.len()).sum();
                for (at, change) in before.into_iter().filter(|(at, _)| *at > whole.after) {
                    self.apply(at, change);
                }
                None
            }
            Change::Look if until.is_none() => {
                Some(Err(Error::new(ErrorKind::Corrupt, "the map of groups has lost its beginning")))
            }
            change => {
                before.push((offset, change));
                None
            }
        }
    }

    fn apply(&mut self, offset: u64, change: Change) -> Option<u64> {
        let is_from = |entries: &BTreeMap<String, (u64, Bytes)>, key: &str, revision: u64| {
            entries.get(key).map_or(0, |(known, _)| *known) == revision
        };
        // 0 is no revision: it says that there is none.
        let made = offset + 1;
        match change {
            Change::Set { key, revision, value } => {
                let holds = is_from(&self.entries, &key, revision);
                // Those who hear are told what was tried too: they look what holds.
                if let Some(heard) = self.heard.get(&key) {
                    heard.iter().for_each(|heard| drop(heard.send(value.clone())));
                }
                if !holds {
                    return None;
                }
                self.n_bytes += key.len() + value.len();
                if let Some((_, old)) = self.entries.insert(key.clone(), (made, value)) {
                    self.n_bytes -= key.len() + old.len();
                }
                Some(made)
            }
            Change::Remove { key, revision } => {
                if !is_from(&self.entries, &key, revision) {
                    return None;
                }
                if let Some((_, old)) = self.entries.remove(&key) {
                    self.n_bytes -= key.len() + old.len();
                }
                if let Some(heard) = self.heard.get(&key) {
                    heard.iter().for_each(|heard| drop(heard.send(Bytes::new())));
                }
                Some(made)
            }
            Change::Whole(_) => {
                self.since_whole = 0;
                None
            }
            Change::Look => None,
        }
    }

    /// The map as bytes, as it is after an offset.
    fn whole(&self, after: u64) -> Vec<u8> {
        let text = |value: &Bytes| String::from_utf8_lossy(value).into_owned();
        let entries =
            self.entries.iter().map(|(key, (revision, value))| (key.clone(), (*revision, text(value))));
        serde_json::to_vec(&Whole { after, entries: entries.collect() }).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(key: &str, revision: u64, value: &'static str) -> Change {
        Change::Set { key: key.into(), revision, value: Bytes::from_static(value.as_bytes()) }
    }

    fn took(map: &mut Map, at: u64, change: Change) -> Option<u64> {
        map.take(at, change).unwrap().unwrap()
    }

    fn begun(from: u64, until: Option<u64>) -> Map {
        Map { unknown: Some(Unknown { from, before: Vec::new(), until }), ..Map::default() }
    }

    #[test]
    fn a_change_holds_if_it_was_made_from_what_is_there() {
        let mut map = Map::default();
        assert_eq!(took(&mut map, 0, set("a", 0, "x")), Some(1));
        assert_eq!(took(&mut map, 1, set("a", 0, "y")), None, "made from nothing");
        assert_eq!(took(&mut map, 2, set("a", 1, "z")), Some(3));
        let remove = |revision| Change::Remove { key: "a".into(), revision };
        assert_eq!(took(&mut map, 4, remove(1)), None);
        assert_eq!(took(&mut map, 5, remove(3)), Some(6));
        assert_eq!((took(&mut map, 6, set("a", 0, "n")), map.n_bytes), (Some(7), 2));
    }

    #[test]
    fn who_begins_in_the_middle_knows_nothing_before_a_whole_map() {
        let mut told = Map::default();
        for (at, change) in [(1, set("a", 0, "1")), (2, set("b", 0, "2")), (3, set("a", 2, "3"))] {
            took(&mut told, at, change);
        }
        let whole = || serde_json::from_slice::<Whole>(&told.whole(3)).unwrap();
        let (early, middle) = (whole(), whole());
        let mut late = begun(3, None);
        assert!(late.take(3, set("a", 2, "3")).is_none());
        assert_eq!(late.take(4, Change::Look).unwrap().unwrap_err().kind(), ErrorKind::Corrupt);
        // Written before the map was, and read after it was asked for.
        took(&mut told, 4, Change::Look);
        took(&mut told, 5, set("b", 3, "5"));
        assert!(late.take(5, set("b", 3, "5")).is_none());
        late.take(6, Change::Whole(middle));
        assert_eq!(late.entries, told.entries);
        assert_eq!((late.n_bytes, took(&mut late, 7, set("b", 6, "7"))), (told.n_bytes, Some(8)));
        // One that lies too far back does not help.
        let mut later = begun(5, None);
        later.take(6, Change::Whole(early));
        assert!(later.unknown.is_some());
        // Near the end, the beginning may still be read.
        assert!(begun(3, Some(9)).take(4, Change::Look).is_none());
    }
}
