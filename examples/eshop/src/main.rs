//! The e-shop's program: the services in one process or several, fed with a file of orders.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use eshop::contracts::Topics;
use eshop::db::Db;
use eshop::orders_file::{self, OrderLine, OrdersFile};
use eshop::patience::patiently;
use eshop::shop::Shop;
use eshop::summary::{self, Summary};
use eshop::{basket, catalog, grace, http, notification, ordering, payment};
use eventbus::{Admin, Bus, Counts, Error, ErrorKind, Running, TopicSpec};
use outbox::Relaying;
use sqlx::{Postgres, Sqlite};

/// Runs an e-shop on the event bus, fed with 6,919 real orders.
///
/// Examples:
///   eshop                                 the shipped orders, on eshop.db, until Ctrl-C
///   eshop --until-done --summary -        ends when every order is settled, prints JSON
///   eshop --services ordering,relay       only these; others run elsewhere on the same bus and tables
///   eshop --db postgres://me@host/shop    tables in PostgreSQL
///   eshop --db sqlite://{service}.db      a file for each service
#[derive(Debug, Parser)]
#[command(version, verbatim_doc_comment)]
struct Options {
    /// Address of the bus.
    #[arg(long, default_value = "sqlite://eshop.db", value_name = "URL")]
    bus: String,
    /// Where the services' tables are, sqlite:// or postgres://; with {service} in it each has its own
    /// [default: an SQLite file beside the bus's file, for memory:// a temporary one, else eshop-services.db].
    #[arg(long, value_name = "URL")]
    db: Option<String>,
    /// File of orders: order,buyer,date,quantity,amount [default: the shipped 6,919].
    #[arg(long, value_name = "FILE")]
    orders: Option<PathBuf>,
    /// Checkouts a second [default: as fast as they are taken].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: Option<u32>,
    /// Services to run in this process; "relay" sends what all of them publish to the bus.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "basket,ordering,grace,catalog,payment,shipping,notification,relay"
    )]
    services: Vec<String>,
    /// How long a relay that ended without a word is waited for before another takes over, at least 1s.
    #[arg(long, default_value = "5s", value_parser = duration, value_name = "DURATION")]
    lease: Duration,
    /// Where the door is.
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR")]
    listen: SocketAddr,
    /// How long a buyer may change their mind, such as 500ms or 1m.
    #[arg(long, default_value = "200ms", value_parser = duration, value_name = "DURATION")]
    grace: Duration,
    /// Initial stock, in percent of what the file asks for.
    #[arg(long, default_value_t = 97, value_name = "PERCENT")]
    stock: u64,
    /// End when every order is settled.
    #[arg(long)]
    until_done: bool,
    /// Write the account as one JSON object to a file, or to standard output for -.
    #[arg(long, value_name = "FILE|-")]
    summary: Option<PathBuf>,
}

/// Says something on standard error; nobody listening is no failure.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        drop(writeln!(std::io::stderr(), $($text)*));
    }};
}

fn duration(text: &str) -> Result<Duration, String> {
    eventbus::url::parse_duration(text)
        .ok_or_else(|| "expected a duration such as 500ms, 2s or 1m".to_owned())
}

/// The exit code for a file with broken lines.
const PARTIAL: u8 = 3;

#[tokio::main]
async fn main() -> ExitCode {
    // The client of RabbitMQ calls every channel's end an error, also those that are answers.
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn,lapin=off".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let options = Options::parse();
    match run(options).await {
        Ok(code) => code,
        Err(error) => {
            say!("eshop: {error}");
            ExitCode::from(if error.kind() == ErrorKind::Config { 2 } else { 1 })
        }
    }
}

async fn run(options: Options) -> eventbus::Result<ExitCode> {
    let temporary = tempfile::tempdir().map_err(|error| {
        Error::new(ErrorKind::Unavailable, "a temporary folder cannot be made").caused_by(error)
    })?;
    let db = options.db.clone().unwrap_or_else(|| tables_beside(&options.bus, temporary.path()));
    match db.split_once("://").map(|(scheme, _)| scheme) {
        Some("sqlite") => run_on::<Sqlite>(options, &db).await,
        Some("postgres" | "postgresql") => run_on::<Postgres>(options, &db).await,
        _ => Err(Error::new(
            ErrorKind::Config,
            "tables are in sqlite://file.db or postgres://user@host/database",
        )),
    }
}

