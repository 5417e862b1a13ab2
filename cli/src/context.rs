//! Contexts: names for addresses, with the care each needs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use crate::complete;
use crate::exit::{Failure, Outcome};
use crate::out::{Out, row, say};
use crate::secret::Secret;
use crate::session::{Care, Gate, Session};

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
    /// Where the password of the address is, which names its user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<Secret>,
    /// The database of the outbox, where it is not the bus's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outbox: Option<String>,
    /// Where the password of that is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outbox_password: Option<Secret>,
    /// It is of `./eventctl.toml`, which others may have written.
    #[serde(skip)]
    is_of_project: bool,
}

impl Context {
    /// The address, with its password.
    ///
    /// # Errors
    /// Usage: the password is not there. Refused: a project would run a program for it.
    pub(crate) fn address(&self) -> Outcome<String> {
        self.whole(&self.url, self.password.as_ref())
    }

    /// The address of the outbox's database, with its password.
    ///
    /// # Errors
    /// As [`address`](Self::address).
    pub(crate) fn outbox_address(&self) -> Outcome<Option<String>> {
        self.outbox.as_deref().map(|url| self.whole(url, self.outbox_password.as_ref())).transpose()
    }

    /// Whether a password of it comes from a program.
    pub(crate) fn runs_a_program(&self) -> bool {
        [&self.password, &self.outbox_password].into_iter().flatten().any(Secret::runs_a_program)
    }

    fn whole(&self, url: &str, password: Option<&Secret>) -> Outcome<String> {
        match password {
            None => Ok(url.to_owned()),
            Some(secret) if self.is_of_project && secret.runs_a_program() => Err(Failure::Refused(format!(
                "./eventctl.toml would run {secret}: only your own configuration may run programs"
            ))),
            Some(secret) => secret.put_into(url),
        }
    }
}

/// The configuration file.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The context used when none is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    /// The context that was used before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<String>,
    /// The contexts by name.
    #[serde(default)]
    pub context: BTreeMap<String, Context>,
}

/// What an address names, without its options and who asks.
pub(crate) fn place(url: &str) -> Option<String> {
    let (scheme, rest) = url.split('?').next()?.split_once("://")?;
    let scheme = if scheme == "postgresql" { "postgres" } else { scheme };
    let (path, host) = (rest.trim_end_matches('/'), rest.rsplit_once('@').map(|(_, host)| host));
    Some(format!("{scheme}://{}", host.unwrap_or(path).trim_end_matches('/')))
}

impl Config {
    /// A context that is as protected as those that name the same place, as their bus or as their outbox.
    pub(crate) fn guarded(&self, url: &str, (mut name, mut context): (String, Context)) -> (String, Context) {
        let is_there = |other: &Context| {
            [Some(other.url.as_str()), other.outbox.as_deref()]
                .into_iter()
                .flatten()
                .any(|its| place(its) == place(url))
        };
        for (other_name, other) in self.context.iter().filter(|(_, other)| is_there(other)) {
            context.read_only |= other.read_only;
            if other.protected && !context.protected {
                (name, context.protected) = (other_name.clone(), true);
            }
        }
        (name, context)
    }

