//! Events read outside of any group.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::{self, stream::Stream};
use async_nats::{HeaderMap, HeaderName, HeaderValue};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde::Deserialize;

use super::store::{Store, damaged, unavailable};
use super::{message, names};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Topic;
use crate::time::from_rfc3339;
use crate::transport::kit::leased::Stored;

impl Store {
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

/// From a sequence on.
pub(super) fn since(sequence: u64) -> DeliverPolicy {
    match sequence {
        0 | 1 => DeliverPolicy::All,
        start_sequence => DeliverPolicy::ByStartSequence { start_sequence },
    }
}
