//! What librdkafka calls delivered: its simulated brokers take any sequence number from a producer, as real ones do
//! from one that they do not know yet.

use std::time::Duration;

use eventbus::{Envelope, Key, Offset, Topic};
use rdkafka::mocking::MockCluster;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

/// More than are on their way at once: the client takes five.
const N_EVENTS: u64 = 8;

/// The first request to a partition is refused for the moment, and the next one, which is on its way, is taken: that
/// is no proof that the first was stored. (In the field: confluent-kafka-go #921.)
#[tokio::test(flavor = "multi_thread")]
async fn what_is_confirmed_is_stored_although_the_first_request_was_refused() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("gap", 2, 1).unwrap();
    let bus =
        eventbus::connect(&format!("kafka://{}?linger=0ms", cluster.bootstrap_servers())).await.unwrap();
    let (topic, publisher) = (Topic::new("gap").unwrap(), bus.transport().publisher().await.unwrap());
    let admin = bus.transport().admin().unwrap();
    let (key, mut n_keys) = (Key::new("0"), 1);
    let partition = admin.partition_of(&topic, &key).await.unwrap();
    while admin.partition_of(&topic, &Key::new(n_keys.to_string())).await.unwrap() == partition {
        n_keys += 1;
    }
    let other = Key::new(n_keys.to_string());
    let event = |key: &Key, n: u64| {
        Envelope::new("test.gap", "/test").with_key(key.clone()).with_payload(n.to_string())
    };
    // The client learns of the topic: else all events would wait for that, and go in one request.
    publisher.enqueue(&topic, vec![event(&other, 0)]).await.unwrap().await.single().unwrap();
    cluster.broker_round_trip_time(1, Duration::from_millis(200)).unwrap();
    cluster.request_errors(
        RDKafkaApiKey::Produce,
        &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION],
    );
    let mut confirms = Vec::new();
    for n in 0..N_EVENTS {
        confirms.push(publisher.enqueue(&topic, vec![event(&key, n)]).await.unwrap());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for (n, confirm) in (0..).zip(confirms) {
        let receipt = confirm.await.single().unwrap();
        assert_eq!((receipt.partition, receipt.offset), (partition, Some(Offset(n))));
    }
    let records = admin.read(&topic, partition, Offset(0), 100).await.unwrap();
    let payload =
        |record: &eventbus::admin::Record| record.content.envelope().unwrap().payload().unwrap().to_vec();
    let found: Vec<Vec<u8>> = records.iter().map(payload).collect();
    let wanted: Vec<Vec<u8>> = (0..N_EVENTS).map(|n| n.to_string().into_bytes()).collect();
    assert_eq!(found, wanted);
    bus.close().await.unwrap();
}
