//! One account of a NATS server: topics, the bucket in which groups are kept, and what errors mean.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant, SystemTime, UNIX_EPOCH};

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::kv::{self, CreateErrorKind, UpdateErrorKind};
use async_nats::jetstream::stream::{Config, Info, RawMessageErrorKind, StorageType, Stream};
use async_nats::jetstream::{self, Context, ErrorCode, context};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, HeaderMap, HeaderName, HeaderValue, ServerAddr,
    Subscriber,
};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Options, PORT, message, names, publisher};
use crate::admin::Retention;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::time::from_rfc3339;
use crate::transport::TlsFiles;
use crate::transport::kit::leased::Stored;
use crate::transport::kit::leased::registers::{Bounds, Held};
use crate::transport::kit::queue::Queue;
use crate::transport::kit::tasks::Tasks;
use crate::transport::kit::tls;
use crate::url::Url;

/// For how long the number of partitions of a topic is believed.
const TOPIC_AGE: Duration = Duration::from_secs(30);
/// Room for headers and framing below the server's largest payload.
const OVERHEAD: usize = 16 << 10;

pub(super) struct Store {
    pub(super) client: Client,
    pub(super) context: Context,
    bucket: kv::Store,
    pub(super) options: Options,
    /// Largest event in bytes.
    pub(super) max_event_bytes: usize,
    /// Where it is, without secrets.
    pub(super) place: String,
    pub(super) queue: Arc<Queue>,
    topics: Mutex<HashMap<Topic, (u32, StdInstant)>>,
    /// Changes with every new connection: what was on its way to us on the last one is lost.
    pub(super) connections: watch::Sender<u64>,
    clock: Mutex<Clock>,
    pub(super) tasks: Tasks,
}

/// What is kept of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TopicDoc {
    pub(super) partitions: u32,
    /// Whether all its streams are there; a topic that is not ready is none.
    pub(super) is_ready: bool,
    /// Milliseconds.
    pub(super) max_age: Option<u64>,
    pub(super) max_events: Option<u64>,
}

/// One look at the server's clock: what it was at some moment between two of ours.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    millis: u64,
    before: Instant,
    after: Instant,
}

impl Clock {
    /// The server's time now, in milliseconds, or a little less.
    pub(super) fn now(&self) -> u64 {
        self.millis.saturating_add(self.after.elapsed().as_millis() as u64)
    }

    /// The server's time at a moment of ours, or a little more.
    pub(super) fn at(&self, moment: Instant) -> u64 {
        let since = moment.saturating_duration_since(self.before).as_micros().div_ceil(1000);
        self.millis.saturating_add(since as u64)
    }

    /// The moment of ours at which the server's time is `millis`, or a little later.
    pub(super) fn moment(&self, millis: u64) -> Option<Instant> {
        self.after.checked_add(Duration::from_millis(millis.saturating_sub(self.millis)))
    }
}

