//! Streams as queues of the broker: how they are declared, and channels that read them.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Consumer};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::names;
use super::wire::{Wires, failed, reading, to_its_end};
use crate::error::{Error, ErrorKind, Result};

/// What the stream of a map keeps at least, and in pieces of which size it is removed.
const MAX_BYTES: i64 = 16 << 20;
const SEGMENT_BYTES: i64 = 1 << 20;
/// When a lock that somebody holds is tried again.
const AGAIN: Duration = Duration::from_millis(200);
/// How long somebody else may take to create a topic.
const LONGEST: Duration = Duration::from_secs(60);

/// A channel with readers of streams. It is closed when this is dropped: the client keeps one open as long as it has a
/// reader, also one whose beginning nobody waits for any more.
pub(super) struct Readers(Arc<Line>);

struct Line {
    channel: Channel,
    /// Dropped behind the end of the channel: the client cancels a reader that nobody holds, at some time of its own, and
    /// gives up the whole connection if the channel ends meanwhile.
    begun: Mutex<Vec<Consumer>>,
}

impl Readers {
    /// A channel whose readers are sent `credit` messages each before they acknowledge any.
    pub(super) async fn open(wires: &Wires, credit: u16) -> Result<Self> {
        let readers = Self(Arc::new(Line { channel: wires.read.channel().await?, begun: Mutex::default() }));
        readers.set_credit(credit).await?;
        Ok(readers)
    }

    /// Changes what readers that begin from now on are sent. What the broker answers comes behind what it sent those
    /// that began before.
    pub(super) async fn set_credit(&self, credit: u16) -> Result<()> {
        self.0.channel.basic_qos(credit, BasicQosOptions::default()).await.map_err(reading)
    }

    /// Begins to read a stream.
    pub(super) async fn begin(&self, stream: &str, from: AMQPValue) -> Result<Consumer> {
        let (line, stream) = (self.0.clone(), short(stream)?);
        // The broker may refuse it: until that is known, the channel stays open.
        to_its_end(async move { line.begin(stream, from).await }).await
    }

    /// Begins to read some streams, when all are there: when a channel ends because one is missing, the broker goes on to
    /// send what readers of others are due, and the client gives up the whole connection over that (seen with RabbitMQ
    /// 3.10.8). That can still happen for one that is deleted in this moment.
    pub(super) async fn begin_all(&self, streams: &[String], from: &AMQPValue) -> Result<Vec<Consumer>> {
        let (line, from) = (self.0.clone(), from.clone());
        let streams = streams.iter().map(|stream| short(stream)).collect::<Result<Vec<_>>>()?;
        to_its_end(async move {
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let looking = streams
                .iter()
                .map(|stream| line.channel.queue_declare(stream.clone(), passive, FieldTable::default()));
            join_all(looking).await.into_iter().collect::<lapin::Result<Vec<_>>>().map_err(reading)?;
            let beginning = streams.into_iter().map(|stream| line.begin(stream, from.clone()));
            join_all(beginning).await.into_iter().collect()
        })
        .await
    }

    /// Says that the broker may send more, without waiting until that is written.
    pub(super) fn ack(&self, tag: u64) -> Result<()> {
        let acked = self.0.channel.basic_ack(tag, BasicAckOptions { multiple: true });
        acked.now_or_never().transpose().map(drop).map_err(failed)
    }
}

impl Line {
    async fn begin(&self, stream: ShortString, from: AMQPValue) -> Result<Consumer> {
        let (tag, mut arguments) = (ShortString::default(), FieldTable::default());
        arguments.insert("x-stream-offset".into(), from);
        let beginning = self.channel.basic_consume(stream, tag, BasicConsumeOptions::default(), arguments);
        let begun = beginning.await.map_err(reading)?;
        self.begun.lock().push(begun.clone());
        Ok(begun)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.channel.status().connected() {
            // In line behind what was asked before; nobody waits for the answer.
            drop(self.channel.close(200, ShortString::default()).now_or_never());
        }
    }
}

/// What the broker is told of a stream.
pub(super) fn stream_arguments(more: &[(&'static str, AMQPValue)]) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("stream".into()));
    for (name, value) in more {
        arguments.insert((*name).into(), value.clone());
    }
    arguments
}

pub(super) fn at(offset: u64) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(offset).unwrap_or(i64::MAX))
}

/// A name as the protocol wants it; ours are checked before.
pub(super) fn short(name: &str) -> Result<ShortString> {
    ShortString::try_new(name)
        .map_err(|_| Error::config("a name is longer than 255 bytes").with("name", name))
}

/// Whether there is a queue of this name.
pub(super) async fn exists(wires: &Wires, name: &str) -> Result<bool> {
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match declare(wires, short(name)?, passive, FieldTable::default()).await {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        // It is there, and is another connection's.
        Err(error) if error.kind() == ErrorKind::Conflict => Ok(true),
        Err(error) => Err(error),
    }
}

/// Declares a queue.
pub(super) async fn declare(
    wires: &Wires,
    name: ShortString,
    options: QueueDeclareOptions,
    arguments: FieldTable,
) -> Result<()> {
    let declaring = |channel: Channel| async move {
        channel.queue_declare(name, options, arguments).await.map_err(failed)
    };
    wires.read.ask(declaring).await.map(drop)
}

/// Deletes a queue, if there is one.
pub(super) async fn delete(wires: &Wires, name: &str) -> Result<()> {
    let name = short(name)?;
    let deleting = |channel: Channel| async move {
        channel.queue_delete(name, QueueDeleteOptions::default()).await.map_err(failed)
    };
    wires.read.ask(deleting).await.map(drop)
}

/// Does what nobody else does at the same time, on any connection. A broker that is asked for a stream while somebody
/// else creates it ends the connection (seen with 3.10.8).
pub(super) async fn alone<T>(wires: &Wires, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let name = short(&names::lock(what))?;
    let deadline = Instant::now() + wires.timeout + LONGEST;
    let lock = loop {
        let ours = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let name = name.clone();
        // The lock is made where it is taken: whoever gives up waiting for it gives it back.
        let locking = |channel: Channel| async move {
            channel.queue_declare(name.clone(), ours, FieldTable::default()).await.map_err(failed)?;
            Ok(Lock { channel, name })
        };
        match wires.read.ask(locking).await {
            Ok(lock) => break lock,
            Err(error) if error.kind() == ErrorKind::Conflict && Instant::now() < deadline => {
                tokio::time::sleep(AGAIN).await;
            }
            Err(error) => return Err(error),
        }
    };
    let outcome = work.await;
    drop(lock);
    outcome
}

/// A lock that is held; dropped, it is given back.
struct Lock {
    channel: Channel,
    name: ShortString,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // It is in the client's line, before the end of the channel.
        let ending = self.channel.queue_delete(self.name.clone(), QueueDeleteOptions::default());
        drop(ending.now_or_never());
    }
}

/// Creates the stream of a map, if there is none.
pub(super) async fn create(wires: &Wires, name: &str) -> Result<()> {
    let arguments = stream_arguments(&[
        ("x-max-length-bytes", AMQPValue::LongLongInt(MAX_BYTES)),
        ("x-stream-max-segment-size-bytes", AMQPValue::LongLongInt(SEGMENT_BYTES)),
    ]);
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    match declare(wires, short(name)?, durable, arguments).await {
        // With other bounds: those of whoever made it.
        Err(error) if error.kind() == ErrorKind::Conflict => Ok(()),
        declared => declared,
    }
}
