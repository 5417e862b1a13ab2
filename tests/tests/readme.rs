//! Every block of the README is run: Rust as a doctest of this package, commands here.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test reports by panicking")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use xtask::brokers::Kind;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn blocks() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    let mut found = Vec::new();
    let mut open: Option<(String, String)> = None;
    for line in text.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(language)) => open = Some((language.to_owned(), String::new())),
            (Some(_), Some(_)) => found.extend(open.take()),
            (Some((_, block)), None) => *block += &format!("{line}\n"),
            (None, None) => {}
        }
    }
    found
}

/// Words that stay when figures are masked.
fn masked(line: &str) -> String {
    let digits = |c: char| if c.is_ascii_digit() { '#' } else { c };
    let masked: String = line.trim().chars().map(digits).collect();
    masked
        .split_whitespace()
        .map(|word| if word.contains('#') && !word.contains("://") { "#" } else { word })
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn every_block_has_somebody_who_runs_it() {
    let languages: Vec<_> = blocks().into_iter().map(|(language, _)| language).collect();
    assert_eq!(languages, ["bash", "text", "bash", "bash", "text", "rust", "toml", "sh"]);
    let ci = std::fs::read_to_string(root().join(".ci/run")).unwrap();
    assert_eq!(blocks()[3].1, "cargo xtask test\n");
    assert!(ci.contains("cargo xtask test"), "CI must call the command that the README names");
    let manifest: toml::Table = blocks()[6].1.parse().unwrap();
    assert!(manifest["dependencies"].get("eventbus").is_some());
}

/// The table of transports is what the transports claim.
#[tokio::test]
async fn the_table_of_transports_is_true() {
    let folder = tempfile::tempdir().unwrap();
    let real = |kind| xtask::brokers::url(kind).unwrap();
    let pages = [
        ("memory://", "memory://".to_owned()),
        ("sqlite://file.db", format!("sqlite://{}/bus.db", folder.path().display())),
        ("kafka://…", real(Kind::Kafka)),
        ("nats://…", real(Kind::Nats)),
        ("postgres://…", real(Kind::Postgres)),
        ("amqp://…", real(Kind::Rabbitmq)),
        ("redis://…", real(Kind::Redis)),
    ];
    let (shown, opened): (Vec<&str>, Vec<String>) = pages.into_iter().unzip();
    let mut pages = Vec::new();
    for url in opened {
        pages.push(eventbus::connect(&url).await.unwrap().transport().capabilities().rows());
    }
    let mut table = format!("| capability | `{}` |\n", shown.join("` | `"));
    table.push_str(&format!("|{}\n", "---|".repeat(1 + shown.len())));
    for (at, (axis, _)) in pages[0].iter().enumerate() {
        let claims: Vec<_> = pages.iter().map(|page| page[at].1.clone()).collect();
        table.push_str(&format!("| {axis} | {} |\n", claims.join(" | ")));
    }
    let (path, marks) = (root().join("README.md"), ["<!-- capabilities -->\n", "<!-- /capabilities -->"]);
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(marks[0]).unwrap();
    let (printed, after) = rest.split_once(marks[1]).unwrap();
    if std::env::var_os("UPDATE_README").is_some() {
        std::fs::write(&path, format!("{before}{}{table}{}{after}", marks[0], marks[1])).unwrap();
        return;
    }
    assert_eq!(printed, table, "cargo xtask conformance --readme writes it anew");
}

/// Both commands of the first screen, as a person types them, on a release build.
#[test]
fn the_first_commands_work_as_printed() {
    let (run, printed, look) = (blocks()[0].1.clone(), blocks()[1].1.clone(), blocks()[2].1.clone());
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path().display().to_string();
    // In a folder of its own and at a free door, so that a shop that is open already is not disturbed.
    // The tool is the one that the tests of the whole workspace built: with its default features alone it would be
    // built once more, and over that one.
    let tool =
        std::env::current_exe().unwrap().parent().unwrap().with_file_name("eventctl").display().to_string();
    let local = |command: &str| {
        command
            .replace("cargo run -q -p eventctl --", &tool)
            .replace("sqlite://eshop", &format!("sqlite://{here}/eshop"))
    };
    let arguments = format!("{} -- --listen 127.0.0.1:0 --bus sqlite://{here}/eshop.db", run.trim());
    let mut shop = Command::new("bash")
        .args(["-c", &format!("exec {arguments}")])
        .current_dir(root())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut seen = Vec::new();
    for line in BufReader::new(shop.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        seen.push(masked(&line));
        if line.contains("all settled") {
            break;
        }
    }
    let expected = printed.lines().map(masked).filter(|line| !line.contains("://"));
    let missing: Vec<_> = expected.filter(|line| !seen.contains(line)).collect();
    let looked: Vec<_> = look
        .lines()
        .map(|line| {
            (
                line.to_owned(),
                Command::new("bash").args(["-c", &local(line)]).current_dir(root()).output().unwrap(),
            )
        })
        .collect();
    drop(shop.kill());
    shop.wait().unwrap();
    assert!(missing.is_empty(), "the README prints what was not seen: {missing:#?}\nseen: {seen:#?}");
    for (line, output) in looked {
        assert!(line.contains("cargo run -q -p eventctl -- "), "{line}: nobody runs it");
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
