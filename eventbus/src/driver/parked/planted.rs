//! Bugs that tests plant, to prove that they would be found. Outside of unit tests there are none.

/// A way to get parking wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "planted by tests only"))]
pub(in crate::driver) enum Bug {
    RunsFollowerInLane,
    ForgetsParkedOnTakeover,
    ParksTwice,
    SettlesBeforePark,
    FreesKeyEarly,
    CountsAfterRun,
    NoCaution,
    LogOrder,
    SweepsBlind,
    SweepMovesFirst,
    SweepReorders,
    SweepForgetsAttempts,
    RedriveHeadOnly,
    DropsOverBound,
    EpochIgnored,
    ParksEverything,
    TrustsFirstMark,
}

#[cfg(test)]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug for everything that runs on this thread.
#[cfg(test)]
pub(in crate::driver) fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

#[cfg(test)]
pub(in crate::driver) fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

#[cfg(not(test))]
pub(in crate::driver) const fn planted(_: Bug) -> bool {
    false
}
