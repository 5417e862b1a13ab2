//! The shop while everything dies at random: services, relays, the broker, the database. Afterwards the laws hold, each order
//! came to one end, and what was done twice was passed over.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use xtask::brokers::{Broker, Kind};

use crate::{ALONE, lawful, summary};

/// Orders a second, as many as a slow machine can settle beside the restarts.
const RATE: u64 = 40;
/// The services of each process; the first imports.
const GROUPS: [&str; 5] =
    ["basket,notification", "ordering,grace", "catalog,payment", "shipping,relay", "relay"];

/// How long everything dies: `CHAOS_SECONDS=60` is the long form.
fn seconds() -> u64 {
    std::env::var("CHAOS_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12)
}

/// A process that is started again when it was killed.
struct Part {
    services: &'static str,
    said: PathBuf,
    child: Child,
}

struct Shop {
    folder: PathBuf,
    bus: String,
    db: String,
}

impl Shop {
    fn command(&self, services: &str, said: &Path) -> Command {
        let said = OpenOptions::new().create(true).append(true).open(said).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_eshop"));
        command.args(["--listen", "127.0.0.1:0", "--stock", "97", "--services", services]);
        command.args(["--bus", &self.bus, "--db", &self.db, "--lease", "6s"]);
        command.args(["--rate", &RATE.to_string(), "--orders"]).arg(self.folder.join("orders.csv"));
        command.env("RUST_LOG", "warn,lapin=off,eventbus::driver::handle::run=debug");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        command
    }

    fn start(&self, services: &'static str) -> Part {
        let said = self.folder.join(format!("{services}.log"));
        let child = self.command(services, &said).spawn().unwrap();
        Part { services, said, child }
    }
}

impl Part {
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Whether its services run, for the first time or again.
    fn is_open(&self) -> bool {
        std::fs::read_to_string(&self.said).is_ok_and(|said| said.contains("door at"))
    }

    fn last_words(&self) -> String {
        let said = std::fs::read_to_string(&self.said).unwrap_or_default();
        let lines: Vec<&str> = said.lines().filter(|line| !line.contains("DEBUG")).collect();
        format!("== {}\n{}\n", self.services, lines[lines.len().saturating_sub(8)..].join("\n"))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Lets everything die for a while; `others` are what does not end by itself.
fn everything_dies(bus: String, db: String, folder: &Path, mut others: Vec<Broker>) {
    let _alone = ALONE.lock();
    let seed = std::env::var("CHAOS_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("CHAOS_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let n_orders = RATE * (seconds() + 8);
    let lines: String = (1..=n_orders).map(|order| format!("{order},{},x,1,2.00\n", order % 90)).collect();
    std::fs::write(folder.join("orders.csv"), format!("order,buyer,date,quantity,amount\n{lines}")).unwrap();
    let shop = Shop { folder: folder.to_owned(), bus, db };
    let mut parts: Vec<Part> = GROUPS.map(|services| shop.start(services)).into();
    // What a broker is killed in the middle of declaring may stay half declared in it: RabbitMQ 3.10 answers INTERNAL_ERROR to
    // everything about such a stream from then on.
    let open_by = Instant::now() + Duration::from_secs(60);
    while !parts.iter().all(Part::is_open) {
        assert!(
            Instant::now() < open_by,
            "not open: {}",
            parts.iter().map(Part::last_words).collect::<String>()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let end = Instant::now() + Duration::from_secs(seconds());
    let (mut killed, mut restarted) = (0, 0);
    // Everything dies once before anything dies again.
    let mut deck: Vec<usize> = Vec::new();
    let mut n_rounds = 0;
    while Instant::now() < end || n_rounds < 1 || !deck.is_empty() {
        if deck.is_empty() {
            deck = (0..parts.len() + others.len()).collect();
            random.shuffle(&mut deck);
            n_rounds += 1;
        }
        std::thread::sleep(Duration::from_millis(random.u64(300..2_000)));
        let Some(next) = deck.pop() else { continue };
        if let Some(other) = next.checked_sub(parts.len()) {
            others[other].restart().unwrap();
            restarted += 1;
            continue;
        }
        let part = &mut parts[next];
        if let Some(status) = part.child.try_wait().unwrap() {
            panic!("{} ended by itself ({status}):\n{}", part.services, part.last_words());
        }
        part.kill();
        killed += 1;
        std::thread::sleep(Duration::from_millis(random.u64(0..1_000)));
        *part = shop.start(part.services);
    }
    // The importing one again, to the end of all orders.
    parts[0].kill();
    let mut last = shop.command(GROUPS[0], &parts[0].said);
    let last = last.args(["--until-done", "--summary", "-"]).stdout(Stdio::piped()).spawn().unwrap();
    parts[0].child = last;
    let deadline = Instant::now() + Duration::from_secs(240);
    while parts[0].child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            let words: String = parts.iter().map(Part::last_words).collect();
            panic!("not over after 240 s (CHAOS_SEED={seed}):\n{words}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let mut stdout = Vec::new();
    std::io::Read::read_to_end(parts[0].child.stdout.as_mut().unwrap(), &mut stdout).unwrap();
    let status = parts[0].child.wait().unwrap();
    assert!(status.success(), "{status}: {}", parts[0].last_words());
    let account = summary(&std::process::Output { status, stdout, stderr: Vec::new() });
    let said: String = parts.iter().map(|part| std::fs::read_to_string(&part.said).unwrap()).collect();
    let passed_over = said.matches("handled before").count();
    println!("{killed} processes killed, {restarted} others; {passed_over} passed over; {account}");
    lawful(&account, n_orders);
    assert!(killed >= GROUPS.len() && restarted >= others.len(), "{killed} killed, {restarted} restarted");
    // In a short run nothing need be done twice.
    assert!(passed_over > 0 || seconds() < 60, "nothing was passed over");
}

#[test]
fn everything_dies_on_sqlite_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (bus, db) = (folder.path().join("bus.db"), folder.path().join("{service}.db"));
    let bus = format!("sqlite://{}?session=2s", bus.display());
    everything_dies(bus, format!("sqlite://{}", db.display()), folder.path(), Vec::new());
}

fn everything_dies_on(kind: Kind) {
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start(kind, None).unwrap();
    let database = Broker::start(Kind::Postgres, None).unwrap();
    let bus = format!("{}?declare=create&partitions=4&session=6s&timeout=5s", broker.url());
    everything_dies(bus, database.url().to_owned(), folder.path(), vec![broker, database]);
}

#[test]
fn everything_dies_on_postgres_and_kafka() {
    everything_dies_on(Kind::Kafka);
}

#[test]
fn everything_dies_on_postgres_and_rabbitmq() {
    everything_dies_on(Kind::Rabbitmq);
}
