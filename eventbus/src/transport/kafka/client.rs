//! One cluster: settings, topics, the producer, and what errors mean.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rdkafka::ClientConfig;
use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigResource, NewTopic, OwnedResourceSpecifier, ResourceSpecifier,
    TopicReplication,
};
use rdkafka::client::{ClientContext, DefaultClientContext};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};

use super::Options;
use super::ends::Ends;
use super::publisher::Producing;
use crate::admin::{Retention, TopicInfo};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::transport::TlsFiles;
use crate::transport::kit::tls;
use crate::url::Url;

/// Readers of ranges: so many ranges are read at a time.
const MAX_READERS: usize = 8;
/// For how long the number of partitions of a topic is believed.
const TOPIC_AGE: Duration = Duration::from_secs(30);

pub(super) struct Client {
    config: ClientConfig,
    pub(super) options: Options,
    /// Where it is, without secrets.
    pub(super) place: String,
    pub(super) admin: AdminClient<DefaultClientContext>,
    /// Looks at metadata and positions.
    pub(super) reader: Mutex<BaseConsumer<Quiet>>,
    /// Read ranges, outside of any group.
    readers: Mutex<Readers>,
    /// Rung when one is free.
    returned: Condvar,
    pub(super) producing: Producing,
    topics: Mutex<HashMap<Topic, (u32, Instant)>>,
    /// What is kept of topics, believed for as long.
    kept: Mutex<HashMap<Topic, (Retention, Instant)>>,
    /// The ends of partitions that somebody waits for.
    pub(super) ends: Arc<Ends>,
    closed: AtomicBool,
}

#[derive(Default)]
struct Readers {
    /// Those that nobody uses now.
    kept: Vec<BaseConsumer<Quiet>>,
    n_lent: usize,
}

/// A context that passes what librdkafka says on as debug messages: what matters comes back as errors.
#[derive(Debug, Clone, Default)]
pub(super) struct Quiet {
    /// The last thing that was said about authentication or TLS: the calls themselves only time out.
    refused: Arc<Mutex<Option<Error>>>,
}

impl ClientContext for Quiet {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(?level, facility, message, "librdkafka");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let refused = match error.rdkafka_error_code() {
            Some(Code::Authentication | Code::SaslAuthenticationFailed) => {
                Error::new(ErrorKind::Unauthorized, "the broker refused the user or the password")
                    .caused_by(reason)
            }
            Some(Code::SSL) => tls::refused(reason),
            // In TLS 1.3 the broker says what it thinks of our certificate after the handshake: for the client that is
            // a failure of the network with words of OpenSSL.
            Some(Code::BrokerTransportFailure) if reason.contains("SSL routines") => tls::refused(reason),
            _ => return tracing::debug!(%error, reason, "librdkafka"),
        };
        *self.refused.lock() = Some(refused);
        tracing::debug!(%error, reason, "librdkafka");
    }
}

impl rdkafka::consumer::ConsumerContext for Quiet {}

/// How long is taken for what the client said before and nobody heard.
const SAID_BY_THEN: Duration = Duration::from_millis(50);

