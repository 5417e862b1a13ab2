//! Who waits for news of what.

use std::collections::HashMap;
use std::hash::Hash;

use parking_lot::Mutex;
use tokio::sync::watch;

/// A bell for each thing; the values behind it say nothing.
#[derive(Debug)]
pub(crate) struct Bells<K>(Mutex<HashMap<K, watch::Sender<u64>>>);

impl<K> Default for Bells<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq> Bells<K> {
    pub(crate) fn hear(&self, of: K) -> watch::Receiver<u64> {
        self.0.lock().entry(of).or_default().subscribe()
    }

    pub(crate) fn ring(&self, of: &K) {
        if let Some(bell) = self.0.lock().get(of) {
            bell.send_modify(|n| *n += 1);
        }
    }

    /// Rings all, and forgets those that nobody hears.
    pub(crate) fn ring_all(&self) {
        let mut bells = self.0.lock();
        bells.retain(|_, bell| bell.receiver_count() > 0);
        bells.values().for_each(|bell| bell.send_modify(|n| *n += 1));
    }

    /// Ends all: whoever waits is told that no more will come.
    pub(crate) fn end(&self) {
        self.ring_all();
        self.0.lock().clear();
    }
}
