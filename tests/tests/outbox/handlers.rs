//! Handlers whose effects happen once.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use eventbus::{
    Attempt, Emit, Envelope, Error, ErrorKind, Event, EventId, Failure, FromState, Meta, Retry, Running,
    Service, State, Topic, TopicSpec,
};
use outbox::{Inbox, InboxOperator as _, Memory, Namespace, Options, Outbox, Tx};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::home::{Cx, Home, SOON};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "test.counted", version = 1, key = n)]
pub(crate) struct Counted {
    pub(crate) n: i64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "test.billed", version = 1, key = n)]
pub(crate) struct Billed {
    pub(crate) n: i64,
}

/// The state of a service, of which the inbox is a part.
pub(crate) struct App<Db: Home> {
    inbox: Inbox<Db>,
    pub(crate) runs: Arc<AtomicU32>,
    kept: Arc<Mutex<Vec<Tx<Db>>>>,
}

impl<Db: Home> Clone for App<Db> {
    fn clone(&self) -> Self {
        Self { inbox: self.inbox.clone(), runs: self.runs.clone(), kept: self.kept.clone() }
    }
}

/// So many times the handler ran.
pub(crate) struct Runs(pub(crate) Arc<AtomicU32>);

struct Kept<Db: Home>(Arc<Mutex<Vec<Tx<Db>>>>);

impl<Db: Home> FromState<App<Db>> for Inbox<Db> {
    fn from_state(app: &App<Db>) -> Self {
        app.inbox.clone()
    }
}

impl<Db: Home> FromState<App<Db>> for Runs {
    fn from_state(app: &App<Db>) -> Self {
        Self(app.runs.clone())
    }
}

impl<Db: Home> FromState<App<Db>> for Kept<Db> {
    fn from_state(app: &App<Db>) -> Self {
        Self(app.kept.clone())
    }
}

impl<Db: Home> App<Db> {
    pub(crate) fn new(inbox: Inbox<Db>) -> Self {
        Self { inbox, runs: Arc::default(), kept: Arc::default() }
    }
}

/// The one effect of a run.
pub(crate) async fn effect<Db: Home>(tx: &mut Tx<Db>, n: i64) -> Result<(), Failure> {
    Ok(Db::run(tx, format!("INSERT INTO effects VALUES ({n})")).await?)
}

async fn bill<Db: Home>(mut tx: Tx<Db>, Meta(event): Meta, State(runs): State<Runs>) -> Result<(), Failure> {
    runs.0.fetch_add(1, Ordering::SeqCst);
    effect(&mut tx, number(&event)).await
}

async fn fail_twice<Db: Home>(
    mut tx: Tx<Db>,
    Meta(event): Meta,
    State(runs): State<Runs>,
    Attempt(_): Attempt,
) -> Result<(), Failure> {
    effect(&mut tx, number(&event)).await?;
    tx.publish(&Topic::new("bills").unwrap(), &Billed { n: number(&event) })?;
    match runs.0.fetch_add(1, Ordering::SeqCst) {
        0 | 1 => Err(Failure::transient("test.fails", "as it should")),
        _ => Ok(()),
    }
}

async fn panic_once<Db: Home>(
    mut tx: Tx<Db>,
    Meta(event): Meta,
    State(runs): State<Runs>,
) -> Result<(), Failure> {
    effect(&mut tx, number(&event)).await?;
    assert!(runs.0.fetch_add(1, Ordering::SeqCst) > 0, "as it should");
    Ok(())
}

async fn hang_once<Db: Home>(
    mut tx: Tx<Db>,
    Meta(event): Meta,
    State(runs): State<Runs>,
) -> Result<(), Failure> {
    effect(&mut tx, number(&event)).await?;
    if runs.0.fetch_add(1, Ordering::SeqCst) == 0 {
        std::future::pending::<()>().await;
    }
    Ok(())
}

async fn answer<Db: Home>(mut tx: Tx<Db>, Meta(event): Meta) -> Result<Emit<Billed>, Failure> {
    effect(&mut tx, number(&event)).await?;
    Ok(Emit(Billed { n: number(&event) }))
}

