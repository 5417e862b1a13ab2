//! Contexts: names for addresses, with the care each needs.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use eventbus::Bus;
use serde::Deserialize;

use crate::exit::{Failure, Outcome};
use crate::out::say;

/// One named address.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    /// The address.
    pub url: String,
    /// Shown beside the name.
    pub label: Option<String>,
    /// Writes need the name typed or given.
    #[serde(default)]
    pub protected: bool,
    /// Writes are refused.
    #[serde(default)]
    pub read_only: bool,
}

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The context used when none is named.
    pub current: Option<String>,
    /// The contexts by name.
    #[serde(default)]
    pub context: BTreeMap<String, Context>,
}

impl Config {
    /// Reads the configuration: the given file, or the user's, or none.
    ///
    /// # Errors
    /// Usage: the file is named and missing, or is not valid.
    pub(crate) fn load(path: Option<PathBuf>) -> Outcome<Self> {
        let named = path.is_some();
        let home = || {
            let base = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
            base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".config")))
        };
        let Some(path) = path.or_else(|| Some(home()?.join("eventctl/config.toml"))) else {
            return Ok(Self::default());
        };
        match std::fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text)
                .map_err(|error| Failure::Usage(format!("{}: {}", path.display(), error.message()))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !named => Ok(Self::default()),
            Err(error) => Err(Failure::Usage(format!("{}: {error}", path.display()))),
        }
    }

    /// Finds a context by name, or takes an address as it is.
    ///
    /// # Errors
    /// Usage: nothing is named, or the name is unknown.
    pub(crate) fn find(&self, wanted: Option<&str>) -> Outcome<(String, Context)> {
        let Some(wanted) = wanted.or(self.current.as_deref()) else {
            return Err(Failure::Usage(
                "no context: give -c with a name or an address, such as -c sqlite://shop.db".into(),
            ));
        };
        if wanted.contains("://") {
            // An address is as protected as the contexts that name the same place.
            let place = |url: &str| url.split('?').next().map(str::to_owned);
            let same = |context: &&Context| place(&context.url) == place(wanted);
            let named: Vec<_> = self.context.iter().filter(|(_, context)| same(context)).collect();
            let name = named.iter().find(|(_, context)| context.protected).map(|(name, _)| (*name).clone());
            let context = Context {
                url: wanted.to_owned(),
                label: None,
                protected: name.is_some(),
                read_only: named.iter().any(|(_, context)| context.read_only),
            };
            return Ok((name.unwrap_or_default(), context));
        }
        match self.context.get(wanted) {
            Some(context) => Ok((wanted.to_owned(), context.clone())),
            None => {
                let known: Vec<_> = self.context.keys().cloned().collect();
                Err(Failure::Usage(format!("there is no context {wanted}; known: {}", known.join(", "))))
            }
        }
    }
}

/// A connection, and whether it may be written to.
#[derive(Debug)]
pub(crate) struct Session {
    /// The bus.
    pub bus: Bus,
    /// The scheme of its address.
    pub broker: String,
    name: String,
    context: Context,
    confirm: Option<String>,
    no_input: bool,
}

impl Session {
    /// Connects.
    ///
    /// # Errors
    /// Connect: the transport cannot be reached.
    pub(crate) async fn open(
        creates: bool,
        name: String,
        context: Context,
        confirm: Option<String>,
        no_input: bool,
    ) -> Outcome<Self> {
        let file = context.url.strip_prefix("sqlite://").and_then(|rest| rest.split('?').next());
        if let Some(file) =
            file.filter(|file| !creates && !file.is_empty() && !std::path::Path::new(file).exists())
        {
            return Err(Failure::Connect(format!(
                "there is no file {file}; publish and topic create make one"
            )));
        }
        let bus = match eventbus::connect(&context.url).await {
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
        Ok(Self { bus, broker, name, context, confirm, no_input })
    }

    /// Returns the administration.
    ///
    /// # Errors
    /// Usage: the transport has none.
    pub(crate) fn admin(&self) -> Outcome<&dyn eventbus::Admin> {
        let missing = || Failure::Usage("this transport cannot be administered".into());
        self.bus.transport().admin().ok_or_else(missing)
    }

    /// The one gate of everything that writes.
    ///
    /// # Errors
    /// Refused: the context is read-only, or protected and not confirmed.
    pub(crate) fn may_write(&self) -> Outcome {
        let env = std::env::var("EVENTCTL_READ_ONLY").is_ok_and(|value| !value.is_empty() && value != "0");
        if self.context.read_only || env {
            return Err(Failure::Refused(format!("context {} is read-only", self.shown())));
        }
        if !self.context.protected {
            return Ok(());
        }
        say!("context {} [PROTECTED]", self.shown());
        if self.confirm.as_deref() == Some(&self.name) {
            return Ok(());
        }
        if self.no_input || !std::io::stdin().is_terminal() {
            return Err(Failure::Refused(format!("context {0} is protected: add --confirm {0}", self.name)));
        }
        eprint!("type the name of the context to go on: ");
        std::io::stderr().flush()?;
        let mut typed = String::new();
        std::io::stdin().read_line(&mut typed)?;
        if typed.trim() == self.name {
            Ok(())
        } else {
            Err(Failure::Refused("the name does not match".into()))
        }
    }

    fn shown(&self) -> String {
        let name = if self.name.is_empty() { "(address)" } else { &self.name };
        self.context.label.as_ref().map_or_else(|| name.to_owned(), |label| format!("{name} ({label})"))
    }
}
