//! A broker as a process of this machine.

use std::fs;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::debian::{self, Root};
use super::fetch::run;
use super::recipe::{self, Launch};
use super::secure::{self, Secure};
use super::{Kind, Result, sync};

/// How long a broker may take to start, or to end.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A process that lives as long as this value.
#[derive(Debug)]
pub(super) struct Native {
    kind: Kind,
    /// The version that was asked for.
    asked: Option<String>,
    launch: Launch,
    folder: PathBuf,
    process: Option<Process>,
}

impl Native {
    pub(super) fn start(kind: Kind, version: Option<&str>, advertised: Option<u16>) -> Result<Self> {
        Self::run(kind, version, prepare(kind, version, advertised)?)
    }

    pub(super) fn start_in(folder: &Path, kind: Kind) -> Result<Self> {
        Self::run(kind, None, prepare_in(folder, kind, None, None)?)
    }

    pub(super) fn start_secured(kind: Kind, secure: &Secure) -> Result<Self> {
        Self::start_with(kind, |launch, folder| secure::apply(kind, launch, folder, secure))
    }

    pub(super) fn start_with_sync(sync: Duration) -> Result<Self> {
        Self::start_with(Kind::Postgres, |launch, folder| sync::apply(launch, folder, sync))
    }

    fn start_with(kind: Kind, change: impl FnOnce(&mut Launch, &Path) -> Result<()>) -> Result<Self> {
        let (folder, mut launch) = prepare(kind, None, None)?;
        if let Err(problem) = change(&mut launch, &folder) {
            drop(fs::remove_dir_all(&folder));
            return Err(problem);
        }
        Self::run(kind, None, (folder, launch))
    }

    fn run(kind: Kind, version: Option<&str>, (folder, launch): (PathBuf, Launch)) -> Result<Self> {
        let mut native = Self { kind, asked: version.map(str::to_owned), launch, folder, process: None };
        native.spawn()?;
        Ok(native)
    }

    pub(super) fn url(&self) -> &str {
        &self.launch.url
    }

    /// What the program says that it is.
    pub(super) fn version(&self) -> String {
        match self.asked.as_deref() {
            None => recipe::find(self.kind, None).unwrap_or_else(|problem| problem),
            Some(asked) => format!("{} {asked}", self.kind),
        }
    }

    pub(super) fn port(&self) -> u16 {
        self.launch.port
    }

    /// Ends it without the end that a stop in order has.
    pub(super) fn crash(&mut self) {
        if let Some(process) = self.process.take() {
            process.end(self.launch.crash);
        }
    }

    /// Has the program that controls such brokers do something.
    pub(super) fn control(&self, arguments: &[&str]) -> Result<String> {
        let Some(program) = recipe::control(self.kind) else {
            return Err(format!("{} has no program that controls it", self.kind));
        };
        let environment = self.launch.environment.iter().map(|(name, value)| (name, value));
        run(Command::new(program).args(arguments).envs(environment).current_dir(&self.folder))
    }

    /// True if it did not end by itself.
    pub(super) fn lives(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| matches!(process.child.try_wait(), Ok(None)))
    }

    /// Stops it in the middle of whatever it does, or lets it go on.
    pub(super) fn freeze(&self, on: bool) -> Result<()> {
        match &self.process {
            Some(process) => process.signal(if on { "STOP" } else { "CONT" }),
            None => Ok(()),
        }
    }

    /// Starts it on the data of its folder.
    pub(super) fn spawn(&mut self) -> Result<()> {
        let child = spawn(&self.launch, &self.folder)?;
        let pid = child.id();
        let watch = watch(&format!("kill -s KILL -- -{pid}; kill -s KILL {pid}; {}", self.launch.sweep))?;
        self.process = Some(Process { child, watch });
        wait_until_ready(&self.launch, &self.folder, || match &mut self.process {
            Some(process) => !matches!(process.child.try_wait(), Ok(None)),
            None => true,
        })
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.crash();
        drop(fs::remove_dir_all(&self.folder));
    }
}