/// Where, as whom and how to connect.
fn config(url: &Url) -> Result<ClientConfig> {
    let place = url.authority(9092)?;
    let hosts: Vec<String> = place.hosts.iter().map(|(host, port)| format!("{host}:{port}")).collect();
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", hosts.join(",")).set("client.id", "eventbus");
    let mut security = if place.is_loopback() { "plaintext" } else { "ssl" };
    if place.user.is_some() {
        security = if place.is_loopback() { "sasl_plaintext" } else { "sasl_ssl" };
    }
    let (mut mechanism, mut files) = ("PLAIN", TlsFiles::default());
    for (name, value) in url.options() {
        const KINDS: [&str; 4] = ["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"];
        const MECHANISMS: [&str; 3] = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"];
        match name {
            "security" => security = KINDS.get(url.choice(name, value, &KINDS)?).copied().unwrap_or(security),
            "sasl" => {
                mechanism =
                    MECHANISMS.get(url.choice(name, value, &MECHANISMS)?).copied().unwrap_or(mechanism);
            }
            "ca" => files.ca = Some(PathBuf::from(value)),
            "cert" => files.cert = Some(PathBuf::from(value)),
            "key" => files.key = Some(PathBuf::from(value)),
            _ => {}
        }
    }
    let needs_tls = security.ends_with("ssl") || (security.starts_with("sasl") && mechanism != "PLAIN");
    if needs_tls && !cfg!(feature = "kafka-tls") {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "this program was built without TLS and SCRAM for Kafka: enable the feature \"kafka-tls\" of eventbus, or say security=plaintext where the network is trusted",
        ));
    }
    config.set("security.protocol", security);
    let texts = files.read(security.ends_with("ssl"), "say security=ssl, or sasl_ssl")?;
    if let Some(ca) = texts.ca {
        config.set("ssl.ca.pem", ca);
    }
    if let Some((cert, key)) = texts.identity {
        config.set("ssl.certificate.pem", cert).set("ssl.key.pem", key);
    }
    if security.starts_with("sasl") {
        let (Some(user), Some(password)) = (place.user, place.password) else {
            return Err(Error::config("sasl needs a user and a password: kafka://user:password@host"));
        };
        config.set("sasl.mechanisms", mechanism).set("sasl.username", user).set("sasl.password", password);
    }
    Ok(config)
}

impl Client {
    pub(super) async fn open(url: &Url, options: Options) -> Result<Arc<Self>> {
        let mut config = config(url)?;
        config
            .set("socket.timeout.ms", options.timeout.as_millis().max(1000).to_string())
            .set("socket.connection.setup.timeout.ms", options.timeout.as_millis().max(1000).to_string())
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000")
            // A deleted topic is noticed soon; one that was created is waited for before it is used.
            .set("topic.metadata.propagation.max.ms", "3000")
            .set("topic.metadata.refresh.interval.ms", "10000")
            .set("log_level", "4");
        let place = config.get("bootstrap.servers").unwrap_or_default().to_owned();
        let opening = tokio::task::spawn_blocking(move || {
            let quiet = Quiet::default();
            let reader = reader(&config, quiet.clone())?;
            reader.fetch_metadata(Some("eventbus-probe"), options.timeout).map_err(|error| {
                // What was said meanwhile waits for a poll, and more is said all the time.
                let end = Instant::now() + SAID_BY_THEN;
                while quiet.refused.lock().is_none() && Instant::now() < end {
                    drop(reader.poll(SAID_BY_THEN / 10));
                }
                quiet.refused.lock().take().unwrap_or_else(|| from_kafka(error))
            })?;
            let (admin, ends) = (config.create().map_err(from_kafka)?, Arc::<Ends>::default());
            let producing = Producing::new(config.clone(), &options, ends.clone())?;
            Ok(Self {
                config,
                place: String::new(),
                admin,
                reader: Mutex::new(reader),
                readers: Mutex::default(),
                returned: Condvar::new(),
                producing,
                topics: Mutex::default(),
                kept: Mutex::default(),
                ends,
                closed: AtomicBool::new(false),
                options,
            })
        });
        let opened: Result<Self> = opening.await.map_err(interrupted)?;
        match opened {
            Ok(client) => Ok(Arc::new(Self { place, ..client })),
            Err(error) => Err(error.with("place", place)),
        }
    }

    pub(super) fn is_open(&self) -> Result<()> {
        if self.closed.load(Atomic::Acquire) { Err(Error::closed("transport")) } else { Ok(()) }
    }

    /// Lends a reader of ranges. Each reads one range at a time; a few are kept.
    /// Waits for one that is free. Blocks.
    pub(super) fn with_reader<T>(&self, read: impl FnOnce(&BaseConsumer<Quiet>) -> Result<T>) -> Result<T> {
        let kept = {
            let mut readers = self.readers.lock();
            while readers.n_lent == MAX_READERS {
                self.returned.wait(&mut readers);
            }
            readers.n_lent += 1;
            readers.kept.pop()
        };
        let lent = kept.map_or_else(|| reader(&self.config, Quiet::default()), Ok);
        let outcome = lent.as_ref().map_err(Error::duplicate).and_then(read);
        let mut readers = self.readers.lock();
        readers.n_lent -= 1;
        readers.kept.extend(lent);
        self.returned.notify_one();
        outcome
    }

