//! `publish`: one event from the command line, or many from files and pipes.

use std::io::{BufRead, BufReader, Read, Seek};
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use eventbus::{Bus, Envelope, EventId, Topic};
use outbox::AnyOutbox;
use serde_json::{Value, json};

use crate::exit::{Failure, Outcome};
use crate::out::Out;
use crate::out::say;
use crate::pace::Pace;
use crate::progress::{Progress, Style};
use crate::record;
use crate::session::Gate;
use crate::store::Store;

/// How input is cut into events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Input {
    /// All of it is one body.
    Raw,
    /// Each line is a body.
    Lines,
    /// Each line is a JSON body.
    Jsonl,
    /// Each line is a structured CloudEvent.
    Cloudevents,
    /// Each line is a record as `tail -o jsonl --full` writes it.
    Envelope,
}

/// What becomes of the rest when an event is broken, or refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnError {
    /// It is not published; what came before is.
    Stop,
    /// It is; the event is named, and the exit code is 3.
    Skip,
}

/// Publishes events.
///
/// Examples:
///   eventctl -c sqlite://shop.db publish orders '{"id":7}' --type shop.order.placed -k 7
///   eventctl -c A tail T --from start --until-end -o jsonl --full | eventctl -c B publish T2 - --input envelope
///   eventctl publish orders '{"id":7}' --via-outbox --store postgres://me@db/shop
#[derive(Debug, Args)]
#[command(verbatim_doc_comment, group = clap::ArgGroup::new("again").args(["count", "duration"]).multiple(true))]
pub(crate) struct Publish {
    /// The topic.
    #[arg(add = crate::complete::topics())]
    pub dest: Topic,
    /// The body; - reads standard input.
    pub body: Option<String>,
    /// Reads files instead, in this order; repeatable. With --input raw each is one body.
    #[arg(short, long, value_name = "FILE", conflicts_with = "body")]
    pub file: Vec<PathBuf>,
    /// How the input is cut into events.
    #[arg(long, value_enum, default_value = "raw")]
    pub input: Input,
    /// The ordering key.
    #[arg(short, long)]
    pub key: Option<String>,
    /// A header, repeatable.
    #[arg(short = 'H', long = "header", value_name = "NAME=VALUE")]
    pub headers: Vec<String>,
    /// The type of the event.
    #[arg(long = "type", default_value = "eventctl.message")]
    pub event_type: String,
    /// The version of the type.
    #[arg(long = "type-version", value_name = "N")]
    pub version: Option<u32>,
    /// The source of the event.
    #[arg(long, default_value = "/eventctl")]
    pub source: String,
    /// What the event is about.
    #[arg(long)]
    pub subject: Option<String>,
    /// The id; made up if not given.
    #[arg(long)]
    pub id: Option<String>,
    /// An extension attribute, repeatable.
    #[arg(long = "ce", value_name = "NAME=VALUE")]
    pub extensions: Vec<String>,
    /// The media type of the body.
    #[arg(long, value_name = "TYPE")]
    pub content_type: Option<String>,
    /// Publishes an absent body.
    #[arg(long, conflicts_with_all = ["body", "file"])]
    pub null: bool,
    /// Publishes it so often.
    #[arg(long, value_name = "N", conflicts_with_all = ["file", "null", "input"])]
    pub count: Option<u64>,
    /// Publishes it for so long, or as often as --count says.
    #[arg(long, value_name = "TIME", value_parser = crate::range::duration, conflicts_with_all = ["file", "null", "input"])]
    pub duration: Option<std::time::Duration>,
    /// With --count or --duration: puts the number of the event, from 1, where body and key have an n in braces.
    #[arg(long, requires = "again")]
    pub template: bool,
    /// With --count or --duration: no faster than this, such as 100/s.
    #[arg(long, value_name = "N/s", value_parser = crate::range::rate, requires = "again")]
    pub rate: Option<f64>,
    /// Events published before their confirms are awaited.
    #[arg(long, default_value = "256", value_name = "N")]
    pub in_flight: std::num::NonZeroUsize,
    /// What a line does that cannot be read.
    #[arg(long, value_enum, default_value = "stop")]
    pub on_error: OnError,
    /// Writes a receipt for each event to standard output.
    #[arg(long, value_name = "jsonl", value_parser = ["jsonl"])]
    pub report: Option<String>,
    /// Commits the events to the outbox instead, those of a window in one transaction, and does not ask for the bus: a relay
    /// publishes them.
    #[arg(long, conflicts_with = "report")]
    pub via_outbox: bool,
    #[command(flatten, next_help_heading = "With --via-outbox")]
    pub store: Store,
}

