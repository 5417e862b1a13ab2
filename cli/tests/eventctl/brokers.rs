//! `eventctl` on real brokers: the same commands, the same columns, the same codes.

use serde_json::Value;
use xtask::brokers::{Kind, url};

use crate::shell::Shell;

fn works_on(kind: Kind) {
    let shell = Shell::new();
    let bus = url(kind).unwrap();
    let name = format!("ctl-{}-{}", kind.name(), std::process::id());
    let copy = format!("{name}.copy");
    let on = |arguments: &[&str]| shell.told(&[&["-c", &bus], arguments].concat());
    let ok = |arguments: &[&str]| {
        let (code, stdout, stderr) = on(arguments);
        assert_eq!(code, 0, "{kind} {arguments:?}: {stdout}{stderr}");
        stdout
    };
    let lines = |arguments: &[&str]| -> Vec<Value> {
        ok(arguments).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    assert_eq!(on(&["tail", &name]).0, 4, "a topic that is missing is not found");
    ok(&["topic", "create", &name, "--partitions", "3"]);
    ok(&["topic", "create", &copy, "--partitions", "3"]);
    for n in 0..6 {
        let (key, body) = (format!("k{}", n % 2), format!("{{\"n\":{n}}}"));
        ok(&["publish", &name, &body, "--type", "shop.tried", "-k", &key, "-H", "a=1", "-H", "a=ü"]);
    }
    ok(&["publish", &name, "--null", "-k", "k0"]);
    let all = lines(&["tail", &name, "--from", "start", "--until-end", "--full"]);
    assert_eq!(all.len(), 7);
    let of = |key: &str| -> Vec<u64> {
        let own = all.iter().filter(|record| record["key"]["data"] == *key);
        own.filter_map(|record| record["value"]["data"]["n"].as_u64()).collect()
    };
    assert_eq!((of("k0"), of("k1")), (vec![0, 2, 4], vec![1, 3, 5]), "a key keeps its order");
    let last = lines(&["tail", &name, "-n", "2", "--key", "k1"]);
    assert_eq!(last.last().unwrap()["value"]["data"]["n"], 5, "the last of each partition: {last:?}");
    assert!(last.len() <= 2, "{last:?}");
    let one = lines(&["inspect", "message", all[0]["ref"].as_str().unwrap()]);
    assert_eq!(one[0]["ce"]["id"], all[0]["ce"]["id"]);
    let topics = lines(&["inspect", "topics", "--match", &name]);
    assert_eq!((&topics[0]["partitions"], &topics[0]["kept"]), (&3.into(), &7.into()), "{topics:?}");
    assert_eq!(lines(&["inspect", "topic", &name]).len(), 3);
    let flags = [name.as_str(), "--to", &copy, "--range", "start:end"];
    let planned = lines(&[&["replay", "plan"], &flags[..]].concat());
    assert_eq!(planned.iter().filter_map(|row| row["events"].as_u64()).sum::<u64>(), 7, "{planned:?}");
    ok(&[&["replay", "run"], &flags[..], &["--execute"]].concat());
    let ids = |records: &[Value]| {
        let mut ids: Vec<String> = records.iter().map(|record| record["ce"]["id"].to_string()).collect();
        ids.sort();
        ids
    };
    assert_eq!(ids(&lines(&["tail", &copy, "--from", "start", "--until-end"])), ids(&all));
    lines(&["inspect", "groups"]);
    lines(&["dlq", "list"]);
    assert!(!lines(&["capabilities"]).is_empty());
    let checks = lines(&["doctor"]);
    assert!(checks.iter().all(|check| check["state"] != "FAILED"), "{checks:?}");
    assert!(
        !lines(&["inspect", "topics"]).iter().any(|row| row["topic"] == "_evt.doctor"),
        "a canary left a topic"
    );
    for topic in [&name, &copy] {
        ok(&["topic", "delete", topic, "--execute", "--confirm", topic]);
        assert_eq!(on(&["inspect", "topic", topic]).0, 4);
    }
}

/// The password of a context is the one that the broker asks for.
#[test]
fn a_context_finds_its_password() {
    let shell = Shell::new();
    let bus = url(Kind::Rabbitmq).unwrap();
    let (scheme, rest) = bus.split_once("://").unwrap();
    let (user, host) = rest.rsplit_once('@').unwrap();
    let (user, password) = user.split_once(':').unwrap();
    for (line, expected) in [(password, 0), ("another", 6)] {
        let file = shell.folder().join(line);
        std::fs::write(&file, format!("{line}\n")).unwrap();
        let (address, file) = (format!("{scheme}://{user}@{host}"), format!("file:{}", file.display()));
        shell.ok(&["context", "add", "prod", &address, "--password", &file]);
        let (code, _, stderr) = shell.told(&["context", "test", "prod"]);
        assert_eq!(code, expected, "{stderr}");
    }
}

#[test]
fn kafka_takes_every_command() {
    works_on(Kind::Kafka);
}

#[test]
fn nats_takes_every_command() {
    works_on(Kind::Nats);
}

#[test]
fn postgres_takes_every_command() {
    works_on(Kind::Postgres);
}

#[test]
fn rabbitmq_takes_every_command() {
    works_on(Kind::Rabbitmq);
}

#[test]
fn redis_takes_every_command() {
    works_on(Kind::Redis);
}

#[test]
fn valkey_takes_every_command() {
    works_on(Kind::Valkey);
}
