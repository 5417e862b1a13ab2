//! What the services of one process share: the tables' handle, the topics, the books.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use eventbus::capability::Replay;
use eventbus::{Bus, Service, Start};

use crate::contracts::Topics;
use crate::store::Store;
use crate::{basket, catalog, notification, ordering, payment, timers};

/// The surroundings of a service.
#[derive(Clone, Debug)]
pub struct Shop {
    /// The services' tables, in one file for one group commit.
    pub store: Store,
    /// The topics.
    pub topics: Topics,
    /// How long a buyer may change their mind.
    pub grace: Duration,
    duplicates: Arc<AtomicU64>,
}

impl Shop {
    /// Opens the tables, in memory if there is no path.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open(path: Option<&Path>, grace: Duration) -> eventbus::Result<Self> {
        let schema = [
            basket::SCHEMA,
            catalog::SCHEMA,
            notification::SCHEMA,
            ordering::SCHEMA,
            payment::SCHEMA,
            timers::SCHEMA,
        ];
        Ok(Self {
            store: Store::open(path, schema.concat())?,
            topics: Topics::new()?,
            grace,
            duplicates: Arc::default(),
        })
    }

    /// Begins a service. A new one reads from the first event that is kept, so that nothing is missed
    /// when it starts after the others; where nothing is kept, from now on.
    pub fn service(&self, bus: &Bus, name: &str) -> Service<Self> {
        let keeps = bus.transport().capabilities().replay >= Replay::Offset;
        Service::new(name).start_at(if keeps { Start::Earliest } else { Start::Latest })
    }

    /// Notes that an input had been handled before.
    pub fn count_duplicate(&self) {
        self.duplicates.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns how many inputs had been handled before.
    pub fn n_duplicates(&self) -> u64 {
        self.duplicates.load(Ordering::Relaxed)
    }
}
