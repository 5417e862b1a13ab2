//! Two sources of accident, taken from the system: what is random comes from the seed, and the time of day follows the
//! virtual clock. So a seed is one history, whatever the machine does.
#![allow(unsafe_code, reason = "two functions of the C library are replaced, for this program alone")]

use std::ffi::{c_int, c_uint, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// What is random is drawn from it; 0 = from the system.
static SEED: AtomicU64 = AtomicU64::new(0);
/// When the virtual clock began.
static BEGIN: OnceLock<Instant> = OnceLock::new();
/// By how much the time of day is wrong, in milliseconds.
static SKEW_MS: AtomicI64 = AtomicI64::new(0);

/// The time of day at the beginning, in milliseconds since 1970: any will do.
const EPOCH_MS: i64 = 1_800_000_000_000;

/// From now on everything random comes of this seed. What asks for randomness asks once and early: it is the first that a
/// program calls.
pub(crate) fn seed(seed: u64) {
    SEED.store(seed.wrapping_mul(2).wrapping_add(1), Relaxed);
    fastrand::seed(seed);
}

/// From now on the time of day goes as the runtime's clock does.
pub(crate) fn begin() {
    _ = BEGIN.set(Instant::now());
}

/// Sets the time of day wrong.
pub(crate) fn jump(milliseconds: i64) {
    SKEW_MS.store(milliseconds, Relaxed);
}

/// Since the beginning.
pub(crate) fn elapsed() -> Duration {
    BEGIN.get().map_or(Duration::ZERO, Instant::elapsed)
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
fn draw() -> u64 {
    let state = SEED.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// `getrandom(2)`, which seeds hash tables and all that is seeded of them.
///
/// # Safety
/// As of the function of the C library.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn getrandom(buffer: *mut c_void, length: usize, flags: c_uint) -> isize {
    if SEED.load(Relaxed) == 0 {
        // SAFETY: the caller's arguments are passed on as they are.
        let n = unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) };
        return isize::try_from(n).unwrap_or(-1);
    }
    for at in 0..length {
        // SAFETY: the caller says that there is room for so many bytes.
        unsafe { buffer.cast::<u8>().add(at).write(draw().to_le_bytes()[0]) };
    }
    isize::try_from(length).unwrap_or(isize::MAX)
}

/// `clock_gettime(2)`: the clock that only ascends stands still, as nobody asks it who does not ask the runtime.
///
/// # Safety
/// As of the function of the C library.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    if SEED.load(Relaxed) == 0 {
        // SAFETY: the caller's arguments are passed on as they are.
        let outcome = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
        return c_int::try_from(outcome).unwrap_or(-1);
    }
    let milliseconds = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => {
            let elapsed = i64::try_from(elapsed().as_millis()).unwrap_or(i64::MAX);
            EPOCH_MS + elapsed + SKEW_MS.load(Relaxed)
        }
        _ => 1_000_000_000,
    };
    // SAFETY: the caller says that there is room for a time.
    unsafe {
        (*time).tv_sec = milliseconds.div_euclid(1000);
        (*time).tv_nsec = milliseconds.rem_euclid(1000) * 1_000_000;
    }
    0
}
