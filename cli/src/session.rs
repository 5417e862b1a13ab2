//! Connections, and the gate of everything that writes.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use eventbus::Bus;

use crate::context::{Context, place};
use crate::exit::{Failure, Outcome};
use crate::out::say;

/// A connection, and whether it may be written to.
#[derive(Debug)]
pub(crate) struct Session {
    /// The bus.
    pub bus: Bus,
    /// The scheme of its address.
    pub broker: String,
    gate: Gate,
}

impl std::ops::Deref for Session {
    type Target = Gate;

    fn deref(&self) -> &Gate {
        &self.gate
    }
}

/// The one gate of everything that writes.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    /// The context's name; empty for an address.
    pub name: String,
    /// What is said of it.
    pub context: Context,
    /// What the command line says.
    pub care: Care,
}

/// The file of an embedded store.
fn file_of(url: &str) -> Option<PathBuf> {
    let url = eventbus::url::Url::parse(url).ok().filter(|url| url.scheme() == "sqlite")?;
    Some(url.place().into())
}

/// What was said about writing.
#[derive(Debug, Clone)]
pub(crate) struct Care {
    /// Names that were confirmed.
    pub confirm: Vec<String>,
    /// Nobody is asked.
    pub no_input: bool,
    /// Nothing is written.
    pub dry_run: bool,
}

impl Session {
    /// Connects.
    ///
    /// # Errors
    /// Connect: the transport cannot be reached.
    pub(crate) async fn through(creates: bool, gate: Gate) -> Outcome<Self> {
        let context = &gate.context;
        let file = file_of(&context.url).filter(|file| !creates && !file.as_os_str().is_empty());
        if let Some(file) = file.filter(|file| !file.exists()) {
            let file = file.display();
            return Err(Failure::Connect(format!(
                "there is no file {file}; publish and topic create make one"
            )));
        }
        let bus = match eventbus::connect(&context.address()?).await {
            Ok(bus) => bus.with_source("/eventctl"),
            Err(error)
                if error.kind() == eventbus::ErrorKind::Config && !error.message().contains("folder") =>
            {
                return Err(error.into());
            }
            Err(error) if error.kind() == eventbus::ErrorKind::Unsupported => return Err(error.into()),
            Err(error) => return Err(Failure::Connect(error.to_string())),
        };
        let broker = context.url.split("://").next().unwrap_or_default().to_owned();
        Ok(Self { bus, broker, gate })
    }

    /// Returns the administration.
    ///
    /// # Errors
    /// Usage: the transport has none.
    pub(crate) fn admin(&self) -> Outcome<&dyn eventbus::Admin> {
        let missing = || Failure::Usage("this transport cannot be administered".into());
        self.bus.transport().admin().ok_or_else(missing)
    }

    /// A topic of this program's own, which is made where the bus does not make topics on use: true if it was.
    ///
    /// # Errors
    /// As the transport reports.
    pub(crate) async fn own_topic(&self, name: &str) -> eventbus::Result<(eventbus::Topic, bool)> {
        let topic = eventbus::Topic::new(name)?;
        let is_new = match self.bus.transport().admin() {
            Some(admin) if admin.topic(&topic).await?.is_none() => {
                let spec = eventbus::admin::TopicSpec::new(topic.clone());
                admin.declare(&spec.with_partitions(std::num::NonZeroU32::MIN)).await?
            }
            _ => false,
        };
        Ok((topic, is_new))
    }
}

impl Gate {
    /// What its address names: no user, no password, no options.
    pub(crate) fn place(&self) -> String {
        place(&self.context.url).unwrap_or_default()
    }

    /// Whether something may be written.
    ///
    /// # Errors
    /// Refused: the context is read-only, or protected and not confirmed.
    pub(crate) fn may_write(&self) -> Outcome {
        let env = std::env::var("EVENTCTL_READ_ONLY").is_ok_and(|value| !value.is_empty() && value != "0");
        if self.context.read_only || env {
            return Err(Failure::Refused(format!("context {} is read-only", self.shown())));
        }
        if self.context.protected {
            say!("context {} [PROTECTED]", self.shown());
            self.typed(&self.name, "context", "is protected")?;
        }
        if self.care.dry_run { Err(Failure::DryRun) } else { Ok(()) }
    }

    /// The gate of what destroys: the name of the thing, typed or given.
    ///
    /// # Errors
    /// Refused: nobody confirmed it.
    pub(crate) fn may_destroy(&self, what: &str, name: &str) -> Outcome {
        self.may_write()?;
        self.typed(name, what, "would be destroyed")
    }

    fn typed(&self, name: &str, what: &str, why: &str) -> Outcome {
        if self.care.confirm.iter().any(|given| given == name) {
            return Ok(());
        }
        if self.care.no_input || !std::io::stdin().is_terminal() {
            return Err(Failure::Refused(format!("{what} {name} {why}: add --confirm {name}")));
        }
        eprint!("{what} {name} {why}: type its name to go on: ");
        std::io::stderr().flush()?;
        let mut typed = String::new();
        std::io::stdin().read_line(&mut typed)?;
        if typed.trim() == name { Ok(()) } else { Err(Failure::Refused("the name does not match".into())) }
    }

    fn shown(&self) -> String {
        let name = if self.name.is_empty() { "(address)" } else { &self.name };
        self.context.label.as_ref().map_or_else(|| name.to_owned(), |label| format!("{name} ({label})"))
    }
}
