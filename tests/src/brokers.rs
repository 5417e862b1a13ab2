//! Real brokers as subjects of the suite.

use std::path::PathBuf;
use std::sync::Arc;

use eventbus::conformance::Subject;
use eventbus::{Error, ErrorKind, Result, Topic, Transport, Undecodable};
use parking_lot::Mutex;
use xtask::brokers::{self, Broker, Kind};

use crate::proxy::{Proxy, Wire};

/// How soon a silent member loses its seat, and the rest that cases wait for.
const OPTIONS: &str = "declare=create&session=2s&timeout=5s";

fn address(kind: Kind, url: &str) -> String {
    let more = if kind == Kind::Kafka { "&delivery_timeout=5s" } else { "" };
    format!("{url}?{OPTIONS}{more}")
}

/// A transport on a broker that is shared with other tests, with the hooks that disturb nobody.
pub fn shared(kind: Kind, child: &'static str) -> Subject {
    shared_with(kind, "", child)
}

/// The same with options of its own: `&protocol=consumer`, for one.
pub fn shared_with(kind: Kind, options: &str, child: &'static str) -> Subject {
    // A missing broker fails every case, with the reason.
    let url = brokers::url(kind).map(|url| address(kind, &url) + options);
    with_raw(subject(kind, url.clone(), child), kind, url)
}

/// A broker of its own behind a wire that can fail, and the address that leads there.
///
/// # Errors
/// Why it could not be started.
pub fn behind(kind: Kind) -> Result<(Broker, Proxy, String), String> {
    let proxy = Proxy::start().map_err(|error| error.to_string())?;
    let broker = Broker::start_behind(kind, None, Some(proxy.port()))?;
    proxy.lead(broker.port());
    let port = |port: u16| format!("127.0.0.1:{port}");
    let url = broker.url().replace(&port(broker.port()), &port(proxy.port()));
    Ok((broker, proxy, url))
}

/// A transport on a broker of its own, which can be restarted, behind a wire that can fail.
pub fn own(kind: Kind, child: &'static str) -> Subject {
    let (broker, proxy, url) = match behind(kind) {
        Ok(started) => started,
        Err(problem) => return subject(kind, Err(problem), child),
    };
    let subject = subject(kind, Ok(address(kind, &url)), child);
    let (broker, proxy) = (Arc::new(Mutex::new(broker)), Arc::new(proxy));
    subject
        .with_restart(move || {
            let broker = broker.clone();
            async move {
                if kind == Kind::Rabbitmq {
                    // One that is killed within a second of its first stream finds none of them again (3.10.8): the
                    // directory of its replicated logs is written later than what it names.
                    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
                }
                let restarting = tokio::task::spawn_blocking(move || broker.lock().restart());
                restarting.await.map_err(|error| error.to_string()).and_then(|done| done).map_err(missing)
            }
        })
        .with_cut(move |on| {
            let proxy = proxy.clone();
            async move {
                proxy.set(if on { Wire::DropAnswers } else { Wire::Whole });
                if on {
                    // Requests that are on their way arrive; then the connection is gone.
                    std::thread::spawn(move || {
                        std::thread::sleep(std::time::Duration::from_millis(500));
                        proxy.reset();
                    });
                }
                Ok(())
            }
        })
}

fn missing(problem: String) -> Error {
    Error::new(ErrorKind::Unavailable, problem)
}

fn subject(kind: Kind, url: std::result::Result<String, String>, child: &'static str) -> Subject {
    let of_child = url.clone();
    Subject::new(kind.name(), move || {
        let url = url.clone();
        async move {
            let bus = eventbus::connect(&url.map_err(missing)?).await?;
            Ok(Arc::clone(bus.transport()) as Arc<dyn Transport>)
        }
    })
    .with_child(move |arguments| {
        let mut command = std::process::Command::new(PathBuf::from(child));
        command.arg(of_child.clone().unwrap_or_default()).arg("sound").args(arguments);
        command
    })
}

fn with_raw(subject: Subject, kind: Kind, url: std::result::Result<String, String>) -> Subject {
    subject.with_raw(move |topic, content| {
        let url = url.clone();
        async move {
            match kind {
                Kind::Postgres => postgres(&url.map_err(missing)?, &topic, content).await,
                Kind::Redis | Kind::Valkey => redis(&url.map_err(missing)?, &topic, content).await,
                Kind::Nats => nats(&url.map_err(missing)?, &topic, content).await,
                Kind::Kafka => kafka(&url.map_err(missing)?, &topic, content).await,
                Kind::Rabbitmq => rabbitmq(&url.map_err(missing)?, &topic, content).await,
            }
        }
    })
}

/// Writes a row that no version of ours would write.
async fn postgres(url: &str, topic: &Topic, content: Undecodable) -> Result<()> {
    let failed = |error: sqlx::Error| Error::new(ErrorKind::Unexpected, "raw insert").caused_by(error);
    let place = url.split('?').next().unwrap_or_default();
    let pool = sqlx::PgPool::connect(place).await.map_err(failed)?;
    let sql = r#"WITH locked AS MATERIALIZED (
          SELECT p.topic, p.first FROM eventbus_partition p JOIN eventbus_topic t ON t.id = p.topic
          WHERE t.name = $1 AND p.partition = 0 FOR UPDATE OF p)
        INSERT INTO eventbus_event (topic, partition, "offset", stored_at, size, source, version, headers, payload)
        SELECT l.topic, 0, h.next, 0, 0, 's', -7, $2, $3
        FROM locked l CROSS JOIN LATERAL eventbus_head(l.topic, 0, l.first) h"#;
    sqlx::query(sql)
        .bind(topic.as_str())
        .bind(content.headers.as_block().as_ref())
        .bind(content.raw.as_deref())
        .execute(&pool)
        .await
        .map_err(failed)?;
    pool.close().await;
    Ok(())
}

