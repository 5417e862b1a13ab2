//! The bucket: a map that is changed by compare and set.

use async_nats::jetstream::kv::{self, CreateErrorKind, UpdateErrorKind};
use async_nats::jetstream::stream::RawMessageErrorKind;
use async_nats::jetstream::{self, Context, ErrorCode};
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use futures_util::future::try_join_all;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::store::{Store, damaged, unavailable};
use super::{Options, names};
use crate::error::{Error, ErrorKind, Result};
use crate::transport::kit::leased::registers::Held;

impl Store {
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
}

/// The bucket in which topics and groups are kept.
pub(super) async fn bucket(context: &Context, options: &Options) -> Result<kv::Store> {
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