    /// The settings of a consumer of a group.
    pub(super) fn consumer_config(&self, group: &str) -> ClientConfig {
        let session = self.options.session;
        let mut config = self.config.clone();
        config
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            .set("isolation.level", "read_committed")
            .set("check.crcs", "true")
            .set("queued.max.messages.kbytes", "16384")
            // One answer of a broker comes on top of what is queued, and the client unpacks all of it at once: bodies that
            // compress well are many times as large as what was fetched.
            .set("fetch.max.bytes", "16777216")
            .set("fetch.message.max.bytes", "262144")
            .set("fetch.queue.backoff.ms", "10")
            .set("fetch.wait.max.ms", "250")
            .set("max.poll.interval.ms", session.as_millis().max(300_000).to_string());
        if self.options.consumer_protocol {
            config.set("group.protocol", "consumer");
        } else {
            config
                .set("partition.assignment.strategy", "cooperative-sticky")
                .set("session.timeout.ms", session.as_millis().to_string())
                .set("heartbeat.interval.ms", (session / 10).as_millis().max(50).to_string());
        }
        if let Some(instance) = &self.options.instance {
            config.set("group.instance.id", instance);
        }
        config
    }

    /// Runs calls of librdkafka that block.
    pub(super) async fn blocking<T, F>(self: &Arc<Self>, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Self) -> Result<T> + Send + 'static,
    {
        let client = self.clone();
        tokio::task::spawn_blocking(move || work(&client)).await.map_err(interrupted)?
    }

    /// The number of partitions of a topic; it is created where that is wanted.
    pub(super) async fn partitions(self: &Arc<Self>, topic: &Topic) -> Result<u32> {
        if let Some((known, looked)) = self.topics.lock().get(topic)
            && looked.elapsed() < TOPIC_AGE
        {
            return Ok(*known);
        }
        let name = topic.clone();
        let found = match self.blocking(move |client| client.find(&name)).await? {
            Some(found) => found,
            None if self.options.create_topics => {
                self.declare(topic, self.options.partitions, Retention::default()).await?;
                self.created(topic).await?
            }
            None => return Err(missing(topic).with("hint", "create it, or say declare=create")),
        };
        self.topics.lock().insert(topic.clone(), (found, Instant::now()));
        Ok(found)
    }

    /// Waits until the brokers know of a topic that was just created.
    pub(super) async fn created(self: &Arc<Self>, topic: &Topic) -> Result<u32> {
        let end = Instant::now() + self.options.timeout;
        loop {
            let name = topic.clone();
            match self.blocking(move |client| client.find(&name)).await? {
                Some(found) => return Ok(found),
                None if Instant::now() > end => return Err(missing(topic)),
                None => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    pub(super) fn forget(&self, topic: &Topic) {
        self.topics.lock().remove(topic);
        self.kept.lock().remove(topic);
        self.producing.forget(topic);
    }

    /// The number of partitions of a topic, if it exists and can be used. Blocks.
    pub(super) fn find(&self, topic: &Topic) -> Result<Option<u32>> {
        let metadata = self
            .reader
            .lock()
            .fetch_metadata(Some(topic.as_str()), self.options.timeout)
            .map_err(from_kafka)?;
        let Some(found) = metadata.topics().iter().find(|found| found.name() == topic.as_str()) else {
            return Ok(None);
        };
        match found.error().map(Code::from) {
            Some(Code::UnknownTopicOrPartition | Code::UnknownTopic) => return Ok(None),
            Some(code) => return Err(from_kafka(KafkaError::MetadataFetch(code)).with("topic", topic)),
            None => {}
        }
        // Right after its creation a topic has partitions without a leader.
        let usable = found.partitions().iter().all(|partition| partition.error().is_none());
        Ok((usable && !found.partitions().is_empty()).then_some(found.partitions().len() as u32))
    }

    /// Creates a topic; false if it exists.
    pub(super) async fn declare(&self, topic: &Topic, partitions: u32, kept: Retention) -> Result<bool> {
        let copies = self.options.replication.map_or(-1, i32::from);
        let age = kept.max_age.map(|age| age.as_millis().to_string());
        let mut wanted = NewTopic::new(topic.as_str(), partitions as i32, TopicReplication::Fixed(copies))
            .set("message.timestamp.type", "LogAppendTime");
        if let Some(age) = &age {
            wanted = wanted.set("retention.ms", age);
        }
        if kept.max_events.is_some() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "Kafka bounds a topic by age and bytes, not by events",
            ));
        }
        let created = self.admin.create_topics([&wanted], &self.patience()).await.map_err(from_kafka)?;
        match created.into_iter().next() {
            Some(Err((_, Code::TopicAlreadyExists))) => Ok(false),
            Some(Err((_, Code::InvalidTopic))) => Err(Error::new(
                ErrorKind::Conflict,
                "Kafka refuses the name: one that differs only in '.' and '_' exists",
            )
            .with("topic", topic)),
            Some(Err((_, code))) => Err(from_kafka(KafkaError::AdminOp(code)).with("topic", topic)),
            _ => Ok(true),
        }
    }

