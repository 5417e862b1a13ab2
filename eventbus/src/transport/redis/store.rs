//! One server: its connections, who waits for news, and the tasks that work on it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::Weak;
use std::time::Duration;

use parking_lot::Mutex;
use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo,
};
use redis::{FromRedisValue, RedisError, Script, ServerErrorKind};

use super::{Options, durability, keys, publisher, retention};
use crate::capability::Durability;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::transport::TlsFiles;
use crate::transport::kit::bells::Bells;
use crate::transport::kit::queue::Queue;
use crate::transport::kit::tasks::Tasks;
use crate::transport::kit::tls::{self, TlsTexts};
use crate::url::Url;

/// How often members look although nobody told them anything: foreign programs tell nothing.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(1);
/// When a connection that failed is tried again.
const AGAIN: Duration = Duration::from_millis(500);

pub(super) struct Store {
    client: Client,
    /// For everything but publishing.
    connection: tokio::sync::Mutex<Option<MultiplexedConnection>>,
    pub(super) options: Options,
    /// Where it is, without secrets.
    pub(super) place: String,
    pub(super) durability: Durability,
    pub(super) queue: Arc<Queue>,
    /// Partitions of topics by name.
    topics: Mutex<HashMap<Topic, u32>>,
    /// Largest entry seen of late in each topic, by which reads are bounded.
    pub(super) sizes: Mutex<HashMap<Topic, usize>>,
    pub(super) bells: Bells<Topic>,
    pub(super) tasks: Tasks,
}

/// A script of this transport, by the name of its file.
macro_rules! script {
    ($name:literal) => {{
        static SCRIPT: std::sync::LazyLock<redis::Script> =
            std::sync::LazyLock::new(|| redis::Script::new(include_str!(concat!("scripts/", $name, ".lua"))));
        &*SCRIPT
    }};
}
pub(super) use script;

/// Where and as whom to connect.
fn client(url: &Url, files: &TlsFiles) -> Result<Client> {
    let place = url.authority(6379)?;
    let [(host, port)] = place.hosts.as_slice() else {
        return Err(Error::config("redis:// takes one host: host:port/database"));
    };
    let tls = url.scheme() == "rediss";
    if tls && !cfg!(feature = "redis-tls") {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "this program was built without TLS for Redis: enable the feature \"redis-tls\" of eventbus",
        ));
    }
    let (host, port) = ((*host).to_owned(), *port);
    let address = if tls {
        ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None }
    } else {
        ConnectionAddr::Tcp(host, port)
    };
    let mut settings = RedisConnectionInfo::default();
    if let Some(user) = place.user {
        settings = settings.set_username(user);
    }
    if let Some(password) = place.password {
        settings = settings.set_password(password);
    }
    if !place.path.is_empty() {
        let number = place.path.parse().map_err(|_| Error::config("a database of Redis is a number"))?;
        settings = settings.set_db(number);
    }
    let info = address.into_connection_info().map_err(from_redis)?.set_redis_settings(settings);
    with_tls(info, files.read(tls, "say rediss://")?)
        .map_err(|error| Error::config("the files of TLS cannot be used").caused_by(error))
}

#[cfg(feature = "redis-tls")]
fn with_tls(info: ConnectionInfo, files: TlsTexts) -> Result<Client, RedisError> {
    if !matches!(info.addr(), ConnectionAddr::TcpTls { .. }) {
        return Client::open(info);
    }
    tls::choose_provider();
    let identity = files.identity.map(|(cert, key)| redis::ClientTlsConfig {
        client_cert: cert.into_bytes(),
        client_key: key.into_bytes(),
    });
    let root_cert = files.ca.map(String::into_bytes);
    Client::build_with_tls(info, redis::TlsCertificates { client_tls: identity, root_cert })
}

#[cfg(not(feature = "redis-tls"))]
fn with_tls(info: ConnectionInfo, _: TlsTexts) -> Result<Client, RedisError> {
    Client::open(info)
}

impl Store {
    pub(super) async fn open(url: &Url, options: Options) -> Result<Arc<Self>> {
        let client = client(url, &options.files)?;
        let place = client.get_connection_info().addr().to_string();
        let opening = async {
            let mut connection = connect(&client, &options).await?;
            let durability = probe(&mut connection, &options).await?;
            Ok((connection, durability))
        };
        let (connection, durability) =
            opening.await.map_err(|error: Error| tls::at_opening(error).with("place", &place))?;
        let (queue, rounds) = Queue::new(options.max_event_bytes);
        let store = Arc::new(Self {
            client,
            connection: tokio::sync::Mutex::new(Some(connection)),
            options,
            place,
            durability,
            queue,
            topics: Mutex::default(),
            sizes: Mutex::default(),
            bells: Bells::default(),
            tasks: Tasks::default(),
        });
        let weak = Arc::downgrade(&store);
        store.tasks.keep(tokio::spawn(publisher::write(weak.clone(), rounds)));
        store.tasks.keep(tokio::spawn(listen(weak.clone())));
        store.tasks.keep(tokio::spawn(retention::keep(weak)));
        Ok(store)
    }