async fn run_on<D: Db>(options: Options, db: &str) -> eventbus::Result<ExitCode> {
    let started = Instant::now();
    let file = read_orders(options.orders.as_deref())?;
    for (line, problem) in &file.broken {
        say!("eshop: line {line}: {problem}; the rest goes on");
    }
    let listener = http::bind(options.listen).await?;
    let door = listener.local_addr().unwrap_or(options.listen);
    let bus = patiently(async || eventbus::connect(&options.bus).await).await?.with_source("/eshop");
    let shop = Arc::new(patiently(async || Shop::<D>::open(db, options.grace).await).await?);
    let topics = Topics::new()?;
    patiently(async || declare(&bus, &topics).await).await?;
    patiently(async || shop.publish_into(&bus).await).await?;
    let initial = initial_stock(&file.lines, options.stock);
    patiently(async || catalog::stock_up(&shop.catalog, &initial).await).await?;
    let (services, relays) = start(&bus, &shop, &options).await?;
    for line in services.iter().flat_map(Running::describe) {
        tracing::info!("{line}");
    }
    // Before anybody is told that we are here: from now on a signal is a polite end.
    let shutdown = eventbus::shutdown_signal();
    let monitors = services.iter().map(Running::monitor).collect();
    tokio::spawn(http::serve(listener, shop.clone(), monitors));
    say!(
        "eshop on {}, door at http://{door}, {} orders in the file",
        redacted(&options.bus),
        file.lines.len()
    );

    let lawful = std::cell::Cell::new(true);
    let flow = async {
        if options.services.iter().any(|service| service == "basket") {
            let digest = file.digest();
            let is_imported = std::cell::Cell::new(false);
            let import = async {
                basket::import(&shop.basket, &digest, &file.lines, options.rate).await?;
                is_imported.set(true);
                Ok(())
            };
            tokio::try_join!(import, watch(&shop, &is_imported))?;
            let took = started.elapsed();
            let summary = patiently(async || account(&bus, &shop, &services, took).await).await?;
            report(&summary, options.summary.as_deref())?;
            lawful.set(summary.is_lawful());
            if options.until_done {
                return Ok(Ended::Done);
            }
            say!("all settled; the door stays open, Ctrl-C ends");
        }
        std::future::pending::<eventbus::Result<Ended>>().await
    };
    let outcome = tokio::select! {
        outcome = flow => outcome,
        () = shutdown => Ok(Ended::Interrupted),
    };
    // A second Ctrl-C does not wait for the drain.
    tokio::spawn(async {
        eventbus::shutdown_signal().await;
        std::process::exit(130);
    });
    for service in services {
        service.stop().await?;
    }
    // After the services, so that their last words leave the house.
    for relay in relays {
        relay.stop().await;
    }
    bus.close().await?;
    Ok(match outcome? {
        _ if !lawful.get() => ExitCode::FAILURE,
        Ended::Interrupted if options.until_done => ExitCode::from(130),
        _ if !file.broken.is_empty() => ExitCode::from(PARTIAL),
        _ => ExitCode::SUCCESS,
    })
}

/// How the flow of orders came to its end.
enum Ended {
    Done,
    Interrupted,
}

/// An address without its secrets.
fn redacted(url: &str) -> String {
    eventbus::url::Url::parse(url).map_or_else(|_| "?".into(), |url| url.to_string())
}

fn read_orders(path: Option<&Path>) -> eventbus::Result<OrdersFile> {
    let Some(path) = path else { return Ok(orders_file::read(orders_file::SHIPPED)) };
    let text = std::fs::read_to_string(path).map_err(|error| {
        Error::new(ErrorKind::Config, "the file of orders cannot be read")
            .with("file", path.display())
            .caused_by(error)
    })?;
    Ok(orders_file::read(&text))
}

