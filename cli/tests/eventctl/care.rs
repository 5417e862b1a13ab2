//! `eventctl` where it must be careful or patient: severe verbs, contexts, interrupted replays, alarms.

use std::process::Command;

use crate::shell::{Shell, text};

#[test]
fn what_destroys_needs_the_name() {
    let shell = Shell::new();
    shell.ok(&["publish", "orders", "{}"]);
    for verb in ["purge", "delete"] {
        let (code, _, stderr) = shell.told(&["topic", verb, "orders", "--execute"]);
        assert!(code == 5 && stderr.contains("--confirm orders"), "{verb}: {code} {stderr}");
        let (code, ..) = shell.told(&["topic", verb, "orders", "--execute", "--confirm", "others"]);
        assert_eq!(code, 5, "{verb} with another name");
    }
    assert_eq!(shell.ok(&["tail", "orders"]).lines().count(), 1, "nothing was destroyed so far");
    shell.ok(&["topic", "purge", "orders", "--execute", "--confirm", "orders"]);
    assert_eq!(shell.ok(&["tail", "orders"]), "");
    shell.ok(&["topic", "delete", "orders", "--execute", "--confirm", "orders"]);
    assert_eq!(shell.told(&["tail", "orders"]).0, 4);
}

#[test]
fn contexts_are_added_chosen_and_removed() {
    let shell = Shell::new();
    let url = shell.url("a");
    shell.ok(&["publish", "orders", "{}"]);
    shell.ok(&["context", "add", "shop", &url]);
    shell.ok(&["context", "add", "prod", &url, "--label", "PROD", "--protected"]);
    let (code, _, stderr) = shell.told(&["-c", "prod", "publish", "orders", "{}"]);
    assert!(code == 5 && stderr.contains("PROTECTED") && stderr.contains("--confirm prod"), "{stderr}");
    // Neither a change that drops it, nor one that is only tried.
    let (code, _, stderr) = shell.told(&["context", "add", "prod", &url]);
    assert!(code == 5 && stderr.contains("protection"), "{stderr}");
    shell.ok(&["--dry-run", "context", "rm", "prod"]);
    shell.ok(&["context", "show", "prod"]);
    shell.ok(&["context", "use", "shop"]);
    let listed = shell.ok(&["context", "list"]);
    assert!(listed.contains("\"name\":\"shop\"") && listed.contains("\"current\":true"), "{listed}");
    assert_eq!(shell.told(&["context", "use", "nobody"]).0, 4);
    // A project may add a context; it cannot take the protection from one of the user's.
    let project =
        format!("current = \"mine\"\n[context.prod]\nurl = \"{url}\"\n[context.mine]\nurl = \"{url}\"\n");
    std::fs::write(shell.folder().join("eventctl.toml"), project).unwrap();
    assert_eq!(shell.told(&["-c", "prod", "publish", "orders", "{}"]).0, 5);
    assert_eq!(shell.told(&["-c", "mine", "tail", "orders"]).0, 0);
    let (code, _, stderr) = shell.told(&["-c", "mine", "publish", "orders", "{}"]);
    assert!(code == 5 && stderr.contains("--confirm prod"), "the same place under another name: {stderr}");
    shell.ok(&["context", "rm", "shop"]);
    assert_eq!(shell.told(&["-c", "shop", "tail", "orders"]).0, 2);
}

/// Passwords are where the configuration says, and not in it.
#[test]
fn a_context_names_where_its_password_is() {
    let shell = Shell::new();
    let add = |name: &str, password: &str| {
        shell.told(&["context", "add", name, "postgres://me@127.0.0.1:1/shop", "--password", password])
    };
    let (code, _, stderr) = add("prod", "s3cret");
    assert!(code == 2 && stderr.contains("env:NAME"), "{stderr}");
    assert_eq!(add("prod", "env:NO_SUCH_VARIABLE").0, 0);
    let listed = shell.ok(&["context", "show", "prod"]);
    assert!(listed.contains("\"password\":\"env:NO_SUCH_VARIABLE\""), "{listed}");
    let (code, _, stderr) = shell.told(&["context", "test", "prod"]);
    assert!(code == 2 && stderr.contains("env:NO_SUCH_VARIABLE"), "{stderr}");
    // It is read, and nothing of it is told.
    let run = shell.folder().join("run");
    assert_eq!(add("prod", &format!("cmd:touch {}; echo s3cret", run.display())).0, 0);
    let (code, stdout, stderr) = shell.told(&["-vv", "context", "test", "prod"]);
    assert!(code == 6 && run.exists() && !format!("{stdout}{stderr}").contains("s3cret"), "{stderr}");
    // A project's file names no program to run.
    std::fs::remove_file(&run).unwrap();
    let project = format!(
        "[context.theirs]\nurl = \"postgres://me@127.0.0.1:1/shop\"\npassword = \"cmd:touch {}\"\n",
        run.display()
    );
    std::fs::write(shell.folder().join("eventctl.toml"), project).unwrap();
    for arguments in [&["-c", "theirs", "tail", "orders"][..], &["context", "copy", "theirs", "mine"]] {
        let (code, _, stderr) = shell.told(arguments);
        assert!(code == 5 && stderr.contains("eventctl.toml") && !run.exists(), "{arguments:?}: {stderr}");
    }
}

