//! Outbox, relay and inbox on each database, with a broker that does what it is told.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test reports by panicking")]

mod append;
mod batches;
mod crowd;
mod direct;
mod doorbell;
mod faults;
mod handlers;
mod home;
mod intents;
mod mutants;
mod operators;
mod relays;
mod strains;
mod suite;
mod writer;

/// The cases of one database.
macro_rules! on_one {
    ($name:ident: $database:ty, $from:path: $($case:ident)*) => {
        mod $name {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    use $from as cases;
                    cases::$case(crate::home::Cx::<$database>::open().await).await;
                }
            )*
        }
    };
}

on_one! {
    postgres_only: sqlx::Postgres, crate::append::postgres:
        a_key_is_held_until_the_commit
        a_late_commit_is_published
        an_asynchronous_commit_is_made_one_that_waits
        a_commit_that_is_refused_publishes_nothing
        a_lost_connection_is_found_out
        a_commit_whose_answer_is_lost_is_found_out
        a_number_that_is_given_out_again_says_nothing
        a_floor_of_before_a_crash_is_none
}

on_one! {
    postgres_handlers: sqlx::Postgres, crate::handlers::postgres:
        a_service_starts_while_its_database_is_away
}

on_one! {
    postgres_strains: sqlx::Postgres, crate::strains:
        a_snapshot_that_is_held_costs_a_relay_nothing
}

on_one! {
    postgres_doorbell: sqlx::Postgres, crate::doorbell:
        a_commit_by_itself_tells_nobody
        a_commit_elsewhere_is_heard
        many_commits_ring_once
}

on_one! {
    sqlite_only: sqlx::Sqlite, crate::writer:
        commits_are_shared
        neighbours_go_their_own_ways
        who_goes_away_leaves_nobody_behind
        a_commit_that_fails_is_told_to_the_one
        a_transaction_ended_by_hand_is_nobodys
        a_connection_that_does_not_sync_is_refused
        one_inside_that_does_not_begin_leaves_nothing_open
        what_was_read_before_a_rollback_is_true
}

on_one! {
    sqlite_direct: sqlx::Sqlite, crate::direct:
        what_is_committed_is_in_its_topic
        what_is_rolled_back_leaves_no_hole
        what_waits_in_the_outbox_goes_first
        a_bus_elsewhere_is_left_to_relays
        a_topic_that_is_made_anew_is_noticed
        a_bus_without_room_is_waited_for
        what_is_too_large_for_the_bus_is_refused
        a_published_commit_can_be_asked_for
        handlers_publish_into_their_bus
        writers_of_both_kinds_keep_the_order
        writers_that_see_nothing_of_the_outbox_are_found
}

/// The cases of each database.
macro_rules! on_each {
    ($($module:ident: $($case:ident)*;)*) => {
        mod sqlite {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    crate::$module::$case(crate::home::Cx::<sqlx::Sqlite>::open().await).await;
                }
            )*)*
        }
        mod postgres {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    crate::$module::$case(crate::home::Cx::<sqlx::Postgres>::open().await).await;
                }
            )*)*
        }
    };
}

on_each! {
    append:
        what_is_committed_is_published
        what_is_rolled_back_is_not
        events_survive_the_way
        a_transaction_of_ones_own_publishes
        what_is_too_large_is_refused_before_the_commit
        too_many_keys_are_refused
        tables_of_a_newer_version_are_refused
        tables_of_an_older_version_are_brought_up
        missing_tables_are_told
        programs_that_start_together_migrate_once
        two_services_share_a_database
        a_commit_can_be_asked_for;
    relays:
        an_event_is_removed_when_it_is_confirmed
        a_lost_answer_is_repeated_under_the_same_id
        a_blocked_key_holds_back_nobody_else
        what_can_never_be_published_is_parked
        a_row_that_is_no_event_is_told
        an_outage_ends_with_everything_published
        a_key_that_fails_is_tried_less_and_less
        a_long_key_does_not_starve_the_others
        a_transport_that_panics_stops_no_key
        a_relay_stops_though_its_database_is_gone
        relays_share_the_work
        patience_begins_anew_with_each_event
        a_relay_that_dies_is_replaced
        a_relay_that_lost_its_lease_changes_nothing
        a_note_that_comes_late_blocks_nothing
        a_relay_that_stops_leaves_nothing_behind
        numbers_ascend_along_each_key
        the_identity_stays;
    handlers:
        an_event_is_handled_once
        a_run_that_fails_leaves_nothing
        a_run_that_panics_leaves_nothing
        a_run_out_of_time_leaves_nothing
        what_is_returned_goes_through_the_outbox
        a_transaction_that_is_kept_fails_the_run
        a_statement_that_failed_is_not_passed_over
        numbers_of_two_topics_are_two_sequences
        services_of_one_name_share_what_they_remember
        what_is_too_old_to_be_known_is_dead_lettered
        what_is_remembered_is_seen_and_forgotten
        repetitions_behind_later_events_change_nothing
        another_generation_runs_again
        a_memory_of_another_kind_is_refused
        what_a_handler_lacks_is_told_at_the_start
        what_is_too_old_is_forgotten;
    batches:
        a_batch_is_handled_once
        one_that_fails_undoes_its_batch
        a_batch_that_panics_leaves_nothing
        what_does_not_fit_a_batch_runs_alone;
    intents:
        a_call_that_ended_is_not_repeated
        a_call_that_fails_is_repeated_with_its_key
        a_call_whose_member_is_gone_is_repeated
        the_result_of_a_call_is_written_once
        what_no_call_can_be_made_for_is_dead_lettered
        calls_that_never_ended_are_forgotten_with_their_events;
    operators:
        operators_see_what_waits
        operators_free_what_is_stuck
        operators_give_up_what_nobody_wants;
    faults:
        a_relay_without_rights_loses_nothing
        connections_that_are_all_taken_are_told;
    strains:
        a_clock_that_jumps_stops_nothing
        a_name_that_is_given_up_is_another_one;
    crowd:
        nothing_is_lost_or_invented_or_overtaken
        writers_of_the_same_keys_do_not_lock_each_other;
}