/// Lines read ahead.
const WINDOW: usize = 256;

fn open(path: &PathBuf) -> Outcome<BufReader<std::fs::File>> {
    let file = std::fs::File::open(path);
    file.map(BufReader::new).map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))
}

/// Whether the last line of a file has its end, so that that of the next file does not become a part of it.
fn ends_in_a_line(path: &PathBuf) -> bool {
    let last = || -> std::io::Result<u8> {
        let mut file = std::fs::File::open(path)?;
        file.seek(std::io::SeekFrom::End(-1))?;
        let mut last = [0];
        file.read_exact(&mut last).map(|()| last[0])
    };
    // What cannot be sought is no plain file, and ends where it ends; an empty one has no line.
    last().map_or(true, |last| last == b'\n')
}

fn pair(text: &str) -> Outcome<(&str, &str)> {
    text.split_once('=').ok_or_else(|| Failure::Usage(format!("expected NAME=VALUE: {text}")))
}

impl Publish {
    /// Whether it publishes as long as there is input, or as often as it is told.
    pub(crate) fn takes_its_time(&self) -> bool {
        self.count.is_some() || self.duration.is_some() || self.input != Input::Raw
    }

    fn event(&self, body: Option<Vec<u8>>) -> Outcome<Envelope> {
        let mut event =
            Envelope::new(self.event_type.clone(), self.source.clone()).with_version(self.version);
        if let Some(id) = &self.id {
            event = event.with_id(EventId::parse(id));
        }
        if let Some(key) = &self.key {
            event = event.with_key(key.as_str());
        }
        if let Some(subject) = &self.subject {
            event = event.with_subject(subject.clone());
        }
        for header in &self.headers {
            let (name, value) = pair(header)?;
            if eventbus::header::is_reserved(name) {
                return Err(Failure::Usage(format!(
                    "the header {name} is reserved: publishing would drop it"
                )));
            }
            event = event.with_header(name, value);
        }
        for extension in &self.extensions {
            let (name, value) = pair(extension)?;
            event = event.with_extension(name, value);
        }
        let Some(body) = body else { return Ok(event) };
        let is_json = serde_json::from_slice::<Value>(&body).is_ok();
        let content_type =
            self.content_type.clone().or_else(|| is_json.then(|| "application/json".to_owned()));
        event = event.with_payload(body);
        Ok(match content_type {
            Some(content_type) => event.with_content_type(content_type),
            None => event,
        })
    }

    fn source(&self) -> Outcome<Box<dyn BufRead + Send>> {
        match self.body.as_deref() {
            _ if !self.file.is_empty() => {
                let mut all: Box<dyn BufRead + Send> = Box::new(std::io::empty());
                for path in &self.file {
                    let file = open(path)?;
                    let end: &[u8] = if ends_in_a_line(path) { b"" } else { b"\n" };
                    all = Box::new(all.chain(file).chain(end));
                }
                Ok(all)
            }
            Some("-") => Ok(Box::new(BufReader::new(std::io::stdin()))),
            Some(body) => Ok(Box::new(std::io::Cursor::new(body.to_owned()))),
            None => Err(Failure::Usage("give a body, - for standard input, --file or --null".into())),
        }
    }

    fn parse(&self, line: &str, at: usize) -> Outcome<Envelope> {
        let place = |problem: String| Failure::Usage(format!("line {at}: {problem}"));
        match self.input {
            Input::Envelope => {
                let value: Value = serde_json::from_str(line).map_err(|error| place(error.to_string()))?;
                record::from_json(&value).map_err(|failure| place(failure.to_string()))
            }
            Input::Cloudevents => eventbus::cloudevents::from_json(line.as_bytes())
                .map_err(|failure| place(failure.message().to_owned())),
            Input::Jsonl => {
                serde_json::from_str::<serde::de::IgnoredAny>(line)
                    .map_err(|error| place(error.to_string()))?;
                self.event(Some(line.into()))
            }
            Input::Lines | Input::Raw => self.event(Some(line.into())),
        }
    }
}

