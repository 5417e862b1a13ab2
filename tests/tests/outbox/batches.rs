//! Batch handlers whose effects happen once.

use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use eventbus::{Batch, Emit, Envelope, Failure, Outcomes, Running, Service, State, Topic};
use outbox::{Inbox, Memory, Tx};

use crate::handlers::{App, Billed, Counted, Runs, counted, effect, effects, quick, until};
use crate::home::{Cx, Home};

/// Bills each event of a call, and counts those that were not alone.
async fn bill_all<Db: Home>(
    events: Batch<Counted>,
    mut tx: Tx<Db>,
    State(runs): State<Runs>,
) -> Result<Outcomes, Failure> {
    if events.len() > 1 {
        runs.0.fetch_add(u32::try_from(events.len()).unwrap(), Ordering::SeqCst);
    }
    for event in &events {
        effect(&mut tx, event.message.n).await?;
        tx.publish(&Topic::new("bills").unwrap(), &Billed { n: event.message.n })?;
    }
    Ok(events.done())
}

/// One of them fails for good; its effect is written all the same.
async fn refuse_seven<Db: Home>(
    events: Batch<Counted>,
    mut tx: Tx<Db>,
    State(runs): State<Runs>,
) -> Result<Outcomes, Failure> {
    if events.len() > 1 {
        runs.0.fetch_add(1, Ordering::SeqCst);
    }
    for event in &events {
        effect(&mut tx, event.message.n).await?;
    }
    Ok(events.each(|event| match event.message.n {
        7 => Err(Failure::permanent("test.seven", "as it should")),
        n => Ok(Emit(Billed { n })),
    }))
}

/// The first call with several fails after its effects, as a whole.
async fn panic_together<Db: Home>(events: Batch<Counted>, mut tx: Tx<Db>) -> Result<Outcomes, Failure> {
    for event in &events {
        effect(&mut tx, event.message.n).await?;
    }
    assert!(events.len() == 1, "as it should");
    Ok(events.done())
}

/// A service that is given so many events at once that it takes several in one call.
async fn service<Db: Home, A: 'static, H: eventbus::BatchHandler<A, App<Db>>>(
    cx: &Cx<Db>,
    app: &App<Db>,
    handler: H,
    events: &[Envelope],
) -> Running {
    cx.run("CREATE TABLE IF NOT EXISTS effects (n bigint)").await;
    let service = Service::new("billing").on_batch(cx.topic.clone(), handler);
    let service = service.emit_to(Topic::new("bills").unwrap()).retry(quick()).with_state(app.clone());
    let running = service.start(&cx.bus).await.unwrap();
    let publisher = cx.bus.transport().publisher().await.unwrap();
    publisher.enqueue(&cx.topic, events.to_vec()).await.unwrap().await.all().unwrap();
    running
}

/// How many numbers have another count of effects than one.
async fn wrong<Db: Home>(cx: &Cx<Db>) -> i64 {
    cx.number("SELECT count(*) FROM (SELECT n FROM effects GROUP BY n HAVING count(*) <> 1) AS wrong").await
}

pub(crate) async fn a_batch_is_handled_once<Db: Home>(cx: Cx<Db>) {
    let app = App::new(Inbox::new(&cx.outbox));
    let events: Vec<Envelope> = (0..100).map(counted).collect();
    // Some come twice in one call: they have no key, or it would be one at a time.
    let mut twice: Vec<Envelope> =
        events.iter().flat_map(|event| [event.clone().without_key(), event.clone().without_key()]).collect();
    let running = service(&cx, &app, bill_all::<Db>, &twice).await;
    until("everything", async || running.counts().handled + running.counts().duplicates == 200).await;
    // And once more, beside new ones.
    twice.extend((100..150).map(counted));
    fastrand::shuffle(&mut twice);
    let publisher = cx.bus.transport().publisher().await.unwrap();
    publisher.enqueue(&cx.topic, twice).await.unwrap().await.all().unwrap();
    until("the rest", async || running.counts().handled + running.counts().duplicates == 450).await;
    assert_eq!((running.counts().handled, running.counts().duplicates), (150, 300));
    assert_eq!((effects(&cx).await, wrong(&cx).await, cx.n_stored().await), (150, 0, 150));
    assert!(app.runs.load(Ordering::SeqCst) > 20, "only so many were not alone: {:?}", app.runs);
    running.stop().await.unwrap();
}

pub(crate) async fn one_that_fails_undoes_its_batch<Db: Home>(cx: Cx<Db>) {
    let app = App::new(Inbox::new(&cx.outbox));
    let events: Vec<Envelope> = (0..40).map(counted).collect();
    let running = service(&cx, &app, refuse_seven::<Db>, &events).await;
    until("all but one", async || running.counts().handled == 39 && running.counts().dead_lettered == 1)
        .await;
    assert_eq!(
        (effects(&cx).await, wrong(&cx).await),
        (39, 0),
        "the neighbours of the seventh ran once more"
    );
    assert_eq!(cx.number("SELECT count(*) FROM effects WHERE n = 7").await, 0);
    assert_eq!(cx.n_stored().await, 39, "what was returned is stored with the effects");
    assert!(app.runs.load(Ordering::SeqCst) > 0, "no call had several events");
    running.stop().await.unwrap();
}

pub(crate) async fn a_batch_that_panics_leaves_nothing<Db: Home>(cx: Cx<Db>) {
    let app = App::new(Inbox::new(&cx.outbox));
    let events: Vec<Envelope> = (0..20).map(counted).collect();
    let running = service(&cx, &app, panic_together::<Db>, &events).await;
    until("everything", async || running.counts().handled == 20).await;
    assert_eq!((effects(&cx).await, wrong(&cx).await), (20, 0));
    running.stop().await.unwrap();
}

/// Each is told what it lacks alone, and takes no neighbour with it.
pub(crate) async fn what_does_not_fit_a_batch_runs_alone<Db: Home>(cx: Cx<Db>) {
    let app = App::new(Inbox::with_memory(&cx.outbox, Memory::Sequences));
    let numbered = |n: i64, seq: i64| {
        let event = counted(n).with_extension("evt-source", "x");
        event.with_extension("evt-seq", seq.to_string())
    };
    let mut events: Vec<Envelope> = (0..30).map(|n| numbered(n, 10 + n)).collect();
    // Without a number; undecodable; without a key and too old; and repetitions of keys.
    events.push(counted(100));
    events.push(numbered(101, 1).with_payload("{"));
    let month = Duration::from_secs(30 * 24 * 3600);
    events.push(counted(102).without_key().with_time(SystemTime::now() - month));
    events.extend((0..30).map(|n| numbered(n, 10 + n)));
    let running = service(&cx, &app, bill_all::<Db>, &events).await;
    until("everything", async || {
        let counts = running.counts();
        counts.handled + counts.duplicates + counts.dead_lettered == 63
    })
    .await;
    let counts = running.counts();
    assert_eq!((counts.handled, counts.duplicates, counts.dead_lettered), (30, 30, 3));
    assert_eq!((effects(&cx).await, wrong(&cx).await), (30, 0));
    running.stop().await.unwrap();
}
