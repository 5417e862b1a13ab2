//! A handler with an inbox beside the same handler with a transaction of its own.

use std::num::NonZeroUsize;
use std::time::Duration;

use eventbus::{Batch, Bus, Envelope, Failure, FromState, Outcomes, Service, State, Topic, Typed};
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
        let batch = format!("inbox, a batch handler's transaction (events), 64 at once, {disk}");
        if !is_any_wanted(lines.iter().map(|(line, _)| line).chain([&batch])) {
            continue;
        }
        let home = Home::open(sync).await?;
        let n = if sync == SLOW { 3_000 } else { 10_000 };
        let all: Vec<Envelope> = events.iter().take(40_000).enumerate().map(numbered).collect();
        // Batches take what one by one would take minutes.
        let events = all.get(..n).unwrap_or(&all);
        for (line, is_sequence) in &lines {
            if is_wanted(line) {
                let ours = if *is_sequence { Way::Sequences } else { Way::Events };
                let raw = || handle(&home, events, Way::Bare);
                pair(line, 0.95, events.len(), raw, || handle(&home, events, ours)).await?;
            }
        }
        if is_wanted(&batch) {
            let raw = || handle(&home, &all, Way::BatchByHand);
            pair(&batch, 0.9, all.len(), raw, || handle(&home, &all, Way::Batch)).await?;
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

/// How events are handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// In a transaction of the handler's own, which notes nothing.
    Bare,
    Events,
    Sequences,
    /// In batches, in a transaction of the handler's own, which inserts as many notes and looks at none.
    BatchByHand,
    Batch,
}

async fn add_all(connection: &mut sqlx::PgConnection, orders: &Batch<Order>) -> Result<(), sqlx::Error> {
    let buyers: Vec<i64> = orders.iter().map(|order| order.message.buyer.cast_signed()).collect();
    let insert =
        sqlx::query("INSERT INTO work (buyer, note) SELECT unnest($1::bigint[]), 'an order of a buyer'");
    insert.bind(buyers).execute(connection).await.map(drop)
}

async fn all_by_hand(orders: Batch<Order>, State(books): State<Books>) -> Result<Outcomes, Failure> {
    let ids: Vec<_> = orders.iter().filter_map(|order| order.envelope.id().as_uuid()).collect();
    let mut tx = books.pool.begin().await?;
    let insert = sqlx::query("INSERT INTO raw_inbox (consumer, message_id) SELECT $1, unnest($2::uuid[])");
    insert.bind("bench.all_by_hand@1").bind(ids).execute(&mut *tx).await?;
    add_all(&mut tx, &orders).await?;
    tx.commit().await?;
    Ok(orders.done())
}

async fn all_noted(orders: Batch<Order>, mut tx: Tx<Postgres>) -> Result<Outcomes, Failure> {
    add_all(&mut tx, &orders).await?;
    Ok(orders.done())
}

/// How long a service takes for the events, from its first to the commit of its last.
async fn handle(home: &Home, events: &[Envelope], way: Way) -> Anyhow<f64> {
    home.clear().await?;
    home.run("UPDATE account SET n = 0").await?;
    home.run("VACUUM account").await?;
    let (bus, topic): (Bus, _) = (void(), Topic::new("orders")?);
    let memory = match way {
        Way::Sequences => Memory::Sequences,
        _ => Memory::Events { keep: Duration::from_secs(14 * 24 * 3600) },
    };
    let books = Books { pool: home.pool.clone(), inbox: Inbox::with_memory(&home.outbox, memory) };
    let lanes = NonZeroUsize::new(LANES).unwrap_or(NonZeroUsize::MIN);
    let service = Service::new("bench").lanes(lanes);
    let service = match way {
        Way::Bare => service.on(topic.clone(), bare),
        Way::Events | Way::Sequences => service.on(topic.clone(), noted),
        Way::BatchByHand => service.on_batch(topic.clone(), all_by_hand),
        Way::Batch => service.on_batch(topic.clone(), all_noted),
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
    let effects = "SELECT (SELECT sum(n)::bigint FROM account) + (SELECT count(*) FROM work)";
    let n: i64 = sqlx::query_scalar(effects).fetch_one(&home.pool).await?;
    if n != i64::try_from(events.len())? {
        return Err(format!("{n} effects of {} events", events.len()).into());
    }
    Ok(took)
}
