//! The program as a person runs it: to its end, killed at any time, with wrong input.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, reason = "a test reports by panicking")]

mod brokers;
mod chaos;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// One at a time: each has a broker and five processes of its own.
static ALONE: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

fn eshop(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_eshop"));
    let bus = format!("sqlite://{}/eshop.db", folder.display());
    command.args(["--listen", "127.0.0.1:0", "--bus", &bus]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn summary(output: &Output) -> serde_json::Value {
    let stdout = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(stdout.lines().count(), 1, "one JSON object alone on stdout: {stdout}");
    serde_json::from_str(&stdout).unwrap()
}

fn lawful(summary: &serde_json::Value, n_orders: u64) {
    assert_eq!(summary["orders"], n_orders, "{summary}");
    assert_eq!(summary["terminal_events"], n_orders, "{summary}");
    assert_eq!(summary["dead_letters"], 0, "{summary}");
    let laws = summary["laws"].as_array().unwrap();
    assert_eq!(laws.len(), 6);
    assert!(laws.iter().all(|law| law["holds"] == true), "{summary}");
}

/// 20 SIGKILLs at random moments of one file, in which bus and tables are: it goes on where it was, and every law holds.
#[test]
fn twenty_kills_lose_and_repeat_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let seed = std::process::id();
    let mut random = fastrand::Rng::with_seed(seed.into());
    println!("seed {seed}");
    // The first 1,500 of the shipped orders, at a rate that leaves some for every one of the runs.
    let file = folder.path().join("orders.csv");
    let lines: Vec<&str> = include_str!("../../data/cdnow_orders.csv").lines().take(1_501).collect();
    std::fs::write(&file, lines.join("\n")).unwrap();
    let bus = format!("sqlite://{}/eshop.db?session=1s", folder.path().display());
    let db = format!("sqlite://{}/eshop.db", folder.path().display());
    let orders = file.to_str().unwrap();
    let arguments = ["--until-done", "--lease", "1s", "--orders", orders, "--bus", &bus, "--db", &db];
    let shop = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_eshop"));
        command.args(["--listen", "127.0.0.1:0"]).args(arguments).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let mut n_killed = 0;
    for _ in 0..20 {
        let mut run = shop(&["--rate", "40"]);
        let mut child = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(random.u64(50..2_000)));
        n_killed += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let output = shop(&["--summary", "-"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let summary = summary(&output);
    println!("{n_killed} killed at work; {summary}");
    assert_eq!(n_killed, 20, "some runs were over before their kill");
    lawful(&summary, 1_500);
}

#[test]
fn broken_lines_are_named_and_the_rest_is_processed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("orders.csv");
    std::fs::write(
        &file,
        "order,buyer,date,quantity,amount\n1,1,x,1,5.00\nwhat?\n2,1,x,2,7.50\n3,2,x,1,no\n",
    )
    .unwrap();
    let arguments = ["--until-done", "--summary", "-", "--stock", "100", "--orders", file.to_str().unwrap()];
    let output = eshop(folder.path(), &arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("line 3:") && stderr.contains("line 5:"), "{stderr}");
    let summary = summary(&output);
    lawful(&summary, 2);
    assert_eq!((&summary["paid"], &summary["revenue_cents"]), (&2.into(), &1250.into()));
}

#[test]
fn wrong_options_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let not_sqlite = folder.path().join("text.db");
    std::fs::write(&not_sqlite, "this is no database, however long it may be. ".repeat(100)).unwrap();
    let text_bus = format!("sqlite://{}", not_sqlite.display());
    for (arguments, code, text) in [
        (vec!["--listen", address.as_str()], 2, "--listen"),
        (vec!["--bus", "sqlite:///nowhere/at/all.db"], 2, "folder"),
        (vec!["--bus", text_bus.as_str()], 1, "not an SQLite database"),
        (vec!["--bus", "nope://x"], 2, "unknown scheme"),
        (vec!["--db", "nope://x"], 2, "tables are in sqlite://"),
        (vec!["--db", "sqlite:///nowhere/at/all.db"], 2, "folder"),
        (vec!["--db", text_bus.as_str()], 1, "not an SQLite database"),
        (vec!["--lease", "1ms"], 2, "lease"),
        (vec!["--bus", "sqlite://x.db?partitons=3"], 2, "unknown option"),
        (vec!["--services", "basket,bakery"], 2, "unknown service bakery"),
        (vec!["--orders", "/no/such/file.csv"], 2, "cannot be read"),
        (vec!["--rate", "0"], 2, "--rate"),
        (vec!["--grace", "soon"], 2, "duration"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_eshop"));
        let bus = format!("sqlite://{}/eshop.db", folder.path().display());
        if !arguments.contains(&"--bus") {
            command.args(["--bus", &bus]);
        }
        if !arguments.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        let output = command.args(&arguments).current_dir(folder.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(text), "{arguments:?} does not say {text:?}: {stderr}");
    }
}

/// A shop that serves, ended when dropped.
struct Open(Child, SocketAddr);

impl Open {
    fn start(folder: &Path, arguments: &[&str]) -> Self {
        let mut child = eshop(folder, arguments).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        let address = line
            .split("http://")
            .nth(1)
            .and_then(|rest| rest.split(',').next())
            .expect(&line)
            .parse()
            .unwrap();
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        Self(child, address)
    }

    /// One request; returns status and body.
    fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, serde_json::Value) {
        let mut stream = TcpStream::connect(self.1).unwrap();
        let n = body.len();
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: shop\r\nconnection: close\r\ncontent-type: application/json\r\n{headers}content-length: {n}\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
        (status, serde_json::from_str(body).unwrap_or_default())
    }

    fn until(&self, order: u64, status: &str) -> serde_json::Value {
        for _ in 0..600 {
            let (code, answer) = self.ask("GET", &format!("/v1/orders/{order}"), "", "");
            if code == 200 && answer["status"] == status {
                return answer;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!(
            "order {order} did not become {status}: {:?}",
            self.ask("GET", &format!("/v1/orders/{order}"), "", "")
        );
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn the_door_places_shows_and_cancels_orders() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("orders.csv");
    // A line of product 1, so that there is stock of it.
    std::fs::write(&file, "order,buyer,date,quantity,amount\n1,1,x,1000,5.00\n").unwrap();
    let shop = Open::start(
        folder.path(),
        &["--orders", file.to_str().unwrap(), "--stock", "300", "--grace", "2500ms"],
    );
    assert_eq!(shop.ask("GET", "/health", "", "").0, 200);
    let body = r#"{"buyer":7,"product":1,"quantity":2,"amount_cents":1999}"#;
    let (code, first) = shop.ask("POST", "/v1/orders", "x-request-id: abc\r\n", body);
    assert_eq!(code, 202, "{first}");
    let (_, again) = shop.ask("POST", "/v1/orders", "x-request-id: abc\r\n", body);
    assert_eq!(first, again, "one request id is one order");
    let other = r#"{"buyer":8,"product":1,"quantity":2,"amount_cents":1999}"#;
    let (code, why) = shop.ask("POST", "/v1/orders", "x-request-id: abc\r\n", other);
    assert_eq!(code, 409, "another order under the same request id: {why}");
    let (_, second) = shop.ask("POST", "/v1/orders", "x-request-id: def\r\n", body);
    assert_ne!(first, second);
    let (first, second) = (first["order"].as_u64().unwrap(), second["order"].as_u64().unwrap());
    // From the answer on the order is known, wherever it is on its way to ordering.
    assert_eq!(shop.ask("GET", &format!("/v1/orders/{second}"), "", "").0, 200);
    assert_eq!(shop.ask("POST", &format!("/v1/orders/{second}/cancel"), "", "").0, 202);
    assert_eq!(shop.until(second, "Cancelled")["cancelled_by"], "buyer");
    shop.until(first, "Shipped");
    assert_eq!(shop.ask("POST", &format!("/v1/orders/{first}/cancel"), "", "").0, 409);
    assert_eq!(shop.ask("GET", "/v1/orders/99", "", "").0, 404);
    assert_eq!(shop.ask("POST", "/v1/orders", "", r#"{"buyer":7}"#).0, 422);
    assert_eq!(
        shop.ask("POST", "/v1/orders", "", r#"{"buyer":7,"product":1,"quantity":0,"amount_cents":1}"#).0,
        422
    );
}

/// The services split over two processes on one bus settle every order.
#[test]
fn services_in_two_processes_share_the_bus() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("orders.csv");
    let lines: String = (1..=300).map(|order| format!("{order},{},x,1,2.00\n", order % 40)).collect();
    std::fs::write(&file, format!("order,buyer,date,quantity,amount\n{lines}")).unwrap();
    let orders = ["--orders", file.to_str().unwrap(), "--stock", "100"];
    let other = [&orders[..], &["--services", "ordering,catalog,shipping"]].concat();
    let _other = Open::start(folder.path(), &other);
    let mine = [
        &orders[..],
        &["--services", "basket,grace,payment,notification,relay", "--until-done", "--summary", "-"],
    ]
    .concat();
    let output = eshop(folder.path(), &mine).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    lawful(&summary(&output), 300);
}

/// Services that start after the first orders were published get them all the same.
#[test]
fn a_service_that_starts_late_misses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("orders.csv");
    let lines: String = (1..=50).map(|order| format!("{order},1,x,1,2.00\n")).collect();
    std::fs::write(&file, lines).unwrap();
    let orders = ["--orders", file.to_str().unwrap(), "--stock", "100", "--services"];
    let first = [&orders[..], &["basket,grace,payment,notification,relay", "--until-done", "--summary", "-"]]
        .concat();
    let first = eshop(folder.path(), &first).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let _late = Open::start(folder.path(), &[&orders[..], &["ordering,catalog,shipping"]].concat());
    let output = first.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    lawful(&summary(&output), 50);
}

/// A corrected file is imported although its lines have moved; what was imported is not repeated.
#[test]
fn a_corrected_file_is_imported() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("orders.csv");
    let run = |text: &str| {
        std::fs::write(&file, text).unwrap();
        eshop(
            folder.path(),
            &["--until-done", "--summary", "-", "--stock", "300", "--orders", file.to_str().unwrap()],
        )
        .output()
        .unwrap()
    };
    let first = run("1,1,x,1,2.00\nbroken\n3,1,x,1,2.00\n");
    assert_eq!(first.status.code(), Some(3));
    lawful(&summary(&first), 2);
    let second = run("1,1,x,1,2.00\n51,1,x,1,2.00\n3,1,x,1,2.00\n9223372036854775808,1,x,1,5.00\n");
    assert_eq!(second.status.code(), Some(3), "a number that is too large is a broken line");
    lawful(&summary(&second), 3);
}

/// SIGTERM drains and ends.
#[test]
fn a_polite_end_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let mut shop = Open::start(folder.path(), &[]);
    let killed = Command::new("kill").args(["-TERM", &shop.0.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let status = shop.0.wait().unwrap();
    assert_eq!(status.code(), Some(0), "{status}");
}
