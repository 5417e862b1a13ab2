//! What foreign programs may leave in a stream of NATS that a client cannot read as it flows.

use std::num::NonZeroUsize;
use std::time::Duration;

use eventbus::admin::TopicSpec;
use eventbus::{Content, Envelope, Group, Polled, Start, Subscription, Topic};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use xtask::brokers::{Kind, url};

/// Sends a message with headers as they are, over a connection of its own.
async fn send_raw(address: &str, subject: &str, headers: &[u8], body: &[u8]) {
    let (user, place) = address.trim_start_matches("nats://").rsplit_once('@').unwrap();
    let (user, password) = user.split_once(':').unwrap();
    let mut stream = tokio::net::TcpStream::connect(place).await.unwrap();
    let connect = format!(
        "CONNECT {{\"verbose\":false,\"headers\":true,\"user\":\"{user}\",\"pass\":\"{password}\"}}\r\n"
    );
    stream.write_all(connect.as_bytes()).await.unwrap();
    let (n_headers, n_all) = (headers.len(), headers.len() + body.len());
    stream.write_all(format!("HPUB {subject} {n_headers} {n_all}\r\n").as_bytes()).await.unwrap();
    stream.write_all(headers).await.unwrap();
    stream.write_all(body).await.unwrap();
    stream.write_all(b"\r\nPING\r\n").await.unwrap();
    let (mut answer, mut chunk) = (Vec::new(), [0; 4096]);
    while !String::from_utf8_lossy(&answer).contains("PONG") {
        let n = stream.read(&mut chunk).await.unwrap();
        assert!(n > 0, "the server went away: {}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&chunk[..n]);
    }
}

/// Headers that are no text, and a first line that means "no responders", neither stop a partition nor vanish.
#[tokio::test(flavor = "multi_thread")]
async fn headers_that_the_client_cannot_read_are_deliveries() {
    let address = url(Kind::Nats).unwrap();
    let bus = eventbus::connect(&format!("{address}?declare=create&timeout=5s")).await.unwrap();
    let topic = Topic::new(format!("foreign.{:x}", fastrand::u64(..))).unwrap();
    let (transport, one) = (bus.transport(), 1.try_into().unwrap());
    let admin = transport.admin().unwrap();
    admin.declare(&TopicSpec::new(topic.clone()).with_partitions(one)).await.unwrap();
    let subject = format!("evt.{topic}.0");
    let publisher = transport.publisher().await.unwrap();
    let publish = async |body: &'static str| {
        let event = Envelope::new("t", "/s").with_payload(body);
        publisher.enqueue(&topic, vec![event]).await.unwrap().await.all().unwrap();
    };
    publish("first").await;
    send_raw(&address, &subject, b"NATS/1.0\r\nbad: \xff\xfe\r\n\r\n", b"no text").await;
    publish("second").await;
    send_raw(&address, &subject, b"NATS/1.0 503\r\n\r\n", b"no status").await;
    publish("third").await;
    let group = Subscription::group(topic.clone(), Group::new("g").unwrap()).with_start(Start::Earliest);
    let consumer = transport.subscribe(&group).await.unwrap();
    let mut bodies = Vec::new();
    let reading = async {
        while bodies.len() < 5 {
            let deliveries = match consumer.poll(NonZeroUsize::MIN).await {
                Ok(Polled::Deliveries(deliveries)) => deliveries,
                Ok(_) => continue,
                // The client ends its connection over such headers, and with it what was asked on it.
                Err(error) if error.is_retryable() => continue,
                Err(error) => panic!("{error}"),
            };
            for delivery in deliveries {
                let body = match &delivery.content {
                    Content::Envelope(event) => event.payload().cloned(),
                    Content::Undecodable(bad) => bad.raw.clone(),
                    other => panic!("{other:?}"),
                };
                bodies.push(String::from_utf8(body.unwrap_or_default().to_vec()).unwrap());
            }
        }
    };
    drop(tokio::time::timeout(Duration::from_secs(90), reading).await);
    assert_eq!(bodies, ["first", "no text", "second", "no status", "third"]);
    bus.close().await.unwrap();
}
