//! The database of an outbox and of inboxes.

use clap::Args;
use outbox::{AnyOutbox, Namespace, Options};

use crate::context::Gate;
use crate::exit::{Failure, Outcome};

/// Where the tables are: what is named, else the context's outbox, else the database of the bus.
#[derive(Debug, Args)]
pub(crate) struct Store {
    /// The database: postgres://user@host/database, or sqlite://file.db.
    #[arg(long, value_name = "URL", env = "EVENTCTL_STORE", hide_env_values = true)]
    store: Option<String>,
    /// The schema (PostgreSQL) or the prefix of the tables (SQLite).
    #[arg(long, value_name = "NAME", default_value = "evt")]
    namespace: String,
}

impl Store {
    /// Whether the command line says where it is.
    pub(crate) fn is_named(&self) -> bool {
        self.store.is_some()
    }

    /// Opens it.
    ///
    /// # Errors
    /// Usage: nothing says where it is. Connect: it cannot be reached. Others: there are no tables, or not ours.
    pub(crate) async fn open(&self, gate: &Gate) -> Outcome<AnyOutbox> {
        let bus = Some(gate.context.url.as_str()).filter(|url| !url.is_empty());
        let bus = bus.and_then(|url| url.split('?').next());
        let url = self.store.as_deref().or(gate.context.outbox.as_deref()).or(bus).ok_or_else(|| {
            Failure::Usage("no outbox: give --store with its database, or -c with a context".into())
        })?;
        let options = Options::default().with_namespace(Namespace::new(&self.namespace)?);
        let outbox = AnyOutbox::open(url, options).await.map_err(|error| match error.kind() {
            eventbus::ErrorKind::Config | eventbus::ErrorKind::Unsupported => error.into(),
            _ => Failure::Connect(error.to_string()),
        })?;
        outbox.verify().await?;
        Ok(outbox)
    }
}
