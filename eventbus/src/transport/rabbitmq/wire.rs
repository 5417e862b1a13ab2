//! The two connections of a transport value, and what errors mean.
//!
//! One sends, and one reads: a broker that is short of memory or disk stops reading from connections that publish, and
//! settling and looking must go on. A connection that is gone is made anew by whoever needs it next, without the
//! client's own recovery: what was on its way is unknown, and each caller knows what that means for it.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::types::ShortString;
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use lapin::{Channel, Connection, ConnectionBuilder, ConnectionProperties};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Options;
use crate::error::{Error, ErrorKind, Result};
use crate::url::Url;

/// How long it is believed that the broker cannot be reached: all readers and publishers of a service ask for a
/// connection again and again while there is none.
const PAUSE: Duration = Duration::from_millis(250);

/// Where, as whom and how to connect.
struct Target {
    hosts: Vec<(String, u16)>,
    user: AMQPUserInfo,
    vhost: String,
    scheme: AMQPScheme,
    tls: OwnedTLSConfig,
    /// Seconds; a connection that is silent for twice as long is gone.
    heartbeat: u16,
    timeout: Duration,
}

/// Both connections.
pub(super) struct Wires {
    pub(super) send: Wire,
    pub(super) read: Wire,
    pub(super) timeout: Duration,
    /// Where they lead, without secrets.
    pub(super) place: String,
}

/// One connection, made when it is needed.
pub(super) struct Wire {
    target: Arc<Target>,
    what: &'static str,
    current: tokio::sync::Mutex<Current>,
    /// The number of the connection; changes with each new one.
    pub(super) numbers: watch::Sender<u64>,
}

#[derive(Default)]
struct Current {
    connection: Option<Arc<Connection>>,
    /// Why there is none, as was found out when.
    failed: Option<(Instant, Error)>,
    number: u64,
    is_closed: bool,
}

impl Wires {
    pub(super) fn new(url: &Url, options: &Options) -> Result<Self> {
        let place = url.authority(if url.scheme() == "amqps" { 5671 } else { 5672 })?;
        let vhost = if place.path.is_empty() { "/" } else { place.path };
        let scheme = match url.scheme() {
            "amqps" if cfg!(feature = "rabbitmq-tls") => AMQPScheme::AMQPS,
            "amqps" => {
                return Err(Error::new(ErrorKind::Unsupported, "this build speaks no TLS to RabbitMQ")
                    .with("feature", "rabbitmq-tls"));
            }
            _ => AMQPScheme::AMQP,
        };
        let files = options.files.read(scheme == AMQPScheme::AMQPS, "say amqps://")?;
        let identity =
            files.identity.map(|(cert, key)| OwnedIdentity::PKCS8 { pem: cert.into(), key: key.into() });
        let shown: Vec<String> = place.hosts.iter().map(|(host, port)| format!("{host}:{port}")).collect();
        let target = Arc::new(Target {
            hosts: place.hosts.iter().map(|(host, port)| ((*host).to_owned(), *port)).collect(),
            user: AMQPUserInfo {
                username: place.user.unwrap_or("guest").to_owned(),
                password: place.password.unwrap_or("guest").to_owned(),
            },
            vhost: vhost.to_owned(),
            scheme,
            tls: OwnedTLSConfig { identity, cert_chain: files.ca },
            heartbeat: (options.session.as_secs() / 2).clamp(1, 30) as u16,
            timeout: options.timeout,
        });
        let wire = |what| Wire {
            target: target.clone(),
            what,
            current: tokio::sync::Mutex::default(),
            numbers: watch::Sender::new(0),
        };
        Ok(Self {
            send: wire("eventbus send"),
            read: wire("eventbus read"),
            timeout: options.timeout,
            place: format!("{} {vhost}", shown.join(",")),
        })
    }

