//! Handlers that call somebody else.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use eventbus::{Emit, Envelope, Failure, FromState, Meta, Running, Service, State, Topic};
use outbox::{Inbox, Intent};
use parking_lot::Mutex;

use crate::handlers::{Billed, counted, effects, number, quick, send, until};
use crate::home::{Cx, Home};

/// What the one who is called does: it notes each call, and fails the first so many.
#[derive(Clone, Default)]
struct Bank {
    calls: Arc<Mutex<Vec<(String, bool)>>>,
    fails: usize,
}

impl Bank {
    fn charge<Db: Home>(&self, intent: &Intent<Db>) -> Result<usize, Failure> {
        let mut calls = self.calls.lock();
        calls.push((intent.key().to_owned(), intent.is_repeated()));
        match calls.len() {
            n if n <= self.fails => Err(Failure::transient("bank.away", "the answer is lost")),
            n => Ok(n),
        }
    }

    fn calls(&self) -> Vec<(String, bool)> {
        self.calls.lock().clone()
    }
}

struct App<Db: Home> {
    inbox: Inbox<Db>,
    bank: Bank,
    /// What another member would do while the call is on its way.
    meanwhile: Arc<Mutex<Option<String>>>,
}

impl<Db: Home> Clone for App<Db> {
    fn clone(&self) -> Self {
        Self { inbox: self.inbox.clone(), bank: self.bank.clone(), meanwhile: self.meanwhile.clone() }
    }
}

impl<Db: Home> App<Db> {
    fn new(cx: &Cx<Db>, fails: usize) -> Self {
        let bank = Bank { calls: Arc::default(), fails };
        Self { inbox: Inbox::new(&cx.outbox), bank, meanwhile: Arc::default() }
    }
}

impl<Db: Home> FromState<App<Db>> for Inbox<Db> {
    fn from_state(app: &App<Db>) -> Self {
        app.inbox.clone()
    }
}

impl<Db: Home> FromState<App<Db>> for Bank {
    fn from_state(app: &App<Db>) -> Self {
        app.bank.clone()
    }
}

/// The call, and nothing in the database but what is returned.
async fn charge<Db: Home>(
    Meta(event): Meta,
    intent: Intent<Db>,
    State(bank): State<Bank>,
) -> Result<Emit<Billed>, Failure> {
    bank.charge(&intent)?;
    Ok(Emit(Billed { n: number(&event) }))
}

async fn charge_too<Db: Home>(intent: Intent<Db>, State(bank): State<Bank>) -> Result<(), Failure> {
    bank.charge(&intent).map(drop)
}

/// The call, and its result as a row. The first run that gets so far fails after that.
async fn charge_and_write<Db: Home>(
    Meta(event): Meta,
    intent: Intent<Db>,
    State(app): State<App<Db>>,
) -> Result<Emit<Billed>, Failure> {
    let n = app.bank.charge(&intent)?;
    let meanwhile = app.meanwhile.lock().take();
    if let Some(sql) = meanwhile {
        let mut connection = app.inbox.outbox().pool().acquire().await?;
        Db::run(&mut connection, sql).await?;
    }
    let mut tx = intent.finish().await?;
    Db::run(&mut tx, format!("INSERT INTO effects VALUES ({})", number(&event))).await?;
    match n {
        2 => Err(Failure::transient("test.fails", "as it should")),
        _ => Ok(Emit(Billed { n: number(&event) })),
    }
}

async fn finish_twice<Db: Home>(intent: Intent<Db>) -> Result<(), Failure> {
    drop(intent.finish().await?);
    intent.finish().await.map(drop)
}

async fn hang<Db: Home>(intent: Intent<Db>, State(bank): State<Bank>) -> Result<(), Failure> {
    if bank.charge(&intent)? == 1 {
        std::future::pending::<()>().await;
    }
    Ok(())
}

async fn service<Db: Home, A: 'static, H: eventbus::Handler<A, App<Db>>>(
    cx: &Cx<Db>,
    app: &App<Db>,
    handler: H,
) -> Running {
    cx.run("CREATE TABLE IF NOT EXISTS effects (n bigint)").await;
    let service = Service::new("payment").on(cx.topic.clone(), handler).emit_to(Topic::new("bills").unwrap());
    service.retry(quick()).with_state(app.clone()).start(&cx.bus).await.unwrap()
}

async fn n_begun<Db: Home>(cx: &Cx<Db>) -> i64 {
    cx.number("SELECT count(*) FROM EVTintent").await
}

pub(crate) async fn a_call_that_ended_is_not_repeated<Db: Home>(cx: Cx<Db>) {
    let app = App::new(&cx, 0);
    let running = service(&cx, &app, charge::<Db>).await;
    let event = counted(1);
    for _ in 0..3 {
        send(&cx, event.clone()).await;
    }
    until("everything", async || running.counts().handled + running.counts().duplicates == 3).await;
    assert_eq!((running.counts().handled, app.bank.calls().len()), (1, 1));
    assert_eq!((cx.n_stored().await, n_begun(&cx).await), (1, 0), "what is returned is stored with the end");
    running.stop().await.unwrap();
}

