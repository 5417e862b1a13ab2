//! `eventctl`: publish, tail, inspect, replay and redrive, with the same words on every transport.

mod audit;
mod chain;
mod compare;
mod complete;
mod context;
mod decode;
mod dlq;
mod doctor;
mod exit;
mod held;
mod inbox;
mod inspect;
mod jq;
mod listing;
mod out;
mod outbox;
mod pace;
mod progress;
mod publish;
mod range;
mod reader;
mod record;
mod replay;
mod secret;
mod session;
mod store;
mod tail;
mod time;
mod topic;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde_json::json;

use crate::context::Config;
use crate::exit::{Failure, Outcome};
use crate::out::{Color, Format, Out, say};
use crate::progress::Style;
use crate::session::{Care, Gate, Session};
use crate::store::Store;
use crate::time::Time;

/// Publish, tail, inspect, replay and redrive on the event bus.
///
/// Examples:
///   eventctl -c sqlite://shop.db inspect topics
///   eventctl -c sqlite://shop.db tail orders -f
///   eventctl -c sqlite://shop.db dlq list --group-by reason
#[derive(Debug, Parser)]
#[command(
    version,
    verbatim_doc_comment,
    disable_help_subcommand = true,
    next_help_heading = "Global options"
)]
struct Cli {
    /// A context's name, or an address.
    #[arg(
        short,
        long,
        global = true,
        env = "EVENTCTL_CONTEXT",
        value_name = "NAME|URL",
        hide_env_values = true,
        add = complete::contexts()
    )]
    context: Option<String>,
    /// The form of results.
    #[arg(short, long, global = true, env = "EVENTCTL_OUTPUT", value_enum, default_value = "auto")]
    output: Format,
    /// Only these columns of lists.
    #[arg(long, global = true, value_delimiter = ',', value_name = "NAMES")]
    columns: Option<Vec<String>>,
    /// Writes lists without their first line of names.
    #[arg(long, global = true)]
    no_headers: bool,
    /// How times are shown to people.
    #[arg(long, global = true, value_enum, default_value = "iso", value_name = "FORM")]
    time: Time,
    /// Whether the names of columns are set off; NO_COLOR and TERM=dumb are heard.
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "WHEN")]
    color: Color,
    /// As --color never.
    #[arg(long, global = true, conflicts_with = "color")]
    no_color: bool,
    /// How far long work has come, on standard error.
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "FORM")]
    progress: Style,
    /// Says on standard error what happens inside; twice says more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Checks everything and writes nothing, also where --execute is given.
    #[arg(long, global = true)]
    dry_run: bool,
    /// Says nothing that was not asked for.
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Gives up after so long. What follows, and what publishes many events, goes on for as long as it takes.
    #[arg(long, global = true, env = "EVENTCTL_TIMEOUT", default_value = "10m", value_parser = range::duration)]
    timeout: Duration,
    /// Never asks. What needs a confirmation is refused then, and the error names the flag.
    #[arg(long, global = true)]
    no_input: bool,
    /// The name of the protected context that may be written to, or of what is to be destroyed; may be repeated.
    #[arg(long, global = true, value_name = "NAME")]
    confirm: Vec<String>,
    /// The configuration file.
    #[arg(long, global = true, env = "EVENTCTL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Publish(publish::Publish),
    Tail(tail::Tail),
    Inspect(inspect::Inspect),
    /// Shows what the transport can do.
    ///
    /// Examples:
    ///   eventctl -c sqlite://shop.db capabilities
    #[command(verbatim_doc_comment)]
    Capabilities,
    Replay(replay::Replay),
    Dlq(dlq::Dlq),
    Topic(topic::TopicCommand),
    Outbox(outbox::OutboxCommand),
    Inbox(inbox::InboxCommand),
    Audit(compare::Audit),
    Doctor(doctor::Doctor),
    Context(context::ContextCommand),
    /// Writes a completion script: commands, flags, and the names of contexts, topics and groups.
    ///
    /// Examples:
    ///   eventctl completions bash > ~/.local/share/bash-completion/completions/eventctl
    #[command(verbatim_doc_comment)]
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
    /// Shows the version.
    ///
    /// Examples:
    ///   eventctl version -o json
    #[command(verbatim_doc_comment)]
    Version,
}

#[tokio::main]
async fn main() -> ExitCode {
    complete::answer();
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if cli.verbose > 0 {
        let level = if cli.verbose == 1 { "eventbus=debug" } else { "eventbus=trace" };
        tracing_subscriber::fmt().with_env_filter(level).with_writer(std::io::stderr).init();
    }
    let work = async {
        cli.heeds_its_store(&matches)?;
        run(&cli).await
    };
    let follows = match &cli.command {
        Command::Tail(tail) => tail.follow,
        Command::Inspect(inspect) => inspect.follows(),
        Command::Outbox(outbox) => outbox.relays(),
        // As long as what it reads, or as it is told to take.
        Command::Publish(publish) => publish.takes_its_time(),
        Command::Replay(replay) => replay.executes(),
        Command::Dlq(dlq) => dlq.executes(),
        _ => false,
    };
    let ends_itself = matches!(&cli.command, Command::Outbox(outbox) if outbox.relays());
    let limited = async {
        if follows {
            return work.await;
        }
        tokio::time::timeout(cli.timeout, work)
            .await
            .unwrap_or_else(|_| Err(Failure::Timeout(format!("not done after {:?}", cli.timeout))))
    };
    let outcome = tokio::select! {
        outcome = limited => outcome,
        _ = tokio::signal::ctrl_c(), if !ends_itself => Err(Failure::Interrupted),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let text = failure.to_string();
            if !text.is_empty() {
                say!("eventctl: {text}");
            }
            failure.code()
        }
    }
}