pub(super) fn millis_of(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// Where, as whom and how to connect.
fn connection(
    url: &Url,
    options: &Options,
    connections: watch::Sender<u64>,
) -> Result<(Vec<ServerAddr>, ConnectOptions, String)> {
    let place = url.authority(PORT)?;
    if !place.path.is_empty() {
        return Err(Error::config("nats:// takes hosts only: nats://user:password@host:port"));
    }
    let mut addresses = Vec::new();
    let mut shown = Vec::new();
    for (host, port) in &place.hosts {
        let host = if host.contains(':') { format!("[{host}]") } else { (*host).to_owned() };
        shown.push(format!("{host}:{port}"));
        let address: Result<ServerAddr, _> = format!("nats://{host}:{port}").parse();
        addresses.push(address.map_err(|error| Error::config("a host cannot be used").caused_by(error))?);
    }
    let mut settings = ConnectOptions::new()
        .name("eventbus")
        .connection_timeout(options.timeout)
        .request_timeout(Some(options.timeout))
        // A connection that is dead and says nothing is given up after three.
        .ping_interval((options.session / 3).clamp(Duration::from_millis(500), Duration::from_secs(5)))
        .event_callback(move |event| {
            if matches!(event, Event::Connected) {
                connections.send_modify(|n| *n += 1);
            }
            async move { tracing::debug!(%event, "NATS") }
        });
    settings = match (place.user, place.password) {
        (Some(user), Some(password)) => settings.user_and_password(user.to_owned(), password.to_owned()),
        (Some(token), None) => settings.token(token.to_owned()),
        _ => settings,
    };
    if let Some(file) = &options.credentials {
        let text = std::fs::read_to_string(file).map_err(|error| {
            Error::config("the file of credentials cannot be read")
                .with("file", file.display())
                .caused_by(error)
        })?;
        // The library's error may show a part of the file.
        settings = settings.credentials(&text).map_err(|_| {
            Error::config("the file holds no credentials of NATS").with("file", file.display())
        })?;
    }
    let TlsFiles { ca, cert, key } = &options.files;
    options.files.read(options.tls, "say tls=on")?;
    // Also where it is off: a server may insist.
    tls::choose_provider();
    settings = settings.require_tls(options.tls);
    if let Some(ca) = ca {
        settings = settings.add_root_certificates(ca.clone());
    }
    if let (Some(cert), Some(key)) = (cert, key) {
        settings = settings.add_client_certificate(cert.clone(), key.clone());
    }
    Ok((addresses, settings, shown.join(",")))
}

impl Store {
    pub(super) async fn open(url: &Url, options: Options) -> Result<Arc<Self>> {
        let connections = watch::Sender::new(0);
        let (addresses, settings, place) = connection(url, &options, connections.clone())?;
        let opening = async {
            let client = settings.connect(addresses).await.map_err(|error| match error.kind() {
                ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => Error::new(
                    ErrorKind::Unauthorized,
                    "the server refused the user, the password or the token",
                )
                .caused_by(error),
                _ if tls::is_refused(&error) => tls::refused(error),
                ConnectErrorKind::Tls | ConnectErrorKind::ServerParse => {
                    Error::config("the server cannot be spoken to like this").caused_by(error)
                }
                _ => Error::new(ErrorKind::Unavailable, "the server cannot be reached").caused_by(error),
            })?;
            let context = context::ContextBuilder::new()
                .timeout(options.timeout)
                .ack_timeout(options.timeout)
                .build(client.clone());
            let bucket = bucket(&context, &options).await?;
            let clock = look_at_clock(&bucket).await?;
            Ok((client, context, bucket, clock))
        };
        let opened = tokio::time::timeout(options.timeout * 2, opening).await;
        let (client, context, bucket, clock) = opened
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Unavailable, "the server does not answer")))
            .map_err(|error: Error| error.with("place", &place))?;
        let most = client.max_payload().saturating_sub(OVERHEAD).max(1);
        let max_event_bytes = options.max_event_bytes.unwrap_or(most);
        if max_event_bytes > most {
            return Err(Error::config("max_event_bytes is above what the server takes")
                .with("max_event_bytes", max_event_bytes)
                .with("server", most));
        }
        let (queue, rounds) = Queue::new(max_event_bytes);
        let store = Arc::new(Self {
            client,
            context,
            bucket,
            options,
            max_event_bytes,
            place,
            queue,
            topics: Mutex::default(),
            connections,
            clock: Mutex::new(clock),
            tasks: Tasks::default(),
        });
        let acks = publisher::Acks::hear(&store.client).await?;
        store.tasks.keep(tokio::spawn(publisher::write(Arc::downgrade(&store), rounds, acks)));
        Ok(store)
    }

    pub(super) fn is_open(&self) -> Result<()> {
        self.queue.is_open()
    }

    pub(super) async fn close(&self) {
        self.queue.stop().await;
        self.tasks.end().await;
        let draining = async { self.client.drain().await.map_err(unavailable) };
        if let Err(error) = self.within(draining).await {
            tracing::debug!(%error, "the connection was closed before");
        }
    }

    pub(super) fn clock(&self) -> Clock {
        *self.clock.lock()
    }

    /// Looks at the server's clock again.
    pub(super) async fn set_clock(&self) -> Result<()> {
        let clock = look_at_clock(&self.bucket).await?;
        *self.clock.lock() = clock;
        Ok(())
    }

    /// Bounds what the client would wait for without end while it has no connection.
    pub(super) async fn within<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::timeout(self.options.timeout, work)
            .await
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Unavailable, "the server did not answer in time")))
    }

    /// Hears what is published on a subject.
    pub(super) async fn subscribe(&self, subject: String) -> Result<Subscriber> {
        self.within(async { self.client.subscribe(subject).await.map_err(unavailable) }).await
    }

    /// The value of a key, and the revision for its next change. Asks the leader: a copy may be behind.
    pub(super) async fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<Held<T>>> {
        let looking = async {
            match self.bucket.stream.get_last_raw_message_by_subject(&names::changes(key)).await {
                Ok(found) => Ok(Some(found)),
                Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
                Err(error) => Err(unavailable(error).with("key", key)),
            }
        };
        // A mark of deletion has no body.
        let Some(found) = self.within(looking).await?.filter(|found| !found.payload.is_empty()) else {
            return Ok(None);
        };
        let value = serde_json::from_slice(&found.payload).map_err(|error| damaged(key).caused_by(error))?;
        Ok(Some(Held { value, revision: found.sequence }))
    }

    /// Writes a key if nobody changed it meanwhile; `None` = somebody did. Returns the new revision.
    pub(super) async fn set<T: Serialize>(&self, key: &str, value: &T, revision: u64) -> Result<Option<u64>> {
        let value = Bytes::from(serde_json::to_vec(value).map_err(|error| damaged(key).caused_by(error))?);
        self.within(async {
            if revision > 0 {
                return self.written(self.bucket.update(key, value, revision).await);
            }
            match self.bucket.create(key, value).await {
                Ok(revision) => Ok(Some(revision)),
                Err(error) if error.kind() == CreateErrorKind::AlreadyExists => Ok(None),
                Err(error) if is_conflict(&error) => Ok(None),
                Err(error) => Err(unavailable(error)),
            }
        })
        .await
    }

    fn written<T>(&self, outcome: Result<T, kv::UpdateError>) -> Result<Option<T>> {
        match outcome {
            Ok(done) => Ok(Some(done)),
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => Ok(None),
            Err(error) if is_conflict(&error) => Ok(None),
            Err(error) => Err(unavailable(error)),
        }
    }

    /// Removes a key if nobody changed it meanwhile; `None` = somebody did.
    pub(super) async fn remove_at(&self, key: &str, revision: u64) -> Result<Option<()>> {
        self.within(async { self.written(self.bucket.purge_expect_revision(key, Some(revision)).await) })
            .await
    }

    /// Removes keys, whatever they hold: who listens hears of it, and nothing is left of them.
    pub(super) async fn remove(&self, keys: impl Iterator<Item = String>) -> Result<()> {
        let removing = keys.map(|key| async move {
            self.within(async { self.bucket.purge(&key).await.map_err(unavailable) }).await?;
            self.clear(&key).await
        });
        try_join_all(removing).await.map(drop)
    }

    /// Removes what a key holds, or keys with a wildcard, and the marks of deletion.
    pub(super) async fn clear(&self, key: &str) -> Result<()> {
        let clearing = self.bucket.stream.purge().filter(names::changes(key));
        self.within(async { clearing.await.map_err(unavailable) }).await.map(drop)
    }

    /// The keys that begin like this; some may hold nothing any more.
    pub(super) async fn keys(&self, prefix: &str) -> Result<Vec<String>> {
        use futures_util::TryStreamExt as _;
        let subject = names::changes(prefix);
        let listing = async {
            let looking = self.bucket.stream.info_builder().subjects(format!("{subject}>"));
            let found: Vec<(String, usize)> =
                looking.fetch().await.map_err(unavailable)?.try_collect().await.map_err(unavailable)?;
            Ok(found)
        };
        let found = self.within(listing).await?;
        let all = names::changes("");
        let mut keys: Vec<String> =
            found.iter().filter_map(|(known, _)| known.strip_prefix(&all).map(str::to_owned)).collect();
        keys.sort_unstable();
        Ok(keys)
    }

    /// What the server says of the stream of a partition, if there is one.
    pub(super) async fn look(&self, topic: &Topic, partition: u32) -> Result<Option<(Stream, Info)>> {
        let looking = async {
            match self.context.get_stream(names::stream(topic, partition)).await {
                Ok(stream) => {
                    let info = stream.cached_info().clone();
                    Ok(Some((stream, info)))
                }
                Err(error) => match error.kind() {
                    context::GetStreamErrorKind::JetStream(error)
                        if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                    {
                        Ok(None)
                    }
                    _ => Err(unavailable(error)),
                },
            }
        };
        self.within(looking).await
    }

    /// Looks at all partitions of a topic that exists.
    pub(super) async fn look_at_all(&self, topic: &Topic, n_partitions: u32) -> Result<Vec<(Stream, Info)>> {
        let looking = (0..n_partitions).map(|partition| self.look(topic, partition));
        join_all(looking).await.into_iter().map(|found| found?.ok_or_else(|| missing(topic))).collect()
    }

    /// What is kept of a topic that is ready.
    pub(super) async fn declared(&self, topic: &Topic) -> Result<Option<TopicDoc>> {
        let found = self.get::<TopicDoc>(&names::topic(topic)).await?;
        Ok(found.map(|held| held.value).filter(|declared| declared.is_ready))
    }

    /// The number of partitions of a topic; it is created where that is wanted.
    pub(super) async fn partitions(&self, topic: &Topic) -> Result<u32> {
        if let Some((known, looked)) = self.topics.lock().get(topic)
            && looked.elapsed() < TOPIC_AGE
        {
            return Ok(*known);
        }
        let found = match self.declared(topic).await? {
            Some(found) => found.partitions,
            None if self.options.create_topics => {
                let retention = Retention { max_age: self.options.retention, ..Retention::default() };
                self.declare(topic, self.options.partitions, retention).await?.0
            }
            None => return Err(missing(topic).with("hint", "create it, or say declare=create")),
        };
        self.topics.lock().insert(topic.clone(), (found, StdInstant::now()));
        Ok(found)
    }

    pub(super) fn forget(&self, topic: &Topic) {
        self.topics.lock().remove(topic);
    }

    /// Creates a topic; returns its partitions, and whether it is new. What an earlier try left undone is done.
    pub(super) async fn declare(
        &self,
        topic: &Topic,
        partitions: u32,
        kept: Retention,
    ) -> Result<(u32, bool)> {
        if kept.max_age.is_some_and(|age| age < SHORTEST) {
            return Err(Error::config("NATS keeps events for 100 ms at least"));
        }
        let max_age = kept.max_age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        let max_events = kept.max_events.map(std::num::NonZeroU64::get);
        let wanted = TopicDoc { partitions, is_ready: false, max_age, max_events };
        let key = names::topic(topic);
        let is_new = self.set(&key, &wanted, 0).await?.is_some();
        // Deleted in between: whoever asked may ask again.
        let found = self.get::<TopicDoc>(&key).await?.ok_or_else(|| missing(topic))?;
        let n_partitions = found.value.partitions;
        let creating = (0..n_partitions).map(|partition| self.create(topic, partition, found.value));
        match try_join_all(creating).await {
            Ok(_) if found.value.is_ready => {}
            // If somebody was quicker, it is what they made of it.
            Ok(_) => drop(self.set(&key, &TopicDoc { is_ready: true, ..found.value }, found.revision).await?),
            Err(error) => {
                if is_new && error.kind() == ErrorKind::Config {
                    // Nobody can ever make it.
                    self.remove_at(&key, found.revision).await?;
                }
                return Err(error);
            }
        }
        Ok((n_partitions, is_new))
    }

    async fn create(&self, topic: &Topic, partition: u32, declared: TopicDoc) -> Result<()> {
        let config = Config {
            name: names::stream(topic, partition),
            subjects: vec![names::subject(topic, partition)],
            storage: StorageType::File,
            num_replicas: self.options.replicas,
            max_age: declared.max_age.map(Duration::from_millis).unwrap_or_default(),
            max_messages: declared.max_events.map_or(-1, |most| i64::try_from(most).unwrap_or(i64::MAX)),
            duplicate_window: self.options.dedup.unwrap_or(Duration::ZERO),
            allow_direct: true,
            ..Config::default()
        };
        let creating = async { Ok(self.context.create_stream(config).await) };
        match self.within(creating).await? {
            Ok(_) => Ok(()),
            Err(error) => match error.kind() {
                // The server takes no stream with these settings, now or later.
                context::CreateStreamErrorKind::JetStream(known)
                    if known.code() == 400
                        && known.error_code() != ErrorCode::STREAM_NAME_EXIST
                        && known.error_code() != ErrorCode::STREAM_SUBJECT_OVERLAP =>
                {
                    Err(Error::config("the server refuses a stream with these settings")
                        .with("topic", topic)
                        .caused_by(error))
                }
                // It stands already, with other settings: those of whoever made it.
                context::CreateStreamErrorKind::JetStream(known)
                    if known.error_code() == ErrorCode::STREAM_NAME_EXIST =>
                {
                    self.verify(topic, partition).await
                }
                context::CreateStreamErrorKind::JetStream(known)
                    if known.error_code() == ErrorCode::STREAM_SUBJECT_OVERLAP =>
                {
                    Err(Error::new(ErrorKind::Conflict, "another stream takes the subjects of this topic")
                        .with("topic", topic)
                        .with("subject", names::subject(topic, partition))
                        .caused_by(error))
                }
                _ => Err(unavailable(error).with("topic", topic)),
            },
        }
    }

    /// Fails unless the stream of a partition takes the events of this partition and no others.
    async fn verify(&self, topic: &Topic, partition: u32) -> Result<()> {
        let (_, info) = self.look(topic, partition).await?.ok_or_else(|| missing(topic))?;
        let subject = names::subject(topic, partition);
        if info.config.subjects == [subject.as_str()] {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Conflict, "a stream of this name holds something else")
            .with("stream", &info.config.name)
            .with("wanted", subject)
            .with("found", info.config.subjects.join(" ")))
    }

    pub(super) async fn delete_stream(&self, topic: &Topic, partition: u32) -> Result<()> {
        let deleting = async { Ok(self.context.delete_stream(names::stream(topic, partition)).await) };
        match self.within(deleting).await? {
            Ok(_) => Ok(()),
            Err(error) => match error.kind() {
                context::DeleteStreamErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    Ok(())
                }
                _ => Err(unavailable(error)),
            },
        }
    }

    /// One event as it is stored, if it is there: told in JSON, whatever its headers are.
    pub(super) async fn alone(&self, topic: &Topic, partition: u32, offset: u64) -> Result<Option<Stored>> {
        #[derive(Deserialize)]
        struct Answer {
            message: Option<Raw>,
        }
        #[derive(Deserialize)]
        struct Raw {
            #[serde(default)]
            hdrs: String,
            #[serde(default)]
            data: String,
            time: String,
        }
        let subject = format!("STREAM.MSG.GET.{}", names::stream(topic, partition));
        let asked = serde_json::json!({ "seq": offset });
        let asking =
            async { self.context.request::<_, _, Answer>(subject, &asked).await.map_err(unavailable) };
        let Some(raw) = self.within(asking).await?.message else { return Ok(None) };
        let bytes =
            |text: &str| BASE64_STANDARD.decode(text).map_err(|error| damaged("message").caused_by(error));
        let (lines, data) = (bytes(&raw.hdrs)?, bytes(&raw.data)?);
        let mut headers = HeaderMap::new();
        for line in String::from_utf8_lossy(&lines).lines().skip(1) {
            let Some((name, value)) = line.split_once(':') else { continue };
            if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.trim().parse::<HeaderValue>()) {
                headers.append(name, value);
            }
        }
        let content = message::content(Some(&headers), Bytes::from(data));
        let stored_at = from_rfc3339(&raw.time).unwrap_or(UNIX_EPOCH);
        Ok(Some(Stored { offset, stored_at, content }))
    }

    /// The first event of a stream that was stored at or after a time.
    pub(super) async fn first_since(&self, stream: &Stream, time: SystemTime) -> Result<Option<u64>> {
        let nanos = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let start_time = async_nats::datetime::from_nanos(i128::try_from(nanos).unwrap_or(i128::MAX))
            .map_err(|_| Error::config("a start lies beyond the times that NATS knows"))?;
        let found = self.fetch(stream, DeliverPolicy::ByStartTime { start_time }, 1).await?;
        Ok(found.first().and_then(|message| Some(message.info().ok()?.stream_sequence)))
    }

    /// What the server may send at once: never below one event, or it could not be read.
    pub(super) fn max_bytes_at_once(&self) -> usize {
        (1 << 20).max(self.client.max_payload() + (64 << 10))
    }

    /// Reads at most `max` messages of a stream from a place on; those that are there now.
    pub(super) async fn fetch(
        &self,
        stream: &Stream,
        from: DeliverPolicy,
        max: usize,
    ) -> Result<Vec<jetstream::Message>> {
        use futures_util::StreamExt as _;
        let creating = async { stream.create_consumer(reading(from)).await.map_err(unavailable) };
        let consumer = self.within(creating).await?;
        let max_bytes = self.max_bytes_at_once();
        let asking = consumer.fetch().max_messages(max).max_bytes(max_bytes).messages();
        let mut batch = self.within(async { asking.await.map_err(unavailable) }).await?;
        let mut found = Vec::new();
        let reading = async {
            while let Some(message) = batch.next().await {
                found.push(message.map_err(|error| {
                    Error::new(ErrorKind::Unavailable, "the server did not bring the events").caused_by(error)
                })?);
            }
            Ok(())
        };
        let read = tokio::time::timeout(self.options.timeout, reading).await;
        let deleting =
            async { stream.delete_consumer(&consumer.cached_info().name).await.map_err(unavailable) };
        if let Err(error) = self.within(deleting).await {
            tracing::debug!(%error, "a reader was left to its end");
        }
        match read {
            Ok(read) => read.map(|()| found),
            Err(_) => Err(Error::new(ErrorKind::Unavailable, "the server did not bring the events in time")),
        }
    }
}

