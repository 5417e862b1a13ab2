//! What transactions publish.

use std::time::Duration;

use eventbus::{Envelope, ErrorKind, Event, EventId, Topic};
use outbox::{Namespace, Options, Outbox, Relay};
use serde::{Deserialize, Serialize};

use crate::home::{Cx, Home};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "test.placed", version = 2, key = order_id)]
struct Placed {
    order_id: i64,
}

pub(crate) async fn what_is_committed_is_published<Db: Home>(cx: Cx<Db>) {
    let relay = cx.relay().await;
    cx.run("CREATE TABLE orders (id bigint)").await;
    let mut tx = cx.outbox.begin().await.unwrap();
    Db::run(&mut tx, "INSERT INTO orders VALUES (7)".to_owned()).await.unwrap();
    let id = tx.publish(&cx.topic, &Placed { order_id: 7 }).unwrap();
    assert_eq!(cx.broker.seen(), [], "it is not published before the commit");
    tx.commit().await.unwrap();
    cx.until("the event", |seen| seen.iter().any(|seen| seen.id == id.to_string() && seen.key == "7")).await;
    cx.until_empty().await;
    assert_eq!(cx.number("SELECT count(*) FROM orders").await, 1);
    relay.stop().await;
}

pub(crate) async fn what_is_rolled_back_is_not<Db: Home>(cx: Cx<Db>) {
    let relay = cx.relay().await;
    for way in 0..4 {
        let mut tx = cx.outbox.begin().await.unwrap();
        tx.publish_envelope(&cx.topic, cx.event("a", way)).unwrap();
        match way {
            0 => tx.rollback().await.unwrap(),
            1 => drop(tx),
            // What is stored already goes with the transaction as well.
            2 => {
                tx.flush().await.unwrap();
                tx.rollback().await.unwrap();
            }
            _ => {
                tx.flush().await.unwrap();
                drop(tx);
            }
        }
    }
    cx.publish("a", 9).await;
    cx.until("the event after them", |seen| seen.iter().any(|seen| seen.n == 9)).await;
    cx.until_empty().await;
    assert_eq!(cx.broker.firsts()["a"], [9]);
    relay.stop().await;
}

pub(crate) async fn events_survive_the_way<Db: Home>(cx: Cx<Db>) {
    let events = [
        Envelope::new("a.b", "/x").with_time(None),
        Envelope::new("a.b", "/x").with_key("").with_payload(""),
        Envelope::new("a.b", "/x")
            .with_id(EventId::parse("not a uuid"))
            .with_key(eventbus::Key::new(vec![0u8, 255, 1]))
            .with_version(3)
            .with_subject("sé\"\\")
            .with_content_type("text/plain")
            .with_schema("urn:x")
            .with_extension("correlationid", "7")
            .with_extension("alpha", [0u8, 159])
            .with_header("tenant", "b")
            .with_header("tenant", "a")
            .with_header("raw", [0u8, 255, 10])
            .with_payload(vec![0u8; 70_000]),
    ];
    let mut tx = cx.outbox.begin().await.unwrap();
    events.iter().for_each(|event| tx.publish_envelope(&cx.topic, event.clone()).unwrap());
    tx.commit().await.unwrap();
    let store = cx.store().await;
    let leased = store.lease("test", Duration::from_secs(5)).await.unwrap();
    let shards = leased.shards.iter().map(|(shard, _)| *shard).collect();
    let mut found = store.claim(&outbox::Claim::new(shards, 100, 1 << 20)).await.unwrap();
    found.sort_by_key(|pending| pending.id);
    let found: Vec<_> = found.into_iter().map(|pending| pending.event.unwrap()).collect();
    assert_eq!(found, events.map(|event| (cx.topic.clone(), event)));
    store.close().await;
}