impl Cli {
    /// A store that is named on the command line is one that the command looks into. The environment may name one for all.
    fn heeds_its_store(&self, matches: &ArgMatches) -> Outcome {
        let flag = match &self.command {
            Command::Publish(publish) if !publish.via_outbox => "--via-outbox",
            Command::Audit(audit) if !audit.asks_a_consumer() => "--consumer",
            _ => return Ok(()),
        };
        let is_given = |name| {
            let of_command = matches.subcommand().and_then(|(_, of_command)| of_command.value_source(name));
            of_command == Some(ValueSource::CommandLine)
        };
        match ["store", "namespace"].into_iter().find(|name| is_given(name)) {
            Some(name) => {
                Err(Failure::Usage(format!("--{name} says where to look with {flag}, which is not given")))
            }
            None => Ok(()),
        }
    }

    fn color(&self) -> Color {
        if self.no_color { Color::Never } else { self.color }
    }

    fn progress(&self) -> Style {
        if self.quiet { Style::None } else { self.progress }
    }
}

async fn run(cli: &Cli) -> Outcome {
    let mut out = Out::new(cli.output, cli.columns.clone(), !cli.no_headers, cli.color());
    match &cli.command {
        Command::Version => {
            let transports: Vec<_> = eventbus::schemes().collect();
            return if cli.output == Format::Json {
                out.line(json!({"eventctl": env!("CARGO_PKG_VERSION"), "transports": transports}))
            } else {
                out.line(format_args!("eventctl {} ({})", env!("CARGO_PKG_VERSION"), transports.join(", ")))
            };
        }
        Command::Completions { shell } => {
            return out.line(complete::script(*shell)?);
        }
        _ => {}
    }
    if let Command::Context(command) = &cli.command {
        return context::run(command, cli.config.as_ref(), cli.dry_run, &mut out).await;
    }
    let config = Config::load(cli.config.as_ref())?;
    let creates = match &cli.command {
        Command::Publish(_) => true,
        Command::Topic(topic) => topic.creates(),
        _ => false,
    };
    let care = || Care { confirm: cli.confirm.clone(), no_input: cli.no_input, dry_run: cli.dry_run };
    // A store that is named needs no bus beside it.
    let gate = |store: &Store| {
        let is_alone = store.is_named() && cli.context.is_none() && !config.has_current();
        let found = if is_alone { Default::default() } else { config.find(cli.context.as_deref())? };
        let (name, context) = store.named().map_or(found.clone(), |url| config.guarded(url, found));
        Ok::<_, Failure>(Gate { name, context, care: care() })
    };
    match &cli.command {
        Command::Outbox(command) if !command.relays() => {
            return outbox::run(command, &gate(command.store())?, None, &mut out).await;
        }
        Command::Inbox(command) => return inbox::run(command, &gate(command.store())?, &mut out).await,
        Command::Publish(publish) if publish.via_outbox => {
            let gate = gate(&publish.store)?;
            let to = publish::To::Outbox(publish.store.open(&gate).await?);
            return publish::run(&gate, to, publish, &mut out, cli.quiet, cli.progress()).await;
        }
        _ => {}
    }
    let found = config.find(cli.context.as_deref())?;
    let (name, context) = match &cli.command {
        // What it publishes and removes is of the store.
        Command::Outbox(command) => {
            command.store().named().map_or(found.clone(), |url| config.guarded(url, found))
        }
        _ => found,
    };
    let session = { Session::through(creates && !cli.dry_run, Gate { name, context, care: care() }).await? };
    let outcome = match &cli.command {
        Command::Publish(publish) => {
            let to = publish::To::Bus(&session.bus);
            publish::run(&session, to, publish, &mut out, cli.quiet, cli.progress()).await
        }
        Command::Tail(tail) => tail::run(&session, tail, cli.time, &mut out).await,
        Command::Inspect(inspect) => inspect::run(&session, inspect, &mut out).await,
        Command::Capabilities => inspect::capabilities(&session, &mut out),
        Command::Replay(replay) => {
            let other = replay.to_context().map(|wanted| config.find(Some(wanted))).transpose()?;
            let other = other.map(|(name, context)| Gate { name, context, care: care() });
            replay::run(&session, other, replay, cli.progress(), &mut out).await
        }
        Command::Dlq(dlq) => dlq::run(&session, dlq, &mut out).await,
        Command::Topic(topic) => topic::run(&session, topic).await,
        Command::Outbox(command) => outbox::run(command, &session, Some(&session), &mut out).await,
        Command::Audit(audit) => compare::run(&session, audit, &mut out).await,
        Command::Doctor(doctor) => doctor::run(&session, doctor, &mut out).await,
        Command::Inbox(_) | Command::Context(_) | Command::Completions { .. } | Command::Version => Ok(()),
    };
    let closed = session.bus.close().await;
    outcome?;
    Ok(closed?)
}