/// Least age of events and least window that the server takes for a stream.
pub(super) const SHORTEST: Duration = Duration::from_millis(100);

/// A reader outside of any group, which the server forgets when nobody pulls.
pub(super) fn reading(from: DeliverPolicy) -> pull::Config {
    pull::Config {
        deliver_policy: from,
        ack_policy: AckPolicy::None,
        inactive_threshold: Duration::from_secs(60),
        memory_storage: true,
        num_replicas: 1,
        ..pull::Config::default()
    }
}

/// What a stream holds.
pub(super) fn bounds(info: &Info) -> Bounds {
    let state = &info.state;
    Bounds { first: state.first_sequence.max(1), next: state.last_sequence + 1, n_kept: state.messages }
}

/// From a sequence on.
pub(super) fn since(sequence: u64) -> DeliverPolicy {
    match sequence {
        0 | 1 => DeliverPolicy::All,
        start_sequence => DeliverPolicy::ByStartSequence { start_sequence },
    }
}

/// The bucket in which topics and groups are kept.
async fn bucket(context: &Context, options: &Options) -> Result<kv::Store> {
    if let Ok(found) = context.get_key_value(names::BUCKET).await {
        return Ok(found);
    }
    let config = kv::Config {
        bucket: names::BUCKET.to_owned(),
        description: "Topics and groups of eventbus".to_owned(),
        history: 1,
        num_replicas: options.replicas,
        ..kv::Config::default()
    };
    context.create_key_value(config).await.map_err(|error| {
        Error::new(ErrorKind::Unavailable, "the bucket of topics and groups cannot be had: is JetStream on?")
            .caused_by(error)
    })
}

async fn look_at_clock(bucket: &kv::Store) -> Result<Clock> {
    let before = Instant::now();
    bucket.put(names::CLOCK, Bytes::new()).await.map_err(unavailable)?;
    // Of the leader: it knows of ours. Another member's may be later, but not than this moment.
    let found = bucket.stream.get_last_raw_message_by_subject(&names::changes(names::CLOCK)).await;
    let found = found.map_err(unavailable)?;
    Ok(Clock { millis: millis_of(found.time.into()), before, after: Instant::now() })
}

/// Whether a change was refused because somebody was quicker: the client knows one of the two codes for it.
fn is_conflict(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(known) = error.downcast_ref::<jetstream::Error>() {
            return matches!(
                known.error_code(),
                ErrorCode::STREAM_WRONG_LAST_SEQUENCE | ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT
            );
        }
        next = error.source();
    }
    false
}

pub(super) fn missing(topic: &Topic) -> Error {
    Error::not_found("there is no such topic").with("topic", topic)
}

pub(super) fn damaged(key: &str) -> Error {
    Error::new(ErrorKind::Corrupt, "what is kept under a key cannot be read").with("key", key)
}

pub(super) fn unavailable(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Unavailable, "the server did not do what it was asked").caused_by(error)
}