/// The services' tables live beside the bus's file: two writers do not queue for one lock.
fn tables_beside(bus: &str, temporary: &Path) -> String {
    let url = eventbus::url::Url::parse(bus).ok();
    match url.as_ref().map(|url| (url.scheme(), url.place())) {
        Some(("sqlite", place)) => {
            format!("sqlite://{}-services.db", place.strip_suffix(".db").unwrap_or(place))
        }
        // A bus that forgets has nothing to do with tables of an earlier run.
        Some(("memory", _)) => format!("sqlite://{}/eshop-services.db", temporary.display()),
        _ => "sqlite://eshop-services.db".into(),
    }
}

async fn declare(bus: &Bus, topics: &Topics) -> eventbus::Result<()> {
    let Some(admin) = bus.transport().admin() else { return Ok(()) };
    for topic in topics.all() {
        Admin::declare(admin, &TopicSpec::new(topic.clone())).await?;
    }
    Ok(())
}

fn initial_stock(lines: &[OrderLine], percent: u64) -> Vec<(u32, u64)> {
    let mut asked: BTreeMap<u32, u64> = BTreeMap::new();
    for line in lines {
        *asked.entry(line.product()).or_default() += u64::from(line.quantity);
    }
    asked.into_iter().map(|(product, quantity)| (product, quantity * percent / 100)).collect()
}

async fn start<D: Db>(
    bus: &Bus,
    shop: &Shop<D>,
    options: &Options,
) -> eventbus::Result<(Vec<Running>, Vec<Relaying>)> {
    let (mut services, mut relays) = (Vec::new(), Vec::new());
    for name in &options.services {
        services.push(match name.as_str() {
            "basket" => patiently(async || basket::start(bus, &shop.basket).await).await?,
            "ordering" => patiently(async || ordering::start(bus, &shop.ordering).await).await?,
            "grace" => patiently(async || grace::start(bus, &shop.grace).await).await?,
            "catalog" => patiently(async || catalog::start(bus, &shop.catalog).await).await?,
            "payment" => patiently(async || payment::start(bus, &shop.payment).await).await?,
            "shipping" => patiently(async || ordering::start_shipping(bus, &shop.ordering).await).await?,
            "notification" => patiently(async || notification::start(bus, &shop.notification).await).await?,
            "relay" => {
                relays = patiently(async || shop.relay(bus, options.lease).await).await?;
                continue;
            }
            other => {
                let known = "basket, ordering, grace, catalog, payment, shipping, notification, relay";
                return Err(
                    Error::new(ErrorKind::Config, format!("unknown service {other}")).with("known", known)
                );
            }
        });
    }
    Ok((services, relays))
}

/// Shows progress until all is imported and every order is settled, also those from the web that came meanwhile.
async fn watch<D: Db>(shop: &Shop<D>, is_imported: &std::cell::Cell<bool>) -> eventbus::Result<()> {
    let bar = indicatif::ProgressBar::new(0);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let style =
        indicatif::ProgressStyle::with_template("{bar:40} {pos}/{len} orders settled, {per_sec}, {elapsed}");
    bar.set_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()));
    let mut look = tokio::time::interval(Duration::from_millis(100));
    loop {
        look.tick().await;
        let was_imported = is_imported.get();
        let progress = patiently(async || summary::progress(shop).await).await?;
        bar.set_length(progress.orders);
        bar.set_position(progress.settled.min(progress.orders));
        if was_imported && progress.settled >= progress.orders {
            bar.finish_and_clear();
            return Ok(());
        }
    }
}

async fn account<D: Db>(
    bus: &Bus,
    shop: &Shop<D>,
    services: &[Running],
    took: Duration,
) -> eventbus::Result<Summary> {
    let mut counts = Counts::default();
    services.iter().for_each(|service| counts += service.counts());
    summary::draw_up(bus, shop, counts, took).await
}

fn report(summary: &Summary, to: Option<&Path>) -> eventbus::Result<()> {
    say!("{summary}");
    let Some(to) = to else { return Ok(()) };
    let failed = |error: std::io::Error| {
        Error::new(ErrorKind::Unavailable, "the summary cannot be written")
            .with("file", to.display())
            .caused_by(error)
    };
    let json = serde_json::to_string(summary).map_err(|error| failed(error.into()))?;
    if to == Path::new("-") {
        writeln!(std::io::stdout(), "{json}").map_err(failed)
    } else {
        std::fs::write(to, json + "\n").map_err(failed)
    }
}
