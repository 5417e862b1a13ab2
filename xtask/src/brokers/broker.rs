//! A broker of one's own: started, restarted, frozen and ended, whichever way it runs.

use std::path::Path;
use std::time::Duration;

use super::container::Container;
use super::process::Native;
use super::secure::Secure;
use super::{Kind, Result, Way};

/// A broker that lives as long as this value, and no longer than this process.
#[derive(Debug)]
pub struct Broker {
    kind: Kind,
    url: String,
    lives: Lives,
}

#[derive(Debug)]
enum Lives {
    Native(Native),
    Container(Container),
}

impl Broker {
    /// Starts a broker of its own, and waits until it can be used.
    ///
    /// # Errors
    /// What is missing on this machine, or the end of its log.
    pub fn start(kind: Kind, version: Option<&str>) -> Result<Self> {
        Self::start_behind(kind, version, None)
    }

    /// Starts one that names another port to its clients than its own: that of a proxy before it.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_behind(kind: Kind, version: Option<&str>, advertised: Option<u16>) -> Result<Self> {
        let lives = Way::run(
            || Ok(Lives::Container(Container::start(kind, version, advertised)?.tied()?)),
            || Ok(Lives::Native(Native::start(kind, version, advertised)?)),
        )?;
        let url = match &lives {
            Lives::Native(native) => native.url().to_owned(),
            Lives::Container(container) => container.url(),
        };
        Ok(Self { kind, url, lives })
    }

    /// Starts one with its data in a folder: on a disk of its own. It is a process of this machine also where others are
    /// containers.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_in(folder: &Path, kind: Kind) -> Result<Self> {
        Native::start_in(folder, kind).map(|native| Self::native(kind, native))
    }

    /// Starts one that speaks nothing but TLS. It is a process of this machine also where others are containers.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_secured(kind: Kind, secure: &Secure) -> Result<Self> {
        Native::start_secured(kind, secure).map(|native| Self::native(kind, native))
    }

    /// Starts a PostgreSQL whose syncs take a time, below a second, and make nothing durable: for measurements. It is a
    /// process of this machine also where others are containers, and needs a C compiler.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with_sync(sync: Duration) -> Result<Self> {
        Native::start_with_sync(sync).map(|native| Self::native(Kind::Postgres, native))
    }

    fn native(kind: Kind, native: Native) -> Self {
        Self { kind, url: native.url().to_owned(), lives: Lives::Native(native) }
    }

    /// Which broker it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its address, as `eventbus::connect` takes it; the same after a restart.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What the program says that it is, or its image.
    pub fn version(&self) -> String {
        match &self.lives {
            Lives::Native(native) => native.version(),
            Lives::Container(container) => format!("container of {}", container.image()),
        }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        match &self.lives {
            Lives::Native(native) => native.port(),
            Lives::Container(container) => container.port(),
        }
    }

    /// Ends it as a crash does, and starts it again on the same data and port.
    ///
    /// # Errors
    /// The end of its log.
    pub fn restart(&mut self) -> Result<()> {
        self.crash();
        match &mut self.lives {
            Lives::Native(native) => native.spawn(),
            Lives::Container(container) => container.start_again(),
        }
    }

    /// Ends it as a crash does; [`restart`](Self::restart) brings it back.
    pub fn crash(&mut self) {
        match &mut self.lives {
            Lives::Native(native) => native.crash(),
            // One that ended already is where it should be.
            Lives::Container(container) => drop(container.crash()),
        }
    }

    /// True if it did not end by itself.
    pub fn lives(&mut self) -> bool {
        match &mut self.lives {
            Lives::Native(native) => native.lives(),
            Lives::Container(container) => super::container::lives(container.id()),
        }
    }

    /// Has the program that controls such brokers do something (`rabbitmqctl`).
    ///
    /// # Errors
    /// What it says; for a container that there is no way to it.
    pub fn control(&self, arguments: &[&str]) -> Result<String> {
        match &self.lives {
            Lives::Native(native) => native.control(arguments),
            Lives::Container(_) => Err("a container is not controlled from outside".to_owned()),
        }
    }

    /// Stops it in the middle of whatever it does, or lets it go on: connections stay open and nobody answers.
    ///
    /// # Errors
    /// What the system says.
    pub fn freeze(&self, on: bool) -> Result<()> {
        match &self.lives {
            Lives::Native(native) => native.freeze(on),
            Lives::Container(container) => container.freeze(on),
        }
    }
}