    /// Whether a context is in use without being named.
    pub(crate) fn has_current(&self) -> bool {
        self.current.is_some()
    }

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
            for (name, mut context) in project.context {
                context.is_of_project = true;
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
            let context = Context { url: wanted.to_owned(), ..Context::default() };
            return Ok(self.guarded(wanted, (String::new(), context)));
        }
        match self.context.get(wanted) {
            // A project does not lend another name to what its user protects.
            Some(context) if context.is_of_project => {
                let found = self.guarded(&context.url, (wanted.to_owned(), context.clone()));
                Ok(context.outbox.as_deref().map_or(found.clone(), |outbox| self.guarded(outbox, found)))
            }
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
    ///
    /// Examples:
    ///   eventctl context list
    #[command(verbatim_doc_comment)]
    List,
    /// Adds one, or changes it.
    ///
    /// Examples:
    ///   eventctl context add prod sqlite:///srv/shop.db --label PROD --protected
    ///   eventctl context add prod kafka://shop@b1,b2 --password env:KAFKA_PASSWORD
    ///   eventctl context add prod postgres://me@db/shop --password 'cmd:secret-tool lookup eventctl prod'
    #[command(verbatim_doc_comment)]
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
        /// Where the password of the address is; it is read when the context is used.
        #[arg(long, value_name = "env:NAME|file:PATH|cmd:COMMAND")]
        password: Option<Secret>,
        /// The database of its outbox, where that is not the bus's own.
        #[arg(long, value_name = "URL")]
        outbox: Option<String>,
        /// Where the password of that is.
        #[arg(long, value_name = "env:NAME|file:PATH|cmd:COMMAND", requires = "outbox")]
        outbox_password: Option<Secret>,
        /// Chooses it as well.
        #[arg(long = "use")]
        and_use: bool,
    },
    /// Chooses the one that is used where none is named.
    ///
    /// Examples:
    ///   eventctl context use prod
    #[command(verbatim_doc_comment)]
    Use {
        /// Its name; - is the one that was in use before.
        #[arg(allow_hyphen_values = true, add = complete::contexts())]
        name: String,
    },
    /// Shows one: the one in use, if none is named.
    ///
    /// Examples:
    ///   eventctl context show prod
    #[command(verbatim_doc_comment)]
    Show {
        /// Its name.
        #[arg(add = complete::contexts())]
        name: Option<String>,
    },
    /// Connects, and says how long that took. Exit code 6 if it fails.
    ///
    /// Examples:
    ///   eventctl context test prod
    #[command(verbatim_doc_comment)]
    Test {
        /// Its name; the one in use, if none is given.
        #[arg(add = complete::contexts())]
        name: Option<String>,
    },
    /// Adds one that is like another.
    ///
    /// Examples:
    ///   eventctl context copy prod prod-eu
    #[command(verbatim_doc_comment)]
    Copy {
        /// The name of the one that is there.
        #[arg(add = complete::contexts())]
        from: String,
        /// The name of the new one.
        to: String,
    },
    /// Opens the configuration in $VISUAL or $EDITOR, and checks it.
    ///
    /// Examples:
    ///   eventctl context edit
    #[command(verbatim_doc_comment)]
    Edit,
    /// Writes the name of the one in use, for a shell's prompt; nothing if there is none.
    ///
    /// Examples:
    ///   eventctl context prompt
    #[command(verbatim_doc_comment)]
    Prompt,
    /// Removes one.
    ///
    /// Examples:
    ///   eventctl context rm prod-eu
    #[command(verbatim_doc_comment)]
    Rm {
        /// Its name.
        #[arg(add = complete::contexts())]
        name: String,
    },
}

/// A context as a row; what is secret in its address is not shown.
fn shown(name: &str, context: &Context) -> serde_json::Map<String, serde_json::Value> {
    let plain = |url: &str| eventbus::url::Url::parse(url).map_or_else(|_| "?".into(), |url| url.to_string());
    row! {"name": name, "url": plain(&context.url), "label": context.label, "protected": context.protected,
    "read_only": context.read_only, "password": context.password.as_ref().map(Secret::to_string),
    "outbox": context.outbox.as_deref().map(plain)}
}

/// Has the configuration edited, and takes it only if it can be read.
fn edit(given: Option<&PathBuf>) -> Outcome {
    let editor = ["VISUAL", "EDITOR"]
        .iter()
        .find_map(std::env::var_os)
        .ok_or_else(|| Failure::Usage("no editor: set VISUAL or EDITOR".into()))?;
    // The file exists then, with what is in it.
    Config::own(given)?.save(given)?;
    let Some(path) = Config::path(given) else { return Ok(()) };
    let new = path.with_extension("toml.new");
    std::fs::copy(&path, &new)?;
    // An editor may come with arguments, as in EDITOR="code --wait".
    let status = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("{} \"$1\"", editor.to_string_lossy()))
        .arg("eventctl")
        .arg(&new)
        .status()?;
    if !status.success() {
        return Err(Failure::Runtime(format!("the editor ended with {status}; nothing is changed")));
    }
    if let Err(failure) = Config::parse(&new) {
        return Err(Failure::Usage(format!(
            "{failure}; nothing is changed, your text is in {}",
            new.display()
        )));
    }
    std::fs::rename(&new, &path)?;
    say!("{} is changed", path.display());
    Ok(())
}

