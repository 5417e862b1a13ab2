//! Whether an outbox can be trusted.

use std::time::Duration;

use eventbus::Result;
use eventbus::fitness::Probe;
use serde::Deserialize;

use crate::backend::Backend;
use crate::operator::{Desk, Operator as _};
use crate::outbox::whole;
use crate::row::Shard;

/// What waits for longer is not on its way.
const LONG: Duration = Duration::from_secs(60);

#[derive(Deserialize)]
struct Counted {
    n: u64,
}

impl<Db: Backend> Desk<Db> {
    pub(crate) async fn look(&self) -> Result<Vec<Probe>> {
        self.0.verify().await?;
        let outbox = self.0.clone();
        let mut probes = whole(async move { Db::probes(outbox.pool()).await }).await?;
        for probe in &mut probes {
            probe.name = format!("database: {}", probe.name);
        }
        let (status, n_relays) = (self.status().await?, self.relays().await?.len());
        let (n_parts, n_unowned) = (Shard::COUNT, status.n_unowned_shards);
        let oldest = Duration::from_millis(status.oldest_ms.and_then(|age| age.try_into().ok()).unwrap_or(0));
        let waiting = format!("{}, the oldest for {} s", status.n_pending, oldest.as_secs());
        let count = |name: &str, n: u64, hint| {
            let probe = Probe::good(name, n);
            // They wait for an operator: that is not what an outbox is unfit by.
            if n == 0 { probe } else { probe.with_hint(hint) }
        };
        let consumers = self.ask::<Counted>("SELECT OBJECT('n', count(*)) FROM EVTconsumer").await?;
        probes.extend([
            Probe::good("relays", format!("{n_relays}; {n_unowned} of {n_parts} parts without one")).or_bad(
                n_unowned == 0 || status.n_pending == 0,
                "nobody publishes what waits: start a service with a relay, or eventctl outbox relay",
            ),
            Probe::good("events that wait", waiting)
                .or_doubtful(oldest < LONG, "eventctl outbox stuck, outbox blockers, outbox status"),
            count("blocked keys", status.n_blocked_keys, "eventctl outbox stuck"),
            count("events set aside", status.n_parked, "eventctl outbox list --state parked"),
            Probe::good("consumers that remember", consumers.first().map_or(0, |counted| counted.n)),
        ]);
        Ok(probes)
    }
}