/// Appends an entry as a foreign program would.
async fn redis(url: &str, topic: &Topic, content: Undecodable) -> Result<()> {
    let failed = |error: redis::RedisError| Error::new(ErrorKind::Unexpected, "raw entry").caused_by(error);
    let place = url.split('?').next().unwrap_or_default();
    let client = redis::Client::open(place).map_err(failed)?;
    let mut connection = client.get_multiplexed_async_connection().await.map_err(failed)?;
    let mut entry = redis::cmd("XADD");
    entry.arg(format!("evt:{{{topic}}}:s:0")).arg("*");
    for (name, value) in &content.headers {
        entry.arg(name).arg(value);
    }
    if let Some(raw) = content.raw.as_deref() {
        entry.arg("data").arg(raw);
    }
    entry.query_async::<()>(&mut connection).await.map_err(failed)
}

/// Sends a record as a foreign program would.
async fn kafka(url: &str, topic: &Topic, content: Undecodable) -> Result<()> {
    use rdkafka::message::{Header, OwnedHeaders};
    use rdkafka::producer::{FutureProducer, FutureRecord};
    let failed =
        |error: rdkafka::error::KafkaError| Error::new(ErrorKind::Unexpected, "raw record").caused_by(error);
    let place = url.split('?').next().unwrap_or_default().trim_start_matches("kafka://");
    let producer: FutureProducer =
        rdkafka::ClientConfig::new().set("bootstrap.servers", place).create().map_err(failed)?;
    let headers = content.headers.iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
        headers.insert(Header { key, value: Some(value) })
    });
    let mut record: FutureRecord<'_, [u8], [u8]> =
        FutureRecord::to(topic.as_str()).partition(0).headers(headers);
    if let Some(raw) = content.raw.as_deref() {
        record = record.payload(raw);
    }
    let sent = producer.send(record, std::time::Duration::from_secs(5)).await;
    sent.map(drop).map_err(|(error, _)| failed(error))
}

/// Publishes a message as a foreign program would, without waiting for more than that it is stored.
async fn nats(url: &str, topic: &Topic, content: Undecodable) -> Result<()> {
    let failed = |error: async_nats::Error| Error::new(ErrorKind::Unexpected, "raw message").caused_by(error);
    let place = url.split('?').next().unwrap_or_default();
    // The client takes no user from an address that is a plain text.
    let place: async_nats::ServerAddr =
        place.parse().map_err(|error: std::io::Error| failed(error.into()))?;
    let options = async_nats::ConnectOptions::new().user_and_password(
        place.username().unwrap_or_default().to_owned(),
        place.password().unwrap_or_default().to_owned(),
    );
    let client = options.connect(place).await.map_err(|error| failed(error.into()))?;
    let mut headers = async_nats::HeaderMap::new();
    for (name, value) in &content.headers {
        // What is no text has no header in NATS.
        let (Ok(name), Ok(value)) = (
            name.parse::<async_nats::HeaderName>(),
            String::from_utf8_lossy(value).parse::<async_nats::HeaderValue>(),
        ) else {
            continue;
        };
        headers.append(name, value);
    }
    if content.raw.is_none() {
        headers.append("evt-nodata", "1");
    }
    let subject = format!("evt.{topic}.0");
    let stream = async_nats::jetstream::new(client);
    let sent = stream.publish_with_headers(subject, headers, content.raw.unwrap_or_default()).await;
    let stored = sent.map_err(|error| failed(error.into()))?.await;
    stored.map(drop).map_err(|error| failed(error.into()))
}

/// Publishes a message as a foreign program would.
async fn rabbitmq(url: &str, topic: &Topic, content: Undecodable) -> Result<()> {
    use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
    use lapin::types::{AMQPValue, FieldTable, ShortString};
    let failed = |error: lapin::Error| Error::new(ErrorKind::Unexpected, "raw message").caused_by(error);
    let place = url.split('?').next().unwrap_or_default();
    let connecting = lapin::Connection::connect(place, lapin::ConnectionProperties::default());
    let connection = connecting.await.map_err(failed)?;
    let channel = connection.create_channel().await.map_err(failed)?;
    channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(failed)?;
    let mut headers = FieldTable::default();
    for (name, value) in &content.headers {
        // A table has each name once.
        if let Ok(name) = ShortString::try_new(name) {
            headers.insert(name, AMQPValue::LongString(value.into()));
        }
    }
    if content.raw.is_none() {
        headers.insert("evt-nodata".into(), AMQPValue::LongString("1".into()));
    }
    let properties = lapin::BasicProperties::default().with_headers(headers);
    let (raw, exchange) = (content.raw.unwrap_or_default(), ShortString::from(topic.as_str()));
    let options = BasicPublishOptions::default();
    let sent =
        channel.basic_publish(exchange, "0".into(), options, &raw, properties).await.map_err(failed)?;
    sent.await.map_err(failed)?;
    connection.close(200, ShortString::default()).await.map_err(failed)
}
