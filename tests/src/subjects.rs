//! The transports under test, with the hooks they can offer.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use eventbus::conformance::{Power, Subject};
use eventbus::transport::memory::{Memory, Options};
use eventbus::transport::sqlite::{self, Sqlite};
use eventbus::{Content, PartitionId, Transport, Undecodable};
use eventbus::{Error, ErrorKind};
use parking_lot::Mutex;

use crate::around::Around;
use crate::disk::Disk;
use crate::folder::Folder;
use crate::mutant::store::{Fault, Faulty};

/// How soon a silent process loses its seat: cases wait for it.
const SESSION: Duration = Duration::from_secs(2);

/// Events a topic of the memory subject holds before publishing waits.
const BOUND: usize = 6_000;

/// The in-process transport; `strong` switches on what is optional.
pub fn memory(strong: Strength) -> Subject {
    let mut options = Options::default();
    options.max_events = BOUND.try_into().unwrap_or(options.max_events);
    let name = match strong {
        Strength::Default => "memory",
        Strength::Strong => {
            options.replay = 100_000;
            options.dedup = Some(std::time::Duration::from_millis(800));
            "memory-strong"
        }
        Strength::Total => {
            options.partitions = std::num::NonZeroU32::MIN;
            options.replay = 100_000;
            "memory-total"
        }
    };
    memory_with(name, options)
}

fn memory_with(name: &'static str, options: Options) -> Subject {
    // A restart leaves nothing of a volatile broker.
    let memory = Arc::new(Mutex::new(Memory::new(options)));
    let (raw, clock, restarted) = (memory.clone(), memory.clone(), memory.clone());
    Subject::new(name, move || {
        let memory = memory.lock().reopen();
        async move { Ok(Arc::new(memory) as Arc<dyn Transport>) }
    })
    .with_bound(options.max_events)
    .with_raw(move |topic, content| {
        let memory = raw.lock().clone();
        async move { memory.inject(&topic, PartitionId(0), Content::Undecodable(Box::new(content))) }
    })
    .with_clock(move |forward, by| {
        clock.lock().step_clock(nanos(forward, by));
        async { Ok(()) }
    })
    .with_restart(move || {
        *restarted.lock() = Memory::new(options);
        async { Ok(()) }
    })
}

/// The subject that an address names, with the hooks that this workspace has for its transport. SQLite is tested on
/// a file of its own in the folder of the one that is named, and leaves nothing there.
///
/// # Errors
/// What is wrong with the address.
pub fn of_url(text: &str, child: &Path) -> eventbus::Result<Subject> {
    let url = eventbus::url::Url::parse(text)?;
    match url.scheme() {
        "folder" => Ok(folder()),
        "memory" => Ok(memory_with("memory", Options::from_url(&url)?)),
        "sqlite" => {
            let mut options = sqlite::Options::from_url(&url)?;
            options.session = options.session.min(SESSION);
            let beside = Path::new(url.place()).parent().filter(|folder| !folder.as_os_str().is_empty());
            let folder = tempfile::tempdir_in(beside.unwrap_or(Path::new(".")));
            Ok(sqlite_in(folder, options, child.to_owned(), "sound", Fault::None))
        }
        _ => {
            let text = text.to_owned();
            Ok(Subject::new("transport", move || {
                let text = text.clone();
                async move { Ok(Arc::clone(eventbus::connect(&text).await?.transport())) }
            }))
        }
    }
}

/// A step of a clock, in nanoseconds.
pub(crate) fn nanos(forward: bool, by: Duration) -> i64 {
    let nanos = i64::try_from(by.as_nanos()).unwrap_or(i64::MAX);
    if forward { nanos } else { -nanos }
}

/// The embedded durable transport on a file of its own; every connection is a writer of its own, as
/// another process would be.
///
/// `child` is the program that plays a role in another process: `CARGO_BIN_EXE_child`, with what breaks it.
pub fn sqlite(partitions: u32, child: &'static str, broken: &'static str) -> Subject {
    sqlite_with(partitions, child, broken, Fault::None)
}

/// The same, with a fault below or beside it.
pub fn sqlite_with(partitions: u32, child: &'static str, broken: &'static str, fault: Fault) -> Subject {
    let mut options = sqlite::Options::default();
    options.partitions = partitions;
    options.session = SESSION;
    sqlite_in(tempfile::tempdir(), options, child.into(), broken, fault)
}

