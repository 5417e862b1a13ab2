//! Where everything happens: chance, processes that are killed and stopped, and the way between them and what they call.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use eventbus::transport::memory::{self, Memory};
use eventbus::{Error, ErrorKind, Result};
use fastrand::Rng;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use crate::bug::Bug;
use crate::clock;
use crate::ledger::Ledger;

/// What a process calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Far {
    Database,
    Broker,
}

/// All that there is.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) random: Mutex<Rng>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) broker: Memory,
    pub(crate) bug: Bug,
    /// Faults are over.
    is_calm: AtomicBool,
    away_until: Mutex<[Instant; 2]>,
    /// Events that the broker refuses, each so many times more.
    refusals: Mutex<HashMap<(String, u64), u32>>,
    /// A sum of everything that happened, with its time.
    trace: AtomicU64,
    pub(crate) n_calls: AtomicU64,
    pub(crate) n_faults: AtomicU64,
    /// Runs of handlers that found their event handled.
    pub(crate) n_repeated: AtomicU64,
}

/// How a call goes there and back.
#[derive(Debug, Clone, Copy)]
struct Way {
    there: Duration,
    back: Duration,
    is_lost_there: bool,
    is_lost_back: bool,
}

impl World {
    pub(crate) fn new(seed: u64, bug: Bug) -> Self {
        let mut options = memory::Options::default();
        options.replay = 1 << 20;
        options.partitions = std::num::NonZeroU32::MIN.saturating_add(3);
        Self {
            random: Mutex::new(Rng::with_seed(seed)),
            ledger: Arc::default(),
            broker: Memory::new(options),
            bug,
            is_calm: AtomicBool::new(false),
            away_until: Mutex::new([Instant::now(); 2]),
            refusals: Mutex::default(),
            trace: AtomicU64::new(0xcbf2_9ce4_8422_2325),
            n_calls: AtomicU64::new(0),
            n_faults: AtomicU64::new(0),
            n_repeated: AtomicU64::new(0),
        }
    }

    pub(crate) fn draw(&self, below: u64) -> u64 {
        self.random.lock().u64(..below)
    }

    /// Whether something happens that happens once in so many times; never when all is calm.
    pub(crate) fn one_in(&self, n: u64) -> bool {
        !self.is_calm() && self.draw(n) == 0
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.is_calm.load(Relaxed)
    }

    /// Ends all faults.
    pub(crate) fn calm(&self) {
        self.is_calm.store(true, Relaxed);
        *self.away_until.lock() = [Instant::now(); 2];
        self.refusals.lock().clear();
    }

    /// Has something be away for a time.
    pub(crate) fn away(&self, far: Far, time: Duration) {
        self.away_until.lock()[far as usize] = Instant::now() + time;
    }

    fn is_away(&self, far: Far) -> bool {
        Instant::now() < self.away_until.lock()[far as usize]
    }

