//! RabbitMQ: lapin on a quorum queue, and on a stream as ours has them.

use std::collections::VecDeque;
use std::time::Instant;

use eventbus::Envelope;
use futures_util::StreamExt as _;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, PublisherConfirm};
use xtask::brokers::Broker;

use super::{FIRST, Wire, consume, decode, filled, fresh, publish};
use crate::{Anyhow, pair};

const LINES_OF_PUBLISH: [(&str, &str, usize); 4] = [
    ("RabbitMQ publish, window 64, raw on a quorum queue", "quorum", 64),
    ("RabbitMQ publish, window 1024, raw on a quorum queue", "quorum", 1024),
    ("RabbitMQ publish, window 64, raw on a stream", "stream", 64),
    ("RabbitMQ publish, window 1024, raw on a stream", "stream", 1024),
];
const ONE: &str = "RabbitMQ publish, window 1024 to one at a time, both ours";
const CONSUME: &str = "RabbitMQ consume to typed events, raw acks each on a quorum queue";
pub(super) const LINES: &[&str] = &[
    LINES_OF_PUBLISH[0].0,
    LINES_OF_PUBLISH[1].0,
    LINES_OF_PUBLISH[2].0,
    LINES_OF_PUBLISH[3].0,
    ONE,
    CONSUME,
];

pub(super) async fn run(broker: &Broker, events: &[Envelope], wires: &[Wire]) -> Anyhow<()> {
    let bus = eventbus::connect(broker.url()).await?;
    let connection = Connection::connect(broker.url(), ConnectionProperties::default()).await?;
    let n = events.len();
    for (name, kind, window) in LINES_OF_PUBLISH {
        let raw = || raw_publish(&connection, kind, wires, window);
        pair(name, 0.97, n, raw, || publish(&bus, events, window)).await?;
    }
    let few = events.get(..2_000.min(n)).unwrap_or(events);
    pair(ONE, 5.0, few.len(), || publish(&bus, few, 1), || publish(&bus, few, 1024)).await?;
    let ours = filled(&bus, events).await?;
    pair(CONSUME, 4.0, n, || raw_consume(&connection, wires), || consume(&bus, &ours, n)).await?;
    bus.transport().close().await?;
    Ok(())
}

async fn raw_queue(connection: &Connection, kind: &str) -> Anyhow<(Channel, String)> {
    let (channel, name) = (connection.create_channel().await?, fresh("raw"));
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(name.as_str().into(), durable, arguments).await?;
    Ok((channel, name))
}

async fn send(channel: &Channel, queue: &str, wires: &[Wire], window: usize) -> Anyhow<()> {
    let mut open: VecDeque<PublisherConfirm> = VecDeque::with_capacity(window);
    for wire in wires {
        if open.len() == window
            && let Some(sent) = open.pop_front()
        {
            sent.await?;
        }
        let mut headers = FieldTable::default();
        for (name, value) in &wire.headers {
            headers.insert(
                format!("cloudEvents_{name}").as_str().into(),
                AMQPValue::LongString(value.as_str().into()),
            );
        }
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_headers(headers)
            .with_message_id(wire.id.as_str().into());
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let sent = channel.basic_publish("".into(), queue.into(), options, &wire.body, properties).await?;
        open.push_back(sent);
    }
    for sent in open {
        sent.await?;
    }
    Ok(())
}

pub(super) async fn raw_publish(
    connection: &Connection,
    kind: &str,
    wires: &[Wire],
    window: usize,
) -> Anyhow<f64> {
    let (channel, name) = raw_queue(connection, kind).await?;
    let (first, rest) = wires.split_at(FIRST.min(wires.len()));
    send(&channel, &name, first, FIRST).await?;
    let started = Instant::now();
    send(&channel, &name, rest, window).await?;
    let took = started.elapsed().as_secs_f64();
    channel.queue_delete(name.as_str().into(), QueueDeleteOptions::default()).await?;
    channel.close(200, "done".into()).await?;
    Ok(took * wires.len() as f64 / rest.len().max(1) as f64)
}

/// Prefetch 1024, one acknowledgement for each message.
async fn raw_consume(connection: &Connection, wires: &[Wire]) -> Anyhow<f64> {
    let (channel, name) = raw_queue(connection, "quorum").await?;
    send(&channel, &name, wires, 1024).await?;
    channel.basic_qos(1024, BasicQosOptions::default()).await?;
    let queue = name.as_str();
    let mut messages = channel
        .basic_consume(queue.into(), "raw".into(), BasicConsumeOptions::default(), FieldTable::default())
        .await?;
    let mut started = None;
    for _ in wires {
        let message = messages.next().await.ok_or("the consumer ended")??;
        started.get_or_insert_with(Instant::now);
        let headers = message.properties.headers().as_ref().ok_or("no headers")?.inner();
        std::hint::black_box((headers.get("cloudEvents_id"), headers.get("cloudEvents_type")));
        decode(&message.data)?;
        message.ack(BasicAckOptions::default()).await?;
    }
    let took = started.map(|started| started.elapsed().as_secs_f64()).unwrap_or_default();
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
    channel.close(200, "done".into()).await?;
    Ok(took)
}