#[test]
fn a_plan_is_written_run_verified_and_resumed() {
    let shell = Shell::new();
    let body = ["publish", "t", "{\"n\":{n}}", "-k", "k{n}", "--count", "60", "--template", "--type", "a"];
    shell.ok(&body);
    assert!(shell.ok(&["tail", "t", "--from", "start", "--full"]).contains("{\"n\":60}"));
    let planned = ["replay", "plan", "t", "--to", "t.copy", "-O", "plan.json", "--max", "50"];
    shell.ok(&planned);
    let (code, _, stderr) = shell.told(&["replay", "run", "plan.json", "--execute"]);
    assert!(code == 5 && stderr.contains("--max is 50"), "the plan keeps its bound: {stderr}");
    shell.ok(&["replay", "plan", "t", "--to", "t.copy", "-O", "plan.json"]);
    // What comes after the plan is not in it.
    shell.ok(&["publish", "t", "{}", "--type", "a"]);
    let rated = ["replay", "run", "plan.json", "--rate", "1000/s", "--verify", "--execute"];
    let (code, _, stderr) = shell.told(&rated);
    assert!(code == 0 && stderr.contains("verified: 60 events"), "{stderr}");
    assert_eq!(shell.ok(&["tail", "t.copy", "--from", "start"]).lines().count(), 60);

    // Killed in the middle, it goes on where its last note says, and everything is there.
    let started = Command::new(env!("CARGO_BIN_EXE_eventctl"))
        .args(["-c", &shell.url("a"), "replay", "run", "t", "--to", "t.slow", "--rate", "10/s"])
        .args(["--checkpoint-every", "5", "--execute"])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let copied = || shell.told(&["tail", "t.slow", "--from", "start"]).1.lines().count();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while copied() < 7 {
        assert!(std::time::Instant::now() < deadline, "the replay does not begin");
    }
    let pid = started.id().to_string();
    assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
    let said = String::from_utf8(started.wait_with_output().unwrap().stderr).unwrap();
    let id = said.split_whitespace().find(|word| word.starts_with("rp_")).unwrap().trim_end_matches(':');
    let before = shell.ok(&["tail", "t.slow", "--from", "start"]).lines().count();
    assert!((1..61).contains(&before), "killed too early or too late: {before}");
    let (code, _, stderr) = shell.told(&["replay", "run", "--resume", id, "--verify", "--execute"]);
    assert_eq!(code, 0, "{stderr}");
    let copies = shell.ok(&["tail", "t.slow", "--from", "start"]);
    let ids: std::collections::HashSet<String> = copies
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["ce"]["id"].to_string())
        .collect();
    assert_eq!(ids.len(), 61, "after the resume");
    assert!(
        copies.lines().count() < 61 + 12,
        "{} copies: more than a checkpoint was repeated",
        copies.lines().count()
    );
    assert_eq!(shell.told(&["replay", "run", "--resume", "rp_unknown", "--execute"]).0, 4);
}

#[test]
fn lines_that_are_broken_can_be_skipped() {
    let shell = Shell::new();
    std::fs::write(shell.folder().join("in.jsonl"), "{\"n\":1}\n{broken\n{\"n\":3}\n").unwrap();
    let (code, _, stderr) =
        shell.told(&["publish", "t", "--file", "in.jsonl", "--input", "jsonl", "--on-error", "skip"]);
    assert!(code == 3 && stderr.contains("line 2"), "{code} {stderr}");
    assert_eq!(shell.ok(&["tail", "t"]).lines().count(), 2);
}

