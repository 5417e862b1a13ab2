//! One account of a NATS server: the connection, its clock, and what errors mean.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant, SystemTime, UNIX_EPOCH};

use async_nats::jetstream::{Context, context, kv};
use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr, Subscriber};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use super::bucket::bucket;
use super::{Options, PORT, names, publisher};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::transport::TlsFiles;
use crate::transport::kit::queue::Queue;
use crate::transport::kit::tasks::Tasks;
use crate::transport::kit::tls;
use crate::url::Url;

/// Room for headers and framing below the server's largest payload.
const OVERHEAD: usize = 16 << 10;

pub(super) struct Store {
    pub(super) client: Client,
    pub(super) context: Context,
    pub(super) bucket: kv::Store,
    pub(super) options: Options,
    /// Largest event in bytes.
    pub(super) max_event_bytes: usize,
    /// Where it is, without secrets.
    pub(super) place: String,
    pub(super) queue: Arc<Queue>,
    pub(super) topics: Mutex<HashMap<Topic, (u32, StdInstant)>>,
    /// Changes with every new connection: what was on its way to us on the last one is lost.
    pub(super) connections: watch::Sender<u64>,
    clock: Mutex<Clock>,
    pub(super) tasks: Tasks,
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
    if !options.tls && place.is_loopback() {
        // Servers beyond this machine, which one here tells of, would be spoken to in plain text.
        settings = settings.ignore_discovered_servers();
    }
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
                ConnectErrorKind::Tls => tls::refused(error),
                ConnectErrorKind::ServerParse => {
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
            .map_err(|error: Error| tls::at_opening(error).with("place", &place))?;
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
}

async fn look_at_clock(bucket: &kv::Store) -> Result<Clock> {
    let before = Instant::now();
    bucket.put(names::CLOCK, Bytes::new()).await.map_err(unavailable)?;
    // Of the leader: it knows of ours. Another member's may be later, but not than this moment.
    let found = bucket.stream.get_last_raw_message_by_subject(&names::changes(names::CLOCK)).await;
    let found = found.map_err(unavailable)?;
    Ok(Clock { millis: millis_of(found.time.into()), before, after: Instant::now() })
}

pub(super) fn damaged(key: &str) -> Error {
    Error::new(ErrorKind::Corrupt, "what is kept under a key cannot be read").with("key", key)
}

pub(super) fn unavailable(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Unavailable, "the server did not do what it was asked").caused_by(error)
}