/// A statement fails, and the handler makes nothing of it.
async fn swallow<Db: Home>(
    mut tx: Tx<Db>,
    Meta(event): Meta,
    State(runs): State<Runs>,
) -> Result<(), Failure> {
    effect(&mut tx, number(&event)).await?;
    if runs.0.fetch_add(1, Ordering::SeqCst) == 0 {
        _ = Db::run(&mut tx, "INSERT INTO nowhere VALUES (1)".to_owned()).await;
    }
    Ok(())
}

async fn keep<Db: Home>(
    mut tx: Tx<Db>,
    Meta(event): Meta,
    State(kept): State<Kept<Db>>,
) -> Result<(), Failure> {
    effect(&mut tx, number(&event)).await?;
    kept.0.lock().push(tx);
    Ok(())
}

pub(crate) fn number(event: &Envelope) -> i64 {
    event.decode::<Counted>().map_or(-1, |counted| counted.n)
}

pub(crate) fn quick() -> Retry {
    Retry::exponential(Duration::from_millis(20), Duration::from_millis(50), NonZeroU32::new(8).unwrap())
}

/// A service with one handler on the topic, which starts where the topic does.
async fn service<Db: Home, A: 'static, H: eventbus::Handler<A, App<Db>>>(
    cx: &Cx<Db>,
    app: &App<Db>,
    handler: H,
) -> Running {
    cx.run("CREATE TABLE IF NOT EXISTS effects (n bigint)").await;
    let service = Service::new("billing").on(cx.topic.clone(), handler).emit_to(Topic::new("bills").unwrap());
    let service = service.retry(quick()).timeout(Duration::from_secs(1)).with_state(app.clone());
    service.start(&cx.bus).await.unwrap()
}

pub(crate) async fn send<Db: Home>(cx: &Cx<Db>, event: Envelope) {
    cx.bus.publisher().await.unwrap().publish_envelope(&cx.topic, event).await.unwrap();
}

pub(crate) fn counted(n: i64) -> Envelope {
    Envelope::of(&Counted { n }, "/test").unwrap()
}

pub(crate) async fn effects<Db: Home>(cx: &Cx<Db>) -> i64 {
    cx.number("SELECT count(*) FROM effects").await
}

pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(SOON, waiting).await.is_ok(), "{what} did not come true");
}

pub(crate) async fn an_event_is_handled_once<Db: Home>(cx: Cx<Db>) {
    let app = App::new(Inbox::new(&cx.outbox));
    let running = service(&cx, &app, bill::<Db>).await;
    let other = Envelope::of(&Counted { n: 2 }, "/other").unwrap().with_id(EventId::parse("1"));
    // The same text as an id of another source is another event.
    let events = [counted(1), other.clone(), other.with_source("/third")];
    for event in events.iter().chain(&events).chain(&events) {
        send(&cx, event.clone()).await;
    }
    until("everything", async || running.counts().handled + running.counts().duplicates == 9).await;
    assert_eq!((running.counts().handled, running.counts().duplicates), (3, 6));
    assert_eq!((effects(&cx).await, app.runs.load(Ordering::SeqCst)), (3, 3));
    running.stop().await.unwrap();
}

pub(crate) async fn a_run_that_fails_leaves_nothing<Db: Home>(cx: Cx<Db>) {
    let app = App::new(Inbox::new(&cx.outbox));
    let running = service(&cx, &app, fail_twice::<Db>).await;
    send(&cx, counted(1)).await;
    until("the third run", async || running.counts().handled == 1).await;
    assert_eq!((effects(&cx).await, app.runs.load(Ordering::SeqCst), cx.n_stored().await), (1, 3, 1));
    running.stop().await.unwrap();
}

