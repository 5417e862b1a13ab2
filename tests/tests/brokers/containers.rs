//! Brokers in containers: the same suite, and the same faults.

use std::process::Command;
use std::time::{Duration, Instant};

use eventbus::conformance::CASES;
use xtask::brokers::{Engine, Kind};

/// The official image is taken where an engine answers; this one has it under the official name, without a registry.
#[test]
fn a_broker_in_a_container_passes_the_suite_and_is_killed_and_started() {
    let engine = Engine::start().unwrap();
    engine.build_nats().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["nats::", "nats_own::"])
        .env("DOCKER_HOST", engine.address())
        .env_remove(Kind::Nats.variable())
        .env("EVENTBUS_BROKERS", "containers")
        // Not those that are up as processes.
        .env("TMPDIR", folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let passed = format!("{} passed; 0 failed", CASES.len() + 3);
    assert!(said.contains(&passed), "not {passed}: {said}");
    // The last goes when the process has gone.
    let end = Instant::now() + Duration::from_secs(20);
    while !engine.containers().unwrap().is_empty() {
        assert!(Instant::now() < end, "a container outlives its process: {:?}", engine.containers());
        std::thread::sleep(Duration::from_millis(50));
    }
}
