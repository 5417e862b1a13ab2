//! A process of its own on the SQLite store, for the cases that kill it. It can be broken on purpose.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use eventbus::transport::sqlite::{Options, Sqlite};
use eventbus::{
    Admin, Capabilities, Confirm, Consumer, Envelope, Error, ErrorKind, PartitionId, Polled, Publisher,
    Receipt, Result, Settle, Settled, Subscription, Token, Topic, Transport,
};
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
    let [path, broken, role @ ..] = arguments else {
        return Err(Error::new(ErrorKind::Config, "usage: child FILE sound|DEFECT ROLE…"));
    };
    let mut options = Options::default();
    options.session = Duration::from_secs(2);
    let sqlite = Sqlite::open_path(path, options).await?;
    let transport: Arc<dyn Transport> = match broken.as_str() {
        "sound" => Arc::new(sqlite),
        _ => Arc::new(Broken { sqlite, confirms_early: broken == "confirms_before_storing" }),
    };
    eventbus::conformance::child(transport, role).await
}

/// Confirms before it stores, or acks what it hands out.
#[derive(Debug)]
struct Broken {
    sqlite: Sqlite,
    confirms_early: bool,
}

#[async_trait]
impl Transport for Broken {
    fn capabilities(&self) -> Capabilities {
        self.sqlite.capabilities()
    }

    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        let publisher = self.sqlite.publisher().await?;
        Ok(if self.confirms_early {
            Arc::new(Early { publisher, waiting: Mutex::default() })
        } else {
            publisher
        })
    }

    async fn subscribe(&self, subscription: &Subscription) -> Result<Arc<dyn Consumer>> {
        let consumer = self.sqlite.subscribe(subscription).await?;
        Ok(if self.confirms_early { consumer } else { Arc::new(Hasty(consumer)) })
    }

    fn admin(&self) -> Option<&dyn Admin> {
        self.sqlite.admin()
    }

    async fn close(&self) -> Result<()> {
        self.sqlite.close().await
    }
}

/// Stores an event when the next one comes.
#[derive(Debug)]
struct Early {
    publisher: Arc<dyn Publisher>,
    waiting: Mutex<Vec<Envelope>>,
}

#[async_trait]
impl Publisher for Early {
    async fn enqueue(&self, topic: &Topic, batch: Vec<Envelope>) -> Result<Confirm> {
        let n = batch.len();
        let earlier = std::mem::replace(&mut *self.waiting.lock(), batch);
        self.publisher.enqueue(topic, earlier).await?.await.all()?;
        Ok(Confirm::ready((0..n).map(|_| Ok(Receipt::new(PartitionId(0), None))).collect()))
    }

    async fn flush(&self) -> Result<()> {
        self.publisher.flush().await
    }

    async fn close(&self) -> Result<()> {
        self.publisher.close().await
    }
}

/// Acks what it hands out.
#[derive(Debug)]
struct Hasty(Arc<dyn Consumer>);

#[async_trait]
impl Consumer for Hasty {
    async fn poll(&self, max: NonZeroUsize) -> Result<Polled> {
        let polled = self.0.poll(max).await?;
        if let Polled::Deliveries(deliveries) = &polled {
            let outcomes: Vec<_> = deliveries.iter().map(|delivery| (delivery.token, Settle::Ack)).collect();
            self.0.settle(&outcomes).await?.all()?;
        }
        Ok(polled)
    }

    async fn settle(&self, outcomes: &[(Token, Settle)]) -> Result<Settled> {
        self.0.settle(outcomes).await
    }

    async fn release(&self, partitions: &[PartitionId]) -> Result<()> {
        self.0.release(partitions).await
    }

    async fn renew(&self, tokens: &[Token], lease: Duration) -> Result<Settled> {
        self.0.renew(tokens, lease).await
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        self.0.close(deadline).await
    }
}
