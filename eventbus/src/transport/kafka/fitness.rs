//! What the cluster's settings mean for what it confirms.

use std::collections::BTreeMap;
use std::sync::Arc;

use rdkafka::admin::{ConfigResource, ResourceSpecifier};
use rdkafka::consumer::Consumer as _;
use rdkafka::error::KafkaError;

use super::client::{Client, from_kafka};
use crate::error::Result;
use crate::fitness::Probe;

/// Copies of a topic below this number do not survive the loss of a broker while another is away.
const SAFE: usize = 3;

impl Client {
    pub(super) async fn probes(self: &Arc<Self>) -> Result<Vec<Probe>> {
        let (brokers, topics) = self
            .blocking(|client| {
                let timeout = client.options.timeout;
                let metadata = client.reader.lock().fetch_metadata(None, timeout).map_err(from_kafka)?;
                let brokers: Vec<i32> = metadata.brokers().iter().map(|broker| broker.id()).collect();
                let copies = |topic: &rdkafka::metadata::MetadataTopic| {
                    topic.partitions().iter().map(|partition| partition.replicas().len()).min().unwrap_or(0)
                };
                let all = metadata.topics().iter().map(|topic| (topic.name().to_owned(), copies(topic)));
                // Those of the cluster itself are its own affair.
                Ok((brokers, all.filter(|(name, _)| !name.starts_with("__")).collect::<BTreeMap<_, _>>()))
            })
            .await?;
        let mut probes = vec![
            Probe::good("brokers", brokers.len())
                .or_doubtful(brokers.len() >= SAFE, "one machine less is one too few: run at least three"),
        ];
        if let Some(first) = brokers.first() {
            let settings = self.settings(&[ResourceSpecifier::Broker(*first)]).await?.into_iter().next();
            let settings = settings.map(|(_, settings)| settings).unwrap_or_default();
            let found = |name: &str| settings.get(name).cloned().unwrap_or_default();
            let (in_sync, unclean) = (found("min.insync.replicas"), found("unclean.leader.election.enable"));
            probes.push(Probe::good("min.insync.replicas", &in_sync).or_doubtful(
                in_sync.parse().is_ok_and(|n: usize| n >= 2),
                "set it to 2: a confirm may mean one broker's memory",
            ));
            probes.push(
                Probe::good("unclean leader election", &unclean).or_bad(
                    unclean != "true",
                    "turn it off: a leader that lags throws confirmed events away",
                ),
            );
        }
        let few: Vec<&str> =
            topics.iter().filter(|(_, n_copies)| **n_copies < SAFE).map(|(name, _)| name.as_str()).collect();
        probes.push(
            Probe::good("three copies of topics", shown(&few, "fewer for", topics.len()))
                .or_doubtful(few.is_empty(), "create topics with replication 3"),
        );
        let wanted: Vec<ResourceSpecifier<'_>> =
            topics.keys().map(|name| ResourceSpecifier::Topic(name)).collect();
        let most = self.options.max_event_bytes;
        let narrow: Vec<String> = self
            .settings(&wanted)
            .await?
            .into_iter()
            .filter(|(_, settings)| {
                let size = settings.get("max.message.bytes").and_then(|size| size.parse::<usize>().ok());
                size.is_some_and(|size| size < most)
            })
            .map(|(name, _)| name)
            .collect();
        let narrow: Vec<&str> = narrow.iter().map(String::as_str).collect();
        probes.push(
            Probe::good("room for the largest event", shown(&narrow, "too little in", topics.len())).or_bad(
                narrow.is_empty(),
                "raise max.message.bytes of these topics, or lower max_event_bytes of the address",
            ),
        );
        Ok(probes)
    }

    /// The settings of brokers or topics, by name of the broker or topic.
    async fn settings(
        &self,
        of: &[ResourceSpecifier<'_>],
    ) -> Result<Vec<(String, BTreeMap<String, String>)>> {
        if of.is_empty() {
            return Ok(Vec::new());
        }
        let found = self.admin.describe_configs(of, &self.patience()).await.map_err(from_kafka)?;
        let read = |resource: std::result::Result<ConfigResource, _>| {
            let resource = resource.map_err(|code| from_kafka(KafkaError::AdminOp(code)))?;
            let name = match &resource.specifier {
                rdkafka::admin::OwnedResourceSpecifier::Topic(name)
                | rdkafka::admin::OwnedResourceSpecifier::Group(name) => name.clone(),
                rdkafka::admin::OwnedResourceSpecifier::Broker(id) => id.to_string(),
            };
            let entries = resource.entries.into_iter();
            Ok((name, entries.filter_map(|entry| Some((entry.name, entry.value?))).collect()))
        };
        found.into_iter().map(read).collect()
    }
}

/// All of them, or those that are not so.
fn shown(not_so: &[&str], how: &str, n_all: usize) -> String {
    match not_so {
        [] => format!("all of {n_all}"),
        some => format!("{how} {}", some.iter().take(5).copied().collect::<Vec<_>>().join(", ")),
    }
}
