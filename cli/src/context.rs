//! Contexts: names for addresses, with the care each needs.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use eventbus::Bus;
use serde::{Deserialize, Serialize};

use crate::exit::{Failure, Outcome};
use crate::out::{Out, row, say};

/// One named address.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    /// The address.
    pub url: String,
    /// Shown beside the name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Writes need the name typed or given.
    #[serde(default)]
    pub protected: bool,
    /// Writes are refused.
    #[serde(default)]
    pub read_only: bool,
}

/// The configuration file.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The context used when none is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    /// The contexts by name.
    #[serde(default)]
    pub context: BTreeMap<String, Context>,
}

impl Config {
    /// Where the user's configuration is.
    fn path(given: Option<&PathBuf>) -> Option<PathBuf> {
        let home = || {
            let base = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
            base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".config")))
        };
        given.cloned().or_else(|| Some(home()?.join("eventctl/config.toml")))
    }

    fn parse(path: &Path) -> Outcome<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))?;
        toml::from_str(&text)
            .map_err(|error| Failure::Usage(format!("{}: {}", path.display(), error.message())))
    }

    /// Reads the user's own configuration: the given file, or the usual one, or none.
    ///
    /// # Errors
    /// Usage: the file is named and missing, or is not valid.
    pub(crate) fn own(given: Option<&PathBuf>) -> Outcome<Self> {
        match Self::path(given) {
            Some(path) if given.is_some() || path.exists() => Self::parse(&path),
            _ => Ok(Self::default()),
        }
    }

    /// Reads the configuration with what `./eventctl.toml` adds to it. A project may add contexts; it neither
    /// changes one of the user's nor chooses the one in use where the user has.
    ///
    /// # Errors
    /// As [`own`](Self::own).
    pub(crate) fn load(given: Option<&PathBuf>) -> Outcome<Self> {
        let mut config = Self::own(given)?;
        let project = Path::new("eventctl.toml");
        if project.exists() {
            let project = Self::parse(project)?;
            for (name, context) in project.context {
                config.context.entry(name).or_insert(context);
            }
            config.current = config.current.or(project.current);
        }
        Ok(config)
    }

    /// Writes the user's own configuration.
    fn save(&self, given: Option<&PathBuf>) -> Outcome {
        let Some(path) = Self::path(given) else {
            return Err(Failure::Usage("there is no home for a configuration: give --config FILE".into()));
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let text = toml::to_string(self).map_err(|error| Failure::Runtime(error.to_string()))?;
        // Beside it and over it, so that a full disk leaves the old one.
        let new = path.with_extension("toml.new");
        std::fs::write(&new, text)?;
        Ok(std::fs::rename(new, path)?)
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

/// Names for addresses: adds, chooses, lists and removes them.
///
/// Examples:
///   eventctl context add shop sqlite://shop.db --use
///   eventctl context add prod sqlite:///srv/shop.db --label PROD --protected
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct ContextCommand {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Lists them; the default.
    List,
    /// Adds one, or changes it.
    Add {
        /// Its name.
        name: String,
        /// Its address.
        url: String,
        /// Shown beside the name.
        #[arg(long)]
        label: Option<String>,
        /// Writes need the name typed, or --confirm NAME.
        #[arg(long)]
        protected: bool,
        /// Writes are refused.
        #[arg(long)]
        read_only: bool,
        /// Chooses it as well.
        #[arg(long = "use")]
        and_use: bool,
    },
    /// Chooses the one that is used where none is named.
    Use {
        /// Its name.
        name: String,
    },
    /// Removes one.
    Rm {
        /// Its name.
        name: String,
    },
}

/// Runs the command.
///
/// # Errors
/// Usage: an address that is none; not found; the file cannot be written.
pub(crate) fn run(command: &ContextCommand, given: Option<&PathBuf>, out: &mut Out) -> Outcome {
    let missing = |name: &str| Failure::NotFound(format!("there is no context {name} in your configuration"));
    match &command.what {
        None | Some(What::List) => {
            let config = Config::load(given)?;
            let rows = config.context.iter().map(|(name, context)| {
                let url = eventbus::url::Url::parse(&context.url)
                    .map_or_else(|_| "?".into(), |url| url.to_string());
                row! {"name": name, "url": url, "label": context.label, "protected": context.protected,
                "read_only": context.read_only, "current": config.current.as_deref() == Some(name)}
            });
            out.rows(rows.collect())
        }
        Some(What::Add { name, url, label, protected, read_only, and_use }) => {
            eventbus::url::Url::parse(url)?;
            let mut config = Config::own(given)?;
            let context = Context {
                url: url.clone(),
                label: label.clone(),
                protected: *protected,
                read_only: *read_only,
            };
            config.context.insert(name.clone(), context);
            if *and_use {
                config.current = Some(name.clone());
            }
            config.save(given)?;
            say!("context {name} is {}", if *and_use { "added and in use" } else { "added" });
            Ok(())
        }
        Some(What::Use { name }) => {
            if !Config::load(given)?.context.contains_key(name) {
                return Err(missing(name));
            }
            let mut config = Config::own(given)?;
            config.current = Some(name.clone());
            config.save(given)?;
            say!("context {name} is in use");
            Ok(())
        }
        Some(What::Rm { name }) => {
            let mut config = Config::own(given)?;
            config.context.remove(name).ok_or_else(|| missing(name))?;
            config.current = config.current.filter(|current| current != name);
            config.save(given)?;
            say!("context {name} is removed; what it named is untouched");
            Ok(())
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
    confirm: Vec<String>,
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
        confirm: Vec<String>,
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

    /// Returns the file of an embedded store.
    pub(crate) fn file(&self) -> Option<std::path::PathBuf> {
        let path = self.context.url.strip_prefix("sqlite://")?.split('?').next()?;
        Some(path.into())
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
        self.typed(&self.name, "context", "is protected")
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
        if self.confirm.iter().any(|given| given == name) {
            return Ok(());
        }
        if self.no_input || !std::io::stdin().is_terminal() {
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
