//! The suite that every transport passes: one table of cases, one macro line to run it.
//!
//! ```no_run
//! # #[cfg(feature = "memory")]
//! # mod mine {
//! use eventbus::conformance::Subject;
//! use eventbus::transport::memory::{Memory, Options};
//!
//! eventbus::conformance!(memory, {
//!     let memory = Memory::new(Options::default());
//!     Subject::new("memory", move || {
//!         let memory = memory.reopen();
//!         async move { Ok(std::sync::Arc::new(memory) as std::sync::Arc<dyn eventbus::Transport>) }
//!     })
//! });
//! # }
//! ```
//!
//! - A gate is a lower bound: a stronger claim never skips a weaker case.
//! - A capability that is not claimed is proven absent: the request is refused, or the absence shows.
//! - Only a missing hook skips a case, and the report says which.
//! - Copies are recorded, never removed. Everything of an event is compared.
//! - Nothing waits by sleeping; "nothing arrives" is a quiet period.

mod cases;
mod check;
mod cx;
mod report;
mod subject;

mod durability;
mod groups;
mod kill;
mod lease;
mod order;
mod power;
mod publish;
mod replay;
mod retry;
mod settle;
mod surface;

pub use self::cases::{CASES, Case, Hook, Run};
pub use self::check::{Outcome, Violation};
pub use self::cx::Cx;
pub use self::kill::child;
pub use self::report::{Line, Report};
pub use self::subject::{Power, Settings, Size, Subject};

/// A case is over after so many idle times, or it hangs.
const LIMIT: u32 = 12;

/// Runs one case against a subject and reports how it ended. A panic of the transport is a failure.
pub async fn run(case: &'static Case, subject: &Subject) -> Line {
    let started = tokio::time::Instant::now();
    let outcome = match case.hooks.iter().find(|hook| !subject.has(**hook)) {
        Some(hook) => Outcome::Skipped(*hook),
        None => {
            let cx = Cx::new(case, subject.clone());
            let limit = subject.settings().idle * LIMIT;
            match tokio::time::timeout(limit, tokio::spawn((case.run)(cx))).await {
                Ok(Ok(Ok(()))) => Outcome::Passed,
                Ok(Ok(Err(violation))) => Outcome::Failed(violation),
                Ok(Err(panic)) => Outcome::Failed(Violation::new(format!("panicked: {panic}"))),
                Err(_) => Outcome::Failed(Violation::new(format!("hangs: not over after {limit:?}"))),
            }
        }
    };
    Line { case, outcome, took: started.elapsed(), seed: subject.settings().seed }
}

/// Runs every case, one after another, and collects the report.
pub async fn run_all(subject: &Subject) -> Report {
    let mut lines = Vec::with_capacity(CASES.len());
    for case in CASES {
        lines.push(run(case, subject).await);
    }
    Report::new(subject.name(), lines)
}

/// Runs every case, each on a subject of its own, and collects the report.
///
/// # Errors
/// What making a subject reports.
pub async fn run_each(
    name: &'static str,
    subject: impl Fn() -> crate::Result<Subject>,
) -> crate::Result<Report> {
    let mut lines = Vec::with_capacity(CASES.len());
    for case in CASES {
        lines.push(run(case, &subject()?).await);
    }
    Ok(Report::new(name, lines))
}

/// Runs one case as a test: panics with the report line if it failed, prints a skip.
#[doc(hidden)]
pub fn run_as_test(id: &str, subject: impl FnOnce() -> Subject) {
    let case = CASES.iter().find(|case| case.id == id);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match (case, runtime) {
        (Some(case), Ok(runtime)) => {
            let line = runtime.block_on(async { run(case, &subject()).await });
            assert!(!line.outcome.is_failure(), "{line}");
            println!("{line}");
        }
        (None, _) => unreachable_case(id),
        (_, Err(error)) => unreachable_case(&error.to_string()),
    }
}

#[expect(clippy::panic, reason = "a test reports by panicking")]
fn unreachable_case(what: &str) {
    panic!("the case cannot run: {what}");
}

/// Expands to a module with one named test for each case of the suite.
///
/// The first argument names the module; the second is an expression of type
/// [`Subject`](crate::conformance::Subject), evaluated for each test.
#[macro_export]
macro_rules! conformance {
    ($name:ident, $subject:expr) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $crate::__conformance_list! { tests [$subject] }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __conformance_tests {
    ([$subject:expr] $($id:ident $name:ident [$($hook:ident)*])*) => {
        $(
            #[test]
            fn $name() {
                $crate::conformance::run_as_test(stringify!($id), || $subject);
            }
        )*
    };
}