/// Where events go.
pub(crate) enum To<'a> {
    Bus(&'a Bus),
    Outbox(AnyOutbox),
}

/// Runs the command.
///
/// # Errors
/// Partial: some events were stored and others were not.
pub(crate) async fn run(
    gate: &Gate,
    to: To<'_>,
    publish: &Publish,
    out: &mut Out,
    quiet: bool,
    progress: Style,
) -> Outcome {
    let dry_run = match gate.may_write() {
        Err(Failure::DryRun) => true,
        allowed => {
            allowed?;
            false
        }
    };
    let reports = publish.report.is_some();
    let mut sender = Sender { to, publish, out, quiet, reports, dry_run, n_stored: 0, n_failed: 0 };
    let mut n_skipped = 0;
    if publish.count.is_some() || publish.duration.is_some() {
        repeat(&mut sender, publish, progress).await?;
    } else if publish.null {
        sender.send(vec![publish.event(None)?]).await?;
    } else if publish.input == Input::Raw && !publish.file.is_empty() {
        for path in &publish.file {
            let mut body = Vec::new();
            open(path)?.read_to_end(&mut body)?;
            sender.send(vec![publish.event(Some(body))?]).await?;
        }
    } else if publish.input == Input::Raw {
        let mut source = publish.source()?;
        let mut body = on_thread(move |sender| {
            let mut body = Vec::new();
            let read = source.read_to_end(&mut body).map(|_| body);
            drop(sender.blocking_send(read));
        });
        let body = body.recv().await.unwrap_or_else(|| Ok(Vec::new()))?;
        sender.send(vec![publish.event(Some(body))?]).await?;
    } else {
        let source = publish.source()?;
        let mut lines = on_thread(move |sender| {
            let mut sent = source.lines().map(|line| sender.blocking_send(line));
            while let Some(Ok(())) = sent.next() {}
        });
        let (mut batch, mut at) = (Vec::new(), 0);
        while let Some(line) = lines.recv().await {
            at += 1;
            let line = line?;
            if line.is_empty() && publish.input != Input::Lines {
                continue;
            }
            match publish.parse(&line, at) {
                Ok(event) => batch.push(event),
                Err(failure) if publish.on_error == OnError::Skip => {
                    n_skipped += 1;
                    say!("eventctl: {failure}; skipped");
                }
                Err(failure) => {
                    // What was read before the broken line is published, and the line is named.
                    sender.send(batch).await?;
                    return Err(match sender.n_stored {
                        0 => failure,
                        n => Failure::Partial(format!("{failure}; {n} events before it were stored")),
                    });
                }
            }
            if batch.len() == publish.in_flight.get() {
                sender.send(std::mem::take(&mut batch)).await?;
            }
        }
        sender.send(batch).await?;
    }
    if dry_run {
        say!("dry run: {} events would be published to {}", sender.n_stored, publish.dest);
    }
    match (sender.n_stored, sender.n_failed + n_skipped) {
        (_, 0) => Ok(()),
        (0, n) => Err(Failure::Runtime(format!("none of {n} events was stored"))),
        (stored, failed) => Err(Failure::Partial(format!("{stored} events were stored, {failed} were not"))),
    }
}

/// Publishes one body many times, at a pace.
async fn repeat(sender: &mut Sender<'_>, publish: &Publish, progress: Style) -> Outcome {
    let count = publish.count.unwrap_or(u64::MAX);
    let mut body = Vec::new();
    publish.source()?.read_to_end(&mut body)?;
    let fill = |text: &str, n: u64| text.replace("{n}", &n.to_string());
    let pace = Pace::begin(publish.rate);
    let window = pace.window(publish.in_flight.get()) as u64;
    let mut progress = Progress::begin(progress, "publish", publish.count.unwrap_or(0));
    let mut n = 0;
    while n < count && publish.duration.is_none_or(|duration| pace.elapsed() < duration) {
        let mut batch = Vec::new();
        for _ in 0..window.min(count - n) {
            n += 1;
            let mut event = publish.event(Some(body.clone()))?;
            if publish.template {
                event = event.with_payload(fill(&String::from_utf8_lossy(&body), n));
                if let Some(key) = &publish.key {
                    event = event.with_key(fill(key, n));
                }
            }
            batch.push(event);
        }
        sender.send(batch).await?;
        progress.at(n);
        pace.keep(n).await;
    }
    progress.end(n);
    Ok(())
}

