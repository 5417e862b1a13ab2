//! Every transport of this workspace against the one list of cases.

use eventbus_tests::subjects::{self, Strength};

eventbus::conformance!(memory, subjects::memory(Strength::Default));
eventbus::conformance!(memory_strong, subjects::memory(Strength::Strong));
eventbus::conformance!(memory_total, subjects::memory(Strength::Total));
eventbus::conformance!(sqlite, subjects::sqlite(16, env!("CARGO_BIN_EXE_child"), "sound"));
eventbus::conformance!(folder, subjects::folder());

/// A case that is skipped is named here with its hook; a new skip fails.
#[test]
fn skips_are_the_expected_ones() {
    use eventbus::conformance::{CASES, Subject};
    let skipped = |subject: Subject| -> Vec<&str> {
        CASES
            .iter()
            .filter(|case| case.hooks.iter().any(|hook| !subject.has(*hook)))
            .map(|case| case.id)
            .collect()
    };
    // An in-process transport has no wire to cut, no other process, no disk to fill.
    assert_eq!(skipped(subjects::memory(Strength::Strong)), ["P18", "D1", "D4", "D6", "D8", "D9", "D12"]);
    // A file is bounded by its disk, not by what is unsettled, and has no wire.
    assert_eq!(
        skipped(subjects::sqlite(16, env!("CARGO_BIN_EXE_child"), "sound")),
        ["P9", "P14", "P18", "P21"]
    );
    assert_eq!(
        skipped(subjects::folder()),
        ["P9", "P14", "P18", "P21", "C23", "D1", "D2", "D3", "D4", "D6", "D8", "D9", "D11", "D12"]
    );
}
