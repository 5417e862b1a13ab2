//! Every transport that speaks to a broker, against the one list of cases, on real brokers.
//!
//! A broker is taken from the environment (`EVENTBUS_POSTGRES_URL` and so on), or from `cargo xtask brokers up`, or
//! started here.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test reports by panicking")]

mod addresses;
mod alarms;
mod away;
mod containers;
mod fitness;
mod interop;
mod kafka_gap;
mod nats_foreign;
mod outbox;
mod postgres_tables;
mod rabbitmq_foreign;
mod round_trip;
mod secure;

use eventbus::conformance::run_as_test;
use eventbus_tests::brokers;
use xtask::brokers::Kind;

const CHILD: &str = env!("CARGO_BIN_EXE_child");

eventbus::conformance!(postgres, brokers::shared(Kind::Postgres, CHILD));
eventbus::conformance!(kafka, brokers::shared(Kind::Kafka, CHILD));
eventbus::conformance!(nats, brokers::shared(Kind::Nats, CHILD));
eventbus::conformance!(rabbitmq, brokers::shared(Kind::Rabbitmq, CHILD));
eventbus::conformance!(redis, brokers::shared(Kind::Redis, CHILD));
eventbus::conformance!(valkey, brokers::shared(Kind::Valkey, CHILD));

/// Cases by name, on a subject that is not tested with all of them.
macro_rules! cases {
    ($($name_of:ident $subject:expr => [$($id:ident $name:ident)*])*) => {$(
        mod $name_of {
            use super::*;
            $(
                #[test]
                fn $name() {
                    run_as_test(stringify!($id), || $subject);
                }
            )*
        }
    )*};
}

/// The cases that disturb a broker, each on one of its own.
macro_rules! disturbing {
    ($($name:ident $kind:ident)*) => {
        cases! {$(
            $name brokers::own(Kind::$kind, CHILD) => [
                P18 lost_ack_is_unknown
                D2 confirmed_survives_restart
                D3 consumer_resumes_after_restart
            ]
        )*}
    };
}

disturbing! {
    kafka_own Kafka
    nats_own Nats
    postgres_own Postgres
    rabbitmq_own Rabbitmq
    redis_own Redis
    valkey_own Valkey
}

// What changes when the broker assigns the partitions (KIP-848): members that come, go and die.
cases! {
    kafka_assigned brokers::shared_with(Kind::Kafka, "&protocol=consumer", CHILD) => [
        S2 members_share_the_work
        S3 group_position_survives_reopen
        S5 leaver_hands_over_unsettled
        S8 subscribe_returns_ready
        C2 dropped_consumer_loses_nothing
        C22 reopen_rounds_lose_nothing
        O5 a_key_has_one_owner
        D4 killed_consumer_loses_nothing
    ]
}
