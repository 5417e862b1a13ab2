//! The run: who is started, what happens to them, and when it is over.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use eventbus_tests::proxy::{Proxy, Wire};
use fastrand::Rng;
use xtask::brokers::{Broker, Kind};

use crate::account::{self, Report};
use crate::bugs::Bug;
use crate::roles::N_PRODUCERS;

const N_CONSUMERS: usize = 3;
/// Silence after which a consumer loses what it has.
const SESSION: Duration = Duration::from_secs(2);
/// How long producers may take for their last round when nothing disturbs any more.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
/// Consumers that handled nothing new for so long will not bring what is left.
pub(crate) const STILL: Duration = Duration::from_secs(30);
/// How often the broker is killed.
const RESTART_EVERY: u64 = 20;

/// A process and what it was started with.
pub(crate) struct Role {
    pub(crate) child: Child,
    arguments: Vec<String>,
    pub(crate) name: String,
}

impl Role {
    pub(crate) fn start(folder: &Path, name: String, arguments: Vec<String>) -> Result<Self, String> {
        let said =
            std::fs::OpenOptions::new().create(true).append(true).open(folder.join(format!("{name}.log")));
        let said = said.map_err(|error| error.to_string())?;
        let me = std::env::current_exe().map_err(|error| error.to_string())?;
        // Much is said, so that what must not be said would be.
        let child = Command::new(me)
            .args(&arguments)
            .env("RUST_LOG", "info,eventbus=trace,outbox=trace")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said)
            .spawn();
        Ok(Self { child: child.map_err(|error| error.to_string())?, arguments, name })
    }

    pub(crate) fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        if !sent.is_ok_and(|status| status.success()) {
            println!("{} could not be sent {signal}", self.name);
        }
    }

    /// Starts it again if it has ended by itself, which none may: whatever is away is waited for.
    pub(crate) fn revive(&mut self, folder: &Path, report: &mut Report) -> Result<(), String> {
        let Ok(Some(status)) = self.child.try_wait() else { return Ok(()) };
        let said = std::fs::read_to_string(folder.join(format!("{}.log", self.name))).unwrap_or_default();
        let last = said.lines().last().unwrap_or("without a word");
        report.violated("gone", format!("{} ended by itself, {status}: {last}", self.name));
        self.again(folder)
    }

    /// Starts it again; it must be over.
    pub(crate) fn again(&mut self, folder: &Path) -> Result<(), String> {
        drop(self.child.wait());
        *self = Self::start(folder, self.name.clone(), self.arguments.clone())?;
        Ok(())
    }

    pub(crate) fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }

    /// The most memory that it had, where the system says so.
    pub(crate) fn memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // Also one that is stopped.
        self.kill();
    }
}

/// The bus under torture: a broker of its own behind a wire, or an address.
pub(crate) struct Target {
    pub(crate) url: String,
    pub(crate) own: Option<(Broker, Proxy)>,
}

impl Target {
    pub(crate) fn open(name: &str) -> Result<Self, String> {
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
        let options = |url: &str| {
            let mark = if url.contains('?') { '&' } else { '?' };
            let create =
                if url.starts_with("sqlite") { "" } else { "&declare=create&timeout=3s&partitions=8" };
            format!("{url}{mark}session={}ms{create}", SESSION.as_millis())
        };
        let Some(kind) = kind else {
            if name.starts_with("memory") {
                return Err("memory:// is one process: there is nothing to torture it with".to_owned());
            }
            if !name.contains("://") {
                return Err(format!("{name} is no broker that can be started, and no address"));
            }
            return Ok(Self { url: options(name), own: None });
        };
        let proxy = Proxy::start().map_err(|error| error.to_string())?;
        let broker = Broker::start_behind(kind, None, Some(proxy.port()))?;
        proxy.lead(broker.port());
        let port = |port: u16| format!("127.0.0.1:{port}");
        let url = broker.url().replace(&port(broker.port()), &port(proxy.port()));
        Ok(Self { url: options(&url), own: Some((broker, proxy)) })
    }
}

