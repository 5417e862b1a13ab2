//! jq filters, several topics, forms of output, dry runs.

use crate::shell::Shell;

fn amounts(shell: &Shell, topic: &str, amounts: &[u32]) {
    for amount in amounts {
        let body = format!("{{\"amount\":{amount}}}");
        shell.ok(&["publish", topic, &body, "-k", &format!("k{amount}"), "--type", "shop.paid"]);
    }
}

#[test]
fn jq_filters_choose_and_select() {
    let shell = Shell::new();
    amounts(&shell, "orders", &[50, 150, 250]);
    shell.ok(&["publish", "orders", "no json", "--type", "note"]);
    let chosen = ["tail", "orders", "--where", ".value.data.amount? > 100", "--select", ".key.data"];
    assert_eq!(shell.ok(&chosen), "\"k150\"\n\"k250\"\n");
    // What the filter cannot be run on is named and passed over.
    let (code, stdout, stderr) = shell.told(&["tail", "orders", "--select", ".value.data.amount"]);
    assert!(code == 0 && stderr.contains("orders/"), "{code} {stderr}");
    assert_eq!(stdout, "50\n150\n250\n");
    let (code, stderr) = shell.code(&["tail", "orders", "--where", ".value["]);
    assert!(code == 2 && stderr.contains("not a jq filter"), "{code} {stderr}");
    let (code, stderr) = shell.code(&["tail", "orders", "--where", "nonsense"]);
    assert!(code == 2 && stderr.contains("nonsense"), "{code} {stderr}");
}

#[test]
fn several_topics_are_merged_by_time() {
    let shell = Shell::new();
    for n in 0..6 {
        shell.ok(&["publish", ["a", "b"][n % 2], &n.to_string()]);
    }
    let all = shell.lines(&["tail", "a", "b", "a", "--range", "start:end"]);
    let places: Vec<_> =
        all.iter().map(|r| format!("{}{}", r["dest"].as_str().unwrap(), r["value"]["data"])).collect();
    assert_eq!(places, ["a0", "b1", "a2", "b3", "a4", "b5"]);
    assert_eq!(shell.lines(&["tail", "a", "b", "-n", "2"]).len(), 2);
    assert_eq!(shell.told(&["tail", "a", "missing"]).0, 4);
}

#[test]
fn a_replay_is_filtered_and_edited() {
    let shell = Shell::new();
    amounts(&shell, "orders", &[50, 150, 250]);
    let replay = |more: &[&str]| {
        let base = ["replay", "run", "orders", "--to", "copy", "--where", ".value.data.amount > 100"];
        shell.told(&[&base[..], more].concat())
    };
    let edit = ["--edit", ".value.data.amount += 1 | .key.data = \"x\"", "--execute"];
    let (code, _, stderr) = replay(&[&edit[..], &["--dry-run"]].concat());
    assert!(code == 0 && stderr.contains("dry run: nothing was written"), "{code} {stderr}");
    assert_eq!(shell.told(&["tail", "copy"]).0, 4, "a dry run made a topic");
    assert_eq!(replay(&edit).0, 0);
    let copies = shell.lines(&["tail", "copy"]);
    let found: Vec<_> =
        copies.iter().map(|copy| (&copy["key"]["data"], &copy["value"]["data"]["amount"])).collect();
    assert_eq!(found, [(&"x".into(), &151.into()), (&"x".into(), &251.into())]);
    assert_eq!(copies[0]["ce"]["type"], "shop.paid");
    // What an edit cannot make is found before anything is written.
    let (code, _, stderr) = replay(&["--edit", ".value.data.amount[0]", "--execute"]);
    assert!(code == 2, "{code} {stderr}");
    assert_eq!(shell.lines(&["tail", "copy"]).len(), 2);
}

