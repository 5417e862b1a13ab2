//! The house rules that a machine can read: arrows between modules, file lengths, public names.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test reports by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// Most lines of a file.
const MAX_LINES: usize = 800;

/// What a module may not use: `(module, forbidden, why)`. Modules of `eventbus` by their place in it, others by
/// their place in the workspace.
const ARROWS: &[(&str, &[&str], &str)] = &[
    ("error.rs", &["crate::transport", "crate::bus", "crate::envelope"], "errors know nobody"),
    ("header.rs", &["crate::transport", "crate::bus", "crate::envelope"], "headers are below the envelope"),
    (
        "envelope.rs",
        &["crate::transport", "crate::bus", "crate::subscription", "crate::event"],
        "the envelope is below the contract",
    ),
    ("capability.rs", &["crate::transport", "crate::bus", "crate::subscription"], "capabilities are data"),
    ("subscription.rs", &["crate::transport", "crate::bus"], "a subscription is what a transport is given"),
    ("codec/", &["crate::transport", "crate::bus", "crate::envelope"], "codecs see bytes"),
    (
        "transport/",
        &[
            "crate::bus",
            "crate::router",
            "crate::driver",
            "crate::handler",
            "crate::extract",
            "crate::layer",
            "crate::service",
        ],
        "a transport never sees handlers, routers or layers",
    ),
    (
        "bus.rs",
        &["crate::driver", "crate::service", "crate::handler"],
        "a service knows the bus, not the other way",
    ),
    ("observer.rs", &["crate::driver", "crate::bus"], "an observer is told, and asks nobody"),
    ("driver/", &["crate::testing", "crate::conformance"], "the driver knows only the contract"),
    ("conformance/", &["crate::bus"], "the suite knows only the contract"),
    (
        "cli/src/out.rs",
        &["crate::context", "crate::record", "crate::reader"],
        "output knows forms, not records",
    ),
    (
        "outbox/src/relay/flow.rs",
        &["tokio", "crate::outbox", "crate::backend", "std::time::Instant"],
        "what a relay has in hand is a state without input, output or clock",
    ),
    ("outbox/src/row.rs", &["crate::store", "crate::relay", "sqlx"], "rows know no database"),
    (
        "outbox/src/relay/",
        &["crate::postgres", "crate::sqlite", "sqlx"],
        "a relay knows stores, not databases",
    ),
    ("outbox/src/inbox.rs", &["crate::relay", "crate::store"], "handlers know no relay"),
    ("cli/src/range.rs", &["crate::context", "crate::reader", "crate::out"], "ranges are below readers"),
    ("cli/src/record.rs", &["crate::context", "crate::reader", "crate::out"], "records are below readers"),
    ("examples/eshop/src/contracts.rs", &["crate::shop", "crate::store"], "contracts know no service"),
    ("examples/eshop/src/machine.rs", &["crate::shop", "crate::store", "eventbus::"], "the table is pure"),
];

/// Who knows no transport by name, and why.
const KNOW_NO_TRANSPORT: &[(&str, &str)] = &[
    ("driver/", "the driver knows only the contract"),
    ("conformance/", "the suite knows only the contract"),
    ("cli/src/", "the command line knows addresses, not transports"),
    ("examples/", "services know addresses, not transports"),
];

/// The modules of the transports.
const TRANSPORTS: &[&str] = &[
    "transport::kafka",
    "transport::memory",
    "transport::nats",
    "transport::postgres",
    "transport::rabbitmq",
    "transport::redis",
    "transport::sqlite",
];

/// Crates whose types may not stand in public signatures outside of a transport's own module.
const BROKER_CRATES: &[&str] = &["rusqlite::", "rdkafka::", "lapin::", "async_nats::", "redis::", "sqlx::"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() {
            if name != "target" && name != ".git" {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn all_sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    sources(&root(), &mut found);
    assert!(found.len() > 30, "the walk found only {} files", found.len());
    found
        .into_iter()
        .map(|path| {
            (path.strip_prefix(root()).unwrap().display().to_string(), fs::read_to_string(&path).unwrap())
        })
        .collect()
}

#[test]
fn no_file_is_longer_than_it_may_be() {
    let long: Vec<_> = all_sources()
        .into_iter()
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, n)| *n > MAX_LINES)
        .collect();
    assert!(long.is_empty(), "split by concept: {long:?}");
    let map = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    assert!(map.lines().count() <= 150, "ARCHITECTURE.md is a map, not a manual");
}

#[test]
fn arrows_point_one_way() {
    let wrong: Vec<_> = all_sources()
        .iter()
        .flat_map(|(path, text)| wrong_arrows(path.strip_prefix("eventbus/src/").unwrap_or(path), text))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn wrong_arrows(path: &str, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    // A module's own tests may use what is above it.
    let no_transport = KNOW_NO_TRANSPORT.iter().map(|(module, why)| (*module, TRANSPORTS, *why));
    let all = ARROWS.iter().copied().chain(no_transport);
    let of = all.filter(|(module, ..)| path.starts_with(module) && !path.contains("/tests/"));
    for (module, forbidden, why) in of {
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for (at, line) in code.enumerate() {
            for name in forbidden.iter().filter(|name| line.contains(**name)) {
                wrong.push(format!("{path} line {}: {name} in {module}: {why}", at + 1));
            }
        }
    }
    wrong
}

#[test]
fn a_wrong_arrow_is_found() {
    assert_eq!(wrong_arrows("transport/memory/mod.rs", "use crate::router::Router;").len(), 1);
    assert!(wrong_arrows("transport/memory/mod.rs", "/// like crate::router").is_empty());
    assert_eq!(wrong_arrows("driver/run.rs", "use crate::transport::nats::Nats;").len(), 1);
}

#[test]
fn broker_types_stay_in_their_modules() {
    let leaks: Vec<_> = all_sources()
        .iter()
        // What errors of `sqlx` mean is asked with one in hand.
        .filter(|(path, _)| path.starts_with("eventbus/src/") && path != "eventbus/src/sql.rs")
        .flat_map(|(path, text)| {
            let public = text.lines().filter(|line| {
                line.trim_start().starts_with("pub ") || line.trim_start().starts_with("pub fn")
            });
            let found: Vec<_> = public
                .filter(|line| BROKER_CRATES.iter().any(|name| line.contains(name)))
                .map(|line| format!("{path}: {}", line.trim()))
                .collect();
            found
        })
        .collect();
    assert!(leaks.is_empty(), "{leaks:#?}");
}

/// The oldest compiler that the workspace declares must be enough for every crate it uses.
#[test]
fn dependencies_do_not_need_a_newer_compiler_than_we_declare() {
    let cargo = std::env::var("CARGO").unwrap();
    let output = std::process::Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--all-features"])
        .current_dir(root())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let declared = manifest
        .lines()
        .find_map(|line| line.strip_prefix("rust-version = "))
        .unwrap()
        .trim_matches('"')
        .to_owned();
    let parse =
        |version: &str| version.split('.').map(|part| part.parse::<u32>().unwrap_or(0)).collect::<Vec<_>>();
    let needed = text.split("\"rust_version\":\"").skip(1).filter_map(|rest| rest.split('"').next());
    let mut n_checked = 0;
    for version in needed {
        n_checked += 1;
        assert!(
            parse(version) <= parse(&declared) || version.starts_with(&declared),
            "a crate needs {version}, we declare {declared}"
        );
    }
    assert!(n_checked > 10, "metadata named only {n_checked} versions");
}