    /// Bounds what may wait without end.
    pub(super) async fn within<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        within(self.timeout, work).await
    }

    pub(super) async fn close(&self) {
        self.send.close().await;
        self.read.close().await;
    }
}

/// Whether a channel could not be opened because of what ended another. The client numbers channels from the first again
/// when it has had all numbers, and answers whoever opens one with why the broker closed the last channel of that number
/// (lapin 4.12.3). The number is spent then, and the next may be good.
fn is_of_another(error: &lapin::Error) -> bool {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(told) => matches!(told.kind(), AMQPErrorKind::Soft(_)),
        lapin::ErrorKind::InvalidChannelState(..) => true,
        _ => false,
    }
}

/// Goes on with work also if nobody waits for it any more.
pub(super) async fn to_its_end<T>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T>
where
    T: Send + 'static,
{
    let interrupted = |error| {
        Error::new(ErrorKind::Unexpected, "what the broker was asked was interrupted").caused_by(error)
    };
    tokio::spawn(work).await.map_err(interrupted)?
}

async fn within<T>(timeout: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    let late = || Err(Error::new(ErrorKind::Unavailable, "the broker did not answer in time"));
    tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| late())
}

impl Wire {
    /// The connection, with its number: a new one each time that it was made anew.
    pub(super) async fn connection(&self) -> Result<(Arc<Connection>, u64)> {
        let mut current = self.current.lock().await;
        if current.is_closed {
            return Err(Error::closed("transport"));
        }
        if let Some(connection) = current.connection.as_ref().filter(|known| known.status().connected()) {
            return Ok((connection.clone(), current.number));
        }
        if let Some((_, known)) = current.failed.as_ref().filter(|(at, _)| at.elapsed() < PAUSE) {
            return Err(known.duplicate());
        }
        let mut outcome = Err(Error::config("amqp:// needs a host"));
        // Not everybody to the first of them.
        let first = fastrand::usize(..self.target.hosts.len().max(1));
        let hosts = self.target.hosts.iter().cycle().skip(first).take(self.target.hosts.len());
        for (host, port) in hosts {
            // So that one that says nothing leaves time for the next.
            let share = self.target.timeout / u32::try_from(self.target.hosts.len()).unwrap_or(1).max(1);
            outcome = within(share, self.connect(host, *port)).await;
            match &outcome {
                // Another will not let us in either.
                Err(error) if error.kind() != ErrorKind::Unavailable => break,
                Err(_) => {}
                Ok(_) => break,
            }
        }
        if let Err(error) = &outcome {
            current.failed = Some((Instant::now(), error.duplicate()));
        }
        let connection = Arc::new(outcome?);
        current.number += 1;
        current.connection = Some(connection.clone());
        self.numbers.send_replace(current.number);
        Ok((connection, current.number))
    }

    async fn connect(&self, host: &str, port: u16) -> Result<Connection> {
        let target = &self.target;
        let uri = AMQPUri {
            scheme: target.scheme.clone(),
            authority: AMQPAuthority { userinfo: target.user.clone(), host: host.to_owned(), port },
            vhost: target.vhost.clone(),
            query: AMQPQueryString {
                heartbeat: Some(target.heartbeat),
                connection_timeout: Some(u64::try_from(target.timeout.as_millis()).unwrap_or(u64::MAX)),
                ..AMQPQueryString::default()
            },
        };
        let properties = ConnectionProperties::default().with_connection_name(self.what.into());
        let builder = ConnectionBuilder::new().map_err(failed)?;
        let connecting =
            builder.with_uri(uri).with_properties(properties).with_tls_config(target.tls.clone());
        connecting.connect().await.map_err(|error| {
            let failed = failed(error);
            match failed.kind() {
                ErrorKind::Unauthorized => failed,
                // 530: no such virtual host, or one that this user may not enter.
                ErrorKind::Config => failed.with("vhost", &target.vhost),
                _ => Error::new(ErrorKind::Unavailable, "the broker cannot be reached").caused_by(failed),
            }
        })
    }