#[test]
fn a_dry_run_checks_and_writes_nothing() {
    let shell = Shell::new();
    amounts(&shell, "orders", &[1]);
    let (code, stderr) = shell.code(&["publish", "orders", "{}", "--count", "3", "--dry-run"]);
    assert!(code == 0 && stderr.contains("3 events would be published to orders"), "{code} {stderr}");
    let (code, stderr) = shell.code(&["publish", "orders", "{}", "--ce", "Bad=1", "--dry-run"]);
    assert!(code == 1 && stderr.contains("extension name"), "{code} {stderr}");
    for destroys in [["topic", "delete"], ["topic", "purge"]] {
        let (code, _) = shell.code(&[&destroys[..], &["orders", "--execute", "--dry-run"]].concat());
        assert_eq!(code, 0);
    }
    assert_eq!(shell.lines(&["tail", "orders"]).len(), 1);
}

#[test]
fn structured_cloudevents_are_input() {
    let shell = Shell::new();
    let lines = concat!(
        r#"{"specversion":"1.0","id":"A1","source":"/shop","type":"shop.paid","partitionkey":"7","data":{"n":1}}"#,
        "\n",
        r#"{"specversion":"1.0","id":"A2","source":"/shop"}"#,
        "\n"
    );
    let output = shell.run_with(&["publish", "orders", "-", "--input", "cloudevents"], lines);
    assert_eq!(output.status.code(), Some(3), "{}", crate::shell::text(&output.stderr));
    let stored = &shell.lines(&["tail", "orders"])[0];
    assert_eq!((&stored["ce"]["id"], &stored["key"]["data"]), (&"A1".into(), &"7".into()));
    assert_eq!(stored["value"]["data"]["n"], 1);
}

