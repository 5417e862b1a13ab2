//! The suite that every [`Store`] passes: one table of cases, one macro line to run it.
//!
//! ```no_run
//! # mod mine {
//! # use std::sync::Arc;
//! # use eventbus::{Envelope, Result, Topic};
//! # use outbox::{Store, conformance::{Subject, Writing}};
//! # struct Mine;
//! # impl Mine { fn new() -> Self { Self } }
//! # #[async_trait::async_trait]
//! # impl Subject for Mine {
//! #     async fn store(&self) -> Result<Arc<dyn Store>> { unimplemented!() }
//! #     async fn begin(&self) -> Result<Box<dyn Writing>> { unimplemented!() }
//! # }
//! outbox::conformance!(my_store, async { Mine::new() });
//! # }
//! ```
//!
//! - Each case has a store of its own, and states one fact of the contract in its name.
//! - What must happen is waited for, up to a bound; "nothing" is what a claim gives at once, or in the time in which a mistake
//!   would show.
//! - Each case is found worth its place by a store that it alone, or it first, finds to be wrong.

mod claims;
mod keys;
mod owners;
mod relays;
mod subject;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

pub use eventbus::conformance::Violation;
use eventbus::{Envelope, Topic};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

pub use self::subject::{Subject, Writing};
use crate::row::{Pending, Shard};
use crate::store::{Claim, Store};

/// A lease that a case waits for the end of, and a delay.
const SHORT: Duration = Duration::from_millis(500);
/// A lease, or a delay, that no case waits for the end of.
const LONG: Duration = Duration::from_secs(120);

/// How a case ends: what the store did that the contract forbids, if it did.
pub type Outcome = Result<(), Violation>;

/// One entry of the table.
pub struct Case {
    /// Its name, which states the fact it proves.
    pub name: &'static str,
    run: for<'a> fn(&'a Cx) -> BoxFuture<'a, Outcome>,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// The list: module and name. What needs several transactions open at once passes where there is one at a time.
#[doc(hidden)]
#[macro_export]
macro_rules! __store_cases {
    ($callback:path, $($args:tt)*) => { $callback! { $($args)*
        claims gives_every_byte_back
        claims gives_what_is_committed_and_nothing_else
        claims gives_what_commits_late
        claims gives_the_events_of_a_key_in_their_order
        claims gives_no_more_than_is_asked_for
        claims numbers_ascend_and_are_given_out_once
        claims holds_a_key_until_the_commit
        claims keeps_its_name
        owners shares_what_nobody_owns
        owners renews_what_is_owned
        owners takes_over_when_a_lease_is_over
        owners gives_free_what_is_released
        owners heeds_no_one_who_is_replaced
        owners removes_what_is_named
        keys keeps_a_blocked_key_back
        keys frees_a_key_with_its_event
        keys blocks_nothing_for_what_is_gone
        keys makes_due_what_may_pass
        keys sets_aside_what_is_parked
        relays loses_and_overtakes_nothing
    } };
}

macro_rules! table {
    ($($module:ident $name:ident)*) => {
        /// The cases, in the order in which they are best understood.
        pub const CASES: &[Case] = &[$(Case { name: stringify!($name), run: |cx| Box::pin($module::$name(cx)) }),*];
    };
}
__store_cases!(table,);

/// Runs one case. A panic of the store is a violation, and so is a case that does not end.
///
/// # Errors
/// What the store did.
pub async fn run(case: &Case, subject: impl Subject) -> Outcome {
    let cx = Cx { subject: Arc::new(subject) };
    let guarded = AssertUnwindSafe((case.run)(&cx)).catch_unwind();
    match tokio::time::timeout(cx.soon() * 4, guarded).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => Err(Violation::new("the store panicked")),
        Err(_) => Err(Violation::new("the case does not end")),
    }
}

/// Runs one case as a test.
#[doc(hidden)]
#[expect(clippy::panic, reason = "a test reports by panicking")]
pub fn run_as_test<S: Subject>(name: &str, subject: impl Future<Output = S>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let case = CASES.iter().find(|case| case.name == name);
    let (Some(case), Ok(runtime)) = (case, runtime) else { panic!("{name} cannot run") };
    if let Err(violation) = runtime.block_on(async { run(case, subject.await).await }) {
        panic!("{name}: {violation}");
    }
}

/// Expands to a module with one named test for each case of the suite.
///
/// The first argument names the module; the second is a future of a [`Subject`](crate::conformance::Subject), made for each test.
#[macro_export]
macro_rules! conformance {
    ($name:ident, $subject:expr) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $crate::__store_cases! { $crate::__store_tests, [$subject] }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __store_tests {
    ([$subject:expr] $($module:ident $name:ident)*) => {
        $(
            #[test]
            fn $name() {
                $crate::conformance::run_as_test(stringify!($name), $subject);
            }
        )*
    };
}

/// What a case works with.
pub(crate) struct Cx {
    subject: Arc<dyn Subject>,
}

impl Cx {
    /// The longest wait for what must happen.
    fn soon(&self) -> Duration {
        self.subject.patience()
    }

    async fn store(&self) -> Result<Arc<dyn Store>, Violation> {
        Ok(self.subject.store().await?)
    }

    fn topic() -> Result<Topic, Violation> {
        Ok(Topic::new("orders")?)
    }

    /// An event `n` of a key.
    fn event(key: &str, n: i64) -> Envelope {
        Envelope::new("test.counted", "/test").with_key(key.to_owned()).with_payload(n.to_string())
    }

    /// Commits events, in one transaction.
    async fn commit(&self, events: &[(&str, i64)]) -> Outcome {
        let mut transaction = self.subject.begin().await?;
        for (key, n) in events {
            transaction.append(&Self::topic()?, Self::event(key, *n)).await?;
        }
        Ok(transaction.commit().await?)
    }

    /// What a claim gives as soon as it gives so many.
    async fn claimed(&self, store: &dyn Store, claim: &Claim, n: usize) -> Result<Vec<Pending>, Violation> {
        let began = tokio::time::Instant::now();
        loop {
            let found = store.claim(claim).await?;
            if found.len() >= n {
                return Ok(found);
            }
            ensure!(
                began.elapsed() < self.soon(),
                "{n} events are there, and {} are given: {}",
                found.len(),
                told(&found)
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// All events that can be published, as soon as there are so many.
    async fn all(&self, store: &dyn Store, n: usize) -> Result<Vec<Pending>, Violation> {
        self.claimed(store, &everything(), n).await
    }
}

/// Asks for all that can be published.
fn everything() -> Claim {
    Claim::new(shards(), 1000, 1 << 20)
}

fn shards() -> Vec<Shard> {
    (0..Shard::COUNT).map(Shard).collect()
}

/// The number of an event of [`Cx::event`].
fn number(pending: &Pending) -> i64 {
    let event = pending.event.as_ref().ok();
    let payload = event.and_then(|(_, event)| event.payload()).map(|bytes| String::from_utf8_lossy(bytes));
    payload.and_then(|text| text.parse().ok()).unwrap_or(-1)
}

/// The numbers of each key, in the order given.
fn numbers(found: &[Pending]) -> BTreeMap<String, Vec<i64>> {
    let mut numbers: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for pending in found {
        let key = String::from_utf8_lossy(&pending.key).into_owned();
        numbers.entry(key).or_default().push(number(pending));
    }
    numbers
}

fn told(found: &[Pending]) -> String {
    format!("{:?}", numbers(found))
}

/// Ends the case with a violation unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::conformance::Violation::new(format!($($text)+)));
        }
    };
}
use ensure;
