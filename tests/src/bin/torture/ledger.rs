//! What the processes of a run over an outbox do: writers commit numbered events in the database, relays publish them,
//! appliers have their effects in the database.

use std::time::Duration;

use eventbus::{Bus, Failure, FromState, Retry, Service, Start, State, Typed};
use eventbus_tests::around::Around;
use outbox::{Inbox, Options, Outbox, Relay, Tx};

use crate::base::Base;
use crate::bugs::{Bug, Planted};
use crate::roles::{AGAIN, FAILS_ONE_IN, Place, Step};

/// Keys, which all writers share; tasks of each writer, and between two transactions of one.
const N_KEYS: usize = 200;
const TASKS: usize = 4;
const PACE: Duration = Duration::from_millis(40);
/// For how long a relay owns without a word.
pub(crate) const LEASE: Duration = Duration::from_secs(2);

/// The keys of a run.
pub(crate) fn keys() -> Vec<String> {
    (0..N_KEYS).map(|n| format!("k{n}")).collect()
}

fn open<D: Base>(url: &str) -> eventbus::Result<Outbox<D>> {
    let pool = D::connect(url).map_err(eventbus::sql::from_sqlx)?;
    Ok(Outbox::with_options(pool, Options::default().with_source("/torture")))
}

/// Creates what is needed.
pub(crate) async fn prepare<D: Base>(url: &str) -> eventbus::Result<()> {
    let outbox = open::<D>(url)?;
    outbox.migrate().await?;
    D::create(outbox.pool(), &keys()).await.map_err(eventbus::sql::from_sqlx)
}

/// One transaction, which may be given up.
async fn write_one<D: Base>(outbox: &Outbox<D>, place: &Place, bus: &Bus) -> eventbus::Result<()> {
    let key = format!("k{}", fastrand::usize(..N_KEYS));
    let (mut tx, topic) = (outbox.begin().await?, place.topic()?);
    let n = D::count_up(&mut tx, &key).await.map_err(eventbus::sql::from_sqlx)?;
    let step = Step::new(key, n);
    D::note(&mut tx, "committed", &step).await.map_err(eventbus::sql::from_sqlx)?;
    if place.bug == Bug::AfterCommit {
        tx.commit().await?;
        bus.publisher().await?.publish(&topic, &step).await?;
        return Ok(());
    }
    tx.publish(&topic, &step)?;
    match fastrand::u8(..10) {
        0 => tx.rollback().await,
        1 => {
            drop(tx);
            Ok(())
        }
        _ => tx.commit().await,
    }
}

/// Commits events until the run is over.
pub(crate) async fn write<D: Base>(place: &Place) -> eventbus::Result<()> {
    let (outbox, bus) = (open::<D>(&place.db)?, place.connect().await?);
    let task = async || {
        while !place.is_over() {
            match write_one(&outbox, place, &bus).await {
                // What became of it is in the database.
                Err(error) if error.is_retryable() => tokio::time::sleep(AGAIN).await,
                done => done?,
            }
            tokio::time::sleep(PACE).await;
        }
        Ok::<_, eventbus::Error>(())
    };
    futures_util::future::try_join_all((0..TASKS).map(|_| task())).await?;
    bus.close().await
}

/// Publishes until it is asked to end.
pub(crate) async fn relay<D: Base>(place: &Place) -> eventbus::Result<()> {
    let (outbox, bus) = (open::<D>(&place.db)?, place.connect().await?);
    let shutdown = eventbus::shutdown_signal();
    let relay = loop {
        match Relay::new(&outbox).with_lease(LEASE).start(&bus).await {
            Err(error) if error.is_retryable() => tokio::time::sleep(AGAIN).await,
            started => break started?,
        }
    };
    shutdown.await;
    relay.stop().await;
    bus.close().await
}

struct Hand<D: Base>(Inbox<D>);

impl<D: Base> Clone for Hand<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D: Base> FromState<Hand<D>> for Inbox<D> {
    fn from_state(hand: &Hand<D>) -> Self {
        hand.0.clone()
    }
}

fn fails() -> Result<(), Failure> {
    match fastrand::u32(..FAILS_ONE_IN) {
        0 => Err(Failure::transient("torture", "one in twenty")),
        _ => Ok(()),
    }
}

async fn apply_once<D: Base>(
    mut tx: Tx<D>,
    Typed(step): Typed<Step>,
    State(_): State<Hand<D>>,
) -> Result<(), Failure> {
    D::note(&mut tx, "effects", &step).await?;
    fails()
}

/// What was handled is not remembered.
async fn apply_again<D: Base>(Typed(step): Typed<Step>, State(hand): State<Hand<D>>) -> Result<(), Failure> {
    let mut tx = hand.0.outbox().begin().await?;
    D::note(&mut tx, "effects", &step).await?;
    tx.commit().await?;
    fails()
}

/// Has the effects of events until it is asked to end.
pub(crate) async fn apply<D: Base>(place: &Place) -> eventbus::Result<()> {
    let bus = place.connect().await?;
    let bus = Bus::new(Around { inner: bus.transport().clone(), change: Planted(place.bug) });
    let hand = Hand(Inbox::new(&open::<D>(&place.db)?));
    let (base, most) = (Duration::from_millis(20), Duration::from_millis(300));
    let retry =
        Retry::exponential(base, most, std::num::NonZeroU32::MAX).with_in_lane(std::num::NonZeroU32::MIN);
    let shutdown = eventbus::shutdown_signal();
    let running = loop {
        let service = Service::new("torture").retry(retry).start_at(Start::Earliest);
        let service = match place.bug {
            Bug::NoInbox => service.on(place.topic()?, apply_again::<D>),
            _ => service.on(place.topic()?, apply_once::<D>),
        };
        match service.with_state(hand.clone()).start(&bus).await {
            Err(error) if error.is_retryable() => tokio::time::sleep(AGAIN).await,
            started => break started?,
        }
    };
    shutdown.await;
    running.stop().await?;
    bus.close().await
}
