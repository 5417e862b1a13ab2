//! The database of an outbox and of inboxes.

use clap::Args;
use outbox::{AnyOutbox, Namespace, Options};

use crate::exit::{Failure, Outcome};
use crate::session::Gate;

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

    /// The address that the command line says.
    pub(crate) fn named(&self) -> Option<&str> {
        self.store.as_deref()
    }

    /// Opens it, if there is one: one that nothing names may be in the database of the bus.
    ///
    /// # Errors
    /// As [`open`](Self::open), where something names it.
    pub(crate) async fn look(&self, gate: &Gate) -> Outcome<Option<AnyOutbox>> {
        let is_named = self.is_named() || gate.context.outbox.is_some();
        match self.open(gate).await {
            Ok(store) => Ok(Some(store)),
            Err(failure) if is_named => Err(failure),
            Err(_) => Ok(None),
        }
    }

    /// Opens it.
    ///
    /// # Errors
    /// Usage: nothing says where it is. Connect: it cannot be reached. Others: there are no tables, or not ours.
    pub(crate) async fn open(&self, gate: &Gate) -> Outcome<AnyOutbox> {
        let context = &gate.context;
        // A password is read only where it is used.
        let url = match &self.store {
            Some(store) => store.clone(),
            None => match context.outbox_address()? {
                Some(outbox) => outbox,
                None if context.url.is_empty() => {
                    let why = "no outbox: give --store with its database, or -c with a context";
                    return Err(Failure::Usage(why.into()));
                }
                None => with_tls_alone(&context.address()?),
            },
        };
        let options = Options::default().with_namespace(Namespace::new(&self.namespace)?);
        let outbox = AnyOutbox::open(&url, options).await.map_err(|error| match error.kind() {
            eventbus::ErrorKind::Config | eventbus::ErrorKind::Unsupported => error.into(),
            _ => Failure::Connect(error.to_string()),
        })?;
        outbox.verify().await?;
        Ok(outbox)
    }
}

/// The address of a bus as one of a database: of its options those of TLS, which are libpq's.
fn with_tls_alone(url: &str) -> String {
    let Some((place, options)) = url.split_once('?') else { return url.to_owned() };
    let of_tls = ["sslmode", "sslrootcert", "sslcert", "sslkey"];
    let is_of_tls = |option: &&str| of_tls.contains(&option.split('=').next().unwrap_or_default());
    let mut kept: Vec<&str> = options.split('&').filter(is_of_tls).collect();
    // Who names an authority wants it to be asked, and the bus does so.
    if kept.iter().any(|option| option.starts_with("sslrootcert=")) {
        kept.iter_mut()
            .filter(|option| **option == "sslmode=require")
            .for_each(|mode| *mode = "sslmode=verify-ca");
    }
    if kept.is_empty() { place.to_owned() } else { format!("{place}?{}", kept.join("&")) }
}

#[cfg(test)]
mod tests {
    use super::with_tls_alone;

    #[test]
    fn a_database_is_reached_as_safely_as_the_bus() {
        let bus = "postgres://me@db/shop?declare=create&sslmode=verify-full&sslrootcert=ca.pem";
        assert_eq!(with_tls_alone(bus), "postgres://me@db/shop?sslmode=verify-full&sslrootcert=ca.pem");
        assert_eq!(
            with_tls_alone("postgres://db/shop?sslmode=require&sslrootcert=ca.pem"),
            "postgres://db/shop?sslmode=verify-ca&sslrootcert=ca.pem"
        );
        assert_eq!(with_tls_alone("sqlite://shop.db?wait=1"), "sqlite://shop.db");
        assert_eq!(with_tls_alone("sqlite://shop.db"), "sqlite://shop.db");
    }
}