pub(crate) async fn a_transaction_of_ones_own_publishes<Db: Home>(cx: Cx<Db>) {
    let relay = cx.relay().await;
    let mut tx = cx.pool.begin().await.unwrap();
    let id = cx.outbox.publish(&mut tx, &cx.topic, &Placed { order_id: 1 }).await.unwrap();
    tx.commit().await.unwrap();
    cx.outbox.wake();
    cx.until("the event", |seen| seen.iter().any(|seen| seen.id == id.to_string())).await;
    let mut tx = cx.pool.begin().await.unwrap();
    let many = (0..1000).map(|n| (cx.topic.clone(), cx.event(&format!("k{}", n % 300), n)));
    assert!(cx.outbox.publish_all(&mut tx, many).await.unwrap().is_some());
    assert!(cx.outbox.publish_all(&mut tx, []).await.unwrap().is_none());
    tx.commit().await.unwrap();
    cx.until_empty().await;
    let firsts = cx.broker.firsts();
    assert!((0..300).all(|key| firsts[&format!("k{key}")].is_sorted()));
    relay.stop().await;
}

pub(crate) async fn what_is_too_large_is_refused_before_the_commit<Db: Home>(cx: Cx<Db>) {
    let options = Options::default().with_namespace(cx.namespace.clone()).with_max_event_bytes(1000);
    let outbox = Outbox::with_options(cx.pool.clone(), options);
    let mut tx = outbox.begin().await.unwrap();
    let error = tx.publish_envelope(&cx.topic, cx.event("a", 1).with_payload(vec![0; 1001])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    // The largest that is taken is taken by a broker of that bound, with what the relay adds.
    let fits = cx.event("a", 3).with_payload(vec![]);
    let fits = fits.clone().with_payload(vec![0; 1000 - 160 - fits.size_bytes()]);
    tx.publish_envelope(&cx.topic, fits.clone()).unwrap();
    let id = format!("{:032x}", u128::MAX);
    let marked = fits.with_extension("evt-source", id).with_extension("evt-seq", i64::MAX.to_string());
    assert!(marked.with_extension("evt-epoch", i64::MAX.to_string()).size_bytes() <= 1000);
    // The transaction goes on with what was taken.
    tx.publish_envelope(&cx.topic, cx.event("a", 2).with_payload(vec![0; 500])).unwrap();
    tx.commit().await.unwrap();
    assert_eq!(cx.n_stored().await, 2);
}

pub(crate) async fn too_many_keys_are_refused<Db: Home>(cx: Cx<Db>) {
    let mut tx = cx.outbox.begin().await.unwrap();
    (0..513).for_each(|n| tx.publish_envelope(&cx.topic, cx.event(&n.to_string(), n)).unwrap());
    assert_eq!(tx.commit().await.unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(cx.n_stored().await, 0);
    let mut tx = cx.outbox.begin().await.unwrap();
    (0..513).for_each(|n| tx.publish_envelope(&cx.topic, cx.event("", n).without_key()).unwrap());
    tx.commit().await.unwrap();
    assert_eq!(cx.n_stored().await, 513);
}

pub(crate) async fn tables_of_a_newer_version_are_refused<Db: Home>(cx: Cx<Db>) {
    for (version, kind) in [("99", ErrorKind::Conflict), ("0", ErrorKind::Corrupt), ("x", ErrorKind::Corrupt)]
    {
        cx.run(&format!("UPDATE EVTmeta SET value = '{version}' WHERE name = 'version'")).await;
        assert_eq!(cx.outbox.migrate().await.unwrap_err().kind(), kind);
        assert_eq!(Relay::new(&cx.outbox).start(&cx.bus).await.unwrap_err().kind(), kind);
    }
}

pub(crate) async fn tables_of_an_older_version_are_brought_up<Db: Home>(cx: Cx<Db>) {
    let name = Namespace::new(&format!("{}_b", cx.namespace)).unwrap();
    let tables = Db::FIRST_TABLES.replace("EXISTS evt;", &format!("EXISTS {name};"));
    cx.run(&tables.replace(&Db::tables(&Namespace::default()), &Db::tables(&name))).await;
    let outbox = Outbox::with_options(cx.pool.clone(), Options::default().with_namespace(name));
    // What an older program stored.
    let mut tx = outbox.begin().await.unwrap();
    tx.publish_envelope(&cx.topic, cx.event("a", 1)).unwrap();
    tx.commit().await.unwrap();
    let error = Relay::new(&outbox).start(&cx.bus).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains("migrate()"), "{error}");
    let (one, other) = tokio::join!(outbox.migrate(), outbox.migrate());
    one.and(other).unwrap();
    let relay = Relay::new(&outbox).start(&cx.bus).await.unwrap();
    cx.until("what was there", |seen| seen.len() == 1).await;
    relay.stop().await;
}

pub(crate) async fn missing_tables_are_told<Db: Home>(cx: Cx<Db>) {
    let options = Options::default().with_namespace(Namespace::new("nowhere").unwrap());
    let outbox = Outbox::with_options(cx.pool.clone(), options);
    let error = Relay::new(&outbox).start(&cx.bus).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("migrate()"), "{error}");
    let mut tx = outbox.begin().await.unwrap();
    tx.publish_envelope(&cx.topic, cx.event("a", 1)).unwrap();
    assert!(!tx.commit().await.unwrap_err().is_retryable());
}

