//! What the services of one process share: the tables' handle, the topics, the books.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::contracts::Topics;
use crate::store::Store;
use crate::{basket, catalog, notification, ordering, payment, timers};

/// The surroundings of a service.
#[derive(Clone, Debug)]
pub struct Shop {
    /// The services' tables; each service touches only its own.
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

    /// Notes that an input had been handled before.
    pub fn count_duplicate(&self) {
        self.duplicates.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns how many inputs had been handled before.
    pub fn n_duplicates(&self) -> u64 {
        self.duplicates.load(Ordering::Relaxed)
    }
}
