//! Addresses that lead nowhere, or in vain: each is told for what it is, in time, and shows no secret.

use std::time::{Duration, Instant};

use eventbus::{Error, ErrorKind};
use xtask::brokers::{Kind, url};

pub(crate) async fn refused(address: &str) -> Error {
    let begun = Instant::now();
    let error = match eventbus::connect(address).await {
        Err(error) => error,
        // Some see who they are when they are asked first.
        Ok(bus) => bus.transport().admin().unwrap().topics().await.unwrap_err(),
    };
    assert!(begun.elapsed() < Duration::from_secs(15), "{address}: after {:?}", begun.elapsed());
    assert!(!format!("{error} {error:?}").contains("canary-secret"), "{error:?}");
    error
}

/// An address in its parts.
struct Parts<'a> {
    scheme: &'a str,
    user: &'a str,
    place: &'a str,
    path: &'a str,
}

impl<'a> Parts<'a> {
    fn of(address: &'a str) -> Self {
        let (scheme, rest) = address.split_once("://").unwrap();
        let (user, rest) = rest.rsplit_once('@').unwrap_or(("", rest));
        let (place, path) = rest.split_once('/').unwrap_or((rest, ""));
        Self { scheme, user: user.split(':').next().unwrap_or(""), place, path }
    }

    fn with_password(&self, place: &str) -> String {
        format!("{}://{}:canary-secret@{place}/{}?timeout=2s", self.scheme, self.user, self.path)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_addresses_are_told_apart_and_show_no_secret() {
    for kind in Kind::ALL {
        let right = url(kind).unwrap();
        let parts = Parts::of(&right);
        let check = async |what: &str, address: String, wanted: ErrorKind| {
            let error = refused(&address).await;
            assert_eq!(error.kind(), wanted, "{kind}, {what}: {error:?}");
        };
        check("an option", format!("{right}?canary=1"), ErrorKind::Config).await;
        check("a value", format!("{right}?timeout=soon"), ErrorKind::Config).await;
        if kind == Kind::Kafka {
            // The broker of the tests knows no users.
            check("a port", "kafka://127.0.0.1:1?timeout=2s".to_owned(), ErrorKind::Unavailable).await;
            continue;
        }
        check("a port", parts.with_password("127.0.0.1:1"), ErrorKind::Unavailable).await;
        check("a password", parts.with_password(parts.place), ErrorKind::Unauthorized).await;
        let secret = right.split('@').next().unwrap();
        let elsewhere = format!("{secret}@{}/canary", parts.place);
        let wanted = if kind == Kind::Postgres { ErrorKind::NotFound } else { ErrorKind::Config };
        check("a database or host", elsewhere, wanted).await;
    }
}
