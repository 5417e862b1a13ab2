//! TLS and who may come in, on brokers that speak nothing else: what is right works, and everything that is not right
//! is told as what it is, in time, without its secrets, and without a try in plain text.

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Duration;

use eventbus::transport::{Polled, Settle};
use eventbus::{Envelope, ErrorKind, Group, Start, Subscription, Topic};

use super::addresses::refused;
use xtask::brokers::{Authority, Broker, Kind, Pair, Secure, url};

/// How an address asks for TLS, and names its files.
struct Words {
    tls: &'static str,
    ca: &'static str,
    cert: &'static str,
    key: &'static str,
}

fn words(kind: Kind) -> Words {
    let plain = Words { tls: "", ca: "ca", cert: "cert", key: "key" };
    match kind {
        Kind::Postgres => {
            Words { tls: "&sslmode=verify-full", ca: "sslrootcert", cert: "sslcert", key: "sslkey" }
        }
        Kind::Kafka => Words { tls: "&security=sasl_ssl", ..plain },
        Kind::Nats => Words { tls: "&tls=on", ..plain },
        Kind::Rabbitmq | Kind::Redis | Kind::Valkey => plain,
    }
}

/// The address of a broker with what it takes to be let in.
fn address(kind: Kind, url: &str, ca: &Path, client: Option<&Pair>) -> String {
    let Words { tls, ca: ca_option, cert, key } = words(kind);
    let mut address = format!("{url}?declare=create&timeout=3s{tls}&{ca_option}={}", ca.display());
    if let Some(client) = client {
        address += &format!("&{cert}={}&{key}={}", client.cert.display(), client.key.display());
    }
    address
}

async fn works(address: &str) {
    let bus = eventbus::connect(address).await.unwrap();
    let topic = Topic::new("secured").unwrap();
    let publisher = bus.transport().publisher().await.unwrap();
    let sent = Envelope::new("sent", "/secured").with_key("k").with_payload("over TLS");
    publisher.enqueue(&topic, vec![sent.clone()]).await.unwrap().await.all().unwrap();
    // Each time a group of its own.
    let group = Group::new(format!("g-{}", sent.id())).unwrap();
    let subscription = Subscription::group(topic, group).with_start(Start::Earliest);
    let consumer = bus.transport().subscribe(&subscription).await.unwrap();
    let receiving = async {
        loop {
            let Polled::Deliveries(deliveries) = consumer.poll(NonZeroUsize::MIN).await.unwrap() else {
                continue;
            };
            if deliveries.iter().any(|one| one.content.envelope().is_some_and(|seen| seen.id() == sent.id()))
            {
                break;
            }
            let done: Vec<_> = deliveries.iter().map(|one| (one.token, Settle::Ack)).collect();
            consumer.settle(&done).await.unwrap().all().unwrap();
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(20), receiving).await.is_ok(),
        "{address}: nothing came"
    );
    bus.close().await.unwrap();
}

async fn is_secure(kind: Kind) {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours").unwrap();
    let other = Authority::new(folder.path(), "other").unwrap();
    let here = ["127.0.0.1", "localhost"];
    let start = |shows: &Pair, asks_for: Option<&Authority>| {
        let asks_for = asks_for.map(|authority| authority.ca.clone());
        Broker::start_secured(kind, &Secure { shows: shows.clone(), asks_for }).unwrap()
    };
    let check = async |what: &str, address: String, wanted: ErrorKind| {
        let error = refused(&address).await;
        assert_eq!(error.kind(), wanted, "{kind}, {what}: {error:?}");
    };

    let broker = start(&ours.sign("broker", &here, false).unwrap(), None);
    let right = address(kind, broker.url(), &ours.ca, None);
    works(&right).await;
    if kind == Kind::Kafka {
        works(&format!("{right}&sasl=SCRAM-SHA-256")).await;
        works(&format!("{right}&sasl=SCRAM-SHA-512")).await;
        let wrong = right.replace(":eventbus@", ":canary-secret@");
        check("a password of SCRAM", format!("{wrong}&sasl=SCRAM-SHA-512"), ErrorKind::Unauthorized).await;
    }
    check("a password", right.replace(":eventbus@", ":canary-secret@"), ErrorKind::Unauthorized).await;
    check("an authority", address(kind, broker.url(), &other.ca, None), ErrorKind::Unauthorized).await;
    if kind == Kind::Postgres {
        let required = |ca| address(kind, broker.url(), ca, None).replace("verify-full", "require");
        works(&required(&ours.ca)).await;
        check("an authority that must be asked", required(&other.ca), ErrorKind::Unauthorized).await;
    }
    let system = right.replace(&format!("&{}={}", words(kind).ca, ours.ca.display()), "");
    check("the system's authorities", system, ErrorKind::Unauthorized).await;
    let missing = address(kind, broker.url(), Path::new("/missing.pem"), None);
    check("a file that is missing", missing, ErrorKind::Config).await;

    let plain = url(kind).unwrap();
    let place = plain.rsplit_once("://").unwrap().1.rsplit('@').next().unwrap();
    let scheme_and_user = broker.url().rsplit_once('@').unwrap().0;
    let plain = address(kind, &format!("{scheme_and_user}@{place}"), &ours.ca, None);
    // These two wait for more, or go without a word.
    let is_silent = matches!(kind, Kind::Kafka | Kind::Redis);
    let told = if is_silent { ErrorKind::Unavailable } else { ErrorKind::Unauthorized };
    check("a broker without TLS", plain, told).await;
    drop(broker);

    for (what, shows) in [
        ("a certificate that has ended", ours.sign("ended", &here, true).unwrap()),
        ("a certificate of another host", ours.sign("elsewhere", &["elsewhere.example"], false).unwrap()),
    ] {
        let broker = start(&shows, None);
        check(what, address(kind, broker.url(), &ours.ca, None), ErrorKind::Unauthorized).await;
    }

    let broker = start(&ours.sign("asking", &here, false).unwrap(), Some(&ours));
    let known = ours.sign("known", &[], false).unwrap();
    let unknown = other.sign("unknown", &[], false).unwrap();
    works(&address(kind, broker.url(), &ours.ca, Some(&known))).await;
    let of = |client| address(kind, broker.url(), &ours.ca, client);
    // With TLS 1.3 a server looks at our certificate when we have begun to speak already, and what it says of it may be lost
    // where it resets the connection over that (RFC 8446, section 4.4.4, and RFC 9293, section 3.5.3): then a later try is told.
    for (what, client) in
        [("no certificate of ours", None), ("a certificate of ours that is unknown", Some(&unknown))]
    {
        let mut tries = 0;
        let error = loop {
            tries += 1;
            match refused(&of(client)).await {
                error if error.kind() == ErrorKind::Unavailable && tries < 5 => {}
                error => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{kind}, {what}: {error:?}");
    }
}

macro_rules! secure {
    ($($name:ident $kind:ident)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            is_secure(Kind::$kind).await;
        }
    )*};
}

secure! {
    kafka Kafka
    nats Nats
    postgres Postgres
    rabbitmq Rabbitmq
    redis Redis
}