#[derive(Debug)]
struct Process {
    child: Child,
    /// Kills the child and sweeps when our end of its input closes: also if we are killed.
    watch: Child,
}

impl Process {
    fn signal(&self, signal: &str) -> Result<()> {
        signal_group(self.child.id(), signal)
    }

    fn end(mut self, signal: &str) {
        // One that is frozen does not take a signal but these two.
        drop(self.signal(signal));
        drop(self.signal("CONT"));
        let end = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(self.signal("KILL"));
        // Before the number of the child is free for another process.
        drop(self.watch.stdin.take());
        drop(self.watch.wait());
        drop(self.child.wait());
    }
}

pub(super) fn signal_group(pid: u32, signal: &str) -> Result<()> {
    run(Command::new("kill").args(["-s", signal, "--", &format!("-{pid}")])).map(drop)
}

/// A port that nobody listens on now, below those that systems give to whoever connects: a broker may take seconds until it
/// listens, and one of those would be taken by then.
pub(super) fn free_port() -> Result<u16> {
    let random = || 12_000 + u16::try_from(RandomState::new().build_hasher().finish() % 20_000).unwrap_or(0);
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    std::iter::repeat_with(random).take(100).find(is_free).ok_or_else(|| "no port is free".to_owned())
}

/// A folder of its own, in the temporary one, with a prepared broker in it.
pub(super) fn prepare(
    kind: Kind,
    version: Option<&str>,
    advertised: Option<u16>,
) -> Result<(PathBuf, Launch)> {
    prepare_in(&std::env::temp_dir(), kind, version, advertised)
}

fn prepare_in(
    folders: &Path,
    kind: Kind,
    version: Option<&str>,
    advertised: Option<u16>,
) -> Result<(PathBuf, Launch)> {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let root = debian::package(kind, version).map(Root::with).transpose()?;
    let folders = root.as_ref().map_or_else(|| folders.to_owned(), Root::folders);
    let folder = folders.join(format!("eventbus-{kind}-{}-{number}", std::process::id()));
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    match recipe::prepare(kind, version, root.as_ref(), &folder, free_port()?, advertised) {
        Ok(launch) => Ok((folder, launch)),
        Err(error) => {
            drop(fs::remove_dir_all(&folder));
            Err(format!("{kind}: {error}"))
        }
    }
}

pub(super) fn log_of(folder: &Path) -> PathBuf {
    folder.join("broker.log")
}

/// Starts the process in a group of its own, with its words in a file.
pub(super) fn spawn(launch: &Launch, folder: &Path) -> Result<Child> {
    let log = fs::File::create(log_of(folder)).map_err(|error| error.to_string())?;
    let errors = log.try_clone().map_err(|error| error.to_string())?;
    let mut command = Command::new(&launch.program);
    command
        .args(&launch.arguments)
        .envs(launch.environment.iter().map(|(name, value)| (name, value)))
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .process_group(0);
    if let Some(user) = launch.user {
        command.uid(user);
    }
    command.spawn().map_err(|error| format!("{}: {error}", launch.program.display()))
}

/// A shell that waits for the end of its input, then does its work.
pub(super) fn watch(work: &str) -> Result<Child> {
    Command::new("sh")
        .args(["-c", &format!("cat >/dev/null; {work}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|error| error.to_string())
}

/// Waits until the log says so and the port answers.
pub(super) fn wait_until_ready(
    launch: &Launch,
    folder: &Path,
    mut ended: impl FnMut() -> bool,
) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let said = fs::read(log_of(folder)).map(|log| String::from_utf8_lossy(&log).into_owned());
        let said = said.unwrap_or_default();
        let answers = || TcpStream::connect(("127.0.0.1", launch.port)).is_ok();
        if said.contains(launch.ready) && answers() {
            return Ok(());
        }
        if ended() || Instant::now() > end {
            let tail: Vec<&str> = said.lines().rev().take(20).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            return Err(format!("{} did not start:\n{}", launch.program.display(), tail.join("\n")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
