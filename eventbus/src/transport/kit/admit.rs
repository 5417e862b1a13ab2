//! What every transport does with a batch before any input or output: check each event, keep the good.

use std::collections::HashSet;

use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Key;
use crate::transport::confirm::{Receipt, Receipts};

/// A checked batch: the events to store, and the ones refused with their places.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) events: Vec<Envelope>,
    pub(crate) n_bytes: usize,
    refused: Vec<(usize, Error)>,
}

impl Admitted {
    /// Checks each event. After a refused one, later events of its key are refused too, so that a
    /// key never has a hole that its order would hide.
    pub(crate) fn check(batch: Vec<Envelope>, max_event_bytes: usize) -> Self {
        let mut admitted = Self { events: Vec::new(), n_bytes: 0, refused: Vec::new() };
        let mut held: HashSet<Key> = HashSet::new();
        // Collecting into the batch's own allocation keeps the common path free of one.
        admitted.events = batch
            .into_iter()
            .enumerate()
            .filter_map(|(at, envelope)| {
                if !held.is_empty() && envelope.key().is_some_and(|key| held.contains(key)) {
                    let error = Error::new(
                        ErrorKind::Failed,
                        "an earlier event of this key in the batch was refused",
                    );
                    admitted.refused.push((at, error));
                    return None;
                }
                match envelope.check(max_event_bytes) {
                    Ok(size) => {
                        let stripped = envelope.strip();
                        admitted.n_bytes += stripped.as_ref().map_or(size, Envelope::size_bytes);
                        Some(stripped.unwrap_or(envelope))
                    }
                    Err(error) => {
                        held.extend(envelope.key().cloned());
                        admitted.refused.push((at, error));
                        None
                    }
                }
            })
            .collect();
        admitted
    }

    /// Refuses the whole batch if it can never fit.
    pub(crate) fn fits(&self, max_events: usize, max_bytes: usize) -> Result<()> {
        if self.events.len() <= max_events && self.n_bytes <= max_bytes {
            return Ok(());
        }
        Err(Error::new(ErrorKind::TooLarge, "the batch is larger than the topic may hold: split it")
            .with("events", self.events.len())
            .with("max_events", max_events)
            .with("bytes", self.n_bytes)
            .with("max_bytes", max_bytes))
    }

    /// Puts the outcomes of the stored events and the refusals back into the batch's order.
    pub(crate) fn receipts(refused: Refused, mut stored: impl Iterator<Item = Result<Receipt>>) -> Receipts {
        let mut receipts = Receipts::default();
        for (at, error) in refused.0 {
            receipts.extend_from(stored.by_ref().take(at - receipts.len()));
            receipts.push(Err(error));
        }
        receipts.extend_from(stored);
        receipts
    }

    pub(crate) fn into_parts(self) -> (Vec<Envelope>, Refused) {
        (self.events, Refused(self.refused))
    }
}

/// The refused events of a batch, by place.
#[derive(Debug)]
pub(crate) struct Refused(Vec<(usize, Error)>);

impl Refused {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PartitionId;

    #[test]
    fn a_refusal_holds_back_its_key_and_nothing_else() {
        let event = |key: &'static str, size: usize| {
            Envelope::new("t", "/s").with_key(key).with_payload(vec![0; size])
        };
        let batch = vec![event("a", 1), event("a", 9_000), event("b", 1), event("a", 1), event("b", 1)];
        let (events, refused) = Admitted::check(batch, 1_000).into_parts();
        assert_eq!(events.len(), 3);
        let stored = events.iter().map(|_| Ok(Receipt::new(PartitionId(0), None)));
        let kinds: Vec<_> = Admitted::receipts(refused, stored)
            .into_iter()
            .map(|outcome| outcome.map(drop).map_err(|error| error.kind()))
            .collect();
        assert_eq!(kinds, [Ok(()), Err(ErrorKind::TooLarge), Ok(()), Err(ErrorKind::Failed), Ok(())]);
    }
}