/// An event whose first run does not succeed is handled in the end, and has one effect.
async fn one_effect<Db: Home, A: 'static, H: eventbus::Handler<A, App<Db>>>(cx: Cx<Db>, handler: H) {
    let app = App::new(Inbox::new(&cx.outbox));
    let running = service(&cx, &app, handler).await;
    send(&cx, counted(1)).await;
    until("a run that succeeds", async || running.counts().handled == 1).await;
    assert_eq!(effects(&cx).await, 1, "the transaction is committed, or run again");
    running.stop().await.unwrap();
}

pub(crate) async fn a_run_that_panics_leaves_nothing<Db: Home>(cx: Cx<Db>) {
    one_effect(cx, panic_once::<Db>).await;
}

pub(crate) async fn a_run_out_of_time_leaves_nothing<Db: Home>(cx: Cx<Db>) {
    one_effect(cx, hang_once::<Db>).await;
}

pub(crate) async fn a_statement_that_failed_is_not_passed_over<Db: Home>(cx: Cx<Db>) {
    one_effect(cx, swallow::<Db>).await;
}

pub(crate) async fn what_is_returned_goes_through_the_outbox<Db: Home>(cx: Cx<Db>) {
    let app = App::new(Inbox::new(&cx.outbox));
    let running = service(&cx, &app, answer::<Db>).await;
    let event = counted(7);
    send(&cx, event.clone()).await;
    until("the run", async || running.counts().handled == 1).await;
    assert_eq!((effects(&cx).await, cx.n_stored().await), (1, 1), "it is stored, not published");
    let relay = cx.relay().await;
    cx.until("the answer", |seen| seen.iter().any(|seen| seen.topic == "bills" && seen.key == "7")).await;
    let answer = cx.broker.seen().into_iter().find(|seen| seen.topic == "bills").unwrap();
    assert_eq!(answer.id, EventId::derive(event.id(), "billing/answer/0").to_string());
    relay.stop().await;
    running.stop().await.unwrap();
}

pub(crate) async fn a_transaction_that_is_kept_fails_the_run<Db: Home>(cx: Cx<Db>) {
    let app = App::new(Inbox::new(&cx.outbox));
    let running = service(&cx, &app, keep::<Db>).await;
    send(&cx, counted(1)).await;
    until("the letter", async || running.counts().dead_lettered == 1).await;
    app.kept.lock().clear();
    assert_eq!(effects(&cx).await, 0);
    running.stop().await.unwrap();
}

pub(crate) async fn numbers_of_two_topics_are_two_sequences<Db: Home>(cx: Cx<Db>) {
    cx.run("CREATE TABLE effects (n bigint)").await;
    let app = App::new(Inbox::with_memory(&cx.outbox, Memory::Sequences));
    let other = Topic::new("other").unwrap();
    let service = Service::new("billing").on(cx.topic.clone(), bill::<Db>).on(other.clone(), bill::<Db>);
    let running = service.with_state(app).start(&cx.bus).await.unwrap();
    let numbered = |n: i64, seq: i64| {
        counted(n).with_key("k").with_extension("evt-seq", seq.to_string()).with_extension("evt-source", "x")
    };
    send(&cx, numbered(1, 6)).await;
    until("the later", async || running.counts().handled == 1).await;
    cx.bus.publisher().await.unwrap().publish_envelope(&other, numbered(2, 5)).await.unwrap();
    until("the earlier", async || running.counts().handled == 2).await;
    assert_eq!(effects(&cx).await, 2);
    running.stop().await.unwrap();
}

