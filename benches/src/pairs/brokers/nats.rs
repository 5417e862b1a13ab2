//! NATS JetStream: async-nats on one stream.

use std::collections::VecDeque;
use std::time::Instant;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::context::PublishAckFuture;
use async_nats::jetstream::stream::{Config, StorageType, Stream};
use async_nats::jetstream::{self, Context};
use async_nats::{Client, ConnectOptions, HeaderMap};
use eventbus::Envelope;
use futures_util::StreamExt as _;
use xtask::brokers::Broker;

use super::{FIRST, Wire, consume, decode, filled, fresh, publish};
use crate::{Anyhow, pair};

const PUBLISH: &str = "JetStream publish, window 1024";
const PUBLISH_64: &str = "JetStream publish, window 64";
const CONSUME: &str = "JetStream pull to typed events";
pub(super) const LINES: &[&str] = &[PUBLISH, PUBLISH_64, CONSUME];

pub(super) async fn run(broker: &Broker, events: &[Envelope], wires: &[Wire]) -> Anyhow<()> {
    let bus = eventbus::connect(broker.url()).await?;
    let context = context(broker.url()).await?;
    let n = events.len();
    for (name, window) in [(PUBLISH_64, 64), (PUBLISH, 1024)] {
        let raw = || raw_publish(&context, wires, window);
        pair(name, 0.95, n, raw, || publish(&bus, events, window)).await?;
    }
    let (ours, (raw, name)) = (filled(&bus, events).await?, raw_stream(&context).await?);
    send(&context, &name, wires, 1024).await?;
    pair(CONSUME, 0.92, n, || raw_pull(&raw, n), || consume(&bus, &ours, n)).await?;
    bus.transport().close().await?;
    Ok(())
}

pub(super) async fn context(url: &str) -> Anyhow<Context> {
    // The client's own limit on what is not acknowledged would be the window.
    let client = connect(url).await?;
    Ok(jetstream::context::ContextBuilder::new().max_ack_inflight(2048).build(client))
}

async fn connect(url: &str) -> Anyhow<Client> {
    let (user, place) = url.trim_start_matches("nats://").split_once('@').ok_or("no user in the address")?;
    let (user, password) = user.split_once(':').ok_or("no password in the address")?;
    let options = ConnectOptions::with_user_and_password(user.to_owned(), password.to_owned());
    Ok(options.connect(place).await?)
}

async fn raw_stream(context: &Context) -> Anyhow<(Stream, String)> {
    let name = fresh("raw");
    let config = Config {
        name: name.clone(),
        subjects: vec![name.clone()],
        storage: StorageType::File,
        ..Config::default()
    };
    Ok((context.create_stream(config).await?, name))
}

async fn send(context: &Context, subject: &str, wires: &[Wire], window: usize) -> Anyhow<()> {
    let mut open: VecDeque<PublishAckFuture> = VecDeque::with_capacity(window);
    for wire in wires {
        if open.len() == window
            && let Some(sent) = open.pop_front()
        {
            sent.await?;
        }
        let mut headers = HeaderMap::new();
        for (name, value) in &wire.headers {
            headers.insert(format!("ce-{name}"), value.as_str());
        }
        headers.insert("ce-partitionkey", str::from_utf8(&wire.key)?);
        headers.insert("Nats-Msg-Id", wire.id.as_str());
        open.push_back(context.publish_with_headers(subject.to_owned(), headers, wire.body.clone()).await?);
    }
    for sent in open {
        sent.await?;
    }
    Ok(())
}

pub(super) async fn raw_publish(context: &Context, wires: &[Wire], window: usize) -> Anyhow<f64> {
    let (_, name) = raw_stream(context).await?;
    let (first, rest) = wires.split_at(FIRST.min(wires.len()));
    send(context, &name, first, FIRST).await?;
    let started = Instant::now();
    send(context, &name, rest, window).await?;
    let took = started.elapsed().as_secs_f64();
    context.delete_stream(&name).await?;
    Ok(took * wires.len() as f64 / rest.len().max(1) as f64)
}

async fn raw_pull(stream: &Stream, n: usize) -> Anyhow<f64> {
    let config = pull::Config {
        durable_name: Some(fresh("raw")),
        ack_policy: AckPolicy::Explicit,
        deliver_policy: DeliverPolicy::All,
        max_ack_pending: 2048,
        ..pull::Config::default()
    };
    let consumer = stream.create_consumer(config).await?;
    let mut messages = consumer.stream().max_messages_per_batch(256).messages().await?;
    let mut started = None;
    for _ in 0..n {
        let message = messages.next().await.ok_or("the stream ended")??;
        started.get_or_insert_with(Instant::now);
        let headers = message.headers.as_ref().ok_or("no headers")?;
        std::hint::black_box((headers.get("ce-id"), headers.get("ce-type")));
        decode(&message.payload)?;
        message.ack().await?;
    }
    Ok(started.map(|started| started.elapsed().as_secs_f64()).unwrap_or_default())
}