    pub(super) fn is_open(&self) -> Result<()> {
        self.queue.is_open()
    }

    /// Opens a connection of its own.
    pub(super) async fn connect(&self) -> Result<MultiplexedConnection> {
        connect(&self.client, &self.options).await
    }

    /// Runs commands on the shared connection; one that failed is not used again.
    pub(super) async fn with<T, F, Fut>(&self, work: F) -> Result<T>
    where
        F: FnOnce(MultiplexedConnection) -> Fut,
        Fut: Future<Output = Result<T, RedisError>>,
    {
        let mut shared = self.connection.lock().await;
        let connection = match &*shared {
            Some(connection) => connection.clone(),
            None => shared.insert(self.connect().await?).clone(),
        };
        drop(shared);
        let outcome = work(connection).await;
        if outcome.as_ref().is_err_and(is_unknown) {
            self.connection.lock().await.take();
        }
        outcome.map_err(from_redis)
    }

    /// Runs a script on the shared connection.
    pub(super) async fn script<T: FromRedisValue>(
        &self,
        script: &'static Script,
        keys: Vec<String>,
        arguments: Vec<Vec<u8>>,
    ) -> Result<T> {
        self.with(|mut connection| async move {
            let mut call = script.prepare_invoke();
            keys.into_iter().for_each(|key| _ = call.key(key));
            arguments.into_iter().for_each(|argument| _ = call.arg(argument));
            call.invoke_async(&mut connection).await
        })
        .await
    }

    /// The number of partitions of a topic, from memory where it is known; it is created where that is wanted.
    pub(super) async fn partitions(&self, topic: &Topic) -> Result<u32> {
        if let Some(known) = self.topics.lock().get(topic) {
            return Ok(*known);
        }
        let found = match self.find(topic).await? {
            Some(found) => found,
            None if self.options.create_topics => {
                let retention = self.options.retention;
                self.declare(topic, self.options.partitions, retention, None).await?.0
            }
            None => return Err(missing(topic).with("hint", "create it, or say declare=create")),
        };
        self.topics.lock().insert(topic.clone(), found);
        Ok(found)
    }

    /// Forgets what is known of a topic.
    pub(super) fn forget(&self, topic: &Topic) {
        self.topics.lock().remove(topic);
    }

    /// The number of partitions of a topic, if it exists.
    pub(super) async fn find(&self, topic: &Topic) -> Result<Option<u32>> {
        let key = keys::meta(topic);
        self.with(|mut connection| async move {
            redis::cmd("HGET").arg(key).arg("partitions").query_async(&mut connection).await
        })
        .await
    }

    /// The number of partitions of a topic that must exist.
    pub(super) async fn existing(&self, topic: &Topic) -> Result<u32> {
        self.find(topic).await?.ok_or_else(|| missing(topic))
    }

    /// Creates a topic if it is missing; returns its number of partitions and whether it is new.
    pub(super) async fn declare(
        &self,
        topic: &Topic,
        partitions: u32,
        max_age: Option<Duration>,
        max_events: Option<u64>,
    ) -> Result<(u32, bool)> {
        let names: Vec<String> =
            std::iter::once(keys::meta(topic)).chain(keys::streams(topic, partitions)).collect();
        let text = |number: Option<String>| number.unwrap_or_default().into_bytes();
        let arguments = vec![
            partitions.to_string().into_bytes(),
            text(max_age.map(|age| age.as_millis().to_string())),
            text(max_events.map(|events| events.to_string())),
        ];
        let (found, is_new): (u32, bool) = self.script(script!("declare"), names, arguments).await?;
        let name = topic.to_string();
        self.with(|mut connection| async move {
            redis::cmd("SADD").arg(keys::TOPICS).arg(name).query_async::<()>(&mut connection).await
        })
        .await?;
        Ok((found, is_new))
    }

    /// Ends what was opened, after everything accepted was answered. May be repeated.
    pub(super) async fn close(&self) {
        self.queue.stop().await;
        self.tasks.end().await;
        // Whoever polls is woken to see that it is closed.
        self.bells.end();
        self.connection.lock().await.take();
    }
}

pub(super) fn missing(topic: &Topic) -> Error {
    Error::not_found("there is no such topic").with("topic", topic)
}

async fn connect(client: &Client, options: &Options) -> Result<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(options.timeout))
        .set_response_timeout(Some(options.timeout));
    client.get_multiplexed_async_connection_with_config(&config).await.map_err(from_redis)
}

