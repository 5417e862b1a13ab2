//! The bus as programs use it: a transport chosen by its address, and typed publishing.

use std::fmt;
use std::sync::Arc;

use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Message;
use crate::name::Topic;
use crate::observer::Observer;
use crate::text::Text;
use crate::transport::{Confirm, Publisher, Receipt, Transport};
use crate::url::Url;

/// The schemes of this build and of the others that exist, with the feature that brings each.
const SCHEMES: [(&str, &str, bool); 11] = [
    ("memory", "memory", cfg!(feature = "memory")),
    ("sqlite", "sqlite", cfg!(feature = "sqlite")),
    ("postgres", "postgres", cfg!(feature = "postgres")),
    ("postgresql", "postgres", cfg!(feature = "postgres")),
    ("kafka", "kafka", cfg!(feature = "kafka")),
    ("nats", "nats", cfg!(feature = "nats")),
    ("amqp", "rabbitmq", cfg!(feature = "rabbitmq")),
    ("amqps", "rabbitmq", cfg!(feature = "rabbitmq")),
    ("redis", "redis", cfg!(feature = "redis")),
    ("rediss", "redis", cfg!(feature = "redis")),
    ("valkey", "redis", cfg!(feature = "redis")),
];

/// Opens the transport that an address names.
///
/// | Address | Transport |
/// |---|---|
/// | `memory://` or `memory://name` | in this process; values of one name share a broker |
/// | `sqlite://path/to/file.db` | one durable file, shared by several processes |
/// | `postgres://user:password@host:port/database` | tables of a PostgreSQL database |
/// | `kafka://user:password@host:port,host:port` | topics of a Kafka cluster |
/// | `nats://user:password@host:port,host:port` | streams of a NATS server with JetStream |
/// | `amqp://user:password@host:port,host:port/vhost` | streams of a RabbitMQ broker |
/// | `redis://user:password@host:port/database` | streams of a Redis or Valkey server |
///
/// Options follow a `?`; the module of each transport lists them.
///
/// # Errors
/// [`Config`](ErrorKind::Config) for a scheme or option that does not exist;
/// [`Unsupported`](ErrorKind::Unsupported) for a transport that was not compiled in, with the feature's
/// name; or what the transport reports about the place.
///
/// # Cancellation
/// Nothing stays open.
pub async fn connect(url: &str) -> Result<Bus> {
    let url = Url::parse(url)?;
    match url.scheme() {
        #[cfg(feature = "memory")]
        "memory" => {
            let options = crate::transport::memory::Options::from_url(&url)?;
            Ok(Bus::new(crate::transport::memory::Memory::named(url.place(), options)?))
        }
        #[cfg(feature = "sqlite")]
        "sqlite" => Ok(Bus::new(Box::pin(crate::transport::sqlite::Sqlite::open(&url)).await?)),
        #[cfg(feature = "postgres")]
        "postgres" | "postgresql" => {
            Ok(Bus::new(Box::pin(crate::transport::postgres::Postgres::open(&url)).await?))
        }
        #[cfg(feature = "kafka")]
        "kafka" => Ok(Bus::new(Box::pin(crate::transport::kafka::Kafka::open(&url)).await?)),
        #[cfg(feature = "nats")]
        "nats" => Ok(Bus::new(Box::pin(crate::transport::nats::Nats::open(&url)).await?)),
        #[cfg(feature = "rabbitmq")]
        "amqp" | "amqps" => Ok(Bus::new(Box::pin(crate::transport::rabbitmq::RabbitMq::open(&url)).await?)),
        #[cfg(feature = "redis")]
        "redis" | "rediss" | "valkey" => {
            Ok(Bus::new(Box::pin(crate::transport::redis::Redis::open(&url)).await?))
        }
        scheme => Err(unavailable(scheme)),
    }
}

/// The schemes of the addresses that [`connect`] opens in this build, in the order of its table.
pub fn schemes() -> impl Iterator<Item = &'static str> {
    SCHEMES.iter().filter(|(.., built)| *built).map(|(scheme, ..)| *scheme)
}

fn unavailable(scheme: &str) -> Error {
    match SCHEMES.iter().find(|(known, ..)| *known == scheme) {
        Some((_, feature, _)) => Error::new(
            ErrorKind::Unsupported,
            format!(
                "this program was built without the transport {scheme}: enable the feature \"{feature}\" of eventbus"
            ),
        ),
        None => {
            let known: Vec<_> = schemes().map(|scheme| format!("{scheme}://")).collect();
            Error::config(format!("unknown scheme {}", scheme.escape_debug())).with("known", known.join(", "))
        }
    }
}

