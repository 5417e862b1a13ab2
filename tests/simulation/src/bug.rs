//! Designs that were refused, and mistakes that are easily made: the account must find each.

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    None,
    /// Relays read behind the highest number they saw.
    NumberCursor,
    /// Relays take rows that nobody else has taken, whoever has earlier ones of the key.
    SkipsLocked,
    /// Relays remove everything up to the highest number that was published.
    RemovesRanges,
    /// Of a key that is blocked only the first event waits.
    BlocksOneEvent,
    /// A key is noted as blocked by an event that is gone.
    BlocksWhatIsGone,
    /// A publish without an answer counts as done.
    LostConfirm,
    /// An event that is published again has another id.
    NewId,
    /// What is delivered is settled before it is handled.
    AckEarly,
    /// Consumers do not remember what they handled.
    NoInbox,
    /// What was handled is noted in a transaction of its own, before the effect.
    InboxApart,
    /// Events are published when their transaction is over.
    AfterCommit,
    /// Events are published before their transaction is over.
    BeforeCommit,
    /// Writers number events of a key without holding the key.
    NoKeyLocks,
}

impl Bug {
    /// All, with their names and what the account calls what they do.
    pub(crate) const ALL: [(&'static str, Self, &'static str); 13] = [
        ("number-cursor", Self::NumberCursor, "loss"),
        ("skips-locked", Self::SkipsLocked, "order"),
        ("removes-ranges", Self::RemovesRanges, "loss"),
        ("blocks-one-event", Self::BlocksOneEvent, "order"),
        ("blocks-what-is-gone", Self::BlocksWhatIsGone, "stale"),
        ("lost-confirm", Self::LostConfirm, "loss"),
        ("new-id", Self::NewId, "twice"),
        ("ack-early", Self::AckEarly, "loss"),
        ("no-inbox", Self::NoInbox, "twice"),
        ("inbox-apart", Self::InboxApart, "loss"),
        ("after-commit", Self::AfterCommit, "loss"),
        ("before-commit", Self::BeforeCommit, "ghost"),
        ("no-key-locks", Self::NoKeyLocks, "order"),
    ];

    pub(crate) fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, ..)| *known == name).map(|(_, bug, _)| *bug)
    }
}