/// Nothing of one is taken for something of the other, but a copy of it.
pub(crate) async fn services_of_one_name_share_what_they_remember<Db: Home>(cx: Cx<Db>) {
    cx.run("CREATE TABLE effects (n bigint)").await;
    let (app, other) = (App::new(Inbox::new(&cx.outbox)), Topic::new("other").unwrap());
    let mut services = Vec::new();
    for topic in [&cx.topic, &other] {
        let service = Service::new("billing").on(topic.clone(), bill::<Db>).with_state(app.clone());
        services.push(service.start(&cx.bus).await.unwrap());
    }
    let publisher = cx.bus.publisher().await.unwrap();
    let events = [1, 2, 3].map(counted);
    for event in &events {
        publisher.publish_envelope(&cx.topic, event.clone()).await.unwrap();
    }
    for event in [4, 5].map(counted) {
        publisher.publish_envelope(&other, event).await.unwrap();
    }
    until("all five", async || effects(&cx).await == 5).await;
    publisher.publish_envelope(&other, events[0].clone()).await.unwrap();
    until("the copy", async || services[1].counts().duplicates == 1).await;
    assert_eq!(effects(&cx).await, 5);
    for service in services {
        service.stop().await.unwrap();
    }
    let sequences = App::new(Inbox::with_memory(&cx.outbox, Memory::Sequences));
    let third = Service::new("billing").on(other, bill::<Db>).with_state(sequences);
    assert_eq!(third.start(&cx.bus).await.unwrap_err().kind(), eventbus::ErrorKind::Conflict);
}

pub(crate) async fn what_is_remembered_is_seen_and_forgotten<Db: Home>(cx: Cx<Db>) {
    let operator = cx.outbox.inbox_operator();
    assert!(operator.consumers().await.unwrap().is_empty());
    let app = App::new(Inbox::new(&cx.outbox));
    let running = service(&cx, &app, bill::<Db>).await;
    let events = [counted(1), counted(2).with_id(EventId::parse("o'clock"))];
    for event in &events {
        send(&cx, event.clone()).await;
    }
    until("both", async || running.counts().handled == 2).await;
    let seen = operator.consumers().await.unwrap().remove(0);
    assert_eq!((seen.n_known, seen.remembers_seconds / 86_400), (2, 15), "a day longer than it promises");
    assert!(seen.oldest_ms.is_some_and(|age| (0..60_000).contains(&age)), "{seen:?}");
    let ids = events.each_ref().map(outbox::known_by);
    let mut handled: Vec<String> =
        operator.handled(&seen.consumer, 10).await.unwrap().into_iter().map(|one| one.event_id).collect();
    let mut expected = ids.map(|id| id.simple().to_string());
    handled.sort();
    expected.sort();
    assert_eq!(handled, expected);
    let unknown = uuid::Uuid::from_u128(7);
    let mut known = operator.knows(&seen.consumer, &[ids[0], unknown, ids[1]]).await.unwrap();
    known.sort();
    let mut both = ids;
    both.sort();
    assert_eq!(known, both);
    assert!(operator.knows("it's nobody", &ids).await.unwrap().is_empty());
    assert_eq!(operator.forget(Some("nobody"), ids[1]).await.unwrap(), 0);
    assert_eq!(operator.forget(None, ids[1]).await.unwrap(), 1);
    for event in &events {
        send(&cx, event.clone()).await;
    }
    until("one again", async || running.counts().handled == 3 && running.counts().duplicates == 1).await;
    running.stop().await.unwrap();

    let app = App::new(Inbox::with_memory(&cx.outbox, Memory::Sequences).with_generation(2));
    let running = service(&cx, &app, bill::<Db>).await;
    let numbered = counted(3).with_extension("evt-seq", "41").with_extension("evt-source", "x");
    send(&cx, numbered.with_key("a'b")).await;
    until("the number", async || running.counts().handled == 1).await;
    let consumers = operator.consumers().await.unwrap();
    assert_eq!((consumers.len(), consumers[1].n_known), (2, 1));
    let progress = operator.progress(&consumers[1].consumer, 10).await.unwrap().remove(0);
    assert_eq!((progress.last_seq, progress.key.as_str()), (41, "612762"));
    assert_eq!(progress.source, format!("x/{}", cx.topic));
    running.stop().await.unwrap();
}

