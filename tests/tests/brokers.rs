//! Every transport that speaks to a broker, against the one list of cases, on real brokers.
//!
//! A broker is taken from the environment (`EVENTBUS_POSTGRES_URL` and so on), or from `cargo xtask brokers up`, or
//! started here.

use eventbus::conformance::run_as_test;
use eventbus_tests::brokers;
use xtask::brokers::Kind;

const CHILD: &str = env!("CARGO_BIN_EXE_child");

eventbus::conformance!(postgres, brokers::shared(Kind::Postgres, CHILD));
eventbus::conformance!(kafka, brokers::shared(Kind::Kafka, CHILD));
eventbus::conformance!(redis, brokers::shared(Kind::Redis, CHILD));
eventbus::conformance!(valkey, brokers::shared(Kind::Valkey, CHILD));

/// The cases that disturb a broker, each on one of its own.
macro_rules! disturbing {
    ($($broker:ident $kind:ident [$($id:ident $name:ident)*])*) => {$(
        mod $broker {
            use super::*;
            $(
                #[test]
                fn $name() {
                    run_as_test(stringify!($id), || brokers::own(Kind::$kind, CHILD));
                }
            )*
        }
    )*};
}

disturbing! {
    postgres_own Postgres [
        P18 lost_ack_is_unknown
        D2 confirmed_survives_restart
        D3 consumer_resumes_after_restart
    ]
    kafka_own Kafka [
        P18 lost_ack_is_unknown
        D2 confirmed_survives_restart
        D3 consumer_resumes_after_restart
    ]
    redis_own Redis [
        P18 lost_ack_is_unknown
        D2 confirmed_survives_restart
        D3 consumer_resumes_after_restart
    ]
    valkey_own Valkey [
        P18 lost_ack_is_unknown
        D2 confirmed_survives_restart
        D3 consumer_resumes_after_restart
    ]
}
