//! A disk that can be slow, fail, and lose power: a layer below SQLite that knows what was synced.
//!
//! It passes everything through to the real file system and remembers, for each file, what the last sync
//! made durable and which writes came after. A crash image is a folder as the disk could be found after a
//! power cut: what was synced, and any part of the rest, sector by sector, in any order.
#![allow(unsafe_code, reason = "SQLite's file system interface is a table of C functions")]

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::ffi::{
    SQLITE_IOERR_FSYNC, SQLITE_NOMEM, SQLITE_OK, sqlite3_file, sqlite3_int64, sqlite3_io_methods,
    sqlite3_vfs, sqlite3_vfs_find, sqlite3_vfs_register,
};

/// What a power cut leaves whole or not at all.
const SECTOR: usize = 512;

/// The disk below one folder.
#[derive(Debug, Default)]
pub struct Disk {
    files: Mutex<HashMap<PathBuf, Tracked>>,
    /// Only times are kept, not contents: there are no crash images.
    forgets: AtomicBool,
    fails: AtomicBool,
    lies: AtomicBool,
    sync_micros: AtomicU64,
    n_syncs: AtomicU64,
}

#[derive(Debug, Default)]
struct Tracked {
    synced: Vec<u8>,
    /// Since the last sync, in order.
    writes: Vec<Write>,
}

#[derive(Debug)]
enum Write {
    At(usize, Vec<u8>),
    Truncate(usize),
}

fn put(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    if bytes.len() < at + data.len() {
        bytes.resize(at + data.len(), 0);
    }
    bytes[at..at + data.len()].copy_from_slice(data);
}

impl Write {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::At(at, data) => put(bytes, *at, data),
            Self::Truncate(len) => bytes.resize(*len, 0),
        }
    }
}

impl Tracked {
    /// The file after a power cut: each sector of each write that was not synced arrived, or did not.
    fn after_power_cut(&self, random: &mut fastrand::Rng) -> Vec<u8> {
        let mut bytes = self.synced.clone();
        let mut sectors: Vec<(usize, &[u8])> = Vec::new();
        for write in &self.writes {
            match write {
                Write::At(at, data) => {
                    let chunks = data.chunks(SECTOR).scan(*at, |at, chunk| {
                        let place = *at;
                        *at += chunk.len();
                        Some((place, chunk))
                    });
                    sectors.extend(chunks);
                }
                Write::Truncate(len) if random.bool() => {
                    bytes.truncate(*len);
                    sectors.retain(|(at, _)| at < len);
                }
                Write::Truncate(_) => {}
            }
        }
        // Nothing, all, or some: the ends are as likely as what lies between.
        match random.u8(..4) {
            0 => sectors.clear(),
            1 => {}
            _ => {
                sectors.retain(|_| random.bool());
                random.shuffle(&mut sectors);
            }
        }
        sectors.into_iter().for_each(|(at, data)| put(&mut bytes, at, data));
        bytes
    }
}

static DISKS: LazyLock<Mutex<HashMap<PathBuf, Arc<Disk>>>> = LazyLock::new(Mutex::default);
static REAL: OnceLock<Real> = OnceLock::new();

struct Real(*mut sqlite3_vfs);
// SAFETY: SQLite's file systems are registered for all threads and never change after that.
unsafe impl Send for Real {}
// SAFETY: as above.
unsafe impl Sync for Real {}

impl Disk {
    /// Watches everything that this process does in a folder, from now on. The folder must exist.
    pub fn below(folder: &Path) -> Arc<Self> {
        install();
        let disk = Arc::<Self>::default();
        let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        DISKS.lock().insert(folder, disk.clone());
        disk
    }

    /// Lets every sync fail, or work again.
    pub fn fail_syncs(&self, fail: bool) {
        self.fails.store(fail, Ordering::SeqCst);
    }

    /// Says of every sync that it succeeded, and keeps nothing.
    pub fn lie(&self) {
        self.lies.store(true, Ordering::SeqCst);
    }

    /// Keeps no contents from now on: for measuring, where copies would be a cost of their own.
    pub fn forget(&self) {
        self.forgets.store(true, Ordering::SeqCst);
        self.files.lock().clear();
    }

    /// Lets every sync take this long at least.
    pub fn slow_syncs(&self, time: Duration) {
        self.sync_micros.store(time.as_micros() as u64, Ordering::SeqCst);
    }

    /// How many syncs there were.
    pub fn n_syncs(&self) -> u64 {
        self.n_syncs.load(Ordering::SeqCst)
    }