pub(crate) async fn a_call_that_fails_is_repeated_with_its_key<Db: Home>(cx: Cx<Db>) {
    let app = App::new(&cx, 2);
    let running = service(&cx, &app, charge::<Db>).await;
    send(&cx, counted(1)).await;
    until("the third call", async || running.counts().handled == 1).await;
    let calls = app.bank.calls();
    assert_eq!(calls.iter().map(|(_, again)| *again).collect::<Vec<_>>(), [false, true, true]);
    assert!(calls.iter().all(|(key, _)| *key == calls[0].0), "{calls:?}");
    assert_eq!(cx.n_stored().await, 1);
    running.stop().await.unwrap();
    // Another handler of the event means another call.
    let other = App::new(&cx, 0);
    let running = service(&cx, &other, charge_too::<Db>).await;
    let event = counted(2);
    send(&cx, event.clone()).await;
    until("the other", async || running.counts().handled == 1).await;
    running.stop().await.unwrap();
    let running = service(&cx, &other, charge::<Db>).await;
    send(&cx, event).await;
    until("the same event", async || running.counts().handled == 1).await;
    let calls = other.bank.calls();
    assert!(calls.len() == 2 && calls[0].0 != calls[1].0 && !calls[1].1, "{calls:?}");
    running.stop().await.unwrap();
}

pub(crate) async fn a_call_whose_member_is_gone_is_repeated<Db: Home>(cx: Cx<Db>) {
    let app = App::new(&cx, 0);
    let running = service(&cx, &app, hang::<Db>).await;
    send(&cx, counted(1)).await;
    until("the first call", async || app.bank.calls().len() == 1).await;
    assert_eq!(n_begun(&cx).await, 1, "it is noted before the call");
    drop(running);
    let running = service(&cx, &app, hang::<Db>).await;
    until("the second", async || running.counts().handled == 1).await;
    let calls = app.bank.calls();
    assert_eq!((calls.len(), calls[0].0.clone(), calls[1].1), (2, calls[1].0.clone(), true));
    assert_eq!(n_begun(&cx).await, 0);
    running.stop().await.unwrap();
}

pub(crate) async fn the_result_of_a_call_is_written_once<Db: Home>(cx: Cx<Db>) {
    let app = App::new(&cx, 1);
    let running = service(&cx, &app, charge_and_write::<Db>).await;
    send(&cx, counted(1)).await;
    until("the third run", async || running.counts().handled == 1).await;
    assert_eq!((app.bank.calls().len(), effects(&cx).await, cx.n_stored().await), (3, 1, 1));
    // Another member ends the event while the call is on its way.
    let event = counted(2);
    let id = event.id().as_uuid().unwrap().simple().to_string();
    let note = match cx.tables().ends_with('.') {
        true => format!("INSERT INTO EVTinbox VALUES ('payment.charge_and_write@1', '{id}')"),
        false => {
            format!(
                "INSERT INTO EVTinbox (consumer, message_id) VALUES ('payment.charge_and_write@1', x'{id}')"
            )
        }
    };
    *app.meanwhile.lock() = Some(cx.sql(&note));
    send(&cx, event).await;
    until("nothing", async || running.counts().duplicates == 1).await;
    assert_eq!((app.bank.calls().len(), effects(&cx).await, cx.n_stored().await), (4, 1, 1));
    running.stop().await.unwrap();
}

pub(crate) async fn what_no_call_can_be_made_for_is_dead_lettered<Db: Home>(cx: Cx<Db>) {
    let app = App::new(&cx, 0);
    let running = service(&cx, &app, charge::<Db>).await;
    let old = SystemTime::now() - Duration::from_secs(30 * 24 * 3600);
    send(&cx, counted(1).with_time(old)).await;
    until("the letter", async || running.counts().dead_lettered == 1).await;
    assert_eq!((app.bank.calls().len(), n_begun(&cx).await), (0, 0));
    running.stop().await.unwrap();
    let running = service(&cx, &app, finish_twice::<Db>).await;
    send(&cx, counted(2)).await;
    until("the second letter", async || running.counts().dead_lettered == 1).await;
    assert_eq!(n_begun(&cx).await, 1, "that it began is no secret");
    running.stop().await.unwrap();
}

pub(crate) async fn calls_that_never_ended_are_forgotten_with_their_events<Db: Home>(cx: Cx<Db>) {
    let app = App::new(&cx, usize::MAX);
    let running = service(&cx, &app, charge::<Db>).await;
    let events: Vec<Envelope> = (1..=3).map(counted).collect();
    for event in &events {
        send(&cx, event.clone()).await;
    }
    until("the letters", async || running.counts().dead_lettered == 3).await;
    running.stop().await.unwrap();
    assert!(!app.inbox.forget().await.unwrap());
    assert_eq!(n_begun(&cx).await, 3);
    cx.run(Db::AGED_INTENTS).await;
    assert!(!app.inbox.forget().await.unwrap());
    assert_eq!(n_begun(&cx).await, 0);
}
