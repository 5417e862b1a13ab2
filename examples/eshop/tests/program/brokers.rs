//! The shop on real brokers, one process for each of five groups of services, and the broker killed in the middle.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use xtask::brokers::{Broker, Kind};

use crate::{ALONE, lawful, summary};

const N_ORDERS: u64 = 600;
/// The services of each process; the last one imports, and ends when all is settled.
const GROUPS: [&str; 5] = ["ordering", "grace,payment", "catalog", "shipping", "basket,notification,relay"];

/// Ends its process when the test does, however that is.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn said_by(folder: &Path, services: &str) -> std::path::PathBuf {
    folder.join(format!("{services}.log"))
}

/// The last words of every process.
fn last_words(folder: &Path) -> String {
    let mut all = String::new();
    for services in GROUPS {
        let said = std::fs::read_to_string(said_by(folder, services)).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(8)..].join("\n");
        all.push_str(&format!("== {services}\n{last}\n"));
    }
    all
}

fn start(folder: &Path, bus: &str, services: &str, more: &[&str]) -> Running {
    let (tables, orders) =
        (format!("sqlite://{}/{{service}}.db", folder.display()), folder.join("orders.csv"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_eshop"));
    command.args(["--listen", "127.0.0.1:0", "--stock", "100", "--services", services]);
    command.args(["--bus", bus]).arg("--db").arg(tables).arg("--orders").arg(orders).args(more);
    // Not a pipe that nobody empties: an outage has much to say.
    let said = std::fs::File::create(said_by(folder, services)).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(said);
    Running(command.spawn().unwrap())
}

/// Waits until a process says where it listens.
fn wait_for_door(folder: &Path, services: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !std::fs::read_to_string(said_by(folder, services)).unwrap_or_default().contains("door at") {
        assert!(Instant::now() < deadline, "{services} did not start:\n{}", last_words(folder));
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn survives(kind: Kind) {
    let _alone = ALONE.lock();
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (1..=N_ORDERS).map(|order| format!("{order},{},x,1,2.00\n", order % 90)).collect();
    std::fs::write(folder.path().join("orders.csv"), format!("order,buyer,date,quantity,amount\n{lines}"))
        .unwrap();
    let mut broker = Broker::start(kind, None).unwrap();
    let bus = format!("{}?declare=create&partitions=4&session=3s&timeout=5s", broker.url());
    let [others @ .., importing] = GROUPS;
    let others: Vec<_> = others.iter().map(|services| start(folder.path(), &bus, services, &[])).collect();
    let more = ["--rate", "100", "--until-done", "--summary", "-"];
    // Topics are there when all have opened their doors: the restart is to hit work, not the making of topics.
    for services in &GROUPS[..GROUPS.len() - 1] {
        wait_for_door(folder.path(), services);
    }
    let mut last = start(folder.path(), &bus, importing, &more);
    wait_for_door(folder.path(), importing);
    std::thread::sleep(Duration::from_secs(3));
    assert!(last.0.try_wait().unwrap().is_none(), "{kind}: all was over before the broker went away");
    broker.restart().unwrap();
    let deadline = Instant::now() + Duration::from_secs(180);
    while last.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "{kind}: not over after 180 s:\n{}", last_words(folder.path()));
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(others);
    let Running(child) = &mut last;
    let mut output =
        std::process::Output { status: child.wait().unwrap(), stdout: Vec::new(), stderr: Vec::new() };
    std::io::Read::read_to_end(child.stdout.as_mut().unwrap(), &mut output.stdout).unwrap();
    assert!(output.status.success(), "{kind}: {}", last_words(folder.path()));
    lawful(&summary(&output), N_ORDERS);
}

#[test]
fn five_processes_survive_a_restart_of_kafka() {
    survives(Kind::Kafka);
}

#[test]
fn five_processes_survive_a_restart_of_nats() {
    survives(Kind::Nats);
}

#[test]
fn five_processes_survive_a_restart_of_postgres() {
    survives(Kind::Postgres);
}

#[test]
fn five_processes_survive_a_restart_of_rabbitmq() {
    survives(Kind::Rabbitmq);
}

#[test]
fn five_processes_survive_a_restart_of_redis() {
    survives(Kind::Redis);
}

#[test]
fn five_processes_survive_a_restart_of_valkey() {
    survives(Kind::Valkey);
}
