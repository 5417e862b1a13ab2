//! An event survives any chain of two transports, byte for byte: all ordered pairs, with events made to be hard.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use eventbus::admin::TopicSpec;
use eventbus::{Bus, Envelope, EventId, Key, Offset, PartitionId, Topic};
use fastrand::Rng;
use xtask::brokers::{Kind, url};

/// Events of each chain.
const N_EVENTS: usize = 60;

/// Text as attributes may hold it: anything but control characters.
fn text(random: &mut Rng, max: usize) -> String {
    let odd = ['ü', '🦀', ' ', '"', '%', ',', ';', '=', '\\', '<', '\u{a0}', 'ß', '漢', '+', '&'];
    let one = |random: &mut Rng| match random.u8(..4) {
        0 => odd[random.usize(..odd.len())],
        1 => char::from(random.u8(b'!'..=b'~')),
        _ => random.alphanumeric(),
    };
    (0..random.usize(1..=max)).map(|_| one(random)).collect()
}

fn bytes(random: &mut Rng, max: usize) -> Vec<u8> {
    (0..random.usize(0..=max)).map(|_| random.u8(..)).collect()
}

/// A name of a header: visible ASCII without `:`, and now and then one that means something on some wire.
fn header(random: &mut Rng) -> String {
    let known = [
        "content-type",
        "Content-Type",
        "ce-id",
        "ce_type",
        "CE-Source",
        "cloudEvents_id",
        "cloudEvents_time",
        "data",
        "key",
        "traceparent",
        "Subject",
        "a",
        "A",
        "a,b",
        "100%",
        "%41",
    ];
    match random.u8(..3) {
        0 => (0..random.usize(1..=12))
            .map(|_| char::from(random.u8(b'!'..=b'~')))
            .map(|char| if char == ':' { ';' } else { char })
            .collect(),
        _ => known[random.usize(..known.len())].to_owned(),
    }
}

fn hard(random: &mut Rng) -> Envelope {
    let mut event = Envelope::new(text(random, 30), text(random, 30)).with_version(random.u32(..));
    if random.bool() {
        event = event.with_id(EventId::parse(&text(random, 40)));
    }
    event = match random.u8(..3) {
        0 => event.with_time(None),
        1 => event,
        _ => event.with_time(
            SystemTime::UNIX_EPOCH + Duration::new(random.u64(..4_000_000_000), random.u32(..1_000_000_000)),
        ),
    };
    if random.bool() {
        event = event.with_version(None);
    }
    if random.bool() {
        event = event.with_subject(text(random, 60));
    }
    if random.bool() {
        event = event.with_schema(text(random, 60));
    }
    if random.bool() {
        event = event.with_content_type(text(random, 40));
    }
    if random.bool() {
        event = event.with_key(Key::new(bytes(random, 40)));
    }
    for _ in 0..random.usize(..4) {
        let names = ["traceparent", "partitionkey", "sequence", "evt-attempt", "evt-seq", "abc1"];
        event = event.with_extension(names[random.usize(..names.len())], text(random, 30));
    }
    for _ in 0..random.usize(..6) {
        let value = if random.bool() { text(random, 20).into_bytes() } else { bytes(random, 20) };
        let name = header(random);
        let is_reserved = ["evt-", "nats-", "x-death", "x-opt-"]
            .iter()
            .any(|prefix| name.to_ascii_lowercase().starts_with(prefix));
        if !is_reserved {
            event = event.with_header(name, value);
        }
    }
    match random.u8(..4) {
        0 => event,
        1 => event.with_payload(""),
        _ => event.with_payload(bytes(random, 300)),
    }
}

/// Publishes events and reads them back, in the order of publishing.
async fn through(bus: &Bus, name: &str, events: &[Envelope]) -> Vec<Envelope> {
    let (topic, admin) = (Topic::new(name).unwrap(), bus.transport().admin().unwrap());
    let spec = TopicSpec::new(topic.clone()).with_partitions(3.try_into().unwrap());
    admin.declare(&spec).await.unwrap();
    let publisher = bus.transport().publisher().await.unwrap();
    let receipts = publisher.enqueue(&topic, events.to_vec()).await.unwrap().await.all().unwrap();
    let mut found: BTreeMap<(PartitionId, Offset), Envelope> = BTreeMap::new();
    for known in admin.topic(&topic).await.unwrap().unwrap().partitions {
        let mut from = known.first;
        loop {
            let page = admin.read(&topic, known.partition, from, 100).await.unwrap();
            let Some(last) = page.last() else { break };
            from = Offset(last.offset.0 + 1);
            for record in page {
                let event =
                    record.content.envelope().unwrap_or_else(|| panic!("{name}: {:?}", record.content));
                found.insert((record.partition, record.offset), event.clone());
            }
        }
    }
    admin.delete_topic(&topic).await.unwrap();
    assert_eq!(found.len(), events.len(), "{name}");
    // Where confirms name no offset, it is the first of the partition that is left: a batch keeps its order.
    let mut take = |receipt: &eventbus::Receipt| {
        let first = (receipt.partition, Offset(0))..;
        let place = receipt.offset.map(|offset| (receipt.partition, offset));
        let place = place.or_else(|| found.range(first).next().map(|(place, _)| *place)).unwrap();
        found.remove(&place).unwrap()
    };
    receipts.iter().map(&mut take).collect()
}

fn all_alike(way: &str, seed: u64, wanted: &[Envelope], found: &[Envelope]) {
    for (wanted, found) in wanted.iter().zip(found) {
        let shown = |event: &Envelope| {
            let pairs = |of: &eventbus::Headers| -> Vec<(String, String)> {
                of.iter().map(|(name, value)| (name.to_owned(), value.escape_ascii().to_string())).collect()
            };
            (
                (
                    event.id().to_string(),
                    event.event_type().to_owned(),
                    event.source().to_owned(),
                    event.time(),
                ),
                (event.subject().map(str::to_owned), event.schema().map(str::to_owned), event.version()),
                (event.content_type().map(str::to_owned), event.key().cloned(), event.payload().cloned()),
                (pairs(event.extensions()), pairs(event.headers())),
            )
        };
        assert_eq!(shown(wanted), shown(found), "{way}, seed {seed}");
        assert!(wanted == found, "{way}, seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_chain_of_two_transports_is_lossless() {
    let folder = tempfile::tempdir().unwrap();
    let seed = std::env::var("ROUND_TRIP_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    let mut random = Rng::with_seed(seed);
    let events: Vec<Envelope> = (0..N_EVENTS).map(|_| hard(&mut random)).collect();
    let mut addresses = vec![
        ("memory", "memory://?replay=100000".to_owned()),
        ("sqlite", format!("sqlite://{}/bus.db", folder.path().display())),
    ];
    addresses.extend(Kind::ALL.iter().map(|kind| (kind.name(), url(*kind).unwrap())));
    let mut buses = Vec::new();
    for (name, address) in addresses {
        buses.push((name, eventbus::connect(&address).await.unwrap()));
    }
    let mut n_ways = 0;
    for (first, one) in &buses {
        let name = |second: &str| format!("way.{seed:x}.{first}.{second}");
        let carried = through(one, &name("alone"), &events).await;
        all_alike(first, seed, &events, &carried);
        for (second, other) in &buses {
            let again = through(other, &name(second), &carried).await;
            all_alike(&format!("{first} to {second}"), seed, &events, &again);
            n_ways += 1;
        }
    }
    assert_eq!(n_ways, buses.len() * buses.len());
    for (_, bus) in buses {
        bus.close().await.unwrap();
    }
}