/// Asks which version the server has, and what it keeps.
async fn probe(connection: &mut MultiplexedConnection, options: &Options) -> Result<Durability> {
    let info: String = redis::cmd("INFO").arg("server").query_async(connection).await.map_err(from_redis)?;
    let version = info.lines().find_map(|line| line.strip_prefix("redis_version:")).unwrap_or_default();
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let known = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if options.flushed && known < (7, 2) {
        return Err(Error::new(ErrorKind::Unsupported, "durability=flushed needs Redis 7.2 (WAITAOF)")
            .with("version", version));
    }
    if known < (7, 0) {
        return Err(
            Error::new(ErrorKind::Unsupported, "the server is older than Redis 7").with("version", version)
        );
    }
    let asked: Result<HashMap<String, String>, RedisError> =
        redis::cmd("CONFIG").arg("GET").arg("append*").query_async(connection).await;
    // A server that does not say what it keeps is taken to keep nothing.
    let settings = asked.unwrap_or_default();
    let of = |name: &str| settings.get(name).map(String::as_str).unwrap_or_default();
    durability(of("appendonly") == "yes", of("appendfsync"), options.flushed)
}

/// Hears what publishers and members tell; readers look for themselves whenever words may have been missed.
async fn listen(store: Weak<Store>) {
    loop {
        let Some(client) = store.upgrade().map(|store| store.client.clone()) else { return };
        let listening = async {
            let (mut sink, mut news) = client.get_async_pubsub().await?.split();
            // Every topic's channel: which ones matter is known here.
            sink.psubscribe("evt:{*}:news").await?;
            if let Some(store) = store.upgrade() {
                store.bells.ring_all();
            }
            loop {
                let next = std::future::poll_fn(|task| {
                    futures_core::Stream::poll_next(std::pin::Pin::new(&mut news), task)
                });
                let (Some(heard), Some(store)) = (next.await, store.upgrade()) else { return Ok(()) };
                let channel = heard.get_channel_name();
                let name = channel.strip_prefix("evt:{").and_then(|rest| rest.strip_suffix("}:news"));
                if let Some(topic) = name.and_then(|name| Topic::new(name).ok()) {
                    store.bells.ring(&topic);
                }
            }
        };
        let ended: Result<(), RedisError> = listening.await;
        if let Err(error) = ended {
            tracing::debug!(%error, "news are not heard; readers look by themselves");
        }
        let Some(store) = store.upgrade() else { return };
        store.bells.ring_all();
        drop(store);
        tokio::time::sleep(AGAIN).await;
    }
}

/// Classes an error once, where its code is known.
pub(super) fn from_redis(error: RedisError) -> Error {
    let (kind, message) = match error.kind() {
        redis::ErrorKind::AuthenticationFailed => {
            (ErrorKind::Unauthorized, "the server refused the user or the password")
        }
        redis::ErrorKind::InvalidClientConfig => {
            (ErrorKind::Config, "the address or its options cannot be used")
        }
        redis::ErrorKind::Server(ServerErrorKind::NoPerm) => {
            (ErrorKind::Unauthorized, "the user lacks a right")
        }
        redis::ErrorKind::Server(
            ServerErrorKind::BusyLoading
            | ServerErrorKind::TryAgain
            | ServerErrorKind::ClusterDown
            | ServerErrorKind::MasterDown
            | ServerErrorKind::ReadOnly,
        ) => (ErrorKind::Unavailable, "the server cannot work now"),
        _ if error.is_io_error() => (ErrorKind::Unavailable, "the server cannot be reached"),
        _ if error.is_timeout() => (ErrorKind::Unavailable, "the server did not answer in time"),
        _ if error.is_unrecoverable_error() => {
            (ErrorKind::Unavailable, "the connection to the server was lost")
        }
        _ => match error.code().unwrap_or_default() {
            "OOM" => (ErrorKind::Full, "the server's memory is full"),
            "MISCONF" => (ErrorKind::Full, "the server cannot write to its disk"),
            "NOAUTH" | "WRONGPASS" => {
                (ErrorKind::Unauthorized, "the server refused the user or the password")
            }
            "WRONGTYPE" => (ErrorKind::Conflict, "a key of this topic is used for something else"),
            "NOTOPIC" => (ErrorKind::NotFound, "there is no such topic"),
            _ => (ErrorKind::Unexpected, "the server refused a command"),
        },
    };
    Error::new(kind, message).caused_by(error)
}

/// Tells whether commands that failed may have been carried out: their answer was lost.
pub(super) fn is_unknown(error: &RedisError) -> bool {
    error.is_timeout() || error.is_unrecoverable_error() || error.is_io_error()
}
