//! `eventctl` as a person and a script use it, on an SQLite file.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test reports by panicking")]

mod brokers;
mod care;
mod filters;
mod inbox;
mod outbox;
mod redrive;
mod schemas;
mod shell;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use self::shell::{Shell, text};

#[test]
fn what_is_published_is_read_back() {
    let shell = Shell::new();
    let output = shell.run(&[
        "publish",
        "orders",
        "{\"id\":7}",
        "--type",
        "shop.order.placed",
        "-k",
        "7",
        "-H",
        "a=1",
        "-H",
        "a=2",
    ]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(output.stdout.is_empty());
    assert!(text(&output.stderr).contains("published orders/"), "{}", text(&output.stderr));
    let tailed = shell.lines(&["tail", "orders"]);
    assert_eq!(tailed.len(), 1);
    assert_eq!(tailed[0]["value"], serde_json::json!({"enc": "json", "data": {"id": 7}}));
    assert_eq!(tailed[0]["ce"]["type"], "shop.order.placed");
    let place = tailed[0]["ref"].as_str().unwrap();
    let one = shell.lines(&["inspect", "message", place]);
    assert_eq!(one[0]["key"]["data"], "7");
    let topics = shell.lines(&["inspect", "topics"]);
    assert_eq!((&topics[0]["topic"], &topics[0]["kept"]), (&"orders".into(), &1.into()));
}

/// The version names the transports that this build can reach, all of them here.
#[test]
fn the_version_names_the_transports() {
    let shell = Shell::new();
    let version = &shell.lines(&["version", "-o", "json"])[0];
    assert_eq!(version["eventctl"], env!("CARGO_PKG_VERSION"));
    let schemes = ["memory", "sqlite", "postgres", "kafka", "nats", "amqp", "redis"];
    let named = version["transports"].as_array().unwrap();
    assert!(schemes.iter().all(|scheme| named.contains(&Value::from(*scheme))), "{version}");
    assert!(shell.ok(&["version"]).contains("postgres, "));
}

/// ids, keys, headers, time and bytes survive a pipe into another bus.
#[test]
fn a_pipe_is_lossless() {
    let shell = Shell::new();
    let bodies = "{\"n\": 1}\nnot json \u{1f980}\n\n";
    let output = shell.run_with(
        &[
            "publish",
            "t",
            "-",
            "--input",
            "lines",
            "-k",
            "k",
            "-H",
            "x=ü",
            "--subject",
            "s",
            "--ce",
            "correlationid=c",
        ],
        bodies,
    );
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(shell.run(&["publish", "t", "--null", "-k", "gone"]).status.success());
    let full = ["tail", "t", "--from", "start", "--until-end", "-o", "jsonl", "--full"];
    let records = text(&shell.run(&full).stdout);
    assert_eq!(records.lines().count(), 4);
    let other = shell.url("b");
    let mut publish = shell
        .command(&["-c", &other, "publish", "t2", "-", "--input", "envelope"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    publish.stdin.take().unwrap().write_all(records.as_bytes()).unwrap();
    assert!(publish.wait().unwrap().success());
    let again = shell
        .command(&["-c", &other, "tail", "t2", "--from", "start", "-o", "jsonl", "--full"])
        .output()
        .unwrap();
    let bare = |lines: &str| -> Vec<String> {
        let mut all: Vec<String> = lines
            .lines()
            .map(|line| {
                let mut record: Value = serde_json::from_str(line).unwrap();
                for place in ["ref", "dest", "partition", "offset", "ts", "broker"] {
                    record.as_object_mut().unwrap().remove(place);
                }
                record.to_string()
            })
            .collect();
        all.sort();
        all
    };
    assert_eq!(bare(&records), bare(&text(&again.stdout)));
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let shell = Shell::new();
    let lines: String = (0..5_000).map(|n| format!("{{\"n\":{n}}}\n")).collect();
    assert!(shell.run_with(&["publish", "t", "-", "--input", "jsonl"], &lines).status.success());
    let script = format!(
        "set -o pipefail; '{}' -c '{}' tail t --from start -o jsonl | head -1 | wc -l; echo code ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_eventctl"),
        shell.url("a")
    );
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(text(&output.stdout), "1\ncode 0\n", "{}", text(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn exit_codes_tell_what_happened() {
    let shell = Shell::new();
    assert!(shell.run(&["publish", "t", "x"]).status.success());
    let cases: &[(&[&str], i32, &str)] = &[
        (&["tail", "missing"], 4, "no topic missing"),
        (&["inspect", "group", "nobody"], 4, "no group nobody"),
        (&["inspect", "message", "t/0@999"], 4, "no record"),
        (&["inspect", "message", "nonsense"], 2, "topic/partition@offset"),
        (&["publish", "bad topic", "x"], 2, "topic name"),
        (&["publish", "t"], 2, "standard input"),
        (&["topic", "create", "t", "--partitions", "3", "--if-not-exists"], 1, "keys would move"),
        (&["topic", "delete", "missing", "--execute"], 4, "no topic"),
        (&["publish", "t", "x", "--rate", "5/s"], 2, "--count"),
        (&["publish", "t", "x", "--template"], 2, "--count"),
        (&["replay", "run", "t", "--to", "t", "--execute"], 5, "same topic"),
        (&["publish", "t", "-H", "novalue", "x"], 2, "NAME=VALUE"),
        (&["frobnicate"], 2, "unrecognized"),
    ];
    for (arguments, code, expected) in cases {
        let (found, stderr) = shell.code(arguments);
        assert_eq!(found, *code, "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?} does not say {expected:?}: {stderr}");
    }
    let unreachable =
        shell.command(&["-c", "sqlite:///nowhere/at/all.db", "inspect", "topics"]).output().unwrap();
    assert_eq!(unreachable.status.code(), Some(6), "{}", text(&unreachable.stderr));
    let nothing = shell.command(&["inspect", "topics"]).output().unwrap();
    assert_eq!(nothing.status.code(), Some(2), "{}", text(&nothing.stderr));
}

/// Read-only and protected contexts hold for every command that writes.
#[test]
fn contexts_protect_from_writing() {
    let shell = Shell::new();
    assert!(shell.run(&["publish", "t", "x"]).status.success());
    let config = shell.folder().join("config.toml");
    let url = shell.url("a");
    let contexts = format!(
        "current = \"look\"\n[context.look]\nurl = \"{url}\"\nread_only = true\n[context.prod]\nurl = \"{url}\"\nprotected = true\n"
    );
    std::fs::write(&config, contexts).unwrap();
    let run = |context: &str, arguments: &[&str]| {
        let config = config.to_str().unwrap();
        let output = shell
            .command(&["--config", config, "-c", context])
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.code().unwrap(), text(&output.stderr))
    };
    let writes: &[&[&str]] = &[
        &["publish", "t", "x"],
        &["topic", "create", "n"],
        &["topic", "delete", "t", "--execute"],
        &["topic", "purge", "t", "--execute"],
        &["replay", "run", "t", "--to", "n", "--execute"],
    ];
    for arguments in writes {
        for context in ["look", "prod"] {
            let (code, stderr) = run(context, arguments);
            assert_eq!(code, 5, "{context} {arguments:?}: {stderr}");
        }
    }
    assert_eq!(shell.lines(&["tail", "t"]).len(), 1, "something was written");
    assert_eq!(run("prod", &["publish", "t", "x", "--confirm", "prod"]).0, 0);
    assert_eq!(run("look", &["tail", "t"]).0, 0);
    assert_eq!(run(&url, &["publish", "t", "x"]).0, 5, "an address is as protected as its contexts");
    assert_eq!(run("nowhere", &["tail", "t"]).0, 2);
}

#[test]
fn a_range_is_replayed_into_a_new_topic() {
    let shell = Shell::new();
    let lines: String = (0..40).map(|n| format!("{{\"n\":{n}}}\n")).collect();
    assert!(
        shell
            .run_with(&["publish", "t", "-", "--input", "jsonl", "-k", "k", "--type", "a"], &lines)
            .status
            .success()
    );
    assert!(shell.run(&["publish", "t", "{}", "-k", "k", "--type", "b"]).status.success());
    let flags = ["t", "--to", "t.replay", "--type", "a", "--range", "10:30"];
    let planned = shell.lines(&[&["replay", "plan"], &flags[..]].concat());
    assert_eq!((&planned[0]["type"], &planned[0]["events"]), (&"a".into(), &20.into()));
    assert_eq!(shell.code(&["tail", "t.replay"]).0, 4, "a plan must write nothing");
    let (code, stderr) = shell.code(&[&["replay", "run"], &flags[..], &["--max", "5", "--execute"]].concat());
    assert_eq!(code, 5, "{stderr}");
    assert!(shell.run(&[&["replay", "run"], &flags[..], &["--execute"]].concat()).status.success());
    let copies = shell.lines(&["tail", "t.replay", "--from", "start"]);
    let numbers: Vec<_> =
        copies.iter().map(|record| record["value"]["data"]["n"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (10..30).collect::<Vec<_>>());
    let originals = shell.lines(&["tail", "t", "--range", "10:30"]);
    assert_eq!(copies[0]["ce"]["id"], originals[0]["ce"]["id"]);
}

#[test]
fn doctor_and_capabilities_answer() {
    let shell = Shell::new();
    let (code, stderr) = shell.code(&["doctor"]);
    assert_eq!(code, 6, "reading must not make a file: {stderr}");
    assert!(shell.run(&["topic", "create", "t"]).status.success());
    let checks = shell.lines(&["doctor"]);
    assert!(checks.iter().all(|check| check["state"] == "ok"), "{checks:?}");
    assert!(checks.iter().any(|check| check["check"].as_str().unwrap().starts_with("canary")));
    let claims = shell.lines(&["capabilities"]);
    assert!(claims.iter().any(|row| row["capability"] == "durability of Ok" && row["claim"] == "flushed"));
}

/// The help of every command is checked in; a change shows in review. UPDATE_HELP=1 rewrites it.
#[test]
fn help_pages_are_as_checked_in() {
    let mut page = String::new();
    help(&Shell::new(), &mut Vec::new(), &mut page);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help.txt");
    if std::env::var_os("UPDATE_HELP").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let known = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = page.lines().zip(known.lines()).find(|(now, before)| now != before);
    assert!(
        differs.is_none() && page.len() == known.len(),
        "run with UPDATE_HELP=1 if the change is meant: {differs:?}"
    );
}

/// Writes the page of a command and those below it. What is global is on the first page alone.
fn help(shell: &Shell, command: &mut Vec<String>, page: &mut String) {
    let arguments: Vec<&str> = command.iter().map(String::as_str).chain(["--help"]).collect();
    let output = shell.command(&arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}");
    let all = text(&output.stdout);
    let own = all.split("\nGlobal options:").next().unwrap();
    assert!(
        command.is_empty() || own.contains("Examples:") || own.contains("Commands:"),
        "{command:?} shows no example"
    );
    page.push_str(&format!(
        "# eventctl {}\n{}\n",
        arguments.join(" "),
        if command.is_empty() { &all } else { own }
    ));
    let commands = own.split("\nCommands:\n").nth(1).and_then(|rest| rest.split("\n\n").next());
    for line in commands.unwrap_or_default().lines() {
        if let Some(name) = line.strip_prefix("  ").filter(|line| !line.starts_with(' ')) {
            command.push(name.split_whitespace().next().unwrap().to_owned());
            help(shell, command, page);
            command.pop();
        }
    }
}

/// What was read before a broken line is stored and counted; a reader of receipts that leaves stops nothing.
#[test]
fn partial_work_is_told() {
    let shell = Shell::new();
    let lines: String = (0..300).map(|n| format!("{{\"n\":{n}}}\n")).collect();
    let output =
        shell.run_with(&["publish", "t", "-", "--input", "jsonl"], &format!("{lines}broken\n{{}}\n"));
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains("line 301") && text(&output.stderr).contains("300 events"),
        "{}",
        text(&output.stderr)
    );
    let script = format!(
        "seq 2000 | '{}' -c '{}' publish u - --input lines --report jsonl | head -1 > /dev/null; echo ${{PIPESTATUS[1]}}",
        env!("CARGO_BIN_EXE_eventctl"),
        shell.url("a")
    );
    assert_eq!(text(&Command::new("bash").args(["-c", &script]).output().unwrap().stdout), "0\n");
    let topics = shell.lines(&["inspect", "topics"]);
    let kept: Vec<_> = topics
        .iter()
        .map(|topic| (topic["topic"].as_str().unwrap(), topic["kept"].as_u64().unwrap()))
        .collect();
    assert_eq!(kept, [("t", 300), ("u", 2_000)]);
}
