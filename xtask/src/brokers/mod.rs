//! Real brokers for tests and for developers' own machines.
//!
//! A broker is a container of its official image, where a container engine answers, else a process of this machine
//! with its data in a temporary folder ([`Way`]); its port was free. [`Broker`] is one that ends with its value (and
//! with this process, however that ends); [`up`] starts one that stays until [`down`]. What a process needs and is not
//! installed is fetched once, into a cache outside of the clone.

mod broker;
mod container;
mod debian;
mod engine;
pub(crate) mod fetch;
mod image;
mod process;
mod recipe;
mod running;
mod secure;
mod sync;

use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

pub use self::broker::Broker;
pub use self::engine::Engine;
pub use self::running::{down, running, up};
pub use self::secure::{Authority, Pair, Secure};

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
        [Self::Kafka, Self::Nats, Self::Postgres, Self::Rabbitmq, Self::Redis, Self::Valkey];

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

    /// The versions that the matrix runs: of a process all that can be asked for, of a container tags of its image.
    pub fn versions(self, way: Way) -> &'static [&'static str] {
        match way {
            Way::Processes => recipe::versions(self),
            Way::Containers => image::tags(self),
        }
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

/// Whether containers could not be had before, by this process.
static NO_IMAGES: AtomicBool = AtomicBool::new(false);

/// The two ways a broker runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As a container of its official image.
    Containers,
    /// As a process of this machine.
    Processes,
}

impl Way {
    /// The way that `EVENTBUS_BROKERS` names (`containers` or `processes`); without it, containers where an engine
    /// answers.
    ///
    /// # Errors
    /// The variable names neither.
    pub fn chosen() -> Result<Self> {
        match std::env::var("EVENTBUS_BROKERS").as_deref() {
            Ok("containers") => Ok(Self::Containers),
            Ok("processes") => Ok(Self::Processes),
            Ok(other) => Err(format!("EVENTBUS_BROKERS is {other:?}; it knows containers and processes")),
            Err(_) if !NO_IMAGES.load(Ordering::Relaxed) && container::engine_answers() => {
                Ok(Self::Containers)
            }
            Err(_) => Ok(Self::Processes),
        }
    }

    /// Runs the way that is chosen. Where nobody asked for containers and one cannot be had, as its image cannot be
    /// fetched for one, it is processes from then on.
    fn run<T>(container: impl FnOnce() -> Result<T>, process: impl FnOnce() -> Result<T>) -> Result<T> {
        if Self::chosen()? == Self::Processes {
            return process();
        }
        match container() {
            Err(problem) if std::env::var_os("EVENTBUS_BROKERS").is_none() => {
                eprintln!("{problem}");
                NO_IMAGES.store(true, Ordering::Relaxed);
                process()
            }
            run => run,
        }
    }
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

/// A program that comes with PostgreSQL, such as `pg_dump`; it is installed where it is missing.
///
/// # Errors
/// What is missing on this machine.
pub fn postgres_program(name: &str) -> Result<std::path::PathBuf> {
    recipe::postgres_program(name)
}

/// Tells for each broker how it would be started here, or what is missing.
///
/// # Errors
/// As [`Way::chosen`].
pub fn doctor() -> Result<Vec<(Kind, Result<String>)>> {
    let way = Way::chosen()?;
    let found = |kind| match way {
        Way::Processes => recipe::find(kind, None),
        Way::Containers => Ok(format!("a container of {}", image::of(kind, None, 0))),
    };
    Ok(Kind::ALL.into_iter().map(|kind| (kind, found(kind))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compose_file_says_the_same() {
        let compose = include_str!("../../../compose.yaml");
        for kind in Kind::ALL {
            let from = compose.split_once(&format!("\n  {kind}:\n")).map(|(_, from)| from);
            let from = from.unwrap_or_else(|| panic!("{kind} is no service of compose.yaml"));
            let service: Vec<&str> = from.lines().take_while(|line| line.starts_with("    ")).collect();
            let service = service.join("\n");
            let image = image::of(kind, None, 9092);
            assert!(service.contains(&format!("image: {image}")), "{kind}: not {image}");
            let command = format!("command: {:?}", image.command);
            assert!(image.command.is_empty() || service.contains(&command), "{kind}: not {command}");
            for (name, value) in &image.environment {
                let line = format!("{name}: {value}");
                assert!(service.replace('"', "").contains(&line), "{kind}: not {line}");
            }
            let address = format!("export {}={}", kind.variable(), image.url(0));
            let address = address.trim_end_matches(|c: char| c != ':');
            assert!(compose.contains(address), "{kind}: no {address}");
        }
    }
}