pub(crate) async fn programs_that_start_together_migrate_once<Db: Home>(cx: Cx<Db>) {
    let name = format!("{}_n", cx.namespace);
    let options = Options::default().with_namespace(Namespace::new(&name).unwrap());
    let outbox = Outbox::with_options(cx.pool.clone(), options);
    let (a, b, c) = tokio::join!(outbox.migrate(), outbox.migrate(), outbox.migrate());
    a.and(b).and(c).unwrap();
}

pub(crate) async fn two_services_share_a_database<Db: Home>(cx: Cx<Db>) {
    let name = format!("{}_b", cx.namespace);
    let options = Options::default().with_namespace(Namespace::new(&name).unwrap());
    let other = Outbox::with_options(cx.pool.clone(), options);
    other.migrate().await.unwrap();
    cx.publish("a", 1).await;
    let mut tx = other.begin().await.unwrap();
    tx.publish_envelope(&Topic::new("other").unwrap(), cx.event("a", 2)).unwrap();
    tx.commit().await.unwrap();
    let relay = cx.relay().await;
    cx.until_empty().await;
    assert_eq!(cx.broker.firsts()["a"], [1]);
    let relay_of_other = Relay::new(&other).start(&cx.bus).await.unwrap();
    cx.until("both", |seen| seen.len() == 2).await;
    relay.stop().await;
    relay_of_other.stop().await;
}

pub(crate) async fn a_commit_can_be_asked_for<Db: Home>(cx: Cx<Db>) {
    let mut tx = cx.outbox.begin().await.unwrap();
    tx.publish_envelope(&cx.topic, cx.event("a", 1)).unwrap();
    let committed = tx.flush().await.unwrap().unwrap();
    tx.commit().await.unwrap();
    assert_eq!(cx.outbox.resolve(committed).await.unwrap(), Some(true));
    let mut tx = cx.outbox.begin().await.unwrap();
    tx.publish_envelope(&cx.topic, cx.event("a", 2)).unwrap();
    let undone = tx.flush().await.unwrap().unwrap();
    tx.rollback().await.unwrap();
    assert_ne!(cx.outbox.resolve(undone).await.unwrap(), Some(true));
}

/// What holds only of PostgreSQL: writers are not one after another.
pub(crate) mod postgres {
    use std::time::Duration;

    use eventbus::Event;
    use eventbus_tests::proxy::{Proxy, Wire};
    use outbox::{Options, Outbox};
    use sqlx::Postgres;

    use crate::home::Cx;

