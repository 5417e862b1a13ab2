//! Real brokers for tests and for developers' own machines.
//!
//! A broker is a native process with its data in a temporary folder, on a port that was free. [`Broker`] is one
//! that ends with its value (and with this process, however that ends); [`up`] starts one that stays until
//! [`down`]. What is not installed is fetched once, into a cache outside of the clone.

mod debian;
mod fetch;
mod process;
mod recipe;
mod running;

use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;

pub use self::process::Broker;
pub use self::running::{down, running, up};

/// An error as a person reads it.
pub type Result<T> = std::result::Result<T, String>;

/// The brokers that the transports speak to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// PostgreSQL.
    Postgres,
    /// Redis.
    Redis,
    /// Valkey, the continuation of Redis under its old licence.
    Valkey,
    /// NATS with JetStream.
    Nats,
    /// Apache Kafka in KRaft mode.
    Kafka,
    /// RabbitMQ.
    Rabbitmq,
}

impl Kind {
    /// Every broker.
    pub const ALL: [Self; 6] =
        [Self::Postgres, Self::Redis, Self::Valkey, Self::Nats, Self::Kafka, Self::Rabbitmq];

    /// Those that the tests need.
    pub const TESTED: [Self; 5] = [Self::Kafka, Self::Nats, Self::Postgres, Self::Redis, Self::Valkey];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Redis => "redis",
            Self::Valkey => "valkey",
            Self::Nats => "nats",
            Self::Kafka => "kafka",
            Self::Rabbitmq => "rabbitmq",
        }
    }

    /// The versions that can be asked for, beside the one that is taken else.
    pub fn versions(self) -> &'static [&'static str] {
        recipe::versions(self)
    }

    /// The variable that names one to use instead of starting one.
    pub fn variable(self) -> String {
        format!("EVENTBUS_{}_URL", self.name().to_ascii_uppercase())
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|kind| kind.name()).collect();
            format!("there is no broker {name:?}; known are {}", known.join(", "))
        })
    }
}

/// The folder of a Java library and of what it needs at run time; fetched by name, once.
///
/// # Errors
/// What the fetching program said.
pub fn java_libraries(group: &str, artifact: &str, version: &str) -> Result<std::path::PathBuf> {
    // Threads of one process would fetch into one folder.
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    fetch::maven(group, artifact, version)
}

/// The address of a broker for tests: from the environment, else of one that is up, else of one that is started
/// now and ends with this process.
///
/// # Errors
/// What is missing on this machine.
pub fn url(kind: Kind) -> Result<String> {
    /// Started by this process, once each.
    static STARTED: Mutex<Vec<Broker>> = Mutex::new(Vec::new());
    if let Ok(url) = std::env::var(kind.variable()) {
        return Ok(url);
    }
    if let Some(found) = running()?.into_iter().find(|found| found.kind == kind) {
        return Ok(found.url);
    }
    let mut started = STARTED.lock().map_err(|_| "another thread failed to start a broker".to_owned())?;
    if let Some(broker) = started.iter().find(|broker| broker.kind() == kind) {
        return Ok(broker.url().to_owned());
    }
    let broker = Broker::start(kind, None)?;
    let url = broker.url().to_owned();
    started.push(broker);
    Ok(url)
}

/// Tells for each broker how it would be started here, or what is missing.
pub fn doctor() -> Vec<(Kind, Result<String>)> {
    Kind::ALL.into_iter().map(|kind| (kind, recipe::find(kind, None))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compose_file_has_every_broker() {
        let compose = include_str!("../../../compose.yaml");
        for kind in Kind::ALL {
            assert!(compose.contains(&format!("\n  {kind}:\n")), "{kind} is no service of compose.yaml");
            let address = format!("{}={}", kind.variable(), if kind == Kind::Valkey { "redis" } else { "" });
            assert!(compose.contains(&address), "{kind} has no address in compose.yaml");
        }
    }
}