pub(crate) async fn what_is_too_old_to_be_known_is_dead_lettered<Db: Home>(cx: Cx<Db>) {
    let app = App::new(Inbox::with_memory(&cx.outbox, Memory::Events { keep: Duration::from_secs(3600) }));
    let running = service(&cx, &app, bill::<Db>).await;
    let old = SystemTime::now() - Duration::from_secs(3700);
    send(&cx, counted(1).with_time(old)).await;
    until("the letter", async || running.counts().dead_lettered == 1).await;
    // Where an event says no time, its id may.
    let id = uuid::Builder::from_unix_timestamp_millis(1_600_000_000_000, &[7; 10]).into_uuid();
    send(&cx, counted(9).with_time(None).with_id(EventId::from(id))).await;
    until("the other letter", async || running.counts().dead_lettered == 2).await;
    // An operator who sends it again has decided.
    let marks = counted(2).with_time(old).with_extension("evt-replay-group", "billing");
    send(&cx, marks.with_extension("evt-replay-handler", "bill")).await;
    // One that was handled is known, however old it is.
    let event = counted(3);
    send(&cx, event.clone()).await;
    send(&cx, event.with_time(old)).await;
    until("the rest", async || running.counts().handled == 2 && running.counts().duplicates == 1).await;
    assert_eq!((effects(&cx).await, running.counts().dead_lettered), (2, 2));
    running.stop().await.unwrap();
}

pub(crate) async fn repetitions_behind_later_events_change_nothing<Db: Home>(cx: Cx<Db>) {
    let app = App::new(Inbox::with_memory(&cx.outbox, Memory::Sequences));
    let running = service(&cx, &app, bill::<Db>).await;
    let numbered = |n: i64, seq: i64, source: &str| {
        counted(n)
            .with_key("k")
            .with_extension("evt-seq", seq.to_string())
            .with_extension("evt-source", source)
    };
    for (n, seq, source) in [(1, 5, "x"), (2, 9, "x"), (1, 5, "x"), (2, 9, "x"), (3, 3, "y"), (4, 12, "x")] {
        send(&cx, numbered(n, seq, source)).await;
    }
    until("everything", async || running.counts().handled + running.counts().duplicates == 6).await;
    assert_eq!((running.counts().handled, running.counts().duplicates), (4, 2));
    // Without a number, or sent again behind later ones by an operator: nobody can say, so nothing is skipped in silence.
    send(&cx, counted(5).with_key("other")).await;
    let late = numbered(6, 7, "x").with_extension("evt-replay-group", "billing");
    send(&cx, late.with_extension("evt-replay-handler", "bill")).await;
    until("the letters", async || running.counts().dead_lettered == 2).await;
    assert_eq!(effects(&cx).await, 4);
    // An event without a key is known by its id.
    let plain = counted(8).without_key();
    send(&cx, plain.clone()).await;
    send(&cx, plain).await;
    until("the last", async || running.counts().handled == 5 && running.counts().duplicates == 3).await;
    running.stop().await.unwrap();
}

pub(crate) async fn another_generation_runs_again<Db: Home>(cx: Cx<Db>) {
    let event = counted(1);
    let inbox = Inbox::new(&cx.outbox);
    for (generation, handled) in [(1, 1), (1, 0), (2, 1)] {
        let running = service(&cx, &App::new(inbox.with_generation(generation)), bill::<Db>).await;
        send(&cx, event.clone()).await;
        until("the event", async || running.counts().handled + running.counts().duplicates == 1).await;
        assert_eq!(running.counts().handled, handled);
        running.stop().await.unwrap();
    }
    assert_eq!(effects(&cx).await, 2);
}

pub(crate) async fn a_memory_of_another_kind_is_refused<Db: Home>(cx: Cx<Db>) {
    let running = service(&cx, &App::new(Inbox::new(&cx.outbox)), bill::<Db>).await;
    running.stop().await.unwrap();
    let refused = lacks(&cx, Inbox::with_memory(&cx.outbox, Memory::Sequences), bill::<Db>).await;
    assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
    assert!(refused.to_string().contains("bill"), "{refused}");
}