/// A transport with the name under which this program publishes.
#[derive(Clone)]
pub struct Bus {
    transport: Arc<dyn Transport>,
    source: Text,
    observer: Option<Arc<dyn Observer>>,
}

impl Bus {
    /// Wraps a transport; the source is `/` and the program's name until [`with_source`](Self::with_source).
    pub fn new(transport: impl Transport) -> Self {
        let program = std::env::current_exe().ok();
        let stem = program.as_deref().and_then(|path| path.file_stem()).and_then(|stem| stem.to_str());
        Self {
            transport: Arc::new(transport),
            source: format!("/{}", stem.unwrap_or("eventbus")).into(),
            observer: None,
        }
    }

    /// Sets the CloudEvents `source` of what is published through this value.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Text>) -> Self {
        self.source = source.into();
        self
    }

    /// Lets an observer see what services on this value do.
    #[cfg(feature = "testing")]
    pub(crate) fn with_observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.observer = Some(observer);
        self
    }

    pub(crate) fn observer(&self) -> Option<&Arc<dyn Observer>> {
        self.observer.as_ref()
    }

    /// Returns the CloudEvents `source` of what is published through this value.
    pub fn source(&self) -> Text {
        self.source.clone()
    }

    /// Returns the transport.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// Opens a typed publisher.
    ///
    /// # Errors
    /// As [`Transport::publisher`].
    ///
    /// # Cancellation
    /// Nothing stays open.
    pub async fn publisher(&self) -> Result<TypedPublisher> {
        Ok(TypedPublisher { publisher: self.transport.publisher().await?, source: self.source.clone() })
    }

    /// Closes the transport and everything opened from it.
    ///
    /// # Errors
    /// As [`Transport::close`].
    ///
    /// # Cancellation
    /// Closing goes on; a repeated call waits for it.
    pub async fn close(&self) -> Result<()> {
        self.transport.close().await
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bus").field("transport", &self.transport).field("source", &self.source).finish()
    }
}

/// Publishes messages by their type. Cheap to clone; clones share the order of acceptance.
#[derive(Debug, Clone)]
pub struct TypedPublisher {
    publisher: Arc<dyn Publisher>,
    source: Text,
}

impl TypedPublisher {
    /// Publishes one message; durable when it returns.
    ///
    /// # Errors
    /// [`Unknown`](ErrorKind::Unknown): it may be stored. Build the envelope with [`Envelope::of`] and
    /// publish that, where a repetition must keep its id.
    ///
    /// # Cancellation
    /// The message may or may not be published.
    pub async fn publish<M: Message>(&self, topic: &Topic, message: &M) -> Result<Receipt> {
        let envelope = Envelope::of(message, self.source.clone())?;
        self.publish_envelope(topic, envelope).await
    }

    /// Publishes one envelope; durable when it returns.
    ///
    /// # Errors
    /// As [`publish`](Self::publish); the id is kept, so the call can be repeated.
    ///
    /// # Cancellation
    /// As [`enqueue`](crate::Publisher::enqueue) until it is accepted; after that it is published, and only
    /// the knowledge is lost.
    pub async fn publish_envelope(&self, topic: &Topic, envelope: Envelope) -> Result<Receipt> {
        self.publisher.enqueue(topic, vec![envelope]).await?.await.single()
    }

    /// Accepts messages in order and returns at once; they are durable when the confirm resolves.
    ///
    /// # Errors
    /// As [`Publisher::enqueue`].
    ///
    /// # Cancellation
    /// Before it returns nothing is published.
    pub async fn enqueue<'a, M: Message>(
        &self,
        topic: &Topic,
        messages: impl IntoIterator<Item = &'a M, IntoIter: Send> + Send,
    ) -> Result<Confirm> {
        let batch: Result<Vec<_>> =
            messages.into_iter().map(|message| Envelope::of(message, self.source.clone())).collect();
        self.publisher.enqueue(topic, batch?).await
    }

    /// Returns the untyped publisher.
    pub fn inner(&self) -> &Arc<dyn Publisher> {
        &self.publisher
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn wrong_addresses_say_what_to_do() {
        for (url, text) in [
            ("shop.db", "looks like scheme://place"),
            ("kafkka://x", "unknown scheme"),
            #[cfg(feature = "memory")]
            ("memory://?replai=1", "unknown option"),
            #[cfg(feature = "memory")]
            ("memory://?replay=many", "not a number"),
        ] {
            let error = connect(url).await.unwrap_err();
            assert!(error.to_string().contains(text), "{url}: {error}");
        }
    }
}
