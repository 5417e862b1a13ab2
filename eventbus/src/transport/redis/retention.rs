//! Removing what retention allows: old or surplus events that every group has settled.

use std::sync::Weak;
use std::time::Duration;

use super::keys;
use super::store::{Store, script};
use crate::error::Result;
use crate::name::Topic;

const TRIM_EVERY: Duration = Duration::from_secs(10);
/// Events removed of a partition in one call, so that nobody waits long behind it.
const MAX_ENTRIES: usize = 500;

/// Enforces retention from time to time, until the store is gone.
pub(super) async fn keep(store: Weak<Store>) {
    loop {
        tokio::time::sleep(TRIM_EVERY).await;
        let Some(store) = store.upgrade() else { return };
        let trimmed = {
            let store = store.clone();
            async move { trim(&store).await }
        };
        if let Err(error) = store.tasks.run(trimmed).await {
            tracing::warn!(%error, "retention could not be enforced; it is tried again");
        }
    }
}

/// One pass over the topics of this store; a large surplus goes in several.
async fn trim(store: &Store) -> Result<()> {
    let names: Vec<String> = store
        .with(|mut connection| async move {
            redis::cmd("SMEMBERS").arg(keys::TOPICS).query_async(&mut connection).await
        })
        .await?;
    for topic in names.into_iter().filter_map(|name| Topic::new(name).ok()) {
        let Some(n_partitions) = store.find(&topic).await? else { continue };
        for partition in 0..n_partitions {
            trim_partition(store, &topic, partition).await?;
        }
    }
    Ok(())
}

async fn trim_partition(store: &Store, topic: &Topic, partition: u32) -> Result<()> {
    loop {
        let names = vec![keys::meta(topic), keys::groups(topic), keys::stream(topic, partition)];
        let arguments = vec![
            keys::group_prefix(topic).into_bytes(),
            keys::exception_prefix(topic).into_bytes(),
            partition.to_string().into_bytes(),
            MAX_ENTRIES.to_string().into_bytes(),
        ];
        let n_removed: usize = store.script(script!("trim"), names, arguments).await?;
        if n_removed < MAX_ENTRIES {
            return Ok(());
        }
    }
}