/// Why a service with a handler does not start; nothing was joined then.
async fn lacks<Db: Home, A: 'static, H: eventbus::Handler<A, App<Db>>>(
    cx: &Cx<Db>,
    inbox: Inbox<Db>,
    handler: H,
) -> Error {
    let service = Service::new("billing").on(cx.topic.clone(), handler).with_state(App::new(inbox));
    let refused = service.start(&cx.bus).await.err().unwrap();
    let groups = cx.bus.transport().admin().unwrap().groups(None).await.unwrap();
    assert!(groups.iter().all(|group| group.owner.is_none()), "{groups:?}");
    refused
}

pub(crate) async fn what_a_handler_lacks_is_told_at_the_start<Db: Home>(cx: Cx<Db>) {
    let unnamed = async |mut tx: Tx<Db>| effect(&mut tx, 1).await;
    let refused = lacks(&cx, Inbox::new(&cx.outbox), unnamed).await;
    assert_eq!(refused.kind(), ErrorKind::Config, "{refused}");

    let day = Duration::from_secs(24 * 3600);
    let spec = TopicSpec::new(cx.topic.clone()).with_max_age(day * 30);
    cx.bus.transport().admin().unwrap().declare(&spec).await.unwrap();
    let refused = lacks(&cx, Inbox::new(&cx.outbox), bill::<Db>).await;
    assert_eq!(refused.kind(), ErrorKind::Config, "{refused}");
    assert!(refused.to_string().contains("remember"), "{refused}");
    let long = Inbox::with_memory(&cx.outbox, Memory::Events { keep: day * 30 });
    service(&cx, &App::new(long), bill::<Db>).await.stop().await.unwrap();

    let elsewhere = Options::default().with_namespace(Namespace::new("nowhere").unwrap());
    let elsewhere = Outbox::with_options(cx.outbox.pool().clone(), elsewhere);
    let sequences = Inbox::with_memory(&elsewhere, Memory::Sequences);
    let refused = lacks(&cx, sequences, bill::<Db>).await;
    assert_eq!(refused.kind(), ErrorKind::NotFound, "{refused}");
}

pub(crate) async fn what_is_too_old_is_forgotten<Db: Home>(cx: Cx<Db>) {
    let app = App::new(Inbox::with_memory(&cx.outbox, Memory::Events { keep: Duration::from_secs(1000) }));
    let running = service(&cx, &app, bill::<Db>).await;
    for n in 0..20 {
        send(&cx, counted(n)).await;
    }
    until("the events", async || running.counts().handled == 20).await;
    running.stop().await.unwrap();
    cx.run(&Db::aged(15, 100_000)).await;
    assert!(!app.inbox.forget().await.unwrap());
    assert_eq!(cx.number("SELECT count(*) FROM EVTinbox").await, 5);
    // What nobody says anything of is kept.
    cx.run("DELETE FROM EVTconsumer").await;
    cx.run(&Db::aged(5, 100_000)).await;
    assert!(!app.inbox.forget().await.unwrap());
    assert_eq!(cx.number("SELECT count(*) FROM EVTinbox").await, 5);
}

pub(crate) mod postgres {
    use super::*;

    /// Its events wait for the database, as they do when it goes away later.
    pub(crate) async fn a_service_starts_while_its_database_is_away(cx: Cx<sqlx::Postgres>) {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = server.local_addr().unwrap().port();
        drop(server);
        let pool = sqlx::postgres::PgPoolOptions::new().acquire_timeout(Duration::from_secs(1));
        let pool = pool.connect_lazy(&format!("postgres://nobody@127.0.0.1:{port}/none")).unwrap();
        let app = App::new(Inbox::new(&Outbox::new(pool)));
        let service = Service::new("billing").on(cx.topic.clone(), bill::<sqlx::Postgres>);
        let service = service.on(Topic::new("others").unwrap(), answer::<sqlx::Postgres>).with_state(app);
        let began = std::time::Instant::now();
        let running = service.start(&cx.bus).await.unwrap();
        // Two handlers do not wait twice.
        assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
        send(&cx, counted(1)).await;
        until("the attempt", async || running.counts().retried > 0).await;
        assert_eq!((running.counts().handled, running.counts().dead_lettered), (0, 0));
        running.stop().await.unwrap();
    }
}
