//! The e-shop's program: the services in one process or several, fed with a file of orders.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use eshop::orders_file::{self, OrderLine, OrdersFile};
use eshop::patience::patiently;
use eshop::shop::Shop;
use eshop::summary::{self, Summary};
use eshop::{basket, catalog, http, notification, ordering, payment, timers};
use eventbus::{Admin, Bus, Counts, Error, ErrorKind, Running, TopicSpec};

/// Runs an e-shop on the event bus, fed with 6,919 real orders.
///
/// Examples:
///   eshop                                 the shipped orders, on eshop.db, until Ctrl-C
///   eshop --until-done --summary -        ends when every order is settled, prints JSON
///   eshop --services ordering,catalog     only these services; others run elsewhere on the same bus
#[derive(Debug, Parser)]
#[command(version, verbatim_doc_comment)]
struct Options {
    /// Address of the bus.
    #[arg(long, default_value = "sqlite://eshop.db", value_name = "URL")]
    bus: String,
    /// File of the services' tables [default: beside the bus's file, else in memory].
    #[arg(long, value_name = "FILE")]
    tables: Option<PathBuf>,
    /// File of orders: order,buyer,date,quantity,amount [default: the shipped 6,919].
    #[arg(long, value_name = "FILE")]
    orders: Option<PathBuf>,
    /// Checkouts a second [default: as fast as they are taken].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: Option<u32>,
    /// Services to run in this process.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "basket,ordering,grace,catalog,payment,shipping,notification"
    )]
    services: Vec<String>,
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
    let started = Instant::now();
    let file = read_orders(options.orders.as_deref())?;
    for (line, problem) in &file.broken {
        say!("eshop: line {line}: {problem}; the rest goes on");
    }
    let listener = http::bind(options.listen).await?;
    let door = listener.local_addr().unwrap_or(options.listen);
    let bus = eventbus::connect(&options.bus).await?.with_source("/eshop");
    let tables = options.tables.clone().or_else(|| tables_beside(&options.bus));
    let shop = Shop::open(tables.as_deref(), options.grace)?;
    patiently(async || declare(&bus, &shop).await).await?;
    let initial = initial_stock(&file.lines, options.stock);
    shop.store.run(move |tables| catalog::stock_up(tables, &initial)).await?;
    let services = start(&bus, &shop, &options.services).await?;
    for line in services.iter().flat_map(Running::describe) {
        tracing::info!("{line}");
    }
    // Before anybody is told that we are here: from now on a signal is a polite end.
    let shutdown = eventbus::shutdown_signal();
    let monitors = services.iter().map(Running::monitor).collect();
    tokio::spawn(http::serve(listener, bus.clone(), shop.clone(), monitors));
    say!(
        "eshop on {}, door at http://{door}, {} orders in the file",
        redacted(&options.bus),
        file.lines.len()
    );

    let lawful = std::cell::Cell::new(true);
    let flow = async {
        if options.services.iter().any(|service| service == "basket") {
            summary::watch_for(&shop, file.lines.iter().map(|line| line.order).collect()).await?;
            let digest = file.digest();
            tokio::try_join!(
                basket::import(&bus, &shop, &digest, &file.lines, options.rate),
                watch(&shop, file.lines.len() as u64)
            )?;
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
fn tables_beside(bus: &str) -> Option<PathBuf> {
    let url = eventbus::url::Url::parse(bus).ok().filter(|url| url.scheme() == "sqlite")?;
    let place = url.place();
    Some(PathBuf::from(format!("{}-services.db", place.strip_suffix(".db").unwrap_or(place))))
}

async fn declare(bus: &Bus, shop: &Shop) -> eventbus::Result<()> {
    let Some(admin) = bus.transport().admin() else { return Ok(()) };
    for topic in shop.topics.all() {
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

async fn start(bus: &Bus, shop: &Shop, names: &[String]) -> eventbus::Result<Vec<Running>> {
    let mut services = Vec::new();
    for name in names {
        services.push(match name.as_str() {
            "basket" => patiently(async || basket::start(bus, shop).await).await?,
            "ordering" => patiently(async || ordering::start(bus, shop).await).await?,
            "grace" => patiently(async || timers::start(bus, shop).await).await?,
            "catalog" => patiently(async || catalog::start(bus, shop).await).await?,
            "payment" => patiently(async || payment::start(bus, shop).await).await?,
            "shipping" => patiently(async || ordering::start_shipping(bus, shop).await).await?,
            "notification" => patiently(async || notification::start(bus, shop).await).await?,
            other => {
                let known = "basket, ordering, grace, catalog, payment, shipping, notification";
                return Err(
                    Error::new(ErrorKind::Config, format!("unknown service {other}")).with("known", known)
                );
            }
        });
    }
    Ok(services)
}

/// Shows progress until every order is settled.
async fn watch(shop: &Shop, mut n_orders: u64) -> eventbus::Result<()> {
    let bar = indicatif::ProgressBar::new(n_orders);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let style =
        indicatif::ProgressStyle::with_template("{bar:40} {pos}/{len} orders settled, {per_sec}, {elapsed}");
    bar.set_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()));
    let mut look = tokio::time::interval(Duration::from_millis(100));
    loop {
        look.tick().await;
        let progress = summary::progress(shop).await?;
        bar.set_position(progress.settled.min(n_orders));
        if progress.orders < n_orders || progress.settled < progress.orders {
            continue;
        }
        // The account is of whole orders: those from the web that came meanwhile are waited for as well.
        let n_all = summary::watch_all(shop).await?;
        if n_all == n_orders {
            bar.finish_and_clear();
            return Ok(());
        }
        n_orders = n_all;
        bar.set_length(n_orders);
    }
}

async fn account(bus: &Bus, shop: &Shop, services: &[Running], took: Duration) -> eventbus::Result<Summary> {
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
