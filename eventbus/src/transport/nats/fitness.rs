//! What the server's settings mean for what it confirms.

use super::store::Store;
use crate::error::Result;
use crate::fitness::Probe;

impl Store {
    pub(super) async fn probes(&self) -> Result<Vec<Probe>> {
        let (mut n_topics, mut alone) = (0, Vec::new());
        for topic in self.all().await? {
            n_topics += 1;
            if let Some((_, info)) = self.look(&topic, 0).await?
                && info.config.num_replicas < 3
            {
                alone.push(topic.to_string());
            }
        }
        alone.truncate(5);
        let detail = match alone.as_slice() {
            [] => format!("all of {n_topics}"),
            some => format!("fewer for {}", some.join(", ")),
        };
        Ok(vec![
            Probe::good("server", self.client.server_info().version),
            Probe::good("three copies of topics", detail).or_doubtful(
                alone.is_empty(),
                "in a cluster, declare topics with replicas=3: one server can be lost",
            ),
            Probe::good("sync of files", "not told to clients; every two minutes unless set otherwise")
                .or_doubtful(
                    false,
                    "set sync_interval: always, or keep three copies: a power loss takes the last minutes",
                ),
        ])
    }
}