/// Runs it all, and draws up the account.
pub(crate) fn run(
    target: &str,
    length: Duration,
    seed: u64,
    bug: Bug,
    folder: &Path,
) -> Result<Report, String> {
    let mut random = Rng::with_seed(seed);
    let mut target = Target::open(target)?;
    let topic = format!("torture.{seed:x}");
    let start = |role: &str, id: usize| {
        let arguments =
            [role, &target.url, &topic, &folder.display().to_string(), &id.to_string(), bug.name()];
        Role::start(folder, format!("{role}.{id}"), arguments.map(str::to_owned).into())
    };
    let mut producers = (0..N_PRODUCERS).map(|id| start("produce", id)).collect::<Result<Vec<_>, _>>()?;
    let mut consumers = (0..N_CONSUMERS).map(|id| start("consume", id)).collect::<Result<Vec<_>, _>>()?;
    let mut report = Report::default();
    let begin = Instant::now();
    let mut n_faults = 0;
    while begin.elapsed() < length {
        std::thread::sleep(Duration::from_secs(1));
        n_faults += 1;
        for role in producers.iter_mut().chain(&mut consumers) {
            role.revive(folder, &mut report)?;
        }
        let name = disturb(&mut random, n_faults, &mut target, &mut producers, &mut consumers, folder)?;
        *report.faults.entry(name).or_default() += 1;
    }
    if let Some((_, proxy)) = &target.own {
        proxy.set(Wire::Whole);
    }
    std::fs::write(folder.join("over"), "").map_err(|error| error.to_string())?;
    let end = Instant::now() + if bug == Bug::None { PATIENCE } else { PATIENCE / 6 };
    for producer in &mut producers {
        let mut is_on = || producer.child.try_wait().is_ok_and(|status| status.is_none());
        while is_on() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
        }
        if is_on() {
            report
                .violated("end", format!("{} did not end when nothing disturbed it any more", producer.name));
        }
    }
    let confirmed = account::confirmed(folder, N_PRODUCERS)?;
    // What is left takes as long as it takes, while there is progress.
    let (mut n_before, mut moved_at) = (0, Instant::now());
    let still = if bug == Bug::None { STILL } else { STILL / 6 };
    while moved_at.elapsed() < still {
        let handled = account::handled(folder)?;
        if confirmed.iter().all(|(key, end)| handled.get(key).is_some_and(|seen| seen >= end)) {
            break;
        }
        let n_handled = handled.values().sum::<u64>();
        if n_handled > n_before {
            (n_before, moved_at) = (n_handled, Instant::now());
        }
        for consumer in &mut consumers {
            consumer.revive(folder, &mut report)?;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    drop((producers, consumers));
    account::draw_up(folder, N_PRODUCERS, report)
}

/// Has the wire in a state for some milliseconds.
pub(crate) fn disturb_wire(proxy: &Proxy, wire: Wire, millis: u64) {
    proxy.set(wire);
    std::thread::sleep(Duration::from_millis(millis));
    proxy.set(Wire::Whole);
}

/// One fault; returns its name.
fn disturb(
    random: &mut Rng,
    n_faults: u64,
    target: &mut Target,
    producers: &mut [Role],
    consumers: &mut [Role],
    folder: &Path,
) -> Result<&'static str, String> {
    let (a, b) = (random.usize(..producers.len()), random.usize(..consumers.len()));
    let (Some(producer), Some(consumer)) = (producers.get_mut(a), consumers.get_mut(b)) else {
        return Ok("none");
    };
    if let Some((broker, proxy)) = &mut target.own {
        if n_faults % RESTART_EVERY == RESTART_EVERY / 2 {
            broker.restart()?;
            return Ok("broker killed and started");
        }
        match random.u8(..8) {
            0 => {
                proxy.reset();
                return Ok("connections reset");
            }
            1 => {
                disturb_wire(proxy, Wire::Stall, random.u64(200..1_500));
                return Ok("wire stalled");
            }
            2 => {
                disturb_wire(proxy, Wire::DropAnswers, random.u64(50..400));
                proxy.reset();
                return Ok("answers dropped");
            }
            3 => {
                disturb_wire(proxy, Wire::Cut, random.u64(100..1_000));
                return Ok("wire cut");
            }
            _ => {}
        }
    }
    Ok(match random.u8(..5) {
        0 => {
            producer.kill();
            producer.again(folder)?;
            "producer killed"
        }
        1 => {
            consumer.signal("-TERM");
            let end = Instant::now() + Duration::from_secs(10);
            while consumer.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(20));
            }
            consumer.kill();
            consumer.again(folder)?;
            "consumer ended and started"
        }
        2 => {
            consumer.signal("-STOP");
            std::thread::sleep(SESSION + SESSION / 2);
            consumer.signal("-CONT");
            "consumer stopped for longer than its session"
        }
        _ => {
            consumer.kill();
            consumer.again(folder)?;
            "consumer killed"
        }
    })
}