/// Reads on a thread of its own: a blocking read must not keep Ctrl-C and the time-out waiting.
fn on_thread<T: Send + 'static>(
    work: impl FnOnce(tokio::sync::mpsc::Sender<T>) + Send + 'static,
) -> tokio::sync::mpsc::Receiver<T> {
    let (sender, receiver) = tokio::sync::mpsc::channel(WINDOW);
    std::thread::spawn(move || work(sender));
    receiver
}

struct Sender<'a> {
    to: To<'a>,
    publish: &'a Publish,
    out: &'a mut Out,
    quiet: bool,
    reports: bool,
    /// Events are checked and not sent.
    dry_run: bool,
    n_stored: usize,
    n_failed: usize,
}

impl Sender<'_> {
    async fn send(&mut self, batch: Vec<Envelope>) -> Outcome {
        if batch.is_empty() {
            return Ok(());
        }
        let topic = &self.publish.dest;
        if self.dry_run {
            let max_bytes = match &self.to {
                To::Bus(bus) => bus.transport().capabilities().max_event_bytes.unwrap_or(usize::MAX),
                To::Outbox(_) => outbox::Options::default().max_event_bytes,
            };
            for event in batch {
                let id = event.id().clone();
                match event.admit(max_bytes) {
                    Ok(_) => self.n_stored += 1,
                    Err(error) => {
                        self.n_failed += 1;
                        say!("eventctl: {id}: {error}");
                    }
                }
            }
            return Ok(());
        }
        let started = Instant::now();
        let told: Vec<_> = batch
            .iter()
            .map(|event| (event.id().clone(), event.payload().map_or(0, bytes::Bytes::len)))
            .collect();
        let bus = match &self.to {
            To::Bus(bus) => bus,
            To::Outbox(outbox) => {
                let events = batch.into_iter().map(|event| (topic.clone(), event)).collect();
                match outbox.publish(events).await {
                    Ok(()) => {
                        self.n_stored += told.len();
                        if !self.quiet {
                            say!("committed {} for {topic}: a relay publishes them", told.len());
                        }
                    }
                    // All of them are committed, or none is; what comes later must not be committed without them.
                    Err(error) => {
                        let (n, first) = (told.len(), told.first().map(|(id, _)| id.to_string()));
                        let said = match error.is_unknown() {
                            true => format!(
                                "{n} events from {} on are stored, or none of them: look before you repeat it: {error}",
                                first.unwrap_or_default()
                            ),
                            false => {
                                format!("{n} events were not stored, nor what comes after them: {error}")
                            }
                        };
                        return Err(match self.n_stored {
                            0 if !error.is_unknown() => Failure::Runtime(said),
                            stored => {
                                Failure::Partial(format!("{said}; {stored} events before them were stored"))
                            }
                        });
                    }
                }
                return Ok(());
            }
        };
        let publisher = bus.transport().publisher().await?;
        let outcomes = publisher.enqueue(topic, batch).await?.await;
        let single = told.len() == 1;
        for ((id, size), outcome) in told.into_iter().zip(outcomes) {
            match outcome {
                Ok(receipt) => {
                    self.n_stored += 1;
                    let place =
                        format!("{topic}/{}@{}", receipt.partition, receipt.offset.unwrap_or_default());
                    if self.reports {
                        let line =
                            json!({"ref": place, "id": id.to_string(), "duplicate": receipt.duplicate});
                        // Nobody reads the receipts any more: that is no reason to stop publishing.
                        self.reports = self.out.line(line).is_ok();
                    } else if single && !self.quiet {
                        say!("published {place}  id {id}  {size} B  {} ms", started.elapsed().as_millis());
                    }
                }
                Err(error) => {
                    self.n_failed += 1;
                    say!("eventctl: {id}: {error}");
                }
            }
        }
        if !single && !self.quiet {
            say!("published {} to {topic}", self.n_stored);
        }
        Ok(())
    }
}
