//! A handler with an inbox beside the same handler with a transaction of its own.

use std::num::NonZeroUsize;
use std::time::Duration;

use eventbus::{Bus, Envelope, Failure, FromState, Service, State, Topic, Typed};
use outbox::{Inbox, Memory, Tx};
use sqlx::Postgres;
use sqlx::postgres::PgPool;

use super::{DISKS, Home, SLOW, is_any_wanted, void};
use crate::{Anyhow, Order, is_wanted, pair, timed};

const LANES: usize = 8;

pub(super) async fn run(events: &[Envelope]) -> Anyhow<()> {
    for (disk, sync) in DISKS {
        let lines = [("events", false), ("sequences of keys", true)];
        let lines = lines.map(|(memory, is_sequence)| {
            (format!("inbox, a handler's transaction ({memory}), 8 lanes, {disk}"), is_sequence)
        });
        if !is_any_wanted(lines.iter().map(|(line, _)| line)) {
            continue;
        }
        let home = Home::open(sync).await?;
        let n = if sync == SLOW { 3_000 } else { 10_000 };
        let events: Vec<Envelope> = events.iter().take(n).enumerate().map(numbered).collect();
        for (line, is_sequence) in &lines {
            if is_wanted(line) {
                let ours = || handle(&home, &events, true, *is_sequence);
                pair(line, 0.95, events.len(), || handle(&home, &events, false, false), ours).await?;
            }
        }
    }
    Ok(())
}

/// As a relay sends it.
fn numbered((n, event): (usize, &Envelope)) -> Envelope {
    let event = event.clone();
    event.with_extension("evt-seq", (n + 1).to_string()).with_extension("evt-source", "bench")
}

#[derive(Clone)]
struct Books {
    pool: PgPool,
    inbox: Inbox<Postgres>,
}

impl FromState<Books> for Inbox<Postgres> {
    fn from_state(books: &Books) -> Self {
        books.inbox.clone()
    }
}

async fn add(connection: &mut sqlx::PgConnection, order: &Order) -> Result<(), sqlx::Error> {
    let update = sqlx::query("UPDATE account SET n = n + 1 WHERE id = $1");
    update.bind(order.buyer.cast_signed()).execute(connection).await.map(drop)
}

async fn bare(State(books): State<Books>, Typed(order): Typed<Order>) -> Result<(), Failure> {
    let mut tx = books.pool.begin().await?;
    add(&mut tx, &order).await?;
    Ok(tx.commit().await?)
}

async fn noted(mut tx: Tx<Postgres>, Typed(order): Typed<Order>) -> Result<(), Failure> {
    add(&mut tx, &order).await?;
    Ok(())
}

/// How long a service takes for the events, from its first to the commit of its last.
async fn handle(home: &Home, events: &[Envelope], is_noted: bool, is_sequence: bool) -> Anyhow<f64> {
    home.clear().await?;
    home.run("UPDATE account SET n = 0").await?;
    home.run("VACUUM account").await?;
    let (bus, topic): (Bus, _) = (void(), Topic::new("orders")?);
    let memory = match is_sequence {
        true => Memory::Sequences,
        false => Memory::Events { keep: Duration::from_secs(14 * 24 * 3600) },
    };
    let books = Books { pool: home.pool.clone(), inbox: Inbox::with_memory(&home.outbox, memory) };
    let lanes = NonZeroUsize::new(LANES).unwrap_or(NonZeroUsize::MIN);
    let service = Service::new("bench").lanes(lanes);
    let service = match is_noted {
        true => service.on(topic.clone(), noted),
        false => service.on(topic.clone(), bare),
    };
    let running = service.with_state(books.clone()).start(&bus).await?;
    let publisher = bus.transport().publisher().await?;
    let took = timed(async {
        for some in events.chunks(256) {
            publisher.enqueue(&topic, some.to_vec()).await?.await.all()?;
        }
        while running.counts().handled < events.len() as u64 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    })
    .await?;
    running.stop().await?;
    let n: i64 = sqlx::query_scalar("SELECT sum(n)::bigint FROM account").fetch_one(&home.pool).await?;
    if n != i64::try_from(events.len())? {
        return Err(format!("{n} effects of {} events", events.len()).into());
    }
    Ok(took)
}