fn sqlite_in(
    folder: std::io::Result<tempfile::TempDir>,
    options: sqlite::Options,
    child: PathBuf,
    broken: &'static str,
    fault: Fault,
) -> Subject {
    let folder = Arc::new(folder);
    let path =
        folder.as_ref().as_ref().map_or_else(|_| PathBuf::new(), |folder| folder.path().join("bus.db"));
    let opened: Arc<Mutex<Vec<Sqlite>>> = Arc::default();
    let disk = Disk::below(path.parent().unwrap_or(&path));
    if fault == Fault::DiskLies {
        disk.lie();
    }
    // Crash images live as long as the subject.
    let images: Arc<Mutex<Vec<tempfile::TempDir>>> = Arc::default();
    let (slow, damaged) = (disk.clone(), path.clone());
    let (raw_path, child_path) = (path.clone(), path.clone());
    let (filled, restarted, stepped) = (opened.clone(), opened.clone(), opened.clone());
    Subject::new("sqlite", move || {
        let (path, opened, folder) = (path.clone(), opened.clone(), folder.clone());
        async move {
            let sqlite = Sqlite::open_path(&path, options).await?;
            opened.lock().push(sqlite.clone());
            drop(folder);
            Ok(match fault {
                Fault::TrustsSecondSync | Fault::SkipsCorruption => {
                    let change = Faulty { path, options, fault };
                    Arc::new(Around { inner: Arc::new(sqlite), change }) as Arc<dyn Transport>
                }
                Fault::None | Fault::DiskLies => Arc::new(sqlite),
            })
        }
    })
    .with_raw(move |topic, content| {
        let inserted = insert_garbage(&raw_path, topic.as_str(), &content);
        async move { inserted.map_err(|error| Error::new(ErrorKind::Unexpected, "raw insert").caused_by(error)) }
    })
    .with_child(move |arguments| {
        let mut command = std::process::Command::new(&child);
        let url = format!("sqlite://{}?session={}ms", child_path.display(), options.session.as_millis());
        command.arg(url).arg(broken).args(arguments);
        command
    })
    .with_power(Power::new(
        move |seed| {
            let (disk, images) = (disk.clone(), images.clone());
            async move {
                let failed = |error| Error::new(ErrorKind::Unexpected, "a crash image").caused_by(error);
                let image = tempfile::tempdir().map_err(failed)?;
                disk.power_cut(image.path(), seed).map_err(failed)?;
                let sqlite = Sqlite::open_path(image.path().join("bus.db"), options).await?;
                images.lock().push(image);
                Ok(Arc::new(sqlite) as Arc<dyn Transport>)
            }
        },
        move |on| {
            slow.fail_syncs(on);
            async { Ok(()) }
        },
        move |seed| {
            let damaged = damage(&damaged, seed);
            async move { damaged.map_err(|error| Error::new(ErrorKind::Unexpected, "damage").caused_by(error)) }
        },
    ))
    .with_fill(move |on| {
        let opened = filled.lock().clone();
        async move { opened.iter().try_for_each(|sqlite| sqlite.set_max_file_bytes(on.then_some(1))) }
    })
    .with_clock(move |forward, by| {
        stepped.lock().iter().for_each(|sqlite| sqlite.step_clock(nanos(forward, by)));
        async { Ok(()) }
    })
    .with_restart(move || {
        let opened = std::mem::take(&mut *restarted.lock());
        async move {
            for sqlite in opened {
                sqlite.close().await?;
            }
            Ok(())
        }
    })
}

/// Flips one bit in the body of a stored event, wherever the file holds a copy of it.
fn damage(path: &Path, seed: u64) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let file = rusqlite::Connection::open(path)?;
    let bodies: Vec<Vec<u8>> = file
        .prepare("SELECT payload FROM eventbus_event WHERE length(payload) > 8")?
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    file.close().map_err(|(_, error)| error)?;
    let body = random.choice(&bodies).ok_or("no event to damage")?;
    let (at, bit) = (random.usize(..body.len()), random.u8(..8));
    let mut bytes = std::fs::read(path)?;
    let places: Vec<usize> =
        bytes.windows(body.len()).enumerate().filter(|(_, part)| part == body).map(|(at, _)| at).collect();
    places.iter().for_each(|place| bytes[place + at] ^= 1 << bit);
    Ok(std::fs::write(path, bytes)?)
}

/// The third party's transport, in a folder of its own.
pub fn folder() -> Subject {
    let place = Arc::new(tempfile::tempdir());
    let opened = place.as_ref().as_ref().ok().and_then(|place| Folder::open(place.path().to_owned()).ok());
    Subject::new("folder", move || {
        let (opened, place) = (opened.as_ref().map(Folder::reopen), place.clone());
        async move {
            drop(place);
            let folder = opened.ok_or_else(|| Error::new(ErrorKind::Unavailable, "no temporary folder"))?;
            Ok(Arc::new(folder) as Arc<dyn Transport>)
        }
    })
}

/// Writes a row that no version of ours would write.
fn insert_garbage(path: &Path, topic: &str, content: &Undecodable) -> rusqlite::Result<()> {
    let file = rusqlite::Connection::open(path)?;
    file.busy_timeout(Duration::from_secs(5))?;
    let id: i64 =
        file.query_row("SELECT id FROM eventbus_topic WHERE name = ?1", [topic], |row| row.get(0))?;
    file.execute_batch("BEGIN IMMEDIATE")?;
    let sql =
        "UPDATE eventbus_partition SET next = next + 1 WHERE topic = ?1 AND partition = 0 RETURNING next - 1";
    let offset: i64 = file.query_row(sql, [id], |row| row.get(0))?;
    let headers = content.headers.as_block().to_vec();
    let sql = "INSERT INTO eventbus_event (position, stored_at, source, version, headers, payload) VALUES (?1, 0, 's', -7, ?2, ?3)";
    file.execute(sql, rusqlite::params![id << 48 | offset, headers, content.raw.as_deref()])?;
    file.execute_batch("COMMIT")
}

/// Which of its options a transport runs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strength {
    /// As it comes.
    Default,
    /// Replay and deduplication on.
    Strong,
    /// One partition: order over the whole topic.
    Total,
}
