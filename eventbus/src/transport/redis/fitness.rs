//! What the server's settings mean for what it confirms.

use std::collections::BTreeMap;

use super::store::Store;
use crate::error::Result;
use crate::fitness::Probe;

const SETTINGS: [&str; 4] = ["appendonly", "appendfsync", "maxmemory", "maxmemory-policy"];

impl Store {
    pub(super) async fn probes(&self) -> Result<Vec<Probe>> {
        let roles: String = self
            .with(|mut connection| async move {
                redis::cmd("INFO").arg("replication").query_async(&mut connection).await
            })
            .await?;
        let is_replica = roles.lines().any(|line| line.trim() == "role:slave");
        let role = if is_replica { "replica" } else { "primary" };
        let mut probes =
            vec![Probe::good("role", role).or_bad(!is_replica, "give the address of the primary")];
        let settings: Result<BTreeMap<String, String>> = self
            .with(|mut connection| async move {
                redis::cmd("CONFIG").arg("GET").arg(&SETTINGS).query_async(&mut connection).await
            })
            .await;
        let settings = match settings {
            Ok(settings) => settings,
            Err(error) if error.is_retryable() => return Err(error),
            // Services that run Redis for others often refuse the command.
            Err(error) => {
                let hint = "ask whoever runs the server for appendonly, appendfsync and maxmemory-policy";
                probes.push(Probe::good("settings", error).or_doubtful(false, hint));
                return Ok(probes);
            }
        };
        let found = |name: &str| settings.get(name).map_or("", String::as_str);
        let (keeps, syncs) = (found("appendonly"), found("appendfsync"));
        probes.push(
            Probe::good("append-only file", keeps)
                .or_doubtful(keeps == "yes", "set appendonly yes: a restart forgets confirmed events"),
        );
        probes.push(Probe::good("sync of it", syncs).or_doubtful(
            syncs == "always",
            "a crash of the machine loses up to a second, or more: set appendfsync always",
        ));
        // The other policies remove what expires, which nothing of ours does.
        let (most, policy) = (found("maxmemory"), found("maxmemory-policy"));
        probes.push(Probe::good("eviction", format!("{policy}, maxmemory {most}")).or_bad(
            !policy.starts_with("allkeys") || most == "0",
            "set maxmemory-policy noeviction: streams are removed",
        ));
        Ok(probes)
    }
}