    /// A channel of its own, on a connection that lives.
    pub(super) async fn channel(&self) -> Result<Channel> {
        let opening = async {
            loop {
                let (connection, number) = self.connection().await?;
                let error = match connection.create_channel().await {
                    Ok(channel) => return Ok(channel),
                    Err(error) => error,
                };
                if matches!(error.kind(), lapin::ErrorKind::ChannelsLimitReached) {
                    self.retire(number).await;
                } else if !(connection.status().connected() && is_of_another(&error)) {
                    return Err(failed(error));
                }
            }
        };
        // In a box, as what the client does is large.
        within(self.target.timeout, Box::pin(opening)).await
    }

    /// Lets a connection go whose channels are used up; who has one there keeps it.
    async fn retire(&self, number: u64) {
        let mut current = self.current.lock().await;
        if current.number == number {
            current.connection = None;
        }
    }

    /// Asks one thing on a channel of its own, to the end also if nobody waits for that any more. A channel that is given
    /// up while the broker refuses what was asked is closed by both at once, and the client then gives up the whole
    /// connection, with all that others asked on it (seen with lapin 4.12.3).
    pub(super) async fn ask<T, W>(&self, what: impl FnOnce(Channel) -> W) -> Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T>> + Send + 'static,
    {
        let asking = async { to_its_end(what(self.channel().await?)).await };
        within(self.target.timeout, asking).await
    }

    /// Whether the broker takes nothing for the moment: an alarm of memory or disk.
    pub(super) async fn is_blocked(&self) -> bool {
        self.current.lock().await.connection.as_ref().is_some_and(|known| known.status().blocked())
    }

    async fn close(&self) {
        let connection = {
            let mut current = self.current.lock().await;
            current.is_closed = true;
            current.connection.take()
        };
        if let Some(connection) = connection {
            let closing = async { connection.close(200, ShortString::default()).await.map_err(failed) };
            if let Err(error) = within(self.target.timeout.min(Duration::from_secs(2)), closing).await {
                tracing::debug!(%error, "the connection was closed before");
            }
        }
    }
}

/// Whether what the broker did not find does not exist.
fn is_absent(told: &str) -> bool {
    ["NOT_FOUND - no queue ", "NOT_FOUND - no exchange "].into_iter().any(|start| told.starts_with(start))
}

/// What an error of the client or the broker means.
pub(super) fn failed(error: lapin::Error) -> Error {
    let (kind, what) = match error.kind() {
        lapin::ErrorKind::ProtocolError(told) => match told.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
                (ErrorKind::Unauthorized, "the broker refused the user, the password or the permission")
            }
            // It says so too of one whose node is down, or is just coming up.
            AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) if is_absent(told.get_message().as_str()) => {
                (ErrorKind::NotFound, "the broker has no such thing")
            }
            AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => {
                (ErrorKind::Conflict, "the broker has something else of this name, or refuses what was asked")
            }
            AMQPErrorKind::Soft(AMQPSoftError::RESOURCELOCKED) => {
                (ErrorKind::Conflict, "another connection holds it")
            }
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => {
                (ErrorKind::Config, "the broker does not allow that")
            }
            _ => (ErrorKind::Unavailable, "the broker ended what it was asked"),
        },
        _ => (ErrorKind::Unavailable, "the broker did not do what it was asked"),
    };
    Error::new(kind, what).caused_by(error)
}

/// What an error of a reader means: only that there is no such stream is for good. The broker also ends readers that
/// did not acknowledge for long, and has no copy where it is just coming up.
pub(super) fn reading(error: lapin::Error) -> Error {
    let error = failed(error);
    match error.kind() {
        ErrorKind::Conflict => {
            Error::new(ErrorKind::Unavailable, "the broker does not let the stream be read now")
                .caused_by(error)
        }
        _ => error,
    }
}