    /// Writes into `to` what the folder would hold after a power cut at this moment.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn power_cut(&self, to: &Path, seed: u64) -> std::io::Result<()> {
        let mut random = fastrand::Rng::with_seed(seed);
        // One lock for all files: the moment is the same for each.
        let files = self.files.lock();
        for (path, tracked) in &*files {
            if let Some(name) = path.file_name() {
                std::fs::write(to.join(name), tracked.after_power_cut(&mut random))?;
            }
        }
        Ok(())
    }

    fn write(&self, path: &Path, write: impl FnOnce() -> Write) {
        if self.forgets.load(Ordering::Relaxed) {
            return;
        }
        let write = write();
        self.files.lock().entry(path.to_owned()).or_default().writes.push(write);
    }

    fn sync(&self, path: &Path) -> bool {
        let wait = self.sync_micros.load(Ordering::SeqCst);
        if wait > 0 {
            std::thread::sleep(Duration::from_micros(wait));
        }
        self.n_syncs.fetch_add(1, Ordering::SeqCst);
        if self.fails.load(Ordering::SeqCst) {
            return false;
        }
        if self.lies.load(Ordering::SeqCst) || self.forgets.load(Ordering::SeqCst) {
            return true;
        }
        let mut files = self.files.lock();
        let Tracked { synced, writes } = files.entry(path.to_owned()).or_default();
        writes.drain(..).for_each(|write| write.apply(synced));
        true
    }
}

/// One open file: SQLite's part, ours, and behind us the real one.
#[repr(C)]
struct File {
    base: sqlite3_file,
    tracked: *mut (Arc<Disk>, PathBuf),
}

/// The real file behind ours.
fn real(file: *mut sqlite3_file) -> *mut sqlite3_file {
    // SAFETY: SQLite allocates `szOsFile` bytes, which is our size and the real one's behind it.
    unsafe { file.cast::<u8>().add(size_of::<File>()).cast() }
}

/// Calls a method of the real file.
macro_rules! forward {
    ($file:expr, $method:ident $(, $argument:expr)*) => {{
        let file = real($file);
        // SAFETY: the real file was opened by the real file system, which gave it all its methods.
        unsafe {
            match (*(*file).pMethods).$method {
                Some(method) => method(file $(, $argument)*),
                None => Default::default(),
            }
        }
    }};
}

fn tracked<'a>(file: *mut sqlite3_file) -> Option<&'a (Arc<Disk>, PathBuf)> {
    // SAFETY: set in `open` and freed in `close`; SQLite uses a file between the two.
    unsafe { (*file.cast::<File>()).tracked.as_ref() }
}

unsafe extern "C" fn close(file: *mut sqlite3_file) -> c_int {
    let code = forward!(file, xClose);
    let file = file.cast::<File>();
    // SAFETY: made by `Box::into_raw` in `open`; nothing uses the file any more.
    unsafe {
        if !(*file).tracked.is_null() {
            drop(Box::from_raw((*file).tracked));
            (*file).tracked = std::ptr::null_mut();
        }
    }
    code
}

unsafe extern "C" fn read(file: *mut sqlite3_file, to: *mut c_void, n: c_int, at: sqlite3_int64) -> c_int {
    forward!(file, xRead, to, n, at)
}

unsafe extern "C" fn write(
    file: *mut sqlite3_file,
    from: *const c_void,
    n: c_int,
    at: sqlite3_int64,
) -> c_int {
    if let Some((disk, path)) = tracked(file) {
        // SAFETY: SQLite hands `n` bytes.
        let data = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), n as usize) };
        disk.write(path, || Write::At(at as usize, data.to_vec()));
    }
    forward!(file, xWrite, from, n, at)
}

unsafe extern "C" fn truncate(file: *mut sqlite3_file, len: sqlite3_int64) -> c_int {
    if let Some((disk, path)) = tracked(file) {
        disk.write(path, || Write::Truncate(len as usize));
    }
    forward!(file, xTruncate, len)
}

unsafe extern "C" fn sync(file: *mut sqlite3_file, flags: c_int) -> c_int {
    match tracked(file) {
        // The disk is ours: what is synced is what we say.
        Some((disk, path)) if disk.sync(path) => SQLITE_OK,
        Some(_) => SQLITE_IOERR_FSYNC,
        None => forward!(file, xSync, flags),
    }
}