    /// Says what is kept of topics, where the broker tells us.
    pub(super) async fn keeps(&self, topics: &mut [TopicInfo]) -> Result<()> {
        let asked: Vec<String> = {
            let mut kept = self.kept.lock();
            kept.retain(|_, (_, since)| since.elapsed() < TOPIC_AGE);
            topics
                .iter()
                .filter(|info| !kept.contains_key(&info.topic))
                .map(|info| info.topic.to_string())
                .collect()
        };
        if !asked.is_empty() {
            let asked: Vec<_> = asked.iter().map(|topic| ResourceSpecifier::Topic(topic)).collect();
            let told = self.admin.describe_configs(&asked, &self.patience()).await.map_err(from_kafka)?;
            let mut kept = self.kept.lock();
            // Who may not look at settings is not told.
            for config in told.into_iter().flatten() {
                if let OwnedResourceSpecifier::Topic(name) = &config.specifier
                    && let Ok(topic) = Topic::new(name.as_str())
                {
                    kept.insert(topic, (retention(&config), Instant::now()));
                }
            }
        }
        let kept = self.kept.lock();
        for info in topics {
            info.retention = kept.get(&info.topic).map_or_else(Retention::default, |(kept, _)| *kept);
        }
        Ok(())
    }

    pub(super) fn patience(&self) -> AdminOptions {
        let timeout = self.options.timeout;
        AdminOptions::new().request_timeout(Some(timeout)).operation_timeout(Some(timeout))
    }

    pub(super) async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        let deleted =
            self.admin.delete_topics(&[topic.as_str()], &self.patience()).await.map_err(from_kafka)?;
        self.forget(topic);
        match deleted.into_iter().next() {
            Some(Err((_, Code::UnknownTopicOrPartition))) => Err(missing(topic)),
            Some(Err((_, code))) => Err(from_kafka(KafkaError::AdminOp(code)).with("topic", topic)),
            _ => Ok(()),
        }
    }

    pub(super) async fn delete_group(&self, group: &str) -> Result<()> {
        let deleted = self.admin.delete_groups(&[group], &self.patience()).await.map_err(from_kafka)?;
        match deleted.into_iter().next() {
            Some(Err((_, Code::NonEmptyGroup))) => {
                Err(Error::new(ErrorKind::Conflict, "the group has members: stop them first")
                    .with("group", group))
            }
            Some(Err((_, Code::GroupIdNotFound))) => {
                Err(Error::not_found("there is no such group").with("group", group))
            }
            Some(Err((_, code))) => Err(from_kafka(KafkaError::AdminOp(code)).with("group", group)),
            _ => Ok(()),
        }
    }

    pub(super) async fn delete_records(&self, records: &rdkafka::TopicPartitionList) -> Result<()> {
        let done = self.admin.delete_records(records, &self.patience()).await.map_err(from_kafka)?;
        done.elements().iter().try_for_each(|element| element.error().map_err(from_kafka))
    }

    /// Takes no more work.
    pub(super) fn close(&self) {
        self.closed.store(true, Atomic::Release);
    }
}

