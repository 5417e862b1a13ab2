//! A process of its own on any transport, for the cases that kill it. It can be broken on purpose.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::Arc;

use async_trait::async_trait;
use eventbus::{
    Confirm, Consumer, Envelope, Error, ErrorKind, PartitionId, Polled, Publisher, Receipt, Result, Settle,
    Topic, Transport,
};
use eventbus_tests::around::{Around, Change, Enqueue, Enqueues, Poll, Polls};
use parking_lot::Mutex;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match play(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("child: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn play(arguments: &[String]) -> Result<()> {
    let [url, broken, role @ ..] = arguments else {
        return Err(Error::new(ErrorKind::Config, "usage: child URL sound|DEFECT ROLE…"));
    };
    let sound = eventbus::connect(url).await?.transport().clone();
    let transport: Arc<dyn Transport> = match broken.as_str() {
        "sound" => sound,
        _ => {
            let change = Broken { confirms_early: broken == "confirms_before_storing" };
            Arc::new(Around { inner: sound, change })
        }
    };
    eventbus::conformance::child(transport, role).await
}

/// Confirms before it stores, or acks what it hands out.
#[derive(Debug)]
struct Broken {
    confirms_early: bool,
}

impl Change for Broken {
    fn publisher(&self, publisher: Arc<dyn Publisher>) -> Arc<dyn Publisher> {
        if self.confirms_early { Arc::new(Enqueues(publisher, Early::default())) } else { publisher }
    }

    fn consumer(&self, consumer: Arc<dyn Consumer>) -> Arc<dyn Consumer> {
        if self.confirms_early { consumer } else { Arc::new(Polls(consumer, Hasty)) }
    }
}

/// Stores an event when the next one comes.
#[derive(Debug, Default)]
struct Early(Mutex<Vec<Envelope>>);

#[async_trait]
impl Enqueue for Early {
    async fn enqueue(&self, inner: &dyn Publisher, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        let n = batch.len();
        let earlier = std::mem::replace(&mut *self.0.lock(), batch);
        inner.enqueue(topic, earlier).await?.await.all()?;
        Ok(Confirm::ready((0..n).map(|_| Ok(Receipt::new(PartitionId(0), None))).collect()))
    }
}

/// Acks what it hands out.
#[derive(Debug)]
struct Hasty;

#[async_trait]
impl Poll for Hasty {
    async fn poll(&self, inner: &dyn Consumer, max: NonZeroUsize) -> Result<Polled> {
        let polled = inner.poll(max).await?;
        if let Polled::Deliveries(deliveries) = &polled {
            let outcomes: Vec<_> = deliveries.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
            inner.settle(&outcomes).await?.all()?;
        }
        Ok(polled)
    }
}
