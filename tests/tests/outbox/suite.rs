//! The suite of stores, over both databases and over a store of somebody else; and what its cases are worth.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use eventbus::{Envelope, Result, Topic};
use eventbus_tests::shelf::{Flaw, Shelf};
use outbox::conformance::{CASES, Outcome, Subject, Writing, run};
use outbox::{Store, Transaction};

use crate::home::{Cx, Home};

struct On<Db: Home>(Cx<Db>);

struct Writes<Db: Home>(Transaction<Db>);

#[async_trait]
impl<Db: Home> Subject for On<Db> {
    async fn store(&self) -> Result<Arc<dyn Store>> {
        self.0.outbox.store().await
    }

    async fn begin(&self) -> Result<Box<dyn Writing>> {
        Ok(Box::new(Writes(self.0.outbox.begin().await?)))
    }

    fn writes_in_turn(&self) -> bool {
        Db::WRITES_IN_TURN
    }
}

#[async_trait]
impl<Db: Home> Writing for Writes<Db> {
    async fn append(&mut self, topic: &Topic, event: Envelope) -> Result<()> {
        self.0.publish_envelope(topic, event)?;
        self.0.flush().await.map(drop)
    }

    async fn commit(self: Box<Self>) -> Result<()> {
        self.0.commit().await
    }

    async fn rollback(self: Box<Self>) -> Result<()> {
        self.0.rollback().await
    }
}

outbox::conformance!(postgres, async { On(Cx::<sqlx::Postgres>::open().await) });
outbox::conformance!(sqlite, async { On(Cx::<sqlx::Sqlite>::open().await) });
outbox::conformance!(shelf, async { Shelf::new(Flaw::None) });

/// What may be wrong, and which case finds it.
const FOUND: &[(Flaw, &str)] = &[
    (Flaw::LosesHeaders, "gives_every_byte_back"),
    (Flaw::ShowsWhatIsOpen, "gives_what_is_committed_and_nothing_else"),
    (Flaw::KeepsWhatIsUndone, "gives_what_is_committed_and_nothing_else"),
    (Flaw::ReadsBehindACursor, "gives_what_commits_late"),
    (Flaw::SkipsWhatDoesNotFit, "gives_the_events_of_a_key_in_their_order"),
    (Flaw::Shuffles, "gives_the_events_of_a_key_in_their_order"),
    (Flaw::ForgetsWhatIsHeld, "gives_no_more_than_is_asked_for"),
    (Flaw::ForgetsWhatIsFull, "gives_no_more_than_is_asked_for"),
    (Flaw::KnowsNoTopics, "gives_no_more_than_is_asked_for"),
    (Flaw::KnowsNoShards, "gives_no_more_than_is_asked_for"),
    (Flaw::GivesNumbersAgain, "numbers_ascend_and_are_given_out_once"),
    (Flaw::HoldsNoKeys, "holds_a_key_until_the_commit"),
    (Flaw::HasManyNames, "keeps_its_name"),
    (Flaw::SharesNothing, "shares_what_nobody_owns"),
    (Flaw::RenewsNothing, "renews_what_is_owned"),
    (Flaw::CountsEpochsAlways, "renews_what_is_owned"),
    (Flaw::LeasesForEver, "takes_over_when_a_lease_is_over"),
    (Flaw::KeepsEpochs, "takes_over_when_a_lease_is_over"),
    (Flaw::KeepsWhatIsReleased, "gives_free_what_is_released"),
    (Flaw::ReleasesForOthers, "gives_free_what_is_released"),
    (Flaw::KnowsNoOwner, "heeds_no_one_who_is_replaced"),
    (Flaw::KnowsNoEpoch, "heeds_no_one_who_is_replaced"),
    (Flaw::RemovesRanges, "removes_what_is_named"),
    (Flaw::RemovesByNumber, "removes_what_is_named"),
    (Flaw::KnowsNoBlocks, "keeps_a_blocked_key_back"),
    (Flaw::BlocksOneEvent, "keeps_a_blocked_key_back"),
    (Flaw::CountsForTheKey, "keeps_a_blocked_key_back"),
    (Flaw::KeepsBlocks, "frees_a_key_with_its_event"),
    (Flaw::BlocksWhatIsGone, "blocks_nothing_for_what_is_gone"),
    (Flaw::UnblocksAll, "makes_due_what_may_pass"),
    (Flaw::UnblocksNothing, "makes_due_what_may_pass"),
    (Flaw::ParksKeys, "sets_aside_what_is_parked"),
    (Flaw::ParksNothing, "sets_aside_what_is_parked"),
    (Flaw::SkipsWhatIsTaken, "loses_and_overtakes_nothing"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_flaw_is_found_by_its_case() {
    // Relays that race may come off well, though not every time.
    let found = async |name: &str, flaw: Flaw| -> Outcome {
        let case = CASES.iter().find(|case| case.name == name).unwrap();
        for _ in 0..10 {
            run(case, Shelf::new(flaw)).await?;
        }
        Ok(())
    };
    let all = FOUND.iter().map(async |(flaw, name)| (flaw, name, found(name, *flaw).await));
    for (flaw, name, outcome) in futures_util::future::join_all(all).await {
        match outcome {
            Ok(()) => panic!("{name} does not find {flaw:?}"),
            Err(violation) => println!("{flaw:?}: {violation}"),
        }
    }
    let finding: BTreeSet<&str> = FOUND.iter().map(|(_, name)| *name).collect();
    let idle: Vec<_> = CASES.iter().filter(|case| !finding.contains(case.name)).collect();
    assert!(idle.is_empty(), "nothing shows what these are worth: {idle:?}");
}
