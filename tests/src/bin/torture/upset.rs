//! The run over an outbox: who is started, what happens to them and to the database, and the account at the end.

use std::path::Path;
use std::time::{Duration, Instant};

use eventbus_tests::proxy::{Proxy, Wire};
use fastrand::Rng;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Pool, Postgres, Sqlite};
use tokio::runtime::Runtime;
use xtask::brokers::{Broker, Kind};

use crate::account::{self, Report};
use crate::base::Base;
use crate::bugs::Bug;
use crate::faults::{PATIENCE, Role, STILL, Target, disturb_wire};
use crate::ledger::{self, LEASE};

const N_WRITERS: usize = 4;
const N_RELAYS: usize = 3;
const N_APPLIERS: usize = 3;
/// One fault in so many is that the database is killed, and another that the broker is.
const KILL_EVERY: u64 = 8;
/// The password of the processes: none may say it.
const CANARY: &str = "torture-canary";
/// How long a second effect is waited for, when all have had their first.
const LATE: Duration = Duration::from_secs(3);
/// Most memory of a process.
const MAX_MEMORY_KIB: u64 = 256 * 1024;

/// Where the database is: a server of its own behind a wire, or a file.
struct Database {
    /// For the processes.
    url: String,
    /// For the account.
    direct: String,
    own: Option<(Broker, Proxy)>,
}

impl Database {
    fn open(name: &str, folder: &Path, runtime: &Runtime) -> Result<Self, String> {
        if name == "sqlite" {
            let url = format!("sqlite://{}/ledger.db", folder.display());
            return Ok(Self { direct: url.clone(), url, own: None });
        }
        if name != "postgres" {
            return Err(format!("{name}: an outbox is in sqlite or postgres"));
        }
        let proxy = Proxy::start().map_err(|error| error.to_string())?;
        let server = Broker::start(Kind::Postgres, None)?;
        proxy.lead(server.port());
        let port = |port: u16| format!("127.0.0.1:{port}");
        let direct = server.url().to_owned();
        let create = async {
            let mut connection = PgConnection::connect(&direct).await?;
            let role = format!("CREATE ROLE torture SUPERUSER LOGIN PASSWORD '{CANARY}'");
            sqlx::raw_sql(AssertSqlSafe(role)).execute(&mut connection).await?;
            connection.close().await
        };
        runtime.block_on(create).map_err(|error: sqlx::Error| error.to_string())?;
        let url = direct.replace(&port(server.port()), &port(proxy.port()));
        let place = url.split_once('@').map_or("", |(_, place)| place);
        let url = format!("postgres://torture:{CANARY}@{place}");
        Ok(Self { url, direct, own: Some((server, proxy)) })
    }
}

/// Runs it all, and draws up the account.
pub(crate) fn run(
    target: &str,
    database: &str,
    length: Duration,
    seed: u64,
    bug: Bug,
    folder: &Path,
) -> Result<Report, String> {
    match database {
        "sqlite" => run_on::<Sqlite>(target, database, length, seed, bug, folder),
        _ => run_on::<Postgres>(target, database, length, seed, bug, folder),
    }
}

struct Run<'a, D: Base> {
    target: Target,
    database: Database,
    roles: Vec<Role>,
    folder: &'a Path,
    runtime: Runtime,
    pool: Pool<D>,
}

fn run_on<D: Base>(
    target: &str,
    database: &str,
    length: Duration,
    seed: u64,
    bug: Bug,
    folder: &Path,
) -> Result<Report, String> {
    let mut random = Rng::with_seed(seed);
    let runtime = Runtime::new().map_err(|error| error.to_string())?;
    let (target, database) = (Target::open(target)?, Database::open(database, folder, &runtime)?);
    runtime.block_on(ledger::prepare::<D>(&database.direct)).map_err(|error| error.to_string())?;
    let pool = {
        let _entered = runtime.enter();
        D::connect(&database.direct).map_err(|error| error.to_string())?
    };
    let topic = format!("torture.{seed:x}");
    let mut roles = Vec::new();
    for (role, n) in [("write", N_WRITERS), ("relay", N_RELAYS), ("apply", N_APPLIERS)] {
        for id in 0..n {
            let (folder_name, id) = (folder.display().to_string(), id.to_string());
            let arguments = [role, &target.url, &topic, &folder_name, &id, bug.name(), &database.url];
            let name = format!("{role}.{id}");
            roles.push(Role::start(folder, name, arguments.map(str::to_owned).into())?);
        }
    }
    let mut run = Run { target, database, roles, folder, runtime, pool };
    let mut report = Report::default();
    let begin = Instant::now();
    let mut n_faults = 0;
    while begin.elapsed() < length {
        std::thread::sleep(Duration::from_secs(1));
        n_faults += 1;
        run.revive(&mut report)?;
        let name = run.disturb(&mut random, n_faults)?;
        *report.faults.entry(name).or_default() += 1;
    }
    for proxy in [&run.target.own, &run.database.own].into_iter().flatten().map(|(_, proxy)| proxy) {
        proxy.set(Wire::Whole);
    }
    let healed = Instant::now();
    std::fs::write(folder.join("over"), "").map_err(|error| error.to_string())?;
    run.until_written(&mut report);
    run.until_applied(&mut report, if bug == Bug::None { STILL } else { STILL / 6 })?;
    report.drained_ms = u64::try_from(healed.elapsed().as_millis()).unwrap_or(u64::MAX);
    for role in &run.roles {
        if role.memory_kib() > MAX_MEMORY_KIB {
            report.violated("memory", format!("{} took {} KiB", role.name, role.memory_kib()));
        }
    }
    let (committed, effects) = (run.noted("committed")?, run.noted("effects")?);
    report.n_published = run.published(&topic)?;
    drop(run.roles);
    run.runtime.block_on(run.pool.close());
    account::of_ledger(folder, &committed, &effects, CANARY, report)
}

