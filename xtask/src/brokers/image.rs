//! The official image of each broker, and what it is started with.

use std::fmt;

use super::Kind;
use super::recipe::PASSWORD;

/// An image with all that a container of it is started with.
#[derive(Debug, Clone)]
pub(super) struct Image {
    pub(super) name: &'static str,
    pub(super) tag: String,
    /// The port of the broker inside of the container.
    pub(super) port: u16,
    pub(super) command: Vec<String>,
    pub(super) environment: Vec<(&'static str, String)>,
    /// What its log says each time that it can be used.
    pub(super) ready: &'static str,
    /// How often its log says so until its first start is done.
    pub(super) says_at_first: usize,
    scheme: &'static str,
    user: &'static str,
    path: &'static str,
}

impl Image {
    /// The address of the broker behind a port of this machine.
    pub(super) fn url(&self, port: u16) -> String {
        let Self { scheme, user, path, .. } = self;
        format!("{scheme}://{user}127.0.0.1:{port}{path}")
    }
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.tag)
    }
}

/// The tags that the matrix runs; the last is taken when none is asked for.
pub(super) fn tags(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Postgres => &["15", "17", "18"],
        Kind::Redis => &["7", "8"],
        Kind::Valkey => &["8.1", "9.0"],
        Kind::Nats => &["2.10", "2.11", "2.12"],
        Kind::Kafka => &["3.9.1", "4.1.1"],
        Kind::Rabbitmq => &["3.13", "4"],
    }
}

/// The image of a broker under any tag. A broker that names itself to its clients names the advertised port.
pub(super) fn of(kind: Kind, tag: Option<&str>, advertised: u16) -> Image {
    let tag = tag.or(tags(kind).last().copied()).unwrap_or("latest").to_owned();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let keeper = |server| words(&[server, "--appendonly", "yes", "--save", "", "--requirepass", PASSWORD]);
    let plain = Image {
        name: "",
        tag,
        port: 0,
        command: Vec::new(),
        environment: Vec::new(),
        ready: "",
        says_at_first: 1,
        scheme: kind.name(),
        user: "eventbus:eventbus@",
        path: "",
    };
    match kind {
        Kind::Redis => Image {
            name: "redis",
            port: 6379,
            command: keeper("redis-server"),
            ready: "eady to accept connections",
            user: ":eventbus@",
            ..plain
        },
        Kind::Valkey => Image {
            name: "valkey/valkey",
            port: 6379,
            command: keeper("valkey-server"),
            ready: "eady to accept connections",
            scheme: "redis",
            user: ":eventbus@",
            ..plain
        },
        Kind::Nats => Image {
            name: "nats",
            port: 4222,
            command: words(&["-js", "-sd", "/data", "--user", "eventbus", "--pass", PASSWORD]),
            ready: "Server is ready",
            ..plain
        },
        Kind::Postgres => Image {
            name: "postgres",
            port: 5432,
            command: words(&["-c", "max_connections=300"]),
            environment: vec![
                ("POSTGRES_USER", "eventbus".to_owned()),
                ("POSTGRES_PASSWORD", PASSWORD.to_owned()),
                ("POSTGRES_DB", "postgres".to_owned()),
            ],
            ready: "database system is ready to accept connections",
            // The first is the server that prepares the database, which nobody outside reaches.
            says_at_first: 2,
            path: "/postgres",
            ..plain
        },
        Kind::Rabbitmq => Image {
            name: "rabbitmq",
            port: 5672,
            environment: vec![
                ("RABBITMQ_DEFAULT_USER", "eventbus".to_owned()),
                ("RABBITMQ_DEFAULT_PASS", PASSWORD.to_owned()),
            ],
            ready: "Server startup complete",
            scheme: "amqp",
            ..plain
        },
        Kind::Kafka => Image {
            name: "apache/kafka",
            port: 9092,
            environment: kafka(advertised),
            ready: "Kafka Server started",
            user: "",
            ..plain
        },
    }
}

/// One node that is its own controller; sessions are shorter than in production, as tests wait for members that died.
fn kafka(advertised: u16) -> Vec<(&'static str, String)> {
    let mut environment: Vec<_> = [
        ("KAFKA_NODE_ID", "1"),
        ("KAFKA_PROCESS_ROLES", "broker,controller"),
        ("KAFKA_CONTROLLER_QUORUM_VOTERS", "1@localhost:9093"),
        ("KAFKA_CONTROLLER_LISTENER_NAMES", "CONTROLLER"),
        ("KAFKA_LISTENERS", "PLAINTEXT://:9092,CONTROLLER://:9093"),
        ("KAFKA_LISTENER_SECURITY_PROTOCOL_MAP", "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT"),
        ("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false"),
        ("KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR", "1"),
        ("KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS", "4"),
        ("KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR", "1"),
        ("KAFKA_TRANSACTION_STATE_LOG_MIN_ISR", "1"),
        ("KAFKA_TRANSACTION_STATE_LOG_NUM_PARTITIONS", "4"),
        ("KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS", "0"),
        ("KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS", "100"),
        ("KAFKA_GROUP_CONSUMER_MIN_SESSION_TIMEOUT_MS", "100"),
        ("KAFKA_GROUP_CONSUMER_SESSION_TIMEOUT_MS", "2000"),
        ("KAFKA_GROUP_CONSUMER_MIN_HEARTBEAT_INTERVAL_MS", "100"),
        ("KAFKA_GROUP_CONSUMER_HEARTBEAT_INTERVAL_MS", "200"),
        ("KAFKA_LOG_RETENTION_CHECK_INTERVAL_MS", "1000"),
    ]
    .map(|(name, value)| (name, value.to_owned()))
    .into();
    environment.push(("KAFKA_ADVERTISED_LISTENERS", format!("PLAINTEXT://127.0.0.1:{advertised}")));
    environment
}