    /// Adds to the sum of everything that happened.
    pub(crate) fn note(&self, what: &str, of: u64) {
        let mut sum = self.trace.load(Relaxed);
        let time = u64::try_from(clock::elapsed().as_micros()).unwrap_or(u64::MAX);
        for byte in what.bytes().chain(of.to_le_bytes()).chain(time.to_le_bytes()) {
            sum = (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        self.trace.store(sum, Relaxed);
    }

    pub(crate) fn trace(&self) -> u64 {
        self.trace.load(Relaxed)
    }

    /// Whether the broker refuses an event this time, for what it is.
    pub(crate) fn refuses(&self, key: &str, n: u64) -> bool {
        if self.is_calm() {
            return false;
        }
        let mut refusals = self.refusals.lock();
        let times = || {
            let mut random = self.random.lock();
            if random.u8(..50) == 0 { random.u32(1..4) } else { 0 }
        };
        let left = refusals.entry((key.to_owned(), n)).or_insert_with(times);
        *left > 0 && {
            *left -= 1;
            true
        }
    }

    fn way(&self) -> Way {
        let mut random = self.random.lock();
        let mut part = || {
            let milliseconds = match random.u32(..1000) {
                0..600 => 0,
                600..950 => random.u64(1..20),
                950..990 => random.u64(20..500),
                990..997 => random.u64(500..6_000),
                _ => random.u64(6_000..45_000),
            };
            Duration::from_millis(milliseconds)
        };
        if self.is_calm() {
            return Way {
                there: Duration::ZERO,
                back: Duration::ZERO,
                is_lost_there: false,
                is_lost_back: false,
            };
        }
        let (there, back) = (part(), part());
        Way { there, back, is_lost_there: random.u8(..100) == 0, is_lost_back: random.u8(..100) == 0 }
    }
}

/// A process.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) world: Arc<World>,
    pub(crate) id: u64,
    is_dead: AtomicBool,
    stopped_until: Mutex<Instant>,
    end: watch::Sender<bool>,
}

impl Node {
    pub(crate) fn new(world: &Arc<World>, id: u64) -> Arc<Self> {
        let stopped_until = Mutex::new(Instant::now());
        let (is_dead, end) = (AtomicBool::new(false), watch::channel(false).0);
        Arc::new(Self { world: world.clone(), id, is_dead, stopped_until, end })
    }

    /// As SIGTERM.
    pub(crate) fn ask_to_end(&self) {
        self.end.send_replace(true);
    }

    pub(crate) fn is_asked_to_end(&self) -> bool {
        *self.end.borrow()
    }

    /// Returns when the process is asked to end.
    pub(crate) async fn asked_to_end(&self) {
        _ = self.end.subscribe().wait_for(|asked| *asked).await;
        self.pass().await;
    }

    /// As SIGKILL: nothing of it is heard any more. What it sent is on its way, and the database ends its transactions.
    pub(crate) fn kill(&self) {
        self.is_dead.store(true, Relaxed);
        self.world.ledger.abort_all(|node| node == self.id, false);
    }

    /// As SIGSTOP, and SIGCONT after a time.
    pub(crate) fn stop(&self, time: Duration) {
        *self.stopped_until.lock() = Instant::now() + time;
    }

    /// Goes on with a process that was stopped.
    pub(crate) fn resume(&self) {
        *self.stopped_until.lock() = Instant::now();
    }

    pub(crate) fn is_free(&self) -> bool {
        !self.is_dead.load(Relaxed) && Instant::now() >= *self.stopped_until.lock()
    }

    /// Returns when the process runs: for ever not, if it is dead.
    pub(crate) async fn pass(&self) {
        while !self.is_free() {
            let until = *self.stopped_until.lock();
            match self.is_dead.load(Relaxed) {
                true => std::future::pending().await,
                // In steps, as it may be resumed before.
                false => sleep_until(until.min(Instant::now() + Duration::from_secs(1))).await,
            }
        }
    }

    /// Calls what is far away. Whoever does not wait for the answer has called all the same.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        far: Far,
        name: &'static str,
        call: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.pass().await;
        let (world, way, id) = (self.world.clone(), self.world.way(), self.id);
        let away = || Err(Error::new(ErrorKind::Unavailable, "it is away"));
        world.n_calls.fetch_add(1, Relaxed);
        let there_and_back = async move {
            if !way.there.is_zero() {
                sleep(way.there).await;
            }
            if way.is_lost_there || world.is_away(far) {
                world.note("lost", id);
                return away();
            }
            let answer = call.await;
            world.note(name, id << 1 | u64::from(answer.is_ok()));
            if !way.back.is_zero() {
                sleep(way.back).await;
            }
            match way.is_lost_back || world.is_away(far) {
                true => Err(Error::new(ErrorKind::Unknown, "the answer is lost")),
                false => answer,
            }
        };
        let answer = match way.there.is_zero() && way.back.is_zero() {
            // Nothing can come between.
            true => there_and_back.await,
            false => tokio::spawn(there_and_back).await.unwrap_or_else(|_| away()),
        };
        self.pass().await;
        answer
    }
}