impl<D: Base> Run<'_, D> {
    /// Has nobody missing, but for writers that are done.
    fn revive(&mut self, report: &mut Report) -> Result<(), String> {
        let is_over = self.folder.join("over").exists();
        for role in self.roles.iter_mut().filter(|role| !(is_over && role.name.starts_with("write"))) {
            role.revive(self.folder, report)?;
        }
        Ok(())
    }

    /// One fault; returns its name.
    fn disturb(&mut self, random: &mut Rng, n_faults: u64) -> Result<&'static str, String> {
        if let Some((server, _)) = &mut self.database.own
            && n_faults % KILL_EVERY == KILL_EVERY / 4
        {
            server.restart()?;
            return Ok("database killed and started");
        }
        if let Some((broker, _)) = &mut self.target.own
            && n_faults % KILL_EVERY == KILL_EVERY * 5 / 8
        {
            broker.restart()?;
            return Ok("broker killed and started");
        }
        let wires: Vec<&Proxy> =
            [&self.target.own, &self.database.own].into_iter().flatten().map(|(_, proxy)| proxy).collect();
        let at = random.usize(..self.roles.len());
        let wire = wires.get(random.usize(..wires.len().max(1)));
        match (random.u8(..10), wire) {
            (0, Some(wire)) => {
                wire.reset();
                return Ok("connections reset");
            }
            (1, Some(wire)) => {
                disturb_wire(wire, Wire::Stall, random.u64(200..1_500));
                return Ok("wire stalled");
            }
            (2, Some(wire)) => {
                disturb_wire(wire, Wire::DropAnswers, random.u64(50..400));
                wire.reset();
                return Ok("answers dropped");
            }
            (3, Some(wire)) => {
                disturb_wire(wire, Wire::Cut, random.u64(100..1_000));
                return Ok("wire cut");
            }
            (4, _) if self.database.own.is_some() => {
                // One that cannot be had now has none to end.
                _ = self.runtime.block_on(D::disconnect(&self.pool));
                return Ok("connections to the database ended");
            }
            _ => {}
        }
        let Some(role) = self.roles.get_mut(at) else { return Ok("none") };
        Ok(match random.u8(..3) {
            0 => {
                role.signal("-STOP");
                std::thread::sleep(LEASE + LEASE / 2);
                role.signal("-CONT");
                "process stopped for longer than its lease"
            }
            _ => {
                role.kill();
                role.again(self.folder)?;
                "process killed"
            }
        })
    }

    fn until_written(&mut self, report: &mut Report) {
        let end = Instant::now() + PATIENCE;
        for role in self.roles.iter_mut().filter(|role| role.name.starts_with("write")) {
            let mut is_on = || role.child.try_wait().is_ok_and(|status| status.is_none());
            while is_on() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(50));
            }
            if is_on() {
                report
                    .violated("end", format!("{} did not end when nothing disturbed it any more", role.name));
            }
        }
    }

    /// What is left takes as long as it takes, while there is progress.
    fn until_applied(&mut self, report: &mut Report, still: Duration) -> Result<(), String> {
        let (mut before, mut moved_at) = (0, Instant::now());
        while moved_at.elapsed() < still {
            let counts = async {
                Ok::<_, sqlx::Error>((
                    D::count(&self.pool, "committed").await?,
                    D::count(&self.pool, "effects").await?,
                ))
            };
            // The server may just have come back.
            let Ok((n_committed, n_effects)) = self.runtime.block_on(counts) else {
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            if n_effects >= n_committed {
                // One that comes again comes late.
                std::thread::sleep(LATE);
                return self.revive(report);
            }
            if n_effects > before {
                (before, moved_at) = (n_effects, Instant::now());
            }
            self.revive(report)?;
            std::thread::sleep(Duration::from_millis(250));
        }
        Ok(())
    }

    fn noted(&self, table: &'static str) -> Result<Vec<crate::base::Noted>, String> {
        self.runtime.block_on(D::noted(&self.pool, table)).map_err(|error| error.to_string())
    }

    /// How many events the topic has, repetitions included.
    fn published(&self, topic: &str) -> Result<u64, String> {
        let reading = async {
            let bus = eventbus::connect(&self.target.url).await?;
            let topics = match bus.transport().admin() {
                Some(admin) => admin.topics().await?,
                None => Vec::new(),
            };
            let of = topics.into_iter().filter(|info| info.topic.as_str() == topic);
            let n_kept = of.flat_map(|info| info.partitions).map(|part| part.n_kept).sum();
            bus.close().await?;
            Ok::<u64, eventbus::Error>(n_kept)
        };
        self.runtime.block_on(reading).map_err(|error| error.to_string())
    }
}
