//! Brokers that stay up until they are told to go: what runs is written down in the temporary folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::container::{self, Container};
use super::fetch::run;
use super::process::{prepare, signal_group, spawn, wait_until_ready};
use super::{Kind, Result, Way};

/// A broker that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Running {
    /// Which broker.
    pub kind: Kind,
    /// Its address.
    pub url: String,
    lives: Lives,
    note: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Lives {
    Container {
        id: String,
    },
    Process {
        pid: u32,
        /// When it began, so that a number that is given out again is not taken for it.
        born: String,
        folder: PathBuf,
        sweep: String,
    },
}

impl Lives {
    /// As lines of a note.
    fn written(&self) -> String {
        match self {
            Self::Container { id } => format!("container\n{id}\n"),
            Self::Process { pid, born, folder, sweep } => {
                format!("process\n{pid}\n{born}\n{}\n{sweep}\n", folder.display())
            }
        }
    }

    fn read(lines: &[&str]) -> Option<Self> {
        match lines {
            ["container", id] => Some(Self::Container { id: (*id).to_owned() }),
            ["process", pid, born, folder, sweep @ ..] => Some(Self::Process {
                pid: pid.parse().ok()?,
                born: (*born).to_owned(),
                folder: PathBuf::from(folder),
                sweep: sweep.concat(),
            }),
            _ => None,
        }
    }

    fn is_up(&self) -> bool {
        match self {
            Self::Container { id } => container::lives(id),
            Self::Process { pid, born, .. } => birth(*pid).as_ref() == Some(born),
        }
    }

    /// Starts a broker that nobody holds.
    fn start(kind: Kind, version: Option<&str>) -> Result<(Self, String)> {
        let container = || {
            let container = Container::start(kind, version, None)?;
            Ok((Self::Container { id: container.id().to_owned() }, container.url()))
        };
        Way::run(container, || Self::start_process(kind, version))
    }

    fn start_process(kind: Kind, version: Option<&str>) -> Result<(Self, String)> {
        let (folder, launch) = prepare(kind, version, None)?;
        let mut child = spawn(&launch, &folder)?;
        let pid = child.id();
        if let Err(problem) = wait_until_ready(&launch, &folder, || !matches!(child.try_wait(), Ok(None))) {
            // Nobody would find it: it is not noted yet.
            drop(signal_group(pid, "KILL"));
            drop(child.wait());
            remove(&folder)?;
            return Err(problem);
        }
        let born = birth(pid).ok_or_else(|| format!("{kind} ended right after its start"))?;
        Ok((Self::Process { pid, born, folder, sweep: launch.sweep }, launch.url))
    }

    /// Ends it in order, and removes its data.
    fn end(&self) -> Result<()> {
        let (pid, folder, sweep) = match self {
            Self::Container { id } => return container::remove(id),
            Self::Process { pid, folder, sweep, .. } => (*pid, folder, sweep),
        };
        signal_group(pid, "TERM")?;
        let end = Instant::now() + Duration::from_secs(10);
        while birth(pid).is_some() {
            if Instant::now() > end {
                signal_group(pid, "KILL")?;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        if !sweep.is_empty() {
            run(Command::new("sh").args(["-c", sweep]))?;
        }
        remove(folder)
    }
}

fn notes() -> PathBuf {
    std::env::temp_dir().join("eventbus-brokers")
}

/// When a process began.
fn birth(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may hold anything: state is the first field, the start the twentieth.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    if fields.first() == Some(&"Z") { None } else { fields.get(19).map(|field| (*field).to_owned()) }
}

/// The brokers that [`up`] started and that still live.
///
/// # Errors
/// What reading the notes reports.
pub fn running() -> Result<Vec<Running>> {
    let Ok(entries) = fs::read_dir(notes()) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for note in entries.filter_map(std::result::Result::ok).map(|entry| entry.path()) {
        let text = fs::read_to_string(&note).map_err(|error| format!("{}: {error}", note.display()))?;
        let lines: Vec<&str> = text.lines().collect();
        let [kind, url, lives @ ..] = lines.as_slice() else { continue };
        if let Some(lives) = Lives::read(lives).filter(Lives::is_up) {
            found.push(Running { kind: kind.parse()?, url: (*url).to_owned(), lives, note });
        }
    }
    found.sort_by_key(|running| running.kind);
    Ok(found)
}

/// Starts brokers that stay, unless one of the kind is up already.
///
/// # Errors
/// What is missing on this machine, or the end of a broker's log.
pub fn up(kinds: &[Kind], version: Option<&str>) -> Result<Vec<Running>> {
    for kind in kinds {
        if running()?.iter().any(|running| running.kind == *kind) {
            continue;
        }
        let (lives, url) = Lives::start(*kind, version)?;
        let note = |error: std::io::Error| format!("{}: {error}", notes().display());
        fs::create_dir_all(notes()).map_err(note)?;
        fs::write(notes().join(kind.name()), format!("{kind}\n{url}\n{}", lives.written())).map_err(note)?;
    }
    Ok(running()?.into_iter().filter(|running| kinds.contains(&running.kind)).collect())
}

/// Ends the brokers that [`up`] started, and removes their data. Returns those that were up.
///
/// # Errors
/// What the system says.
pub fn down(kinds: &[Kind]) -> Result<Vec<Running>> {
    let ours: Vec<_> = running()?.into_iter().filter(|running| kinds.contains(&running.kind)).collect();
    for running in &ours {
        running.lives.end()?;
        drop(fs::remove_file(&running.note));
    }
    Ok(ours)
}

fn remove(folder: &Path) -> Result<()> {
    fs::remove_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read_again() {
        let process = |sweep: &str| Lives::Process {
            pid: 7,
            born: "12".to_owned(),
            folder: PathBuf::from("/tmp/a b"),
            sweep: sweep.to_owned(),
        };
        for lives in [Lives::Container { id: "0a1b".to_owned() }, process(""), process("epmd -kill")] {
            let written = lives.written();
            assert_eq!(Lives::read(&written.lines().collect::<Vec<_>>()), Some(lives));
        }
        assert_eq!(Lives::read(&["process", "not a number", "1", "/"]), None);
    }
}
