//! The raw client of a broker as a publisher, for whoever compares more than a client.

use async_nats::jetstream::Context;
use lapin::{Connection, ConnectionProperties};
use xtask::brokers::{Broker, Kind};

use super::{Wire, kafka, nats, rabbitmq};
use crate::Anyhow;

/// Sends with a window of 1,024, to a place like the one that ours sends to.
pub(crate) enum Raw {
    Kafka(String),
    Nats(Context),
    Rabbitmq(Connection),
}

impl Raw {
    pub(crate) async fn connect(broker: &Broker) -> Anyhow<Self> {
        match broker.kind() {
            Kind::Kafka => Ok(Self::Kafka(kafka::hosts(broker))),
            Kind::Nats => Ok(Self::Nats(nats::context(broker.url()).await?)),
            Kind::Rabbitmq => {
                let connection = Connection::connect(broker.url(), ConnectionProperties::default()).await?;
                Ok(Self::Rabbitmq(connection))
            }
            other => Err(format!("{other} has no raw publisher here").into()),
        }
    }

    pub(crate) async fn publish(&self, wires: &[Wire]) -> Anyhow<f64> {
        match self {
            Self::Kafka(hosts) => kafka::raw_publish(hosts, wires, 1024).await,
            Self::Nats(context) => nats::raw_publish(context, wires, 1024).await,
            Self::Rabbitmq(connection) => rabbitmq::raw_publish(connection, "stream", wires, 1024).await,
        }
    }
}
