//! What the broker's settings mean for what it confirms, as far as a client of this protocol is told.

use super::store::Store;
use crate::error::Result;
use crate::fitness::Probe;

impl Store {
    pub(super) async fn probes(&self) -> Result<Vec<Probe>> {
        self.wires.read.connection().await?;
        self.wires.send.connection().await?;
        let is_blocked = self.wires.send.is_blocked().await;
        let alarm = if is_blocked { "it takes no events" } else { "none" };
        Ok(vec![
            Probe::good("alarm of memory or disk", alarm)
                .or_doubtful(!is_blocked, "free memory or disk of the broker: publishing waits until then"),
            Probe::good(
                "copies and sync of streams",
                "not told to clients; files are not synced before a confirm",
            )
            .or_doubtful(false, "run three nodes: a power loss of one takes its last moments"),
        ])
    }
}
