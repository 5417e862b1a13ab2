//! What a shell completes: names of the configuration, and of the bus that the line speaks of.

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use clap::CommandFactory;
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::Shells;
use clap_complete::{CompleteEnv, Shell};

use crate::Cli;
use crate::context::Config;
use crate::exit::{Failure, Outcome};
use crate::session::{Care, Gate, Session};

/// A shell waits no longer for names.
const PATIENCE: Duration = Duration::from_millis(300);
/// The variable by which the script of a shell asks.
const ASKS: &str = "COMPLETE";

/// Answers a shell that asks, and ends the program then.
pub(crate) fn answer() {
    CompleteEnv::with_factory(Cli::command).var(ASKS).complete();
}

/// The script that has a shell ask.
///
/// # Errors
/// Usage: the shell is not among those that can.
pub(crate) fn script(shell: Shell) -> Outcome<String> {
    let (name, shells) = (shell.to_string(), Shells::builtins());
    let completer = shells.completer(&name);
    let completer =
        completer.ok_or_else(|| Failure::Usage(format!("there are no completions for {name}")))?;
    let mut script = Vec::new();
    completer.write_registration(ASKS, "eventctl", "eventctl", "eventctl", &mut script)?;
    Ok(String::from_utf8_lossy(&script).into_owned())
}

/// The names of contexts.
pub(crate) fn contexts() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let names = config().into_iter().flat_map(|config| config.context.into_keys());
        names.map(CompletionCandidate::new).collect()
    })
}

/// The names of topics.
pub(crate) fn topics() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        names(async |session| {
            let topics = session.admin()?.topics().await?;
            Ok(topics.into_iter().map(|info| info.topic.to_string()).collect())
        })
    })
}

/// The names of groups.
pub(crate) fn groups() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        names(async |session| {
            let mut names: Vec<_> = session.admin()?.groups(None).await?;
            names.sort_by(|one, other| one.group.cmp(&other.group));
            names.dedup_by(|one, other| one.group == other.group);
            Ok(names.into_iter().map(|info| info.group.to_string()).collect())
        })
    })
}

/// The configuration that the line speaks of.
fn config() -> Outcome<Config> {
    let named = flag("--config", None).map(PathBuf::from);
    Config::load(named.or_else(|| std::env::var_os("EVENTCTL_CONFIG").map(PathBuf::from)).as_ref())
}

/// A flag of the line that is completed: what follows the `--` is that line.
fn flag(long: &str, short: Option<&str>) -> Option<String> {
    let mut line = std::env::args().skip_while(|argument| argument != "--").skip(1);
    let mut found = None;
    while let Some(argument) = line.next() {
        if argument == long || short == Some(argument.as_str()) {
            found = line.next();
        } else if let Some(value) = argument.strip_prefix(long).and_then(|rest| rest.strip_prefix('=')) {
            found = Some(value.to_owned());
        }
    }
    found
}

/// Names of a bus, as far as it says them in time: a line that is being typed is no place for errors.
fn names(
    ask: impl AsyncFnOnce(&Session) -> Outcome<Vec<String>> + Send + 'static,
) -> Vec<CompletionCandidate> {
    let (answer, answered) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let names = runtime.block_on(async {
            let session = open().await?;
            ask(&session).await
        });
        drop(answer.send(names.unwrap_or_default()));
        Ok::<_, std::io::Error>(())
    });
    let names = answered.recv_timeout(PATIENCE).unwrap_or_default();
    names.into_iter().map(CompletionCandidate::new).collect()
}

/// Opens the bus of the line that is completed.
async fn open() -> Outcome<Session> {
    let config = config()?;
    let wanted = flag("--context", Some("-c")).or_else(|| std::env::var("EVENTCTL_CONTEXT").ok());
    let (name, context) = config.find(wanted.as_deref())?;
    if context.runs_a_program() {
        // It may ask its user, who is at another line.
        return Err(Failure::Refused("no program is run for a completion".into()));
    }
    let care = Care { confirm: Vec::new(), no_input: true, dry_run: true };
    Session::through(false, Gate { name, context, care }).await
}