#[test]
fn lists_take_the_form_that_is_asked_for() {
    let shell = Shell::new();
    amounts(&shell, "orders", &[1]);
    let list = |more: &[&str]| shell.ok(&[&["inspect", "topics", "--columns", "topic"], more].concat());
    assert_eq!(list(&["-o", "table"]), " TOPIC\n orders\n");
    assert_eq!(list(&["-o", "table", "--color", "always"]), "\u{1b}[1m TOPIC\u{1b}[0m\n orders\n");
    assert_eq!(list(&["-o", "table", "--no-headers"]).trim(), "orders");
    assert_eq!(list(&["-o", "csv", "--no-headers"]), "orders\n");
    let shown = |form: &str| shell.ok(&["tail", "orders", "--format", "{ts}", "--time", form]);
    assert!(shown("utc").ends_with("Z\n") && shown("relative").ends_with("s ago\n"));
    assert!(shown("unix").trim().parse::<f64>().unwrap() > 1.7e9);
    assert!(jiff_reads(shown("local").trim()), "{}", shown("local"));
    let (_, _, stderr) = shell.told(&["-v", "publish", "orders", "{}"]);
    assert!(!stderr.is_empty());
    let (_, _, stderr) = shell.told(&["publish", "orders", "{}", "--count", "5", "--progress", "json"]);
    assert!(stderr.contains(r#"{"verb":"publish","done":5,"total":5}"#), "{stderr}");
}

/// Whether a text is a time with its offset.
fn jiff_reads(text: &str) -> bool {
    eventbus::time::from_rfc3339(text).is_some()
}

#[test]
fn contexts_are_shown_tested_copied_and_edited() {
    let shell = Shell::new();
    amounts(&shell, "orders", &[1]);
    let (a, b) = (shell.url("a"), shell.url("b"));
    assert_eq!(shell.ok(&["context", "prompt"]), "");
    shell.ok(&["context", "add", "one", &a, "--use"]);
    shell.ok(&["context", "add", "two", &b, "--use"]);
    assert_eq!(shell.ok(&["context", "prompt"]), "two\n");
    shell.ok(&["context", "use", "-"]);
    assert_eq!(shell.ok(&["context", "prompt"]), "one\n");
    let (code, stderr) = shell.code(&["context", "test"]);
    assert!(code == 0 && stderr.contains("one answers: 1 topics"), "{stderr}");
    assert_eq!(shell.code(&["context", "test", "two"]).0, 6, "there is no such file");
    shell.ok(&["context", "copy", "one", "three"]);
    assert_eq!(shell.code(&["context", "copy", "one", "two"]).0, 5);
    let shown = shell.ok(&["context", "show", "three"]);
    assert!(shown.contains(&a), "{shown}");
    let edit = |script: &str| {
        let output = shell.command(&["context", "edit"]).env("VISUAL", script).output().unwrap();
        (output.status.code().unwrap(), crate::shell::text(&output.stderr))
    };
    assert_eq!(edit("sed -i s/three/four/").0, 0);
    assert_eq!(shell.told(&["context", "show", "four"]).0, 0);
    let (code, stderr) = edit("sed -i s/url/nonsense/");
    assert!(code == 2 && stderr.contains("nothing is changed"), "{code} {stderr}");
    assert_eq!(edit("false").0, 1);
    assert_eq!(shell.told(&["context", "show", "four"]).0, 0);
}

#[test]
fn one_record_takes_every_form() {
    let shell = Shell::new();
    amounts(&shell, "orders", &[1, 2]);
    let place = shell.lines(&["tail", "orders", "-n", "1"])[0]["ref"].as_str().unwrap().to_owned();
    let show = |form: &str| shell.ok(&["inspect", "message", &place, "-o", form]);
    assert!(show("yaml").starts_with("---\n") && show("csv").lines().count() == 2);
    assert_eq!((show("none").as_str(), show("jsonl").lines().count()), ("", 1));
    assert!(show("table").lines().count() > 5);
    let list: serde_json::Value = serde_json::from_str(&shell.ok(&["tail", "orders", "-o", "json"])).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2);
    assert_eq!(shell.ok(&["tail", "orders", "--key", "nobody", "-o", "json"]), "[]\n");
}

#[test]
fn what_would_be_dropped_is_refused_and_places_may_have_spaces() {
    let shell = Shell::new();
    for reserved in ["evt-x=1", "Nats-Msg-Id=1"] {
        let (code, stderr) = shell.code(&["publish", "orders", "{}", "-H", reserved]);
        assert!(code == 2 && stderr.contains("reserved"), "{code} {stderr}");
    }
    let url = shell.url("with%20space");
    shell.ok(&["-c", &url, "publish", "orders", "{}"]);
    assert!(shell.folder().join("with space.db").exists());
    assert_eq!(shell.ok(&["-c", &url, "tail", "orders"]).lines().count(), 1);
    assert_eq!(shell.told(&["-c", &url, "doctor"]).0, 0);
}

#[test]
fn what_destroys_is_in_the_audit() {
    let shell = Shell::new();
    amounts(&shell, "orders", &[1, 2]);
    shell.ok(&["topic", "purge", "orders", "--execute", "--confirm", "orders"]);
    shell.ok(&["topic", "delete", "orders", "--execute", "--confirm", "orders"]);
    let notes = shell.lines(&["tail", "_evt.audit"]);
    let said: Vec<_> = notes.iter().map(|note| &note["value"]["data"]).collect();
    assert_eq!((&said[0]["action"], &said[0]["details"]["events"]), (&"purge".into(), &2.into()));
    assert_eq!((&said[1]["action"], &said[1]["details"]["topic"]), (&"delete".into(), &"orders".into()));
}

#[test]
fn lists_are_matched_and_sorted() {
    let shell = Shell::new();
    for (topic, n) in [("order-a", 1), ("order-b", 3), ("payments", 2)] {
        amounts(&shell, topic, &vec![1; n]);
    }
    shell.ok(&["topic", "create", "order-none"]);
    let names = |flags: &[&str]| -> Vec<String> {
        let rows = shell.lines(&[&["inspect", "topics"], flags].concat());
        rows.iter().map(|row| row["topic"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&["--match", "order-*", "--sort", "kept"]), ["order-b", "order-a", "order-none"]);
    assert_eq!(names(&["--regex", "^pay|-b$", "--sort", "topic"]), ["order-b", "payments"]);
    assert_eq!(names(&["--empty"]), ["order-none"]);
    assert_eq!(shell.code(&["inspect", "topics", "--regex", "("]).0, 2);
    assert_eq!(shell.code(&["inspect", "topics", "--sort", "nothing"]).0, 2);
    // It goes on until somebody ends it.
    let url = shell.url("a");
    let mut watch = shell.command(&["-c", &url, "inspect", "topics", "--watch=50ms"]);
    let mut watch = watch.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(watch.stdout.take().unwrap()));
    assert_eq!(lines.take(9).filter(Result::is_ok).count(), 9);
    watch.kill().unwrap();
    watch.wait().unwrap();
    let grep = |re: &str| shell.ok(&["tail", "order-b", "--grep", re]).lines().count();
    assert_eq!((grep("amount.:1}"), grep("^x")), (3, 0));
}

#[test]
fn a_message_is_shown_among_its_like() {
    let shell = Shell::new();
    shell.ok(&["topic", "create", "orders", "--partitions", "1"]);
    for n in 0..5 {
        let (cause, id) = (format!("causationid=e{}", n - 1), format!("e{n}"));
        shell.ok(&["publish", "orders", &format!("body {n}"), "--id", &id, "--ce", &cause, "--type", "step"]);
    }
    shell.ok(&["publish", "others", "x", "--id", "other", "--ce", "causationid=e2", "--type", "side"]);
    let around = shell.lines(&["inspect", "message", "orders/0@1", "--context-window", "2"]);
    assert_eq!(
        around.iter().map(|record| record["offset"].as_u64().unwrap()).collect::<Vec<_>>(),
        [0, 1, 2, 3]
    );
    let hex = shell.ok(&["inspect", "message", "orders/0@1", "--hex"]);
    assert!(hex.starts_with("00000000  62 6f 64 79 20 31 ") && hex.trim_end().ends_with("body.1"), "{hex}");
    let chain = shell.lines(&["inspect", "message", "orders/0@2", "--chain"]);
    let tree: Vec<_> = chain.iter().map(|row| row["event"].as_str().unwrap()).collect();
    assert_eq!(tree, ["step", "  step", "    step*", "      step", "        step", "      side"]);
}

#[test]
fn a_replay_leaves_out_what_it_is_told_to() {
    let shell = Shell::new();
    shell.ok(&["publish", "orders", "{}", "-H", "tenant=a", "-H", "secret=x", "-k", "1"]);
    shell.ok(&["publish", "orders", "--null", "-k", "2"]);
    let flags = ["--to", "copy", "--skip-tombstones", "--headers", "strip=secret,nothing", "--execute"];
    shell.ok(&[&["replay", "run", "orders"], &flags[..]].concat());
    let copies = shell.lines(&["tail", "copy"]);
    let names: Vec<_> =
        copies[0]["headers"].as_array().unwrap().iter().map(|h| h[0].as_str().unwrap()).collect();
    assert!(copies.len() == 1 && names.contains(&"tenant") && !names.contains(&"secret"), "{copies:?}");
    assert_eq!(shell.code(&["replay", "run", "orders", "--to", "x", "--headers", "some"]).0, 2);
}

/// Bodies are shown as bytes, as text, or as what a program makes of them; what fails is in the record.
#[test]
fn bodies_are_decoded_as_asked_for() {
    let shell = Shell::new();
    shell.ok(&["publish", "t", "{\"n\":1}", "-k", "k"]);
    shell.ok(&["publish", "t", "no json", "-k", "k"]);
    let values = |flags: &[&str]| -> Vec<serde_json::Value> {
        shell.lines(&[&["tail", "t", "--select", "[.value.enc, .value.data, .decode_error]"], flags].concat())
    };
    assert_eq!(values(&["--decode", "raw"])[0], serde_json::json!(["utf8", "{\"n\":1}", null]));
    let json = values(&["--decode", "json"]);
    assert!(json[0][2].is_null() && json[1][2].as_str().unwrap().contains("not JSON"), "{json:?}");
    let hex = values(&["--decode", "hex"]);
    assert_eq!(hex[1], serde_json::json!(["hex", "6e6f206a736f6e", null]));
    let upper = values(&["--decode-with", "tr a-z A-Z"]);
    assert_eq!((&upper[0][1]["N"], &upper[1][1]), (&1.into(), &"NO JSON".into()));
    let failed = values(&["--decode-with", "echo broken >&2; exit 3"]);
    assert!(failed.iter().all(|of| of[2].as_str().unwrap().contains("broken")), "{failed:?}");
    assert_eq!(failed[1][1], "no json", "what cannot be decoded is shown as it is");
    assert_eq!(
        shell.ok(&["tail", "t", "--decode", "hex", "--format", "{value}"]).lines().nth(1),
        Some("6e6f206a736f6e")
    );
    // What is longer than a pipe holds goes through one; a program need not read all of it.
    let long = "x".repeat(300_000);
    assert!(shell.run_with(&["publish", "long", "-"], &long).status.success());
    let sized = ["tail", "long", "--full", "--select", ".value.data", "--decode-with"];
    assert_eq!(shell.lines(&[&sized[..], &["cat"]].concat())[0].as_str().map(str::len), Some(300_000));
    assert_eq!(shell.lines(&[&sized[..], &["head -c 3"]].concat())[0], "xxx");
    // Bytes as digits are still a record.
    let records = shell.ok(&["tail", "t", "--full", "--decode", "hex"]);
    let copied = shell.run_with(&["publish", "copy", "-", "--input", "envelope"], &records);
    assert!(copied.status.success());
    let bodies = shell.ok(&["tail", "copy", "--format", "{value}"]);
    assert_eq!(bodies.lines().collect::<Vec<_>>(), ["{\"n\":1}", "no json"]);
}

/// A body is JSON however it was written: filters look into it, and what they leave alone keeps its bytes.
#[test]
fn filters_see_json_however_it_was_written() {
    let shell = Shell::new();
    let written = "{ \"z\": 1,\n  \"amount\": 300.10 }";
    shell.ok(&["publish", "t", written, "-k", "k"]);
    shell.ok(&["publish", "t", "{\"amount\": 7}", "-k", "k"]);
    let large = ["tail", "t", "--where", ".value.data.amount > 100", "--select", ".value.data.z"];
    assert_eq!(shell.lines(&large), [1]);
    let edit =
        |to: &str, edit: &str| shell.ok(&["replay", "run", "t", "--to", to, "--edit", edit, "--execute"]);
    edit("keyed", ".key.data = \"other\"");
    let keyed = shell.ok(&["tail", "keyed", "--format", "{key} {value}", "-n", "2"]);
    assert!(keyed.starts_with(&format!("other {written}")), "{keyed}");
    edit("cheaper", ".value.data.amount = 1");
    assert_eq!(
        shell.ok(&["tail", "cheaper", "--format", "{value}"]).lines().next(),
        Some("{\"z\":1,\"amount\":1}")
    );
    // Columns come in the order that was asked for, and one that is not there is told.
    assert!(shell.ok(&["inspect", "topics", "--columns", "kept,topic"]).starts_with("{\"kept\":"));
    let (code, stderr) = shell.code(&["inspect", "topics", "--columns", "kept,size"]);
    assert!(code == 2 && stderr.contains("size") && stderr.contains("partitions"), "{stderr}");
}

/// The last that fit are found however far back they are, and in the order of all partitions.
#[test]
fn the_last_that_fit_are_found() {
    let shell = Shell::new();
    shell.ok(&["publish", "t", "first", "--id", "abc", "--type", "rare"]);
    shell.ok(&["publish", "t", "{n}", "--count", "400", "--template", "-k", "k{n}", "--type", "often"]);
    shell.ok(&["publish", "t", "second", "-k", "k7", "--type", "rare"]);
    shell.ok(&["publish", "t", "{n}", "--count", "900", "--template", "-k", "k7", "--type", "often"]);
    let bodies = |flags: &[&str]| -> Vec<String> {
        let told = shell.ok(&[&["tail", "t", "--format", "{value}"], flags].concat());
        told.lines().map(str::to_owned).collect()
    };
    assert_eq!(bodies(&["--id", "abc"]), ["first"]);
    assert_eq!(bodies(&["--type", "rare"]), ["first", "second"]);
    assert_eq!(bodies(&["--type", "rare", "-n", "1"]), ["second"]);
    assert_eq!(bodies(&["--type", "often", "-n", "2"]), ["899", "900"]);
    assert_eq!(bodies(&["-n", "901"])[..1], ["second"]);
    assert!(bodies(&["--type", "none"]).is_empty() && bodies(&["-n", "0"]).is_empty());
}

/// Events go to another bus, where the replay is noted too; the one they come from is only read.
#[test]
fn a_replay_goes_to_another_bus() {
    let shell = Shell::new();
    for n in 0..3 {
        shell.ok(&["publish", "orders", &format!("{{\"n\":{n}}}"), "-k", "k"]);
    }
    let large = format!("\"{}\"", "x".repeat(3_000));
    shell.ok(&["publish", "orders", &large, "-k", "other"]);
    let (a, b) = (shell.url("a"), shell.url("b"));
    shell.ok(&["context", "add", "prod", &a, "--read-only"]);
    shell.ok(&["context", "add", "copy", &b, "--protected"]);
    let on = |arguments: &[&str]| shell.told(&[&["-c", "prod", "replay"], arguments].concat());
    // A plan makes no file of a bus, and runs where it says.
    let (code, _, stderr) = on(&["plan", "orders", "--to-context", "copy", "-O", "plan.json"]);
    assert!(code == 0 && !shell.folder().join("b.db").exists(), "{stderr}");
    let (code, _, stderr) = on(&["run", "plan.json", "--execute"]);
    assert!(code == 2 && stderr.contains("--to-context"), "{stderr}");
    let (code, _, stderr) = on(&["run", "plan.json", "--to-context", "copy", "--execute"]);
    assert!(code == 5 && stderr.contains("--confirm copy"), "{stderr}");
    assert_eq!(on(&["run", "orders", "--execute"]).0, 2, "where to?");
    // What the target refuses ends it, or is told.
    let small = format!("{b}?max_event_bytes=2000");
    let run = ["run", "orders", "--to-context", &small, "--confirm", "copy", "--execute", "--verify"];
    let (code, _, stderr) = on(&run);
    assert!(code != 0 && code != 3, "{code}: {stderr}");
    let (code, _, stderr) = on(&[&run[..], &["--on-error", "skip", "--to", "skipped"]].concat());
    assert!(
        code == 3 && stderr.contains("orders/") && stderr.contains("3 events were published, 1"),
        "{stderr}"
    );
    let copies = shell.lines(&["-c", &b, "tail", "skipped", "--select", ".value.data.n"]);
    assert_eq!(copies, [0, 1, 2].map(serde_json::Value::from));
    let known = shell.lines(&["-c", &b, "inspect", "topics", "--internal"]);
    let is_noted = |name: &str| known.iter().any(|topic| topic["topic"] == name);
    assert!(is_noted("_evt.replays") && is_noted("_evt.audit"), "{known:?}");
    assert_eq!(shell.lines(&["inspect", "topics", "--internal"]).len(), 1, "the source is only read");
    // Four events of four a second, slowly at first: the fourth goes half a second later than without.
    let slow = ["run", "orders", "--to-context", "copy", "--to", "slow", "--confirm", "copy", "--execute"];
    let started = std::time::Instant::now();
    let (code, _, stderr) = on(&[&slow[..], &["--rate", "4/s", "--ramp", "1s"]].concat());
    assert!(code == 0 && started.elapsed() >= std::time::Duration::from_millis(1_500), "{stderr}");
}

#[test]
fn several_files_are_input() {
    let shell = Shell::new();
    for (name, text) in [("a.jsonl", "{\"n\":1}\n{\"n\":2}"), ("b.jsonl", "{\"n\":3}\n")] {
        std::fs::write(shell.folder().join(name), text).unwrap();
    }
    let files = ["-f", "a.jsonl", "-f", "b.jsonl"];
    shell.ok(&[&["publish", "lines", "--input", "jsonl", "-k", "1"], &files[..]].concat());
    assert_eq!(shell.ok(&["tail", "lines", "--select", ".value.data.n"]), "1\n2\n3\n");
    shell.ok(&[&["publish", "bodies", "-k", "1"], &files[..]].concat());
    assert_eq!(shell.ok(&["tail", "bodies", "--select", ".size"]), "15\n8\n");
    let (code, stderr) = shell.code(&["publish", "bodies", "-f", "missing"]);
    assert!(code == 2 && stderr.contains("missing"), "{code} {stderr}");
    let hints = shell.lines(&["doctor", "--fix-hints"]);
    assert!(hints.iter().all(|row| row.get("hint").is_some()), "{hints:?}");
}