    /// Whoever publishes under a key waits for the transaction that did so before, and nobody else does.
    pub(crate) async fn a_key_is_held_until_the_commit(cx: Cx<Postgres>) {
        let mut first = cx.outbox.begin().await.unwrap();
        first.publish_envelope(&cx.topic, cx.event("a", 1)).unwrap();
        first.flush().await.unwrap();
        let mut other = cx.outbox.begin().await.unwrap();
        other.publish_envelope(&cx.topic, cx.event("b", 1)).unwrap();
        tokio::time::timeout(Duration::from_secs(5), other.commit()).await.unwrap().unwrap();
        let mut second = cx.outbox.begin().await.unwrap();
        second.publish_envelope(&cx.topic, cx.event("a", 2)).unwrap();
        let mut second = tokio::spawn(second.commit());
        let waits = tokio::time::timeout(Duration::from_millis(300), &mut second).await.is_err();
        assert!(waits, "the second passed the first");
        first.commit().await.unwrap();
        second.await.unwrap().unwrap();
    }

    /// A transaction that commits late, with a number below those that were published since: it is found at once, and not by
    /// the sweep of every ten seconds.
    pub(crate) async fn a_late_commit_is_published(cx: Cx<Postgres>) {
        for n in 0..80 {
            cx.publish(&format!("k{n}"), 0).await;
        }
        let sql = "SELECT min(encode(key, 'escape')), shard::bigint FROM EVToutbox GROUP BY shard HAVING count(*) > 1
            UNION ALL SELECT max(encode(key, 'escape')), shard::bigint FROM EVToutbox GROUP BY shard HAVING count(*) > 1 ORDER BY 2, 1";
        let mut connection = cx.pool.acquire().await.unwrap();
        let of_a_shard = <Postgres as crate::home::Home>::pairs(&mut connection, cx.sql(sql)).await;
        let of_a_shard: Vec<(String, i64)> = of_a_shard.unwrap();
        drop(connection);
        let [(late, shard), (early, same), ..] = &of_a_shard[..] else { panic!("no shard has two keys") };
        assert_eq!(shard, same);
        cx.run("DELETE FROM EVToutbox").await;
        let relay = cx.relay().await;
        let mut slow = cx.outbox.begin().await.unwrap();
        slow.publish_envelope(&cx.topic, cx.event(late, 1)).unwrap();
        slow.flush().await.unwrap();
        // Long enough for floors to move several times.
        for n in 0..100 {
            cx.publish(early, n).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cx.until("the others", |seen| seen.len() == 100).await;
        slow.commit().await.unwrap();
        let published = cx.until("the late one", |seen| seen.iter().any(|seen| seen.key == *late));
        tokio::time::timeout(Duration::from_secs(3), published).await.unwrap();
        relay.stop().await;
    }

    /// A commit that is not flushed could vanish after its event was published.
    pub(crate) async fn an_asynchronous_commit_is_made_one_that_waits(cx: Cx<Postgres>) {
        for (before, after) in [("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")] {
            let mut tx = cx.outbox.begin().await.unwrap();
            let set = format!("SET LOCAL synchronous_commit = {before}");
            sqlx::raw_sql(sqlx::AssertSqlSafe(set)).execute(&mut *tx).await.unwrap();
            tx.publish_envelope(&cx.topic, cx.event("a", 1)).unwrap();
            tx.flush().await.unwrap();
            let now: String =
                sqlx::query_scalar("SHOW synchronous_commit").fetch_one(&mut *tx).await.unwrap();
            assert_eq!(now, after);
            tx.rollback().await.unwrap();
        }
        // One that publishes nothing may acknowledge an event. What holds at its commit is noted by what runs in there.
        cx.run(
            "CREATE TABLE written (n bigint); CREATE TABLE noted (level text);
            CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
              $$ BEGIN INSERT INTO noted VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$;
            CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON written DEFERRABLE INITIALLY DEFERRED
              FOR EACH ROW EXECUTE FUNCTION note()",
        )
        .await;
        for (before, after) in [("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")] {
            let options = (*cx.pool.connect_options()).clone().options([("synchronous_commit", before)]);
            let outbox = outbox::Outbox::new(sqlx::PgPool::connect_with(options).await.unwrap());
            let mut tx = outbox.begin().await.unwrap();
            sqlx::raw_sql("INSERT INTO written VALUES (1)").execute(&mut *tx).await.unwrap();
            tx.commit().await.unwrap();
            let noted: String =
                sqlx::query_scalar("DELETE FROM noted RETURNING level").fetch_one(&cx.pool).await.unwrap();
            assert_eq!(noted, after);
        }
    }

    #[derive(Event, serde::Serialize, serde::Deserialize)]
    #[event(type = "test.checked", version = 1, key = n)]
    struct Checked {
        n: i64,
    }

    /// A constraint that is checked at the commit undoes the event as well.
    pub(crate) async fn a_commit_that_is_refused_publishes_nothing(cx: Cx<Postgres>) {
        cx.run("CREATE TABLE p (id bigint PRIMARY KEY); CREATE TABLE c (p bigint REFERENCES p DEFERRABLE INITIALLY DEFERRED)").await;
        let mut tx = cx.outbox.begin().await.unwrap();
        sqlx::query("INSERT INTO c VALUES (1)").execute(&mut *tx).await.unwrap();
        tx.publish(&cx.topic, &Checked { n: 1 }).unwrap();
        let error = tx.commit().await.unwrap_err();
        assert!(!error.is_retryable() && !error.is_unknown(), "{error}");
        assert_eq!(cx.n_stored().await, 0);
    }

    /// The commit is done and its answer is lost: that is found out as well.
    pub(crate) async fn a_commit_whose_answer_is_lost_is_found_out(cx: Cx<Postgres>) {
        let url = xtask::brokers::url(xtask::brokers::Kind::Postgres).unwrap();
        let connect: sqlx::postgres::PgConnectOptions = url.parse().unwrap();
        let wire = Proxy::start().unwrap();
        wire.lead(connect.get_port());
        let connect = connect.port(wire.port()).options([("search_path", cx.namespace.as_str())]);
        let pool = sqlx::postgres::PgPoolOptions::new().connect_with(connect).await.unwrap();
        let options = Options::default().with_namespace(cx.namespace.clone());
        let behind = Outbox::with_options(pool, options);
        // A commit that takes its time, so that the wire fails in the middle of it.
        cx.run("CREATE TABLE slow (x bigint);
            CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(1); RETURN NULL; END';
            CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()")
            .await;
        let mut tx = behind.begin().await.unwrap();
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
        sqlx::query("INSERT INTO slow VALUES (1)").execute(&mut *tx).await.unwrap();
        tx.publish_envelope(&cx.topic, cx.event("a", 1)).unwrap();
        let ticket = tx.flush().await.unwrap().unwrap();
        let commit = tokio::spawn(tx.commit());
        let until = async |sql: &str| {
            let waiting = async {
                while cx.number(sql).await == 0 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(crate::home::SOON, waiting).await.unwrap();
        };
        until(&format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND query = 'COMMIT'")).await;
        wire.set(Wire::DropAnswers);
        until("SELECT count(*) FROM EVToutbox").await;
        assert_eq!(cx.outbox.resolve(ticket).await.unwrap(), Some(true));
        assert!(!commit.is_finished());
        wire.set(Wire::Whole);
        wire.reset();
        commit.await.unwrap().unwrap();
        assert_eq!(cx.n_stored().await, 1);
    }

    /// The connection ends while it commits: whether it is committed is found out, and not guessed.
    pub(crate) async fn a_lost_connection_is_found_out(cx: Cx<Postgres>) {
        let mut tx = cx.outbox.begin().await.unwrap();
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
        tx.publish_envelope(&cx.topic, cx.event("a", 1)).unwrap();
        let ticket = tx.flush().await.unwrap().unwrap();
        sqlx::query("SELECT pg_terminate_backend($1)").bind(pid).execute(&cx.pool).await.unwrap();
        let error = tx.commit().await.unwrap_err();
        // It was not committed, and that is known.
        assert!(error.is_retryable() && !error.is_unknown(), "{error}");
        assert_eq!(cx.outbox.resolve(ticket).await.unwrap(), Some(false));
        assert_eq!(cx.n_stored().await, 0);
    }

    /// A server that crashed gives the number of a transaction that it lost to another one: what becomes of that is not what
    /// became of ours.
    pub(crate) async fn a_number_that_is_given_out_again_says_nothing(_: Cx<Postgres>) {
        let mut server = xtask::brokers::Broker::start(xtask::brokers::Kind::Postgres, None).unwrap();
        let pool = sqlx::PgPool::connect(server.url()).await.unwrap();
        let outbox = outbox::Outbox::new(pool.clone());
        outbox.migrate().await.unwrap();
        sqlx::raw_sql("CREATE TABLE other (n bigint); CHECKPOINT").execute(&pool).await.unwrap();
        let topic = eventbus::Topic::new("orders").unwrap();
        let mut n_again = 0;
        for _ in 0..3 {
            let mut tx = outbox.begin().await.unwrap();
            tx.publish(&topic, &Checked { n: 1 }).unwrap();
            let ticket = tx.flush().await.unwrap().unwrap();
            let id = format!("{ticket:?}")
                .split(|sign: char| !sign.is_ascii_digit())
                .find(|text| !text.is_empty())
                .unwrap()
                .to_owned();
            server.restart().unwrap();
            assert!(tx.commit().await.is_err());
            let mut given = String::new();
            while given.parse::<u64>().unwrap_or(0) < id.parse().unwrap() {
                let insert = "INSERT INTO other VALUES (1) RETURNING pg_current_xact_id()::text";
                given = match sqlx::query_scalar(insert).fetch_one(&pool).await {
                    Ok(given) => given,
                    // Connections of before the crash.
                    Err(_) => continue,
                };
                n_again += u32::from(given == id);
            }
            let fate = outbox.resolve(ticket).await.unwrap();
            assert_ne!(fate, Some(true), "the transaction {id} was lost with the server");
        }
        assert!(n_again > 0, "no number was given out again: this machine is too slow for the case");
    }

    /// The numbers of events go back as well, below what a relay takes for the lowest that is to come.
    pub(crate) async fn a_floor_of_before_a_crash_is_none(cx: Cx<Postgres>) {
        let mut server = xtask::brokers::Broker::start(xtask::brokers::Kind::Postgres, None).unwrap();
        let pool = sqlx::PgPool::connect(server.url()).await.unwrap();
        let outbox = outbox::Outbox::new(pool.clone());
        outbox.migrate().await.unwrap();
        let relay = outbox::Relay::new(&outbox).start(&cx.bus).await.unwrap();
        let number = async |number: i64| {
            let set = sqlx::query("SELECT setval('evt.outbox_id_seq', $1)").bind(number);
            set.execute(&pool).await.unwrap();
        };
        let publish = async |key: &str, n: i64| {
            let mut tx = outbox.begin().await.unwrap();
            tx.publish_envelope(&cx.topic, cx.event(key, n)).unwrap();
            tx.commit().await.unwrap();
        };
        number(1_000).await;
        // Long enough for floors to move beyond.
        for n in 0..60 {
            publish("a", n).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        cx.until("the first", |seen| seen.len() == 60).await;
        server.restart().unwrap();
        while sqlx::query("SELECT 1").execute(&pool).await.is_err() {}
        number(500).await;
        publish("b", 0).await;
        number(2_000).await;
        publish("b", 1).await;
        let mut order = Vec::new();
        cx.until("what comes after the crash", |seen| {
            order = seen.iter().filter(|seen| seen.key == "b").map(|seen| seen.n).collect();
            order.len() == 2
        })
        .await;
        assert_eq!(order, [0, 1]);
        relay.stop().await;
    }
}
