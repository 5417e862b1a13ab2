//! What the services of one process share: where each keeps its tables, the topics, what they are set to.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use eventbus::capability::Replay;
use eventbus::{Bus, FromState, Result, Service, Start};
use outbox::{Inbox, Options, Outbox, Relay, Relaying};
use sqlx::pool::PoolConnection;

use crate::contracts::Topics;
use crate::db::Db;
use crate::{basket, catalog, grace, notification, ordering, payment};

/// In an address of tables this stands for the service's name: each has a database of its own then.
const EACH: &str = "{service}";

/// The services, each at a desk of its own.
#[derive(Debug)]
#[allow(missing_docs, reason = "named as the modules are")]
pub struct Shop<D: Db> {
    pub basket: Desk<D>,
    pub catalog: Desk<D>,
    pub grace: Desk<D>,
    pub notification: Desk<D>,
    pub ordering: Desk<D>,
    pub payment: Desk<D>,
    databases: Vec<Outbox<D>>,
}

impl<D: Db> Shop<D> {
    /// Connects to the tables and creates what is missing. With `{service}` in the address each service has a database of
    /// its own, else they share one; no service looks into the tables of another either way.
    ///
    /// # Errors
    /// [`Config`](eventbus::ErrorKind::Config) for an address that cannot be used, or what the database reports.
    pub async fn open(url: &str, grace: Duration) -> Result<Self> {
        let topics = Arc::new(Topics::new()?);
        let mut databases = BTreeMap::new();
        let mut desk = async |name: &str, schema: &'static str| {
            let address = url.replace(EACH, name);
            let outbox = match databases.get(&address) {
                Some(outbox) => Outbox::clone(outbox),
                None => {
                    let options = Options::default().with_source("/eshop");
                    let outbox = Outbox::with_options(D::connect(&address).await?, options);
                    outbox.migrate().await?;
                    databases.insert(address, outbox.clone());
                    outbox
                }
            };
            D::create(outbox.pool(), schema).await?;
            Ok::<_, eventbus::Error>(Desk { topics: topics.clone(), grace, inbox: Inbox::new(&outbox) })
        };
        Ok(Self {
            basket: desk("basket", basket::SCHEMA).await?,
            catalog: desk("catalog", catalog::SCHEMA).await?,
            grace: desk("grace", grace::SCHEMA).await?,
            notification: desk("notification", notification::SCHEMA).await?,
            ordering: desk("ordering", ordering::SCHEMA).await?,
            payment: desk("payment", payment::SCHEMA).await?,
            databases: databases.into_values().collect(),
        })
    }

    /// Has transactions publish into the bus by themselves where it is in the same file as the tables.
    ///
    /// # Errors
    /// What the databases report.
    pub async fn publish_into(&self, bus: &Bus) -> Result<()> {
        for outbox in &self.databases {
            outbox.publish_into(bus).await?;
        }
        Ok(())
    }

    /// Starts a relay for each database: what transactions published goes to the bus. One that ends without a word is
    /// replaced by another after the lease.
    ///
    /// # Errors
    /// What the databases or the bus report.
    pub async fn relay(&self, bus: &Bus, lease: Duration) -> Result<Vec<Relaying>> {
        let mut relays = Vec::new();
        for outbox in &self.databases {
            relays.push(Relay::new(outbox).with_lease(lease).start(bus).await?);
        }
        Ok(relays)
    }
}

/// What one service works with: its own tables, with what it has handled and what is to be published; the topics.
#[derive(Debug)]
pub struct Desk<D: Db> {
    /// The topics.
    pub topics: Arc<Topics>,
    /// How long a buyer may change their mind.
    pub grace: Duration,
    inbox: Inbox<D>,
}

impl<D: Db> Desk<D> {
    /// Begins a transaction that publishes when it commits, for work that no event asked for.
    ///
    /// # Errors
    /// Transient.
    pub async fn begin(&self) -> Result<outbox::Transaction<D>> {
        self.inbox.outbox().begin().await
    }

    /// Returns a connection to look with.
    ///
    /// # Errors
    /// Transient.
    pub async fn look(&self) -> Result<PoolConnection<D>> {
        self.inbox.outbox().pool().acquire().await.map_err(eventbus::sql::from_sqlx)
    }

    /// Begins a service. A new one reads from the first event that is kept, so that nothing is missed
    /// when it starts after the others; where nothing is kept, from now on.
    pub fn service(&self, bus: &Bus, name: &str) -> Service<Self> {
        let keeps = bus.transport().capabilities().replay >= Replay::Offset;
        Service::new(name).start_at(if keeps { Start::Earliest } else { Start::Latest })
    }
}

impl<D: Db> Clone for Desk<D> {
    fn clone(&self) -> Self {
        Self { topics: self.topics.clone(), grace: self.grace, inbox: self.inbox.clone() }
    }
}

impl<D: Db> FromState<Desk<D>> for Inbox<D> {
    fn from_state(desk: &Desk<D>) -> Self {
        desk.inbox.clone()
    }
}