#[tokio::test]
async fn lag_is_told_to_monitors_and_parking_is_no_lag() {
    use eventbus::{Failure, Meta, Service, Topic};
    async fn refuse(Meta(_): Meta) -> Result<(), Failure> {
        Err(Failure::permanent("never", "no"))
    }
    let shell = Shell::new();
    let bus = eventbus::connect(&shell.url("a")).await.unwrap();
    let topic = Topic::new("orders").unwrap();
    let running = Service::new("billing").on(topic.clone(), refuse).with_state(()).start(&bus).await.unwrap();
    for _ in 0..3 {
        shell.ok(&["publish", "orders", "{}", "-k", "same"]);
    }
    while running.counts().parked < 3 {
        tokio::task::yield_now().await;
    }
    running.stop().await.unwrap();
    assert_eq!(shell.told(&["inspect", "lag", "--crit", "0"]).0, 0, "parked events are not behind");
    assert!(!shell.ok(&["inspect", "topics"]).contains(".parked"));
    assert!(shell.ok(&["inspect", "topics", "--internal"]).contains("orders.billing.parked"));
    for _ in 0..5 {
        shell.ok(&["publish", "orders", "{}"]);
    }
    let (code, stdout, _) = shell.told(&["inspect", "lag", "--warn", "2", "--format", "nagios"]);
    assert!(code == 1 && stdout.starts_with("LAG WARNING"), "{code} {stdout}");
    let (code, stdout, _) = shell.told(&["inspect", "lag", "--crit", "2", "--format", "nagios"]);
    assert!(code == 2 && stdout.starts_with("LAG CRITICAL"), "{code} {stdout}");
    let stdout = shell.ok(&["inspect", "lag", "--format", "prometheus"]);
    assert!(stdout.contains("evt_consumer_lag{messaging_consumer_group_name=\"billing\",messaging_destination_name=\"orders\"} 5"), "{stdout}");
    let doctor = shell.ok(&["doctor"]);
    assert!(
        doctor.contains("\"check\":\"integrity\",\"detail\":\"ok\"")
            || doctor.contains("\"check\":\"integrity\""),
        "{doctor}"
    );
    for check in ["journal mode", "library"] {
        assert!(doctor.contains(check), "{doctor}");
    }
}

#[test]
fn records_take_other_forms() {
    let shell = Shell::new();
    shell.ok(&["publish", "t", "a: \"b\"", "-k", "1", "--type", "x"]);
    shell.ok(&["publish", "t", "two", "-k", "1", "--type", "x"]);
    let line = shell.ok(&["tail", "t", "--from", "start", "--format", "{key}\\t{type}\\t{value}"]);
    assert_eq!(line, "1\tx\ta: \"b\"\n1\tx\ttwo\n");
    assert_eq!(shell.ok(&["tail", "t", "--from", "start", "--sample", "1/2"]).lines().count(), 1);
    shell.ok(&["tail", "t", "--from", "start", "--save", "bodies"]);
    let saved: Vec<_> = std::fs::read_dir(shell.folder().join("bodies")).unwrap().collect();
    assert_eq!(saved.len(), 2);
    let yaml = shell.ok(&["inspect", "topics", "-o", "yaml"]);
    assert!(yaml.starts_with("- topic: \"t\"") || yaml.starts_with("- "), "{yaml}");
    assert!(yaml.contains("topic: \"t\"\n"), "{yaml}");
    let csv = shell.ok(&["tail", "t", "--from", "start", "-o", "csv", "--meta-only"]);
    assert_eq!(csv.lines().count(), 3, "a header and two rows: {csv}");
}

