//! Brokers that stay up until they are told to go: what runs is written down in the temporary folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::fetch::run;
use super::process::{prepare, signal_group, spawn, wait_until_ready};
use super::{Kind, Result};

/// A broker that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Running {
    /// Which broker.
    pub kind: Kind,
    /// Its address.
    pub url: String,
    pid: u32,
    folder: PathBuf,
    sweep: String,
    note: PathBuf,
}

fn notes() -> PathBuf {
    std::env::temp_dir().join("eventbus-brokers")
}

/// When a process began, so that a number that is given out again is not taken for it.
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
        let [kind, url, pid, born, folder, sweep @ ..] = lines.as_slice() else { continue };
        let pid = pid.parse().map_err(|_| format!("{}: not a process's number", note.display()))?;
        if birth(pid).as_deref() == Some(*born) {
            let (kind, url, folder) = (kind.parse()?, (*url).to_owned(), PathBuf::from(folder));
            let sweep = sweep.concat();
            found.push(Running { kind, url, pid, folder, sweep, note });
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
        let (folder, launch) = prepare(*kind, version, None)?;
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
        let text = format!("{kind}\n{}\n{pid}\n{born}\n{}\n{}\n", launch.url, folder.display(), launch.sweep);
        let note = |error: std::io::Error| format!("{}: {error}", notes().display());
        fs::create_dir_all(notes()).map_err(note)?;
        fs::write(notes().join(kind.name()), text).map_err(note)?;
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
        signal_group(running.pid, "TERM")?;
        let end = Instant::now() + Duration::from_secs(10);
        while birth(running.pid).is_some() {
            if Instant::now() > end {
                signal_group(running.pid, "KILL")?;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        if !running.sweep.is_empty() {
            run(Command::new("sh").args(["-c", &running.sweep]))?;
        }
        remove(&running.folder)?;
        drop(fs::remove_file(&running.note));
    }
    Ok(ours)
}

fn remove(folder: &Path) -> Result<()> {
    fs::remove_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))
}