unsafe extern "C" fn file_size(file: *mut sqlite3_file, size: *mut sqlite3_int64) -> c_int {
    forward!(file, xFileSize, size)
}

unsafe extern "C" fn lock(file: *mut sqlite3_file, level: c_int) -> c_int {
    forward!(file, xLock, level)
}

unsafe extern "C" fn unlock(file: *mut sqlite3_file, level: c_int) -> c_int {
    forward!(file, xUnlock, level)
}

unsafe extern "C" fn check_reserved(file: *mut sqlite3_file, out: *mut c_int) -> c_int {
    forward!(file, xCheckReservedLock, out)
}

unsafe extern "C" fn control(file: *mut sqlite3_file, what: c_int, argument: *mut c_void) -> c_int {
    forward!(file, xFileControl, what, argument)
}

unsafe extern "C" fn sector_size(file: *mut sqlite3_file) -> c_int {
    forward!(file, xSectorSize)
}

unsafe extern "C" fn characteristics(_: *mut sqlite3_file) -> c_int {
    // Nothing is promised of this disk: no atomic sectors, no safe appends, no order.
    0
}

unsafe extern "C" fn shm_map(
    file: *mut sqlite3_file,
    page: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    forward!(file, xShmMap, page, size, extend, out)
}

unsafe extern "C" fn shm_lock(file: *mut sqlite3_file, at: c_int, n: c_int, flags: c_int) -> c_int {
    forward!(file, xShmLock, at, n, flags)
}

unsafe extern "C" fn shm_barrier(file: *mut sqlite3_file) {
    forward!(file, xShmBarrier);
}

unsafe extern "C" fn shm_unmap(file: *mut sqlite3_file, delete: c_int) -> c_int {
    forward!(file, xShmUnmap, delete)
}

static METHODS: sqlite3_io_methods = sqlite3_io_methods {
    // Version 2: no memory-mapped reads, so that every access comes through here.
    iVersion: 2,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(unlock),
    xCheckReservedLock: Some(check_reserved),
    xFileControl: Some(control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

fn disk_of(name: *const c_char) -> Option<(Arc<Disk>, PathBuf)> {
    if name.is_null() {
        return None;
    }
    // SAFETY: SQLite's names end with a zero.
    let path = PathBuf::from(unsafe { CStr::from_ptr(name) }.to_str().ok()?);
    let folder = path.parent()?.canonicalize().ok()?;
    let disk = DISKS.lock().get(&folder)?.clone();
    Some((disk, path))
}

unsafe extern "C" fn open(
    _: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    let Some(Real(vfs)) = REAL.get() else { return SQLITE_NOMEM };
    // SAFETY: as `real`; the real file system opens into its own part.
    let code = unsafe {
        match (**vfs).xOpen {
            Some(open) => open(*vfs, name, real(file), flags, out),
            None => SQLITE_NOMEM,
        }
    };
    let ours = file.cast::<File>();
    // SAFETY: SQLite gave us this memory; without methods it does not call `close`.
    unsafe {
        (*ours).tracked = std::ptr::null_mut();
        (*ours).base.pMethods = std::ptr::null();
        if code == SQLITE_OK {
            (*ours).base.pMethods = &raw const METHODS;
            if let Some(tracked) = disk_of(name) {
                (*ours).tracked = Box::into_raw(Box::new(tracked));
            }
        }
    }
    code
}

unsafe extern "C" fn delete(_: *mut sqlite3_vfs, name: *const c_char, sync: c_int) -> c_int {
    if let Some((disk, path)) = disk_of(name) {
        disk.files.lock().remove(&path);
    }
    let Some(Real(vfs)) = REAL.get() else { return SQLITE_NOMEM };
    // SAFETY: the real file system does its own part.
    unsafe { (**vfs).xDelete.map_or(SQLITE_OK, |delete| delete(*vfs, name, sync)) }
}

/// Puts ourselves before the real file system, as the default of this process.
fn install() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: the library is initialised by the first call; the copy lives for ever.
        unsafe {
            let real = sqlite3_vfs_find(std::ptr::null());
            drop(REAL.set(Real(real)));
            let mut ours = *real;
            ours.szOsFile += size_of::<File>() as c_int;
            ours.pNext = std::ptr::null_mut();
            ours.zName = c"eventbus-disk".as_ptr();
            ours.xOpen = Some(open);
            ours.xDelete = Some(delete);
            sqlite3_vfs_register(Box::leak(Box::new(ours)), 1);
        }
    });
}