/// What is idle, what is around a group's positions, and what somebody who helps is given.
#[tokio::test]
async fn a_bus_is_looked_at_closely() {
    let shell = Shell::new();
    for n in 0..6 {
        shell.ok(&["publish", "t", &format!("{n}"), "-k", "k"]);
    }
    shell.ok(&["topic", "create", "unused"]);
    let idle = |time: &str| shell.lines(&["inspect", "topics", "--idle", time]);
    assert_eq!((idle("1h").len(), idle("1h")[0]["topic"].as_str()), (1, Some("unused")));
    let started = std::time::Instant::now();
    while idle("10ms").len() != 2 {
        assert!(started.elapsed().as_secs() < 10, "a topic without news is not idle");
    }
    // A group that handled four of them.
    let bus = eventbus::connect(&shell.url("a")).await.unwrap();
    let topic = eventbus::Topic::new("t").unwrap();
    let group = eventbus::Subscription::group(topic, eventbus::Group::new("billing").unwrap())
        .with_start(eventbus::Start::Earliest);
    let consumer = bus.transport().subscribe(&group).await.unwrap();
    let mut handled = 0;
    while handled < 4 {
        let most = std::num::NonZeroUsize::new(4 - handled).unwrap();
        if let eventbus::Polled::Deliveries(found) = consumer.poll(most).await.unwrap() {
            let acks: Vec<_> = found.iter().map(|one| (one.token, eventbus::Settle::Ack)).collect();
            consumer.settle(&acks).await.unwrap().all().unwrap();
            handled += found.len();
        }
    }
    bus.close().await.unwrap();
    let peeked = shell.lines(&["inspect", "group", "billing", "--peek", "1"]);
    let bodies: Vec<_> = peeked.iter().map(|record| record["value"]["data"].clone()).collect();
    assert_eq!(bodies, [3, 4].map(serde_json::Value::from));
    assert_eq!(shell.lines(&["inspect", "group", "billing", "--peek", "10"]).len(), 6);
    // The bundle names what there is, and no bodies.
    shell.told(&["doctor", "--bundle", "doctor.json"]);
    let bundle = std::fs::read_to_string(shell.folder().join("doctor.json")).unwrap();
    let bundle: serde_json::Value = serde_json::from_str(&bundle).unwrap();
    assert_eq!(bundle["groups"][0]["group"], "billing");
    assert!(
        bundle["checks"].as_array().unwrap().len() > 3 && bundle["capabilities"]["replay"].is_string(),
        "{bundle}"
    );
    let partitions = bundle["topics"].as_array().unwrap().iter().find(|topic| topic["topic"] == "t").unwrap();
    let kept = partitions["partitions"].as_array().unwrap().iter().map(|part| part["kept"].as_u64().unwrap());
    assert_eq!(kept.sum::<u64>(), 6);
}

/// A shell completes names of contexts, topics and groups; a line that is being typed runs no program and shows no errors.
#[test]
fn names_are_completed() {
    let shell = Shell::new();
    let url = shell.url("a");
    shell.ok(&["publish", "orders", "{}"]);
    shell.ok(&["publish", "payments", "{}"]);
    shell.ok(&["context", "add", "shop", &url, "--use"]);
    let completed = |words: &[&str]| {
        let mut line = vec!["--", "eventctl"];
        line.extend(words);
        let index = (line.len() - 2).to_string();
        let mut command = shell.command(&line);
        let told = command.env("COMPLETE", "bash").env("_CLAP_COMPLETE_INDEX", &index).env("_CLAP_IFS", "\n");
        let told = told.output().unwrap();
        assert!(told.status.success() && told.stderr.is_empty(), "{words:?}: {}", text(&told.stderr));
        text(&told.stdout).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(completed(&["tail", "or"]), ["orders"]);
    assert_eq!(completed(&["-c", &url, "replay", "plan", "pay"]), ["payments"]);
    assert_eq!(completed(&["context", "use", "s"]), ["shop"]);
    assert_eq!(completed(&["-c", "sh"]), ["shop"]);
    assert!(completed(&["inspect", "lag", "x"]).is_empty());
    assert!(completed(&["-c", "sqlite:///nowhere/x.db", "tail", "o"]).is_empty());
    assert!(!shell.folder().join("x.db").exists());
    let run = shell.folder().join("run");
    let command = format!("cmd:touch {}", run.display());
    shell.ok(&["context", "add", "prod", "postgres://me@127.0.0.1:1/x", "--password", &command]);
    assert!(completed(&["-c", "prod", "tail", "o"]).is_empty() && !run.exists());
    for name in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(shell.ok(&["completions", name]).contains("eventctl"), "{name}");
    }
}

/// A time-out ends what hangs, and not what is long because it was told to be.
#[test]
fn long_work_has_no_time_out() {
    let shell = Shell::new();
    let slowly =
        ["publish", "t", "{n}", "--template", "--count", "15", "--rate", "10/s", "--timeout", "500ms"];
    let (code, _, stderr) = shell.told(&slowly);
    assert_eq!(code, 0, "{stderr}");
    let (code, _, stderr) = shell.told(&[
        "replay",
        "run",
        "t",
        "--to",
        "copy",
        "--rate",
        "10/s",
        "--timeout",
        "500ms",
        "--execute",
    ]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(shell.lines(&["tail", "copy", "-n", "20"]).len(), 15);
}
