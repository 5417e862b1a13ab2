//! The one list of cases.

use std::future::Future;
use std::pin::Pin;

use super::check::Violation;
use super::cx::Cx;
use super::{durability, groups, kill, lease, order, power, publish, replay, retry, settle, surface};

/// What a subject must let the suite do for a case to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Hook {
    /// Put bytes into a topic past our encoder.
    Raw,
    /// State after how many unsettled events publishing waits.
    Bound,
    /// Drop what travels back to the publisher.
    Cut,
    /// Kill the processes that use the store and start again.
    Restart,
    /// Make the store full, and give the room back.
    Fill,
    /// Run a publisher or consumer as a child process and kill it.
    Kill,
    /// Rebuild the store as power loss would leave it, and make syncs fail.
    Power,
    /// Move the wall clock.
    Clock,
}

/// A case as a function.
pub type Run = fn(Cx) -> Pin<Box<dyn Future<Output = Result<(), Violation>> + Send>>;

/// One entry of the table.
pub struct Case {
    /// Its id, such as `P1`.
    pub id: &'static str,
    /// Its name, which states the fact it proves.
    pub name: &'static str,
    /// The hooks it needs.
    pub hooks: &'static [Hook],
    /// The case itself.
    pub run: Run,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.id, self.name)
    }
}

/// The list: id, name, hooks. The module is named by the first letter of the id.
#[doc(hidden)]
#[macro_export]
macro_rules! __conformance_list {
    (tests $args:tt) => { $crate::__conformance_list! { @all ($crate::__conformance_tests) $args } };
    (table $args:tt) => { $crate::__conformance_list! { @all (table) $args } };
    (@all ($($callback:tt)+) $args:tt) => {
        $($callback)+! { $args
            P1 reads_back_every_byte []
            P2 keeps_headers_exactly []
            P3 carries_payloads_of_every_size []
            P4 refuses_oversize_before_io []
            P5 carries_an_absent_payload []
            P6 ok_means_stored []
            P7 receipts_match_call_order []
            P8 dropped_confirm_still_delivers []
            P9 cancelled_enqueue_publishes_nothing [Bound]
            P10 batch_failure_is_per_event []
            P11 publish_after_close_is_an_error []
            P12 unroutable_is_an_error []
            P13 concurrent_publishers_lose_nothing []
            P14 publish_waits_when_full [Bound]
            P15 flush_waits_for_everything []
            P16 stores_one_id_once []
            P17 equal_payloads_are_two_events []
            P18 lost_ack_is_unknown [Cut]
            P19 hostile_names_stay_apart []
            P20 reserved_headers_cannot_be_spoofed []
            P21 close_wakes_a_waiting_publish [Bound]
            S1 two_groups_each_get_everything []
            S2 members_share_the_work []
            S3 group_position_survives_reopen []
            S4 membership_churn_loses_nothing []
            S5 leaver_hands_over_unsettled []
            S6 topics_do_not_cross []
            S7 start_position_is_honoured []
            S8 subscribe_returns_ready []
            S9 missing_topic_is_typed []
            S10 unsupported_is_refused_at_subscribe []
            S11 history_then_tail_once []
            S12 dropped_subscribe_leaves_no_member []
            S13 broadcast_reaches_every_instance []
            C1 poll_never_exceeds_max []
            C2 dropped_consumer_loses_nothing []
            C3 settled_is_not_redelivered []
            C4 cancelled_poll_strands_nothing []
            C5 settle_is_idempotent []
            C6 settle_runs_beside_a_pending_poll []
            C7 out_of_order_settles_keep_gaps []
            C8 retry_repeats_id_and_counts []
            C9 retry_after_waits []
            C10 reject_ends_it_for_this_group []
            C11 retry_of_one_leaves_the_batch []
            C12 ack_of_one_is_not_ack_of_the_batch []
            C13 first_failures_are_not_lost []
            C14 survives_many_failures []
            C15 expired_lease_redelivers []
            C16 renewed_lease_holds []
            C17 old_token_never_hits_a_new_delivery []
            C18 settle_after_close_is_an_error []
            C19 in_flight_is_bounded []
            C20 close_ends_poll_and_is_idempotent []
            C21 concurrent_close_is_clean []
            C22 reopen_rounds_lose_nothing []
            C23 garbage_is_a_delivery [Raw]
            C24 deleted_topic_is_an_error []
            C26 returned_is_not_an_attempt []
            O1 per_key_order []
            O2 per_topic_order []
            O3 retry_comes_before_later_events_of_its_key []
            O4 order_survives_churn []
            O5 a_key_has_one_owner []
            O6 order_member_limit_is_true []
            O7 same_key_same_partition []
            R1 replay_start_is_exact []
            R2 replay_leaves_live_groups_alone []
            R3 removed_history_is_data_loss []
            R4 a_short_read_is_the_end []
            D1 confirmed_survives_kill [Kill]
            D2 confirmed_survives_restart [Restart]
            D3 consumer_resumes_after_restart [Restart]
            D4 killed_consumer_loses_nothing [Kill]
            D6 full_store_refuses_before_ack [Fill]
            D8 power_loss_keeps_confirmed [Power]
            D9 failed_sync_poisons [Power Restart]
            D10 second_owner_is_refused_or_shares []
            D11 clock_jumps_are_harmless [Clock]
            D12 corruption_is_loud [Power Restart]
            A1 lag_counts_down []
            A2 capabilities_are_constant []
            A3 secrets_never_print []
            A4 close_leaves_nothing_behind []
            A5 types_hold_the_seam []
            A6 what_is_kept_is_told []
        }
    };
}

macro_rules! module_of {
    ($name:ident) => {
        __case_modules::$name
    };
}

macro_rules! table {
    ([] $($id:ident $name:ident [$($hook:ident)*])*) => {
        /// Every case, in the order of the list.
        pub const CASES: &[Case] = &[$(Case {
            id: stringify!($id),
            name: stringify!($name),
            hooks: &[$(Hook::$hook),*],
            run: |cx| Box::pin(module_of!($name)(cx)),
        }),*];
    };
}

/// The sections of the list, in one namespace.
mod __case_modules {
    pub(super) use super::durability::*;
    pub(super) use super::groups::*;
    pub(super) use super::kill::*;
    pub(super) use super::lease::*;
    pub(super) use super::order::*;
    pub(super) use super::power::*;
    pub(super) use super::publish::*;
    pub(super) use super::replay::*;
    pub(super) use super::retry::*;
    pub(super) use super::settle::*;
    pub(super) use super::surface::*;
}

crate::__conformance_list! { table [] }