/// A client that is in no group: positions are given with every read.
fn reader(config: &ClientConfig, quiet: Quiet) -> Result<BaseConsumer<Quiet>> {
    config
        .clone()
        .set("group.id", "eventbus-reader")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "error")
        .set("isolation.level", "read_committed")
        .set("fetch.wait.max.ms", "10")
        .create_with_context(quiet)
        .map_err(from_kafka)
}

pub(super) fn interrupted(error: tokio::task::JoinError) -> Error {
    Error::new(ErrorKind::Unexpected, "the work on the client was interrupted").caused_by(error)
}

/// What a topic's settings say; `retention.ms` of -1 is no bound, and where only `compact` is asked for nothing goes by age.
fn retention(config: &ConfigResource) -> Retention {
    let value = |name| config.get(name).and_then(|entry| entry.value.as_deref());
    let goes_by_age = value("cleanup.policy").is_none_or(|policy| policy.contains("delete"));
    let age = value("retention.ms").filter(|_| goes_by_age).and_then(|millis| millis.parse().ok());
    Retention { max_age: age.map(Duration::from_millis), ..Retention::default() }
}

pub(super) fn missing(topic: &Topic) -> Error {
    Error::not_found("there is no such topic").with("topic", topic)
}

/// Classes an error once, where its code is known.
pub(super) fn from_kafka(error: KafkaError) -> Error {
    // The client library does not tell the code of these (0.39).
    let code = match &error {
        KafkaError::AdminOp(code) => Some(*code),
        error => error.rdkafka_error_code(),
    };
    let (kind, message) = match code {
        Some(code) => of_code(code),
        None if matches!(error, KafkaError::ClientConfig(..)) => {
            (ErrorKind::Config, "an option cannot be used")
        }
        None => (ErrorKind::Unexpected, "the client failed"),
    };
    Error::new(kind, message).caused_by(error)
}

pub(super) fn of_code(code: Code) -> (ErrorKind, &'static str) {
    match code {
        Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition => {
            (ErrorKind::NotFound, "there is no such topic")
        }
        Code::MessageSizeTooLarge | Code::InvalidMessageSize => {
            (ErrorKind::TooLarge, "the event is above the broker's limit")
        }
        Code::Authentication
        | Code::SaslAuthenticationFailed
        | Code::TopicAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed => {
            (ErrorKind::Unauthorized, "the broker refused the user")
        }
        Code::MessageTimedOut => (ErrorKind::Unknown, "the event was not confirmed in time"),
        Code::QueueFull => (ErrorKind::Full, "the client's queue is full"),
        Code::BrokerTransportFailure
        | Code::SSL
        | Code::AllBrokersDown
        | Code::OperationTimedOut
        | Code::RequestTimedOut
        | Code::Resolve
        | Code::LeaderNotAvailable
        | Code::NotLeaderForPartition
        | Code::UnknownLeaderEpoch
        | Code::FencedLeaderEpoch
        | Code::OffsetNotAvailable
        | Code::ReplicaNotAvailable
        | Code::NotEnoughReplicas
        | Code::NotEnoughReplicasAfterAppend
        | Code::CoordinatorLoadInProgress
        | Code::CoordinatorNotAvailable
        | Code::NotCoordinator
        | Code::RebalanceInProgress
        | Code::IllegalGeneration
        | Code::StaleMemberEpoch
        | Code::WaitingForCoordinator
        | Code::BrokerNotAvailable
        | Code::NetworkException
        | Code::KafkaStorageError => (ErrorKind::Unavailable, "the cluster cannot work now"),
        _ => (ErrorKind::Unexpected, "the broker refused a request"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What administration is told is classed as what everybody else is told.
    #[test]
    fn errors_of_administration_are_known_by_their_codes() {
        let away = from_kafka(KafkaError::AdminOp(Code::BrokerTransportFailure));
        assert!(away.is_retryable(), "{away}");
        let refused = from_kafka(KafkaError::AdminOp(Code::TopicAuthorizationFailed));
        assert_eq!(refused.kind(), ErrorKind::Unauthorized);
    }
}
