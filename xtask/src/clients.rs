//! Clients of other languages, for tests of what they and we make of each other's events: fetched by name, once.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::brokers::{Result, fetch};

/// Threads of one process would fetch into one folder.
fn turn() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The folder of a Java library and of what it needs at run time.
///
/// # Errors
/// What the fetching program said.
pub fn java(group: &str, artifact: &str, version: &str) -> Result<PathBuf> {
    let _turn = turn();
    fetch::maven(group, artifact, version)
}

/// The folder of Python packages (`name==version`) and of what they need.
///
/// # Errors
/// What the fetching program said.
pub fn python(packages: &[&str]) -> Result<PathBuf> {
    let _turn = turn();
    fetch::pip(packages)
}

/// The program that a folder of Go files makes.
///
/// # Errors
/// What the compiler said.
pub fn go(source: &Path, name: &str) -> Result<PathBuf> {
    let _turn = turn();
    fetch::go(source, name)
}

/// Sees to it that TLS of Kafka can be built: its client takes the system's OpenSSL.
///
/// # Errors
/// What installing it said.
pub fn openssl() -> Result<()> {
    let _turn = turn();
    let known = fetch::run(Command::new("pkg-config").args(["--exists", "openssl"]));
    known.map(drop).or_else(|_| fetch::apt("pkg-config libssl-dev"))
}