/// Runs the command.
///
/// # Errors
/// Usage: an address that is none; not found; the file cannot be written.
pub(crate) async fn run(
    command: &ContextCommand,
    given: Option<&PathBuf>,
    dry_run: bool,
    out: &mut Out,
) -> Outcome {
    let missing = |name: &str| Failure::NotFound(format!("there is no context {name} in your configuration"));
    let changes = !matches!(
        command.what,
        None | Some(What::List | What::Show { .. } | What::Test { .. } | What::Prompt)
    );
    if dry_run && changes {
        return Err(Failure::DryRun);
    }
    match &command.what {
        None | Some(What::List) => {
            let config = Config::load(given)?;
            let rows = config.context.iter().map(|(name, context)| {
                let mut row = shown(name, context);
                row.insert("current".into(), (config.current.as_deref() == Some(name)).into());
                row
            });
            out.rows(rows.collect())
        }
        Some(What::Add {
            name,
            url,
            label,
            protected,
            read_only,
            password,
            outbox,
            outbox_password,
            and_use,
        }) => {
            eventbus::url::Url::parse(url)?;
            outbox.as_deref().map(eventbus::url::Url::parse).transpose()?;
            let mut config = Config::own(given)?;
            if !protected && config.context.get(name).is_some_and(|known| known.protected) {
                let why = "would lose its protection: give --protected, or remove it first";
                return Err(Failure::Refused(format!("context {name} {why}")));
            }
            let context = Context {
                url: url.clone(),
                label: label.clone(),
                protected: *protected,
                read_only: *read_only,
                password: password.clone(),
                outbox: outbox.clone(),
                outbox_password: outbox_password.clone(),
                is_of_project: false,
            };
            config.context.insert(name.clone(), context);
            if *and_use {
                config.previous = config.current.replace(name.clone());
            }
            config.save(given)?;
            say!("context {name} is {}", if *and_use { "added and in use" } else { "added" });
            Ok(())
        }
        Some(What::Show { name }) => {
            let (name, context) = Config::load(given)?.find(name.as_deref())?;
            out.rows(vec![shown(&name, &context)])
        }
        Some(What::Test { name }) => {
            let (name, context) = Config::load(given)?.find(name.as_deref())?;
            let care = Care { confirm: Vec::new(), no_input: true, dry_run: true };
            let started = std::time::Instant::now();
            let session = Session::through(false, Gate { name: name.clone(), context, care }).await?;
            let n_topics = session.admin()?.topics().await?.len();
            session.bus.close().await?;
            say!("context {name} answers: {n_topics} topics, {} ms", started.elapsed().as_millis());
            Ok(())
        }
        Some(What::Copy { from, to }) => {
            let (_, mut context) = Config::load(given)?.find(Some(from))?;
            if context.is_of_project && context.runs_a_program() {
                return Err(Failure::Refused(format!(
                    "{from} is of ./eventctl.toml and would run a program: add yours by hand"
                )));
            }
            context.is_of_project = false;
            let mut config = Config::own(given)?;
            if config.context.contains_key(to) {
                return Err(Failure::Refused(format!("there is a context {to} already: remove it first")));
            }
            config.context.insert(to.clone(), context);
            config.save(given)?;
            say!("context {to} is a copy of {from}");
            Ok(())
        }
        Some(What::Edit) => edit(given),
        Some(What::Prompt) => match Config::load(given)?.current {
            Some(current) => out.line(current),
            None => Ok(()),
        },
        Some(What::Use { name }) => {
            let mut config = Config::own(given)?;
            let name = match (name.as_str(), &config.previous) {
                ("-", None) => return Err(Failure::NotFound("no context was in use before".into())),
                ("-", Some(previous)) => previous.clone(),
                (name, _) => name.to_owned(),
            };
            if !Config::load(given)?.context.contains_key(&name) {
                return Err(missing(&name));
            }
            config.previous = config.current.replace(name.clone());
            config.save(given)?;
            say!("context {name} is in use");
            Ok(())
        }
        Some(What::Rm { name }) => {
            let mut config = Config::own(given)?;
            config.context.remove(name).ok_or_else(|| missing(name))?;
            config.current = config.current.filter(|current| current != name);
            config.previous = config.previous.filter(|previous| previous != name);
            config.save(given)?;
            say!("context {name} is removed; what it named is untouched");
            Ok(())
        }
    }
}
